"""What is measured: shapes of linear layers and, for each, the cases of ours. The baselines follow the same shapes."""

from __future__ import annotations

from dataclasses import asdict, dataclass

MS = (1, 4, 8, 16, 32, 128)
BITS = (8, 4, 3, 2)
FORMS = ("int8", "float")
OUTLIERS = 0.005  # share of weights kept as FP16 in the outlier cases


@dataclass(frozen=True)
class Shape:
    """A weight [n, k] whose codes share a scale along `group` columns."""

    n: int
    k: int
    group: int

    def __str__(self) -> str:
        return f"{self.n}x{self.k}"


# Linear layers of a 7B model, and of SmolLM2-135M, whose 576 columns are no multiple of 128.
LINEAR = (
    Shape(4096, 4096, 128),
    Shape(11008, 4096, 128),
    Shape(4096, 11008, 128),
    Shape(1536, 576, 64),
    Shape(576, 1536, 64),
)
LINEAR_QUICK = (LINEAR[0], LINEAR[3])
MS_QUICK = (1, 8, 32)
MS_WARM = (1,)  # where a warm figure is printed beside the cold one
MS_AVX2 = (1, 8, 32)  # where the AVX2 tier is reported on a machine that has more


@dataclass(frozen=True)
class Case:
    """One row of ours: wq_linear with m rows of x."""

    shape: Shape
    m: int
    bits: int
    compute: str  # "int8" | "float"
    outliers: float = 0.0
    multi: bool = False  # one wq_multi_linear call over all copies, as the baselines that run one graph

    @property
    def dtype(self) -> str:
        """Type of x: the int8 form is fed fp32 as its competitors are, the float form bf16 as torch's int4 op is."""
        return "float32" if self.compute == "int8" else "bfloat16"

    def label(self) -> str:
        """The `case` of its row."""
        extra = [", 0.5% outliers"] * bool(self.outliers) + [", one call over all copies"] * self.multi
        return self.compute + "".join(extra)

    def keys(self) -> dict[str, float]:
        """The `shape` of its row."""
        return {
            "M": self.m,
            "N": self.shape.n,
            "K": self.shape.k,
            "bits": self.bits,
            "group": self.shape.group,
            "outliers": self.outliers,
        }


def cases(shape: Shape, m: int, bits: tuple[int, ...] = BITS, forms: tuple[str, ...] = FORMS) -> list[Case]:
    """The cases of one shape and batch: every width at M = 1, 8 and 32; four bits, the common one, at every M.

    Outliers and the call over all copies only where they say something: with few rows, at four and three bits.
    """
    out = [Case(shape, m, b, "int8") for b in bits if "int8" in forms and (b == 4 or m in MS_QUICK)]
    out += [Case(shape, m, b, "float") for b in bits if "float" in forms and (b == 4 or m == 1)]
    if m == 1 and "int8" in forms:
        out += [Case(shape, m, b, "int8", outliers=OUTLIERS) for b in bits if b in (4, 3)]
        out += [Case(shape, m, b, "int8", multi=True) for b in bits]
    return out


def as_dict(case: Case) -> dict:
    """A plain dict, for parametrised tests."""
    return asdict(case)
