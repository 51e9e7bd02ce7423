"""DyadLinear, DyadMLP and DyadWqLinear: what they compute, start from, keep, and load."""

from __future__ import annotations

import copy
import gc
import math
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from dyad_cases import ACTS, dyad, feed_forward_bound, same_bits
from effk.nn import DyadLinear, DyadMLP, DyadWqLinear, dyad_state_dict_from_released
from effk.nn.derived_cache import DerivedCache
from effk.ops import dyad_linear as dy
from effk.ops import wq_linear as wq
from wq_cases import check, random_weight

ops = torch.ops.effk


def layer(variant: str = "it", layout: str = "tokens", **how: object) -> DyadLinear:
    torch.manual_seed(3)
    return DyadLinear(32, 24, 4, variant, layout=layout, **how)  # type: ignore[arg-type]


# ---- the layer --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", dy.LAYOUTS)
@pytest.mark.parametrize("variant", dy.VARIANTS)
def test_module_is_the_op(variant: str, layout: str) -> None:
    for bias, dtype in ((True, torch.float32), (False, torch.bfloat16)):
        module = layer(variant, layout, bias=bias, dtype=dtype)
        x = torch.randn(2, 5, 32) if layout == "tokens" else torch.randn(32, 5)
        x = x.to(dtype)
        expected = ops.dyad_linear(x, module.wl, module.wu, module.bias, variant, layout, "none")
        assert torch.equal(module(x), expected)
        with torch.no_grad():
            assert torch.equal(module(x), expected)
            gelu = ops.dyad_linear(x, module.wl, module.wu, module.bias, variant, layout, "gelu")
            assert torch.equal(module(x, "gelu"), gelu)
        spread = x.movedim(0, -1).contiguous().movedim(-1, 0)
        assert torch.equal(module(spread), expected) and torch.equal(module.requires_grad_(False)(spread), expected)


def test_state_dict_and_repr() -> None:
    module = layer("ot", "features")
    assert {k: tuple(v.shape) for k, v in module.state_dict().items()} == {
        "wl": (4, 6, 8),
        "wu": (4, 6, 8),
        "bias": (24,),
    }
    assert repr(module) == (
        "DyadLinear(in_features=32, out_features=24, n_dyad=4, variant=ot, bias=True, layout=features)"
    )
    other = DyadLinear(32, 24, 4, "ot", layout="features")
    other.load_state_dict(module.state_dict())
    x = torch.randn(32, 3)
    assert torch.equal(other(x), module(x))
    assert layer(bias=False).bias is None
    assert DyadLinear(32, 24, dtype=torch.float16).wl.dtype == torch.float16
    assert DyadLinear(32, 24, device="meta")(torch.empty(7, 32, device="meta")).shape == (7, 24)


def test_bad_arguments() -> None:
    for arguments, message in (
        ((32, 24, 4, "cat"), "variant: expected one of .* got 'cat'"),
        ((32, 24, 4, "it", True, "xavier"), "init: expected one of .* got 'xavier'"),
        ((32, 24, 4, "it", True, "paper", "rows"), "layout: expected one of .* got 'rows'"),
        ((30, 24, 4), "n_dyad: expected a number that divides .* got 4 for 30 and 24"),
        ((32, 22, 4), "n_dyad: expected a number that divides .* got 4 for 32 and 22"),
        ((32, 24, 0), "n_dyad: expected .* got 0"),
        ((32, 24, -4), "n_dyad: expected .* got -4"),
        ((0, 24, 4), "n_dyad: expected .* got 4 for 0 and 24"),
    ):
        with pytest.raises(ValueError, match=f"^DyadLinear: {message}"):
            DyadLinear(*arguments)
    with pytest.raises(RuntimeError, match=r"^dyad_linear: x: expected .*32.* got .*\[5, 31\]"):
        layer()(torch.randn(5, 31))
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"^dyad_linear_packed: x: expected .*32.* got .*\[5, 31\]"):
        layer()(torch.randn(5, 31))


def test_tokens_first_input_to_a_features_first_layer_is_refused() -> None:
    """The trap of the released module, which returns nonsense there."""
    module = layer(layout="features")
    for grad in (True, False):
        with torch.set_grad_enabled(grad), pytest.raises(RuntimeError, match="x: expected .*32"):
            module(torch.randn(5, 32))


