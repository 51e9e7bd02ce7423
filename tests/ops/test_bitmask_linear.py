"""bitmask_linear against float64: packing, products on every tier, batches, threads, guarded ends, damaged weights."""

from __future__ import annotations

import itertools
import signal
import subprocess
import sys
import warnings

import pytest
import torch
from torch import Tensor

from dyad_cases import same_bits
from effk import isa
from effk.ops import bitmask_linear as bm

OPS = torch.ops.effk
EPS = 2.0**-24
STORE = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def sparse(n: int, k: int, s: float, seed: int = 0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(n, k, generator=rng).where(torch.rand(n, k, generator=rng) >= s, torch.zeros(()))  # no -0


def packed(w: Tensor, values: str = "fp32", group: int = 0, **more: Tensor) -> bm.BitmaskWeight:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return bm.pack(w, values=values, group=group, **more)


def codes_of(weight: bm.BitmaskWeight) -> Tensor:
    return OPS.bitmask_unpack(weight.values, weight.masks, weight.ptr, None, weight.n, weight.k)


def test_one_row_by_hand() -> None:
    w = torch.tensor([[0, 0, 5, 0, -1, 0, 0, 2]], dtype=torch.int8)
    weight = packed(w, "int8", scale=torch.ones(1, 1))
    assert weight.masks.shape == (1, 1, 8) and weight.masks[0, 0].tolist() == [0x94] + [0] * 7
    assert weight.values[:3].tolist() == [5, -1, 2] and weight.stored == 3 and weight.ptr.tolist() == [0, 3]
    assert weight.row_sum.tolist() == [[6]]


@pytest.mark.parametrize("values", bm.VALUES)
def test_round_trip(values: str) -> None:
    sides = [*itertools.product((1, 7, 8, 9, 64), (1, 63, 64, 65, 127)), (1000, 130), (9, 4096), (3, 11008)]
    for (n, k), s in zip(sides, itertools.cycle((0, 0.1, 0.5, 0.75, 0.99, 1)), strict=False):
        w = sparse(n, k, s, n + k)
        if values == "bf16":
            w = w.bfloat16()
        if values == "int8":
            w = torch.randint(-128, 128, (n, k), dtype=torch.int8) * (torch.rand(n, k) >= s)
        scale = torch.rand(n, 1) if values == "int8" else None
        weight = packed(w, values, scale=scale)
        assert same_bits(codes_of(weight), w), (n, k, s)
        assert int(OPS.bitmask_validate(*weight[:3], n, k)) == weight.stored == int((w != 0).sum())
        if scale is not None:
            assert torch.equal(weight.row_sum[:, 0], w.int().sum(1, dtype=torch.int32))
            assert torch.equal(bm.unpack(weight), w.float() * scale)


def test_masks_of_a_large_layer() -> None:
    """Masks of 8 MiB: from 2 MiB on packed weights lie in memory of effk's own, which has to hold 8 bytes a mask."""
    w = torch.zeros(8192, 8192, dtype=torch.int8)
    w[:, ::64] = 3
    weight = packed(w, "int8", scale=torch.ones(8192, 1))
    assert weight.masks.nbytes == 8 << 20 and bool((weight.masks == 1).all())
    assert torch.equal(codes_of(weight), w)


def test_quantising() -> None:
    """The largest kept magnitude of a group is 127; a kept mask limits who counts; codes of 0 are not stored."""
    w = sparse(20, 200, 0.5)
    for group in (0, 64, 128):
        weight, step = packed(w, "int8", group), group or 200
        scale = torch.stack([part.abs().amax(1) for part in w.split(step, 1)], 1) / 127
        assert torch.equal(weight.scale, torch.where(scale == 0, torch.ones(()), scale))
        wide = weight.scale.repeat_interleave(step, 1)[:, :200]
        assert torch.equal(codes_of(weight).float(), (w / wide).round())
        assert torch.equal(
            weight.row_sum, torch.stack([c.int().sum(1) for c in codes_of(weight).split(step, 1)], 1).int()
        )
    keep = torch.rand(20, 200) < 0.3
    assert same_bits(codes_of(packed(w, "int8", keep=keep)), codes_of(packed(w * keep, "int8")))
    kept = packed(w, "fp32", keep=keep)  # fp32 keeps zeros that the mask keeps
    assert kept.stored == int(keep.sum()) and torch.equal(codes_of(kept), w * keep)


@pytest.mark.emulated
@pytest.mark.parametrize("values", bm.VALUES)
def test_float_product(tier: str, values: str) -> None:
    """fp32 sums of k terms in 16 lanes: an error of k / 16 + 5 roundings and those of scale and bias, and one of storage."""
    for (n, k), (s, m), group in zip(
        ((1, 1), (9, 63), (17, 65), (40, 200), (8, 1100), (70, 2100)),
        ((0, 1), (0.5, 2), (0.75, 5), (1, 3), (0.5, 9), (0.9, 4)),
        (0, 0, 64, 128, 0, 64),
        strict=True,
    ):
        weight = packed(sparse(n, k, s), values, group if values == "int8" else 0)
        dense, bias = bm.unpack(weight).double(), torch.randn(n)
        for dtype in STORE:
            x = torch.randn(m, k).to(dtype)
            expected = bm.reference(x, dense, bias)
            size = x.double().abs() @ dense.abs().T + bias.abs()
            y = bm.linear(x, weight, bias)
            bound = (k / 16 + 8) * EPS * size + STORE[dtype] * (expected.abs() + 1e-3 * size) + 6e-8
            assert y.dtype == dtype and bool(((y - expected).abs() <= bound).all()), (tier, n, k, m, dtype)


@pytest.mark.emulated
def test_integer_product(tier: str) -> None:
    """Integers are exact; what remains are three roundings, and one for each group that is added."""
    for (n, k), m, group in zip(
        ((1, 1), (9, 63), (17, 65), (40, 200), (70, 2100), (8, 5000)),
        (1, 2, 5, 3, 4, 7),
        (0, 0, 64, 128, 64, 0),
        strict=True,
    ):
        weight = packed(sparse(n, k, 0.6), "int8", group)
        codes, bias, x = codes_of(weight), torch.randn(n), torch.randn(m, k)
        expected = bm.reference_int8(x, codes, weight.scale, bias, group)
        q, sx = bm.quantize(x)
        parts = [(q[:, c].double() @ codes[:, c].double().T).abs() for c in torch.arange(k).split(group or k)]
        size = sum(p * weight.scale[:, i].double() for i, p in enumerate(parts)) * sx.double() + bias.abs()
        y = bm.linear(x, weight, bias, "int8")
        assert bool(((y - expected).abs() <= (3 + len(parts)) * EPS * size + 1e-30).all()), (tier, n, k)


def test_tiers_agree_in_integers() -> None:
    weight, x = packed(sparse(40, 700, 0.5), "int8", 128), torch.randn(5, 700)
    results = []
    for tier in isa.supported():
        with isa.use(tier):
            results.append(bm.linear(x, weight, torch.ones(40), "int8"))
    assert all(same_bits(y, results[0]) for y in results)


@pytest.mark.emulated
def test_every_mask_of_sixteen_columns(tier: str) -> None:
    """2^16 rows, one for each mask: bytes, words and lanes are expanded at the right places."""
    masks = torch.arange(1 << 16) if tier != "scalar" else torch.randint(0, 1 << 16, (500,))
    keep = (masks[:, None] >> torch.arange(16)) & 1
    x = 2.0 ** torch.arange(16)[None]
    for values, compute in (("fp32", "float"), ("bf16", "float"), ("int8", "float")):
        w = keep.to(torch.int8) if values == "int8" else keep.float()
        weight = packed(w, values, scale=torch.ones(len(masks), 1) if values == "int8" else None)
        assert torch.equal(bm.linear(x, weight, None, compute)[0], masks.float()), values
    w = keep.to(torch.int8) * torch.arange(
        1, 17, dtype=torch.int8
    )  # each column another value, each row of x one column
    weight = packed(w, "int8", scale=torch.ones(len(masks), 1))
    y = bm.linear(torch.eye(16) * 127, weight, None, "int8")
    assert torch.equal(y, w.T.float() * 127)


@pytest.mark.emulated
def test_extremes(tier: str) -> None:
    """The largest codes with the largest activations, where 16-bit sums of pairs would saturate and shifted sums come near 2^31."""
    k = 65536 if tier != "scalar" else 4096
    for sign in (-1, 1):
        w = torch.full((3, k), 127, dtype=torch.int8) * torch.tensor([[1], [-1], [sign]], dtype=torch.int8)
        weight = packed(w, "int8", scale=torch.ones(3, 1))
        y = bm.linear(torch.full((2, k), 127.0 * sign), weight, None, "int8")
        assert y[0].tolist() == [127.0 * 127 * k * sign, -127.0 * 127 * k * sign, 127.0 * 127 * k]
    for value in (torch.nan, torch.inf):
        x = torch.ones(3, 100)
        x[1, 70] = value
        y = bm.linear(x, packed(sparse(20, 100, 0.5), "int8"), None, "int8")
        assert y[1].isnan().all() and y[[0, 2]].isfinite().all()
    tiny = bm.linear(torch.full((1, 64), 1e-44), packed(torch.ones(1, 64), "int8"), None, "int8")
    assert (
        tiny.tolist() == [[0.0]]
        and bm.linear(torch.zeros(1, 64), packed(torch.ones(1, 64), "int8"), None, "int8")[0, 0] == 0
    )


@pytest.mark.emulated
@pytest.mark.parametrize("values", bm.VALUES)
def test_same_bits_alone_and_in_company(tier: str, values: str) -> None:
    """A token's result depends neither on the others nor on the number of threads."""
    w = sparse(100, 2500, 0.6)
    w[:30] *= torch.rand(30, 2500) < 0.05  # panels of very different sizes
    for compute in ("float", "int8") if values == "int8" else ("float",):
        weight = packed(w, values, 128 if values == "int8" else 0)
        x = torch.randn(133 if tier.startswith("avx512") else 7, 2500)
        all_rows = bm.linear(x, weight, None, compute)
        for count in (1, 2, 3, 4, 7):
            assert same_bits(bm.linear(x[:count].contiguous(), weight, None, compute), all_rows[:count])
        for threads in (2, 3, 16):
            torch.set_num_threads(threads)
            assert same_bits(bm.linear(x, weight, None, compute), all_rows)
            assert same_bits(bm.linear(x[:1].contiguous(), weight, None, compute), all_rows[:1])
        torch.set_num_threads(1)


def test_full_and_empty_rows_side_by_side(tier: str) -> None:
    """In one panel, with signs that alternate: full words where most have few bits, and none where most have many."""
    keep = torch.rand(24, 400) < torch.tensor([0.0, 1.0, 0.1, 0.9, 0.0, 0.05, 1.0, 0.0] * 3)[:, None]
    keep[16:, 64:] &= torch.rand(8, 336) < 0.2  # few values in the panel,
    keep[16:, :64] = torch.rand(8, 64) < torch.linspace(0.3, 1, 8)[:, None]  # but in its first words from 20 to all 64
    signs = (-1.0) ** torch.arange(400)
    w, x = keep * signs * torch.randint(1, 4, (24, 400)), signs * torch.randint(-3, 4, (9, 400))
    expected = x @ w.T  # integers below 2^24: exact in every order
    for values in bm.VALUES:
        given = (w.to(torch.int8), torch.ones(24, 1)) if values == "int8" else (w, None)
        weight = packed(given[0], values, scale=given[1])
        for m in (1, 2, 9):
            assert torch.equal(bm.linear(x[:m], weight), expected[:m]), values
    weight = packed(w.to(torch.int8), "int8", scale=torch.ones(24, 1))
    codes, sx = bm.quantize(x)
    for m in (1, 2, 9):
        exact = (codes.float() @ w.T)[:m] * sx[:m].reshape(-1, 1)
        assert torch.equal(bm.linear(x[:m], weight, None, "int8"), exact.float())


GUARDED = """
import ctypes, itertools, mmap, sys
import torch
from effk import isa
from effk.ops import bitmask_linear as bm

torch.set_num_threads(1)
tiers, visible = sys.argv[1].split(","), int(sys.argv[2])  # bytes behind the values that may be read
room = 1 << 20
memory = mmap.mmap(-1, room + mmap.PAGESIZE)
start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(start + room), ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
for values, (n, k), share in itertools.product(bm.VALUES, ((1, 1), (9, 70), (16, 320), (24, 1100)), (0.1, 0.9)):
    w = torch.randn(n, k) * (torch.rand(n, k) < share)
    weight = bm.pack(w, values=values)
    size = weight.values.nbytes - 64
    at = room - visible - size
    end = torch.frombuffer(memory, dtype=torch.uint8, count=size + 64, offset=at).view(weight.values.dtype)
    ctypes.memmove(start + at, weight.values.data_ptr(), size + visible)
    for name, m in itertools.product(tiers, (1, 2, 3, 9, 40)):
        for compute in ("float", "int8") if values == "int8" else ("float",):
            with isa.use(name):
                x = torch.randn(m, k)
                assert torch.equal(bm.linear(x, weight._replace(values=end), None, compute), bm.linear(x, weight, None, compute))
print("read")
"""


def guarded(tiers: str, visible: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", "-c", GUARDED, tiers, str(visible)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


def test_nothing_is_read_behind_the_tail() -> None:
    """64 bytes behind the values a page begins that nobody may read; without those bytes the fastest tier runs into it."""
    tiers = isa.supported()
    done = guarded(",".join(tiers), 64)
    assert done.returncode == 0 and done.stdout == "read\n", done.stderr
    if tiers[-1] != "scalar":
        assert guarded(tiers[-1], 0).returncode == -signal.SIGSEGV


def test_shapes() -> None:
    weight = packed(sparse(5, 70, 0.5))
    for shape in ((70,), (0, 70), (2, 3, 70)):
        x = torch.randn(shape)
        assert torch.allclose(bm.linear(x, weight), x @ bm.unpack(weight).T, atol=1e-5)
    assert packed(torch.zeros(3, 3)).stored == 0 and not bm.linear(torch.ones(1, 3), packed(torch.zeros(3, 3))).any()


def test_a_dense_weight_warns() -> None:
    assert [bm.break_even(v) for v in bm.VALUES] == [1 / 32, 1 / 16, 1 / 8]
    with pytest.warns(UserWarning, match=r"at least 12.5% zeros, below which the dense weight is smaller, got 10.0%"):
        bm.pack((torch.arange(1000).reshape(10, 100) % 10).float())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bm.pack((torch.arange(1000).reshape(10, 100) % 10).float(), values="fp32")


def damaged() -> dict[str, tuple[list[Tensor], str]]:
    """What bitmask_validate has to refuse, and the beginning of its answer."""
    weight = packed(sparse(20, 100, 0.5), "int8")
    cases = {}

    def case(name: str, answer: str, **parts: Tensor) -> None:
        cases[name] = ([parts.get(f, getattr(weight, f)) for f in ("values", "masks", "ptr")], answer)

    def changed(t: Tensor, place: tuple[int, ...], value: int) -> Tensor:
        t = t.clone()
        t[place] = value
        return t

    more = (
        weight.masks[1, 0, 2].item() | 1 if not weight.masks[1, 0, 2].item() & 1 else weight.masks[1, 0, 2].item() & ~1
    )
    case("one bit", "masks: expected as many bits", masks=changed(weight.masks, (1, 0, 2), more))
    case("bit beyond k", "masks: expected no bits beyond column k", masks=changed(weight.masks, (0, 1, 0), 1 << 40))
    case("bit beyond n", "masks: expected no bits in rows beyond n", masks=changed(weight.masks, (2, 0, 7), 1))
    case("start", "ptr: expected 0 first", ptr=changed(weight.ptr, (0,), 1))
    case("descending", "ptr: expected numbers that ascend", ptr=changed(weight.ptr, (1,), 10**6))
    case("negative", "ptr: expected numbers that ascend", ptr=changed(weight.ptr, (1,), -(2**63)))
    case("fewer values", "ptr: expected numbers that ascend", values=weight.values[:-8].clone())
    case("more values", "values: expected as many", values=torch.cat((weight.values, weight.values)))
    return cases


@pytest.mark.parametrize("name", damaged())
def test_damaged_weights(name: str) -> None:
    (values, masks, ptr), answer = damaged()[name]
    with pytest.raises(RuntimeError, match=f"bitmask_validate: {answer}"):
        OPS.bitmask_validate(values, masks, ptr, 20, 100)


def test_bad_arguments() -> None:
    w, weight = sparse(8, 100, 0.5), packed(sparse(8, 100, 0.5), "int8")
    x = torch.randn(2, 100)
    values, masks, ptr, scale, sums = weight[:5]

    def fails(match: str, call, *args) -> None:  # noqa: ANN001
        with pytest.raises(RuntimeError, match=match):
            call(*args)

    fails(
        "bitmask_pack: values: expected 'fp32', 'bf16' or 'int8', got 'int4'",
        OPS.bitmask_pack,
        w,
        None,
        None,
        "int4",
        0,
    )
    fails("bitmask_pack: group: expected 0, or a multiple of 64", OPS.bitmask_pack, w, None, None, "int8", 32)
    fails("bitmask_pack: group: expected 0", OPS.bitmask_pack, w, None, None, "fp32", 64)
    fails("bitmask_pack: w: expected finite values, .* got nan at 3|got nan at 3", OPS.bitmask_pack,
          w.index_fill(1, torch.tensor([3]), torch.nan), None, None, "fp32", 0)  # fmt: skip
    fails("bitmask_pack: keep: expected", OPS.bitmask_pack, w, torch.ones(8, 99, dtype=torch.bool), None, "fp32", 0)
    fails("bitmask_pack: scale: expected one for codes", OPS.bitmask_pack, w.char(), None, None, "int8", 0)
    fails("bitmask_pack: w: expected", OPS.bitmask_pack, w.T, None, None, "fp32", 0)
    run = OPS.bitmask_linear
    fails(r"bitmask_linear: x: expected \[..., 100\]", run, x[:, :99].contiguous(), *weight[:5], None, 8, 100, "int8")
    fails("bitmask_linear: masks: expected int64", run, x, values, masks.int(), ptr, scale, sums, None, 8, 100, "int8")
    fails(
        "bitmask_linear: scale: expected one for int8 values",
        run,
        x,
        values,
        masks,
        ptr,
        None,
        sums,
        None,
        8,
        100,
        "int8",
    )
    fails("bitmask_linear: row_sum: expected one", run, x, values, masks, ptr, scale, None, None, 8, 100, "int8")
    fails(
        "bitmask_linear: scale: expected float32",
        run,
        x,
        values,
        masks,
        ptr,
        scale.expand(8, 3).contiguous(),
        sums,
        None,
        8,
        100,
        "float",
    )
    fails("bitmask_linear: compute: expected 'float' or 'int8'", run, x, *weight[:5], None, 8, 100, "int4")
    fails("bitmask_linear: bias: expected", run, x, *weight[:5], torch.ones(7), 8, 100, "int8")
    fails("bitmask_linear: values: expected the", run, x, values[1:], masks, ptr, scale, sums, None, 8, 100, "int8")
    plain = packed(w, "fp32")
    fails("bitmask_linear: compute: expected 'float' for values of fp32", run, x, *plain[:5], None, 8, 100, "int8")
    fails(
        "bitmask_linear: expected inputs without gradients",
        lambda: bm.linear(x.requires_grad_(), plain).sum().backward(),
    )


def test_citizen_of_torch() -> None:
    weight = packed(sparse(9, 70, 0.5), "int8")
    x = torch.randn(2, 70)
    tests = ("test_schema", "test_faketensor")
    for arguments in (
        (x, *weight[:5], None, 9, 70, "int8"),
        (x, *packed(sparse(9, 70, 0.5))[:5], torch.ones(9), 9, 70, "float"),
    ):
        torch.library.opcheck(OPS.bitmask_linear.default, arguments, test_utils=tests)
    torch.library.opcheck(OPS.bitmask_unpack.default, (*weight[:4], 9, 70), test_utils=tests)
    torch.library.opcheck(OPS.bitmask_validate.default, (*weight[:3], 9, 70), test_utils=tests)
    torch.library.opcheck(OPS.bitmask_pack.default, (sparse(9, 70, 0.5), None, None, "int8", 64), test_utils=tests)
    compiled = torch.compile(lambda x: bm.linear(x, weight, None, "int8") + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), bm.linear(x, weight, None, "int8") + 1)


def test_error_against_the_dense_layer() -> None:
    """What int8 costs in accuracy: rounding x and w to 8 bits is an error of about 1 % of the result."""
    w, x = sparse(64, 1024, 0.5), torch.randn(16, 1024)
    y, exact = bm.linear(x, packed(w, "int8"), None, "int8"), x @ w.T
    assert 1e-3 < float((y - exact).norm() / exact.norm()) < 2e-2


def test_kernels() -> None:
    assert [row["name"] for row in bm.kernels()][-1] == "scalar:bitmask"
