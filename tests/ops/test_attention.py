"""attention against float64: head sizes, groups, ragged runs, windows, partial rotary, blocks, threads, batches, bad arguments."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from effk.ops import attention as at

OP = torch.ops.effk.attention
EPS = 2.0**-24
STORE = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
Runs = list[tuple[int, int, int]]  # slot, start, count


def angles(positions: int, half: int) -> tuple[Tensor | None, Tensor | None]:
    """Tables of a rotary embedding of ``half`` pairs, or none."""
    if not half:
        return None, None
    at_each = torch.arange(positions)[:, None] * 10.0 ** (-torch.arange(half) * 4.0 / half)
    return at_each.cos(), at_each.sin()


def spoiled(slots: int, kv_heads: int, capacity: int, d: int, dtype: str) -> at.Cache:
    """A cache full of NaN, where its type has them: what was not written must not matter."""
    cache = at.cache(slots, kv_heads, capacity, d, dtype)
    for t in cache:
        if t is not None:
            t.view(torch.uint8).fill_(255)
    return cache


class Case:
    """A layer of heads and kv heads of size d, and its cache."""

    def __init__(self, heads: int, kv_heads: int, d: int, dtype: str = "fp16", slots: int = 2, capacity: int = 400,
                 half: int = 8, window: int = 0) -> None:  # fmt: skip
        self.shape, self.dtype, self.window, self.scale = (heads, kv_heads, d), dtype, window, d**-0.5
        self.cache = spoiled(slots, kv_heads, capacity, d, dtype)
        self.cosine, self.sine = angles(capacity, half)

    def tokens(self, count: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
        heads, kv_heads, d = self.shape
        return tuple(torch.randn(count, n, d).to(dtype) for n in (heads, kv_heads, kv_heads))

    def run(self, qkv: tuple[Tensor, Tensor, Tensor], runs: Runs, cache: at.Cache | None = None) -> Tensor:
        table = torch.tensor(runs, dtype=torch.int32).reshape(-1, 3)
        return OP(*qkv, *(cache or self.cache), table, self.cosine, self.sine, self.scale, self.window)

    def check(self, qkv: tuple[Tensor, Tensor, Tensor], runs: Runs) -> Tensor:
        """Runs, and compares what was stored and what came out with float64."""
        q, k, v = qkv
        got = self.run(qkv, runs)
        assert got.dtype == q.dtype and got.shape == q.shape
        row = 0
        for slot, start, count in runs:
            keys, values = (t[start:] for t in at.cached(self.cache, slot, start + count))
            turned = at.turn(k[row : row + count], self.cosine, self.sine, start)
            self.check_stored(keys, turned, 0)
            self.check_stored(values, v[row : row + count].double(), 1)
            row += count
        want = at.reference(q, self.cache, runs, self.cosine, self.sine, self.scale, self.window)
        bound = self.bound(q, runs)
        allowed = bound + STORE[q.dtype] * (want.abs() + bound)
        assert bool(((got.double() - want).abs() <= allowed).all()), f"{self.shape} {self.dtype} {runs}"
        return got

    def check_stored(self, got: Tensor, want: Tensor, which: int) -> None:
        """Rounded once, after at most four roundings of the rotation; int8 to half a step of its row."""
        size = want.abs().amax(-1, keepdim=True)
        step = {"fp16": 2.0**-11 * want.abs() + 2.0**-25, "fp32": 0.0, "int8": size / 254 * (1 + 1e-5)}[self.dtype]
        assert bool(((got - want).abs() <= step * (1 + 1e-3) + 8 * EPS * size).all()), (
            f"stored {'kv'[which]} {self.dtype}"
        )

    def bound(self, q: Tensor, runs: Runs) -> Tensor:
        """Scores are off by rotation, scaling and a chain of D products, of int8 also by half a unit of q'; weights by twice the worst
        score of a token, and by 2e-7 for 2^x; sums by a chain of 256 positions and the chunks put together."""
        heads, kv_heads, d = self.shape
        out, row = [], 0
        for slot, start, count in runs:
            keys, values = (
                t.abs().repeat_interleave(heads // kv_heads, 1) for t in at.cached(self.cache, slot, start + count)
            )
            x = q[row : row + count].double().abs()
            half = 0 if self.cosine is None else self.cosine.shape[1]
            pair = x[..., :half] + x[..., half : 2 * half]
            x = torch.cat([pair, pair, x[..., 2 * half :]], -1)
            off = self.scale * torch.einsum("thd,jhd->ht", (d + 16) * EPS * x, keys.amax(0, keepdim=True))
            if self.dtype == "int8":
                off = off + self.scale * x.amax(-1).T / (127 * 128 * 2) * keys.sum(-1).amax(0)[:, None]
            length = start + count
            sums = 2 * (min(length, 256) + 4 * (length // 256 + 1) + 16) * EPS + 4e-7
            weights = (2.2 * off + sums).T[..., None]
            largest = values.amax(0)[None]
            out.append(weights * largest)
            row += count
        return torch.cat(out)


HEADS = ((1, 1), (2, 1), (3, 1), (4, 1), (8, 1), (9, 3), (4, 4), (16, 2))


@pytest.mark.emulated
@pytest.mark.parametrize("dtype", at.TYPES)
def test_sizes_and_runs(tier: str, dtype: str) -> None:
    """Head sizes with numbers of heads, rotary parts, windows and types of q in turn; two sequences, fed in ragged runs."""
    turn = itertools.count()
    for d, (heads, kv_heads) in itertools.product((32, 64, 80, 96, 128), HEADS):
        i = next(turn)
        if (i + i // 8) % 3 and dtype == "fp32":  # the kernels differ by type only where they read the cache
            continue
        case = Case(
            heads, kv_heads, d, dtype, capacity=50 + i, half=(0, d // 2, d // 4, 5)[i % 4], window=(0, 7, 40)[i % 3]
        )
        q_type = (torch.float32, torch.bfloat16, torch.float16)[i % 3]
        lengths = [0, 0]
        for counts in ((20, 3), (1, 1), (2, 17), (1, 5)):
            runs = [(slot, lengths[slot], n) for slot, n in enumerate(counts)]
            case.check(case.tokens(sum(counts), q_type), runs[:: -1 if i % 2 else 1])
            lengths = [length + n for length, n in zip(lengths, counts, strict=True)]


@pytest.mark.parametrize("dtype", at.TYPES)
@pytest.mark.parametrize("window", (0, 100))
def test_lengths_around_blocks(tier: str, dtype: str, window: int) -> None:
    """One sequence, in pieces that end at, before and behind the ends of tiles, blocks and chunks."""
    ends = (1, 15, 16, 17, 18, 63, 64, 65, 128, 130, 255, 256, 257, 300, 511, 512, 513, 515)
    case = Case(6, 2, 64, dtype, slots=1, capacity=515, half=16, window=window)
    for start, end in itertools.pairwise((0, *ends)):
        case.check(case.tokens(end - start), [(0, start, end - start)])


@pytest.mark.parametrize("dtype", at.TYPES)
@pytest.mark.parametrize("window", (0, 70))
def test_same_bits_however_a_sequence_is_fed(tier: str, dtype: str, window: int) -> None:
    length = 280
    case = Case(6, 2, 48, dtype, slots=3, capacity=length, window=window)
    q, k, v = case.tokens(length)
    whole = case.run((q, k, v), [(0, 0, length)])
    for slot, step in ((1, 1), (2, 37)):
        parts = [
            case.run((q[i : i + step], k[i : i + step], v[i : i + step]), [(slot, i, min(step, length - i))])
            for i in range(0, length, step)
        ]
        assert torch.equal(torch.cat(parts), whole), f"steps of {step}"


@pytest.mark.parametrize("dtype", at.TYPES)
def test_same_bits_whatever_the_threads_and_the_batch(tier: str, dtype: str) -> None:
    """Long contexts beside short ones, several tokens beside single ones: as if each were alone, with any number of threads."""
    capacity = 700 if tier == "scalar" else 2100
    case = Case(8, 2, 128, dtype, slots=5, capacity=capacity, window=0)
    lengths = (capacity - 9, 3, 300, 0, 513)
    for slot, length in enumerate(lengths):
        if length:
            case.run(case.tokens(length), [(slot, 0, length)])
    runs = [(slot, length, n) for (slot, length), n in zip(enumerate(lengths), (1, 4, 1, 70, 2), strict=True)]
    qkv = case.tokens(sum(n for *_, n in runs))
    first = case.run(qkv, runs)
    for threads in (2, 3, 7):
        torch.set_num_threads(threads)
        assert torch.equal(case.run(qkv, runs), first), threads
        row = 0
        for run in runs:
            part = slice(row, row + run[2])
            assert torch.equal(case.run(tuple(t[part] for t in qkv), [run]), first[part]), (threads, run)
            row += run[2]


@pytest.mark.parametrize("dtype", at.TYPES)
def test_scores_far_apart(tier: str, dtype: str) -> None:
    """A maximum that grows with every block, and one that stays where it was: weights from 1 down to nothing."""
    for growing in (True, False):
        case = Case(2, 1, 32, dtype, slots=1, capacity=400, half=0)
        q, k, v = case.tokens(400)
        steps = torch.linspace(0.1 if growing else 20.0, 20.0 if growing else 0.1, 400)
        case.check((q.abs() * 3, k.abs() * steps[:, None, None], v), [(0, 0, 400)])


def test_other_slots_and_later_positions_are_left_alone(tier: str) -> None:
    for dtype in at.TYPES:
        case = Case(2, 2, 32, dtype, slots=3, capacity=40)
        case.run(case.tokens(20), [(1, 3, 20)])
        for t in case.cache:
            if t is not None:
                raw = t.view(torch.uint8)
                assert bool((raw[0] == 255).all() and (raw[2] == 255).all())
        if dtype == "fp32":
            keys, values = case.cache[0][1].movedim(-1, 2).flatten(1, 2), case.cache[1][1]
            for t in (keys, values):
                assert bool(t[:, :3].isnan().all() and t[:, 23:].isnan().all() and not t[:, 3:23].isnan().any())


def test_layout_of_the_cache() -> None:
    """csrc/formats/kv.h, element by element."""
    for dtype in at.TYPES:
        case = Case(2, 2, 32, dtype, slots=2, capacity=40, half=0)
        x = torch.arange(37 * 2 * 32).reshape(37, 2, 32) % 127 - 63
        x[..., 0] = 127  # so that the scale of int8 is 1
        case.run((x[:, :2].float(), x.float(), -x.float()), [(1, 0, 37)])
        k, v, k_scale, v_scale = case.cache
        for p, h, c in itertools.product((0, 1, 15, 16, 36), (0, 1), (0, 1, 2, 3, 4, 17, 31)):
            key = k[1, h, p // 16, c // 4, p % 16, c % 4] - 128.0 if dtype == "int8" else k[1, h, p // 16, c, p % 16]
            assert key == x[p, h, c] and v[1, h, p, c] == -x[p, h, c], (dtype, p, h, c)
        if dtype == "int8":
            assert bool((k_scale[1, :, :37] == 1).all() and (v_scale[1, :, :37] == 1).all())


@pytest.mark.parametrize("dtype", at.TYPES)
def test_zeros_and_what_is_not_finite(tier: str, dtype: str) -> None:
    """Zero keys weigh all alike; a NaN reaches its own sequence from its position on, and no other."""
    case = Case(2, 1, 32, dtype, slots=2, capacity=80, half=0)
    q, _, v = case.tokens(10)
    case.check((q, torch.zeros(10, 1, 32), v), [(0, 0, 10)])
    q, k, v = case.tokens(2)
    good = case.run((q[1:], k[1:], v[1:]), [(1, 0, 1)])
    v[0, 0, 3] = torch.nan
    bad = case.run((q, k, v), [(0, 10, 1), (1, 0, 1)])
    assert bool(bad[0].isnan().any()) and torch.equal(bad[1:], good)


def test_no_tokens() -> None:
    case = Case(2, 1, 32)
    assert case.run(case.tokens(0), []).shape == (0, 2, 32)


def test_bad_arguments() -> None:
    case = Case(4, 2, 32, "int8", slots=2, capacity=20)
    q, k, v = case.tokens(3)
    parts = dict(zip(("k_cache", "v_cache", "k_scale", "v_scale"), case.cache, strict=True))
    good = dict(q=q, k=k, v=v, **parts, cosine=case.cosine, sine=case.sine, scale=0.2, window=0)

    def runs(*rows: tuple[int, int, int]) -> Tensor:
        return torch.tensor(rows, dtype=torch.int32)

    good["runs"] = runs((1, 0, 3))
    OP(**good)
    before = [t.view(torch.uint8).clone() for t in case.cache]
    for change, message in (
        ({"q": q[:, :3].contiguous()}, r"attention: q: expected \[tokens, heads, 32\] with a multiple of 2 heads"),
        ({"q": q.double()}, r"attention: q: expected float32, bfloat16 or float16"),
        ({"k": k[:2]}, r"attention: k: expected float32 \[3, 2, 32\]"),
        ({"v": v.half()}, r"attention: v: expected float32"),
        ({"v_cache": parts["v_cache"].double()}, r"attention: v_cache: expected float16, int8 or float32"),
        ({"k_cache": parts["k_cache"].flatten(3)}, r"attention: k_cache: expected uint8 \[2, 2, 2, 8, 16, 4\]"),
        ({"k_scale": None}, r"attention: k_scale: expected scales for an int8 cache"),
        ({"v_scale": parts["v_scale"][..., :16].contiguous()}, r"attention: v_scale: expected float32 \[2, 2, 32\]"),
        ({"runs": runs((2, 0, 3))}, r"attention: runs\[0\]: expected a slot from 0 to 1, got 2"),
        ({"runs": runs((-1, 0, 3))}, r"attention: runs\[0\]: expected a slot"),
        ({"runs": runs((0, 0, 2), (0, 2, 1))}, r"attention: runs\[1\]: expected a slot of its own, got 0 again"),
        ({"runs": runs((0, 30, 3))}, r"attention: runs\[0\]: expected positions within the capacity of 32, got 30 to 32"),
        ({"runs": runs((0, -1, 3))}, r"attention: runs\[0\]: expected positions within"),
        ({"runs": runs((0, 0, 3), (1, 0, 0))}, r"attention: runs\[1\]: expected at least one token"),
        ({"runs": runs((0, 0, 2))}, r"attention: runs: expected the 3 rows of q, got 2"),
        ({"runs": runs((0, 0, 3)).long()}, r"attention: runs: expected int32"),
        ({"sine": None}, r"attention: sine: expected one with cosine"),
        ({"runs": runs((1, 18, 3))}, r"attention: cosine: expected \[positions, channels\], at least 21"),
        ({"cosine": torch.ones(20, 17), "sine": torch.ones(20, 17)}, r"attention: cosine: expected .* at most 16"),
        ({"window": -1}, r"attention: window: expected 0"),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match=message):
            OP(**(good | change))
    with pytest.raises(RuntimeError, match="attention: k_scale: expected none for a cache of floats"):
        OP(**(good | dict(zip(("k_cache", "v_cache"), at.cache(2, 2, 20, 32), strict=False))))
    after = (t.view(torch.uint8) for t in case.cache)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True)), "an error came after work"
    for change, message in (
        ({"dtype": "fp8"}, "dtype: expected one of fp16, int8, fp32, got 'fp8'"),
        ({"head_dim": 40}, "head_dim: expected a multiple of 16 up to 256, got 40"),
        ({"slots": 0}, "slots: expected at least 1"),
    ):
        with pytest.raises(ValueError, match=f"attention.cache: {message}"):
            at.cache(**({"slots": 1, "kv_heads": 1, "capacity": 1, "head_dim": 16} | change))


def test_shapes_for_compilers() -> None:
    for dtype in ("fp16", "int8"):
        case = Case(4, 2, 32, dtype)
        for t in case.cache:
            if t is not None:
                t.zero_()
        arguments = (
            *case.tokens(3),
            *case.cache,
            torch.tensor([[1, 0, 3]], dtype=torch.int32),
            case.cosine,
            case.sine,
            0.2,
            0,
        )
        torch.library.opcheck(OP.default, arguments, test_utils=("test_schema", "test_faketensor"))
        compiled = torch.compile(lambda q: OP(q, *arguments[1:]) + 1, fullgraph=True, backend="aot_eager")  # noqa: B023
        assert torch.equal(compiled(arguments[0]), OP(*arguments) + 1)