# ---- initialisation ---------------------------------------------------------------------------------------------------


def test_paper_initialisation() -> None:
    """A million draws from U(-k, k), k = 1/sqrt(f_in): all inside, up to the ends, with the moments of that law."""
    torch.manual_seed(0)
    module = DyadLinear(2048, 2048, 8)
    draws, k = torch.cat([module.wl.flatten(), module.wu.flatten()]).double(), 1 / math.sqrt(2048)
    assert draws.numel() > 1e6 and draws.abs().max() <= k and draws.min() < -0.9999 * k and draws.max() > 0.9999 * k
    spread = k / math.sqrt(3)  # 5 standard errors of each moment
    assert abs(draws.mean()) < 5 * spread / math.sqrt(len(draws))
    assert abs(draws.square().mean() / spread**2 - 1) < 5 * math.sqrt(4 / 5 / len(draws))
    assert not torch.equal(module.wl, module.wu)
    assert module.bias.abs().max() <= k and module.bias.std() > 0.9 * spread


@pytest.mark.parametrize("variant", dy.VARIANTS)
@pytest.mark.parametrize("n", (1, 4, 8))
def test_dense_var_initialisation(n: int, variant: str) -> None:
    """Output variance within 3 % of that of nn.Linear; "paper" has 2/n of it, but for the bias.

    4096 outputs of 256 tokens: the weights of an output share a standard error of sqrt(2 / 4096) only in their norm, the
    tokens one of sqrt(2 / (256 * 1024)), the outputs one of sqrt(2 / 2**20): below 0.5 % together.
    """
    torch.manual_seed(0)
    x = torch.randn(256, 1024)
    with torch.no_grad():
        dense = nn.Linear(1024, 4096)(x).var()
        ours = DyadLinear(1024, 4096, n, variant, init="dense_var")(x).var()
        paper = DyadLinear(1024, 4096, n, variant, bias=False)(x).var()
    assert abs(ours / dense - 1) < 0.03
    assert abs(paper / (2 / n / 3) - 1) < 0.03
    assert DyadLinear(1024, 4096, n, variant, init="dense_var").wl.abs().max() <= math.sqrt(n / 2 / 1024)


def test_reset_parameters() -> None:
    module = layer(init="dense_var")
    before = module.wl.clone()
    module.reset_parameters()
    assert not torch.equal(module.wl, before) and module.wl.abs().max() > 1 / math.sqrt(32)


# ---- dense and back, released weights ------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", dy.VARIANTS)
@pytest.mark.parametrize("bias", (True, False))
def test_to_dense_and_back(variant: str, bias: bool) -> None:
    module = layer(variant, bias=bias)
    dense = module.to_dense()
    x = torch.randn(50, 32)
    assert isinstance(dense, nn.Linear) and dense.weight.requires_grad and dense.weight.is_leaf
    torch.testing.assert_close(dense(x), module(x), rtol=1e-5, atol=1e-6)
    again = DyadLinear.from_dense(dense, 4, variant)
    assert torch.equal(again.to_dense().weight, dense.weight)  # the shares of a place differ, their sum does not
    assert (again.bias is None) == (not bias) and (not bias or torch.equal(again.bias, module.bias))
    assert again.wl.requires_grad and again.wl.is_contiguous() and (again.in_features, again.out_features) == (32, 24)
    dense.weight.data.zero_()
    assert module.wl.abs().max() > 0  # nothing is shared


def test_from_dense_keeps_what_it_can() -> None:
    dense = nn.Linear(32, 24, dtype=torch.bfloat16)
    module = DyadLinear.from_dense(dense, 8, layout="features")
    assert module.wl.dtype == module.bias.dtype == torch.bfloat16 and module.layout == "features"
    back = module.to_dense().weight
    assert torch.equal(back[back != 0], dense.weight[back != 0]) and (back != 0).sum() == 32 * 24 * 15 // 64
    with pytest.raises(ValueError, match="n_dyad: expected a number that divides"):
        DyadLinear.from_dense(dense, 5)


