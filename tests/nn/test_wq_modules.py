"""The modules: exact round trips, dtypes that must not move, sharing, and PyTorch's own machinery on top."""

from __future__ import annotations

import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from effk.nn import WqEmbedding, WqLinear, WqMultiLinear, WqTiedHead
from wq_cases import kinds, random_input, random_weight

CASES = [(bits, kind) for bits in (2, 3, 4, 8) for kind in kinds(bits)]


def same_state(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize(("bits", "kind"), CASES)
def test_canonical_round_trip(bits: int, kind: str) -> None:
    weight = random_weight(37, 100, bits, 32, kind, outliers=0.01)
    module = WqLinear.from_weight(weight, torch.randn(37))
    again = module.to_weight()
    assert again.geometry() == weight.geometry()
    assert same_state(again.to_state(), weight.to_state())
    assert torch.equal(module.dequantize(), weight.dequantize())


@pytest.mark.parametrize("compute", ["float", "int8"])
def test_module_is_the_op(compute: str) -> None:
    weight = random_weight(37, 100, 4, 32, "asymmetric", outliers=0.01)
    module = WqLinear.from_weight(weight, torch.randn(37), compute)
    x = random_input(6, 100).reshape(2, 3, 100)
    expected = torch.ops.effk.wq_linear(
        x, module.packed, module.scales, module.zeros, None, module.out_ptr, module.out_col, module.out_val,
        module.bias, 37, 100, 4, 32, compute,
    )  # fmt: skip
    assert torch.equal(module(x), expected) and expected.shape == (2, 3, 37)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.float32])
def test_conversions_leave_stored_numbers_alone(dtype: torch.dtype, scale_dtype: torch.dtype) -> None:
    weight = random_weight(37, 100, 4, 32, "table", outliers=0.01, scale_dtype=scale_dtype)
    model = nn.Sequential(nn.Linear(4, 4), WqLinear.from_weight(weight, torch.randn(37)))
    before = {k: v.clone() for k, v in model[1].state_dict().items() if k != "bias"}
    model.to(dtype)
    after = {k: v for k, v in model[1].state_dict().items() if k != "bias"}
    assert same_state(before, after)
    assert model[0].weight.dtype == model[1].bias.dtype == dtype
    model.float().half().to(torch.bfloat16)
    assert same_state(before, {k: v for k, v in model[1].state_dict().items() if k != "bias"})


def test_copies_compute_the_same() -> None:
    module = WqLinear.from_weight(random_weight(37, 100, 3, 64, "asymmetric", outliers=0.01), torch.randn(37), "int8")
    x = random_input(3, 100)
    fresh = WqLinear.from_weight(
        random_weight(37, 100, 3, 64, "asymmetric", outliers=0.01, seed=5), torch.zeros(37), "int8"
    )
    if fresh.out_val.shape != module.out_val.shape:
        fresh.out_col, fresh.out_val = torch.zeros_like(module.out_col), torch.zeros_like(module.out_val)
    fresh.load_state_dict(module.state_dict())
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), fresh):
        assert torch.equal(other(x), module(x))


def test_state_dict_of_another_dtype_is_refused() -> None:
    half = WqLinear.from_weight(random_weight(16, 64, 4, 32))
    full = WqLinear.from_weight(random_weight(16, 64, 4, 32, scale_dtype=torch.float32))
    with pytest.raises(RuntimeError, match="dtype mismatch for scales: expected torch.float16, got torch.float32"):
        half.load_state_dict(full.state_dict())


def test_meta_device() -> None:
    module = WqLinear.from_weight(random_weight(37, 100, 4, 32), torch.randn(37)).to("meta")
    assert all(buffer.is_meta for buffer in module.buffers())
    assert module.scales.dtype == torch.float16
    assert module(torch.empty(3, 100, device="meta")).shape == (3, 37)


def test_bad_arguments() -> None:
    weight = random_weight(16, 64, 4, 32)
    with pytest.raises(ValueError, match="compute: expected one of"):
        WqLinear.from_weight(weight, compute="int4")
    with pytest.raises(ValueError, match=r"bias: expected floating point \[16\]"):
        WqLinear.from_weight(weight, torch.zeros(15))
    with pytest.raises(ValueError, match="expected 'float' for a codebook per row"):
        WqLinear.from_weight(random_weight(16, 64, 4, 32, "row_tables"), compute="int8")
    layers = [WqLinear.from_weight(weight), WqLinear.from_weight(random_weight(16, 32, 4, 32))]
    with pytest.raises(ValueError, match="two or more with one in_features"):
        WqMultiLinear(layers)


class Block(nn.Module):
    """q, k, v over one input, as an attention module calls them."""

    def __init__(self, compute: str = "int8") -> None:
        super().__init__()
        self.q = WqLinear.from_weight(random_weight(32, 96, 4, 32, seed=1), torch.randn(32), compute)
        self.k = WqLinear.from_weight(random_weight(16, 96, 3, 64, "asymmetric", seed=2), None, compute)
        self.v = WqLinear.from_weight(random_weight(16, 96, 2, 32, outliers=0.01, seed=3), torch.randn(16), compute)

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1
        return torch.cat((self.q(x), self.k(x), self.v(x)), dim=-1)


@pytest.fixture
def blocks() -> tuple[Block, Block]:
    """One whose layers work alone, one whose layers share; the weights are the same."""
    torch.manual_seed(0)
    alone = Block()
    shared = copy.deepcopy(alone)
    WqMultiLinear([shared.q, shared.k, shared.v]).attach()
    return alone, shared