def test_released_weights() -> None:
    """Keys wl, wu, bias; the bias has a second dimension of one there. In any model, other keys untouched."""
    source = layer("it")
    released = {"wl": source.wl.detach(), "wu": source.wu.detach(), "bias": source.bias.detach()[:, None].clone()}
    target = layer("it")
    target.reset_parameters()
    with pytest.raises(RuntimeError, match="size mismatch for bias"):
        target.load_state_dict(released)
    target.load_state_dict(dyad_state_dict_from_released(released))
    x = torch.randn(5, 32)
    assert torch.equal(target(x), source(x))
    deep = {f"decoder.layers.3.fc1.{k}": v for k, v in released.items()} | {
        "decoder.layers.3.fc1.extra": torch.ones(3, 1),
        "decoder.layers.3.norm.bias": torch.ones(24, 1),
        "bias": torch.ones(24, 1),
    }
    loaded = dyad_state_dict_from_released(deep)
    assert list(loaded) == list(deep)
    assert {k: tuple(v.shape) for k, v in loaded.items() if v.dim() < 3} == {
        "decoder.layers.3.fc1.bias": (24,),
        "decoder.layers.3.fc1.extra": (3, 1),
        "decoder.layers.3.norm.bias": (24, 1),
        "bias": (24, 1),
    }
    assert deep["decoder.layers.3.fc1.bias"].shape == (24, 1)
    without = {k: v for k, v in released.items() if k != "bias"}
    assert dyad_state_dict_from_released(without).keys() == {"wl", "wu"}
    plain = released | {"bias": released["bias"][:, 0]}
    assert dyad_state_dict_from_released(plain)["bias"].shape == (24,)


def test_released_weights_that_do_not_fit() -> None:
    w = torch.zeros(4, 6, 8)
    for state, message in (
        ({"a.wl": w}, r"^a\.wu: expected \(n, d_out, d_in\) as a\.wl \[4, 6, 8\], got none"),
        ({"a.wu": w, "wl": w}, r"^a\.wl: expected .* got none"),
        ({"wl": w, "wu": w[:2]}, r"^wu: expected .*\[4, 6, 8\], got \[2, 6, 8\]"),
        ({"wl": w[0], "wu": w[0]}, r"^wu: expected \(n, d_out, d_in\)"),
        ({"wl": w, "wu": w, "bias": torch.zeros(25, 1)}, r"^bias: expected \[24, 1\] or \[24\], got \[25, 1\]"),
        ({"wl": w, "wu": w, "bias": torch.zeros(1, 24)}, r"^bias: expected \[24, 1\] or \[24\], got \[1, 24\]"),
    ):
        with pytest.raises(ValueError, match=message):
            dyad_state_dict_from_released(state)


# ---- the packed weight that is kept -------------------------------------------------------------------------------------


def unpacked(module: DyadLinear, x: torch.Tensor) -> torch.Tensor:
    return ops.dyad_linear(x, module.wl, module.wu, module.bias, module.variant, module.layout, "none")


def test_weight_is_packed_once(prepared: list[tuple]) -> None:
    module, x = layer(), torch.randn(5, 32)
    module(x)
    assert not prepared and len(module._cache) == 0  # parameters that need gradients
    with torch.no_grad():
        for _ in range(3):
            module(x)
    with torch.inference_mode():
        module(x)
    module.requires_grad_(False).eval()
    module(x)
    assert len(prepared) == 1
    x.requires_grad_()  # through a frozen layer: the unpacked operation
    module(x).sum().backward()
    assert x.grad is not None and len(prepared) == 1


def test_changes_of_the_weights_are_noticed(prepared: list[tuple]) -> None:
    """Without gradients too: the version counter counts writes under no_grad and in inference mode."""
    module, x = layer(), torch.randn(5, 32)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for parameter in module.parameters():
        parameter.grad = torch.randn_like(parameter)
    other = layer()
    other.reset_parameters()
    changes = [
        lambda: None,
        lambda: module.wl.mul_(2),
        lambda: module.wu[1].zero_(),
        lambda: module.wl.view(-1)[3:7].fill_(1),
        lambda: optimizer.step(),
        lambda: module.load_state_dict(other.state_dict()),
        lambda: setattr(module.wu, "data", torch.randn(4, 6, 8)),
        lambda: nn.init.normal_(module.wl),
        lambda: setattr(module, "wl", nn.Parameter(torch.randn(4, 6, 8))),
        lambda: module.wu.copy_(module.wl),
    ]
    with torch.no_grad():
        for i, change in enumerate(changes):
            change()
            for _ in range(2):
                assert torch.equal(module(x), unpacked(module, x)), i
            assert len(prepared) == i + 1, i
            assert len(module._cache) == 1 + (i >= 8), (
                i
            )  # of the replaced parameter as well: the optimizer has it still
        module.bias.add_(1)  # is not packed
        assert torch.equal(module(x), unpacked(module, x)) and len(prepared) == len(changes)
    with torch.inference_mode():
        module.wl.mul_(3)
        assert torch.equal(module(x), unpacked(module, x))


def test_changes_of_dtype_are_noticed() -> None:
    module, x = layer(), torch.randn(5, 32)
    with torch.no_grad():
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float32):
            module.to(dtype)
            assert torch.equal(module(x), unpacked(module, x))


def test_uncounted_changes_need_clear_cache() -> None:
    module, x = layer(), torch.randn(5, 32)
    with torch.no_grad():
        module(x)
        module.wl.data.mul_(2)
        module.clear_cache()
        assert torch.equal(module(x), unpacked(module, x))


def test_a_new_second_weight_at_an_old_address() -> None:
    """The cache belongs to wl; a wu that died and another one in its memory must not be taken for each other."""
    module, x = layer(), torch.randn(5, 32)
    with torch.no_grad():
        for _ in range(20):
            module.wu = nn.Parameter(torch.randn(4, 6, 8))
            assert torch.equal(module(x), unpacked(module, x))
            del module.wu
            gc.collect()


def test_a_cache_of_several_sources() -> None:
    made: list[float] = []

    def make(a: torch.Tensor, b: torch.Tensor, factor: float) -> torch.Tensor:
        made.append(factor)
        return (a + b) * factor

    cache, a, b, c = DerivedCache(make, 2), torch.ones(3), torch.ones(3), torch.zeros(3)
    assert cache.get((a, b), 2.0) is cache.get((a, b), 2.0)
    assert torch.equal(cache.get((b, a), 2.0), cache.get((a, b), 2.0)) and made == [2.0, 2.0]
    assert torch.equal(cache.get((a, c), 2.0), torch.full((3,), 2.0))
    c.add_(1)
    assert torch.equal(cache.get((a, c), 2.0), torch.full((3,), 4.0)) and len(made) == 4
    cache.get((a, b), 3.0)
    cache.get((a, b), 4.0)
    assert len(cache) == 3  # two of a, one of b
    del b
    gc.collect()
    assert len(cache) == 2
    assert torch.equal(cache.get((a[:2], a[1:]), 1.0), torch.full((2,), 2.0))  # views of one memory
    del a
    gc.collect()
    assert len(cache) == 0
    copies = [copy.deepcopy(DerivedCache(math.fsum, 3)), pickle.loads(pickle.dumps(DerivedCache(math.fsum, 3)))]
    assert all((len(c), c._kept, c._make) == (0, 3, math.fsum) for c in copies)


def test_autocast_packs_in_its_dtype(prepared: list[tuple]) -> None:
    module, x = layer(), torch.randn(5, 32)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        y = module(x)
        assert y.dtype == torch.bfloat16 and torch.equal(y, unpacked(module, x))
    with torch.no_grad():
        assert torch.equal(module(x), unpacked(module, x))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        module(x)
    assert prepared == [("it", torch.bfloat16), ("it", torch.float32)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        module(x).float().sum().backward()
    assert module.wl.grad.dtype == torch.float32


def test_copies_have_their_own_cache() -> None:
    module, x = layer(), torch.randn(5, 32)
    with torch.no_grad():
        y = module(x)
        for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert len(other._cache) == 0
            assert torch.equal(other(x), y)
            other.wl.zero_()
            assert not torch.equal(other(x), y) and torch.equal(module(x), y)


def test_threads_share_a_layer() -> None:
    module, xs = layer(), [torch.randn(5, 32) for _ in range(8)]
    with torch.no_grad():
        expected = [unpacked(module, x) for x in xs]

    def run(i: int) -> torch.Tensor:
        with torch.no_grad():
            return module(xs[i % 8])

    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(y, expected[i % 8]) for i, y in enumerate(pool.map(run, range(64))))