@pytest.fixture
def multi_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that grows by one with every fused kernel call."""
    calls: list[int] = []
    original = WqMultiLinear.forward
    monkeypatch.setattr(WqMultiLinear, "forward", lambda self, x: (calls.append(1), original(self, x))[1])
    return calls


def test_sharing_is_one_call_and_bit_exact(blocks: tuple[Block, Block], multi_calls: list[int]) -> None:
    alone, shared = blocks
    for m in (1, 5, 40):
        x = random_input(m, 96)
        assert torch.equal(shared(x), alone(x))
    assert len(multi_calls) == 3
    assert alone.state_dict().keys() == shared.state_dict().keys()
    assert [name for name, _ in shared.named_modules()] == ["", "q", "k", "v"]


def test_sharing_leaves_nothing_on_the_tensor(blocks: tuple[Block, Block]) -> None:
    _, shared = blocks
    x = random_input(2, 96)
    shared.q(x), shared.k(x), shared.v(x)
    assert x.__dict__ == {}


def test_sharing_never_serves_stale_products(blocks: tuple[Block, Block], multi_calls: list[int]) -> None:
    alone, shared = blocks
    x = random_input(2, 96)
    first = shared.q(x)
    x.mul_(2)  # the input changed between siblings: the products left on it no longer hold
    assert torch.equal(shared.k(x), alone.k(x))
    assert torch.equal(shared.q(x), alone.q(x)) and not torch.equal(first, shared.q(x))
    a, b = random_input(2, 96, seed=7), random_input(2, 96, seed=8)
    shared.q(a)
    assert torch.equal(shared.v(b), alone.v(b)) and torch.equal(shared.v(a), alone.v(a))
    assert torch.equal(shared.v(a), alone.v(a)), "a second call computes anew"


def test_only_the_first_layer_computes_for_the_others(blocks: tuple[Block, Block], multi_calls: list[int]) -> None:
    """Called out of order, or one of them only, layers cost no more than alone."""
    alone, shared = blocks
    x = random_input(2, 96)
    assert torch.equal(shared.v(x), alone.v(x)) and torch.equal(shared.k(x), alone.k(x))
    assert not multi_calls and x.__dict__ == {}


def test_sharing_in_inference_mode(blocks: tuple[Block, Block], multi_calls: list[int]) -> None:
    alone, shared = blocks
    with torch.inference_mode():
        x = random_input(3, 96)
        assert torch.equal(shared(x), alone(x)) and len(multi_calls) == 1


def test_sharing_under_threads(blocks: tuple[Block, Block]) -> None:
    alone, shared = blocks
    inputs = [random_input(1 + i % 4, 96, seed=i) for i in range(64)]
    expected = [alone(x) for x in inputs]
    one = inputs[0]  # also one tensor object used by all threads at once
    barrier = threading.Barrier(8)

    def work(worker: int) -> bool:
        barrier.wait()
        own = all(torch.equal(shared(inputs[i]), expected[i]) for i in range(worker, 64, 8))
        common = torch.cat((shared.q(one), shared.k(one), shared.v(one)), dim=-1)
        return own and torch.equal(common, expected[0])

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))


def test_gradients_reach_x_with_and_without_recomputation(blocks: tuple[Block, Block]) -> None:
    torch.manual_seed(0)
    alone = Block("float")
    shared = copy.deepcopy(alone)
    WqMultiLinear([shared.q, shared.k, shared.v]).attach()
    grads = []
    for run in (alone, shared, lambda x: checkpoint(shared, x, use_reentrant=False)):
        x = random_input(3, 96).requires_grad_()
        run(x).square().sum().backward()
        grads.append(x.grad)
    assert torch.equal(grads[0], grads[1]) and torch.equal(grads[0], grads[2])
    dense = torch.cat([layer.dequantize() for layer in (alone.q, alone.k, alone.v)]).double()
    bias = torch.cat((alone.q.bias, torch.zeros(16), alone.v.bias)).double()
    x = random_input(3, 96).double()
    torch.testing.assert_close(grads[0].double(), 2 * (x @ dense.t() + bias) @ dense, rtol=1e-4, atol=1e-4)


def test_compile_and_export_without_breaks(blocks: tuple[Block, Block]) -> None:
    alone, shared = blocks
    x = random_input(3, 96)
    with torch.no_grad():
        expected = alone(x)
        torch._dynamo.reset()
        assert torch.equal(torch.compile(shared, fullgraph=True, backend="aot_eager")(x), expected)
        assert torch.equal(torch.export.export(shared, (x,)).module()(x), expected)


def test_sharing_survives_copies(blocks: tuple[Block, Block], multi_calls: list[int]) -> None:
    alone, shared = blocks
    x = random_input(3, 96)
    for other in (copy.deepcopy(shared), pickle.loads(pickle.dumps(shared))):
        multi_calls.clear()
        assert torch.equal(other(x), alone(x)) and len(multi_calls) == 1
        assert list(other.q._shared.layers) == [other.q, other.k, other.v], "the copy shares with its own siblings"


@pytest.fixture
def tied() -> tuple[WqEmbedding, WqTiedHead, Tensor]:
    weight = random_weight(97, 72, 8, 64)
    embedding = WqEmbedding.from_weight(weight)
    return embedding, WqTiedHead(embedding), weight.dequantize()


def test_embedding_reads_rows(tied: tuple[WqEmbedding, WqTiedHead, Tensor]) -> None:
    embedding, _, dense = tied
    ids = torch.tensor([[0, 15, 16], [96, 95, 33]])
    assert torch.equal(embedding(ids), dense[ids])
    assert torch.equal(embedding(ids.int()), dense[ids])
    assert embedding(ids[:0]).shape == (0, 3, 72)
    assert torch.equal(embedding.bfloat16()(ids), dense[ids].bfloat16())
    assert embedding.scales.dtype == torch.float16
    with pytest.raises(IndexError):
        embedding(torch.tensor([200]))


def test_tied_head_owns_nothing(tied: tuple[WqEmbedding, WqTiedHead, Tensor]) -> None:
    embedding, head, dense = tied
    model = nn.ModuleDict({"embed": embedding, "head": head})
    x = random_input(4, 72)
    assert not [name for name in model.state_dict() if name.startswith("head")]
    bound = 2 * 72 * 2.0**-24 * (x.abs().double() @ dense.abs().double().t())
    assert bool(((head(x).double() - x.double() @ dense.double().t()).abs() <= bound).all())
    twin = copy.deepcopy(model)
    assert twin["head"]._embedding is twin["embed"]
    assert torch.equal(twin["head"](x), head(x))
    assert not list(model.parameters())


def test_embedding_refuses_other_weights() -> None:
    for weight in (random_weight(16, 64, 4, 32), random_weight(16, 64, 8, 32, "asymmetric")):
        with pytest.raises(ValueError, match="WqEmbedding: weight: expected 8 bits, symmetric"):
            WqEmbedding.from_weight(weight)