def test_training_moves_and_evaluation_follows() -> None:
    """A few steps with evaluation in between, as a training loop does."""
    torch.manual_seed(0)
    model = nn.Sequential(DyadLinear(32, 64, 4), nn.GELU(), DyadLinear(64, 8, 4, "dt"))
    optimizer, x, target = torch.optim.Adam(model.parameters(), 1e-2), torch.randn(64, 32), torch.randn(64, 8)
    losses = []
    for _ in range(30):
        loss = (model(x) - target).square().mean()
        with torch.no_grad():
            torch.testing.assert_close((model(x) - target).square().mean(), loss.detach())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_compile_and_export() -> None:
    for layout in dy.LAYOUTS:
        module = layer(layout=layout)
        x = torch.randn(5, 32) if layout == "tokens" else torch.randn(32, 5)
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        y = compiled(x)
        assert torch.equal(y, module(x))
        y.sum().backward()
        assert module.wl.grad is not None
        with torch.no_grad():
            assert torch.equal(compiled(x), module(x))
            module.wl.mul_(2)
            assert torch.equal(compiled(x), module(x))
            program = torch.export.export(module, (x,))
            assert torch.equal(program.module()(x), module(x))
        torch._dynamo.reset()


# ---- feed-forward -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("variant", dy.VARIANTS)
def test_mlp(variant: str, act: str, prepared: list[tuple]) -> None:
    torch.manual_seed(1)
    for dtype in (torch.float32, torch.bfloat16):
        mlp = DyadMLP(32, 64, 16, 4, variant, act, dtype=dtype)
        x = torch.randn(2, 5, 32).to(dtype)
        one, two = dyad(4, 16, 8, 10, variant, dtype=dtype, act=act), dyad(4, 4, 16, 1, variant, dtype=dtype)
        one.x, one.wl, one.wu, one.bias = (
            x.reshape(10, 32),
            mlp.fc1.wl.detach(),
            mlp.fc1.wu.detach(),
            mlp.fc1.bias.detach(),
        )
        two.wl, two.wu, two.bias = mlp.fc2.wl.detach(), mlp.fc2.wu.detach(), mlp.fc2.bias.detach()
        hidden = one.reference()
        expected = dy.reference(hidden, two.wl, two.wu, two.bias, variant)
        allowed = feed_forward_bound(one, two, hidden, expected)
        before = len(prepared)
        y = mlp(x)
        # In training an activation is a step of its own: its argument is rounded to the dtype of x.
        check(y.detach().reshape(10, 16), expected, 3 * allowed)
        assert y.shape == (2, 5, 16) and len(prepared) == before
        y.sum().backward()
        assert all(p.grad is not None for p in mlp.parameters())
        with torch.no_grad():
            check(mlp(x).reshape(10, 16), expected, allowed)
            assert torch.equal(mlp(x), mlp.fc2(mlp.fc1(x, act)))
            assert len(prepared) == before + 2
            mlp.fc2.wu.zero_()
            zeroed = dy.reference(hidden, two.wl, 0 * two.wu, two.bias, variant)
            check(mlp(x).reshape(10, 16), zeroed, allowed)
            assert len(prepared) == before + 3


def test_mlp_details() -> None:
    mlp = DyadMLP(32, 64, act="gelu", bias=False)
    assert (mlp.fc2.out_features, mlp.fc1.bias, mlp.fc2.bias) == (32, None, None) and "act=gelu" in repr(mlp)
    x = torch.randn(3, 5, 32)
    compiled = torch.compile(mlp, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), mlp(x))
    with torch.no_grad():
        assert mlp(x[:0]).shape == (0, 5, 32)
        spread = x.transpose(0, 1).contiguous().transpose(0, 1)
        assert torch.equal(mlp(spread), mlp(x))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert mlp(x).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="^DyadMLP: act: expected one of .* got 'tanh'"):
        DyadMLP(32, 64, act="tanh")
    with pytest.raises(ValueError, match="^DyadLinear: n_dyad: expected"):
        DyadMLP(32, 62)


# ---- quantised --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", dy.VARIANTS)
@pytest.mark.parametrize("bits", (4, 8))
def test_quantised_layer(bits: int, variant: str) -> None:
    """Blocks rounded to nearest: exactly the quantised weights, and near the layer they came from."""
    from effk.compress.solvers.rtn import round_to_nearest
    from effk.formats.wq import WqWeight

    source = DyadLinear(128, 192, 4, variant)
    codes, grid = round_to_nearest(dy.stacked(source.wl, source.wu, variant).detach(), bits, 32, "sym_narrow")
    weight = WqWeight.from_codes(codes, grid.scales, bits=bits, group_size=32, zeros=grid.zeros)
    small = DyadWqLinear.from_weight(weight, 4, variant, source.bias)
    assert (small.in_features, small.out_features, small.n_dyad) == (128, 192, 4)
    wl, wu = small.dequantize()
    assert wl.is_contiguous() and torch.equal(dy.stacked(wl, wu, variant), weight.dequantize())
    for w, exact in (
        (wl, source.wl),
        (wu, source.wu),
    ):  # half a step of the grid, and the rounding of its scale to fp16
        assert (w - exact).abs().max() <= exact.abs().max() * (0.5 / (2 ** (bits - 1) - 1) + 2.0**-10)
    x = torch.randn(2, 5, 128)
    exact = ops.dyad_linear(x, wl, wu, source.bias, variant, "tokens", "none")
    torch.testing.assert_close(small(x), exact.detach(), rtol=1e-5, atol=1e-5)
    assert not small.packed.requires_grad and not list(small.parameters())
    x.requires_grad_()
    small(x).sum().backward()
    assert x.grad is not None
    plain = sum(p.numel() * 4 for p in source.parameters())
    assert sum(b.numel() * b.element_size() for b in small.buffers()) < plain * (bits + 2) / 32


@pytest.mark.parametrize("compute", ("float", "int8"))
def test_quantised_module_is_the_op(compute: str) -> None:
    for kind in ("symmetric", "asymmetric", "table"):
        weight = random_weight(64, 40, 4, 32, kind)
        small = DyadWqLinear.from_weight(weight, 4, "it", torch.randn(64), compute)
        packed, x = wq.pack(weight), torch.randn(6, 80)
        expected = ops.dyad_wq_linear(x, *packed.tensors[:4], small.bias, 4, 64, 80, 4, 32, "it", compute)
        assert same_bits(small(x), expected)
        assert repr(small) == (
            "DyadWqLinear(in_features=80, out_features=64, n_dyad=4, variant=it, bias=True, bits=4, group_size=32, "
            f"compute={compute})"
        )
        again = pickle.loads(pickle.dumps(small))
        assert same_bits(again(x), expected)
        other = DyadWqLinear.from_weight(random_weight(64, 40, 4, 32, kind, seed=1), 4, "it", torch.zeros(64), compute)
        other.load_state_dict(small.state_dict())
        assert same_bits(other(x), expected)
        moved = copy.deepcopy(small).to(torch.bfloat16)
        assert moved.scales.dtype == weight.scales.dtype and moved.bias.dtype == torch.bfloat16
        assert moved(x.bfloat16()).dtype == torch.bfloat16
        assert small.to("meta")(x.to("meta")).shape == (6, 64)


def test_quantised_layer_refuses() -> None:
    weight = random_weight(64, 40, 4, 32)
    for arguments, message in (
        ((weight, 3), r"weight: expected \[16 i n_dyad, 2 d_in\] for variant 'it' and n_dyad = 3, got \[64, 40\]"),
        ((weight, 8), r"weight: expected \[16 i n_dyad, 2 d_in\]"),
        ((weight, 0), r"weight: expected"),
        ((random_weight(64, 41, 4, 32), 4), r"weight: expected \[16 i n_dyad, 2 d_in\]"),
        ((weight, 4, "dt"), r"weight: expected \[32 i n_dyad, d_in\] for variant 'dt'"),
        ((weight, 4, "cat"), r"variant: expected one of .* got 'cat'"),
        ((random_weight(64, 40, 4, 32, outliers=0.05), 4), r"weight: expected no outliers, got \d+"),
        ((weight, 4, "it", torch.zeros(63)), r"bias: expected floating point \[64\], got .* \[63\]"),
        ((weight, 4, "it", torch.zeros(64, dtype=torch.int32)), r"bias: expected floating point"),
        ((weight, 4, "it", None, "int4"), r"compute: expected one of .* got 'int4'"),
        (
            (random_weight(64, 40, 4, 32, "row_tables"), 4, "it", None, "int8"),
            r"compute: expected 'float' for a codebook",
        ),
    ):
        with pytest.raises(ValueError, match=f"^DyadWqLinear: {message}"):
            DyadWqLinear.from_weight(*arguments)
