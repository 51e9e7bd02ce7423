"""FFTConv, the spectra it keeps, and the published call."""

from __future__ import annotations

import copy
import gc
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from effk.nn import FFTConv, FlashFFTConv
from effk.ops import fftconv as fc
from fftconv_cases import problem, relative

# ---- FFTConv and its cache --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", fc.MODES)
def test_module_is_the_function(mode: str) -> None:
    length, taps = {"causal": (60, 90), "circular": (64, 60), "bidirectional": (30, 64)}[mode]
    conv = FFTConv(mode=mode)
    for parts in ("", "a", "abs"):
        p = problem(length, taps, 2, 3, 256 if mode == "causal" else None, mode, parts=parts)
        assert torch.equal(conv(*p.tensors), fc.fftconv(*p.tensors, mode=mode))
        k = p.k.clone().requires_grad_()
        conv(p.u, k, *p.tensors[2:]).sum().backward()
        assert k.grad.shape == k.shape


def test_spectrum_is_prepared_once(prepared: list[tuple]) -> None:
    conv, p = FFTConv(), problem(50, 50)
    first = conv(p.u, p.k)
    for k in (p.k, p.k.view(3, 50), p.k[None][0], p.k.detach(), p.k[None]):  # views are new objects over the same taps
        assert torch.equal(conv(p.u, k), first)
    assert len(prepared) == 2  # the leading 1 is another shape
    parameter = nn.Parameter(p.k.clone())
    with torch.no_grad():
        assert torch.equal(conv(p.u, parameter), first)
    with torch.inference_mode():
        assert torch.equal(conv(p.u, parameter), first)
    assert len(prepared) == 3
    p.u.requires_grad_()
    conv(p.u, parameter.detach()).sum().backward()
    assert p.u.grad is not None and len(prepared) == 3


def test_a_filter_that_needs_a_gradient_is_not_cached(prepared: list[tuple]) -> None:
    conv, p = FFTConv(), problem(50, 50)
    conv(p.u, p.k.requires_grad_())
    assert not prepared and len(conv._cache) == 0


def test_changes_of_the_filter_are_noticed(prepared: list[tuple]) -> None:
    conv, p = FFTConv(), problem(50, 50)
    k = nn.Parameter(p.k.clone())
    optimizer = torch.optim.SGD([k], lr=0.1)
    k.grad = torch.randn_like(k)
    changes = [
        lambda: None,
        lambda: k.mul_(2),
        lambda: k[1].zero_(),
        lambda: k.view(-1)[3:7].fill_(1),
        lambda: optimizer.step(),
        lambda: nn.ParameterDict({"k": k}).load_state_dict({"k": torch.randn(3, 50)}),
        lambda: setattr(k, "data", torch.randn(3, 50)),
        lambda: nn.init.normal_(k),
    ]
    with torch.no_grad():
        for i, change in enumerate(changes):
            change()
            assert relative(conv(p.u, k), fc.reference(p.u, k)) < 1e-6
            assert relative(conv(p.u, k), fc.reference(p.u, k)) < 1e-6
            assert len(prepared) == i + 1 and len(conv._cache) == 1
    with torch.inference_mode():
        k.mul_(3)  # counted there too, for a tensor made outside
        assert relative(conv(p.u, k), fc.reference(p.u, k)) < 1e-6


def test_uncounted_changes_need_clear_cache() -> None:
    conv, p = FFTConv(), problem(50, 50)
    conv(p.u, p.k)
    p.k.data.mul_(2)
    conv.clear_cache()
    assert relative(conv(p.u, p.k), fc.reference(p.u, p.k)) < 1e-6


def test_filters_at_one_address_do_not_collide(prepared: list[tuple]) -> None:
    """Other shapes, strides and sizes over one memory."""
    conv, memory, u = FFTConv(), torch.randn(240), torch.randn(2, 3, 30)
    filters = [
        memory.view(3, 80),
        memory[:120].view(3, 40),
        memory[:60].view(3, 20),
        memory.as_strided((3, 40), (80, 2)),
    ]
    for _ in range(2):
        for k in filters:
            assert relative(conv(u, k), fc.reference(u, k)) < 1e-6
            assert relative(conv(u[..., :7].contiguous(), k), fc.reference(u[..., :7], k)) < 1e-6
    assert len(conv._cache) <= 4
    conv = FFTConv(512)
    for k in filters:
        assert relative(conv(u, k), fc.reference(u, k)) < 1e-6


def test_a_new_filter_at_an_old_address() -> None:
    """Memory is reused after a filter dies: its spectrum must not be."""
    conv, u = FFTConv(), torch.randn(1, 3, 40)
    for _ in range(20):
        k = torch.randn(3, 40)
        assert relative(conv(u, k), fc.reference(u, k)) < 1e-6
        del k


def test_memory_is_bounded() -> None:
    conv = FFTConv()
    k = torch.randn(2, 100)
    for length in range(1, 100, 3):
        conv(torch.randn(1, 2, length), k)
    assert 0 < len(conv._cache) <= 4
    other, view = torch.randn(2, 100), k[:, :50]
    conv(torch.randn(1, 2, 9), other)
    kept = len(conv._cache)
    del other
    gc.collect()
    assert len(conv._cache) == kept - 1
    del k
    gc.collect()
    assert len(conv._cache) == kept - 1  # a view keeps the taps alive
    del view
    gc.collect()
    assert len(conv._cache) == 0


def test_inference_tensors_are_never_stale(prepared: list[tuple]) -> None:
    """They count no writes: their spectra are not kept."""
    conv, u = FFTConv(), torch.randn(1, 3, 40)
    with torch.inference_mode():
        k = torch.randn(3, 40)
        conv(u, k)
        k.mul_(2)
        assert relative(conv(u, k), fc.reference(u, k)) < 1e-6
    assert len(prepared) == 2 and len(conv._cache) == 0


def test_a_spectrum_cached_in_inference_mode_serves_training() -> None:
    conv, p = FFTConv(), problem(50, 50)
    with torch.inference_mode():
        conv(p.u, p.k)
    conv(p.u.requires_grad_(), p.k).sum().backward()
    assert p.u.grad is not None


def test_copies_have_their_own_cache() -> None:
    conv, p = FFTConv(256), problem(50, 50)
    y = conv(p.u, p.k)
    for other in (copy.deepcopy(conv), pickle.loads(pickle.dumps(conv))):
        assert len(other._cache) == 0 and other.n_fft == 256
        assert torch.equal(other(p.u, p.k), y)
    assert list(conv.parameters()) == [] and conv.state_dict() == {}


def test_threads_share_a_cache() -> None:
    conv = FFTConv()
    problems = [problem(50, 50, seed=i) for i in range(8)]
    expected = [p.run() for p in problems]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda i: conv(problems[i % 8].u, problems[i % 8].k), range(64)))
    assert all(torch.equal(y, expected[i % 8]) for i, y in enumerate(results))


def test_module_in_compile_and_export() -> None:
    conv, p = FFTConv(), problem(50, 50, parts="ab")
    compiled = torch.compile(conv, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*p.tensors), conv(*p.tensors))
    p.k.mul_(2)
    assert torch.equal(compiled(*p.tensors), conv(*p.tensors))
    program = torch.export.export(conv, p.tensors[:2])
    assert torch.equal(program.module()(*p.tensors[:2]), conv(*p.tensors[:2]))


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="FFTConv: mode: expected one of .* got 'same'"):
        FFTConv(mode="same")
    with pytest.raises(ValueError, match="FFTConv: scheme: expected one of .* got 'fast'"):
        FFTConv(scheme="fast")
    with pytest.raises(RuntimeError, match="fftconv: u: expected"):
        FFTConv()(torch.randn(3, 20), torch.randn(3, 20))
    with pytest.raises(RuntimeError, match="fftconv_prepare: k: expected"):
        FFTConv()(torch.randn(1, 3, 20), torch.randn(2, 3, 20))


# ---- the published call -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("length", "taps"), [(64, 64), (32, 32), (32, 64), (20, 50), (64, 3), (40, 40), (1, 64)])
def test_flash_call(length: int, taps: int) -> None:
    """A circular convolution of seqlen points, cropped: causal for half the length, circular for all of it."""
    conv = FlashFFTConv(64, dtype=torch.bfloat16)
    for gated in (False, True):
        p = problem(length, taps, 2, 3, 64, "circular", parts="ab" if gated else "")
        v = p.u.double() * (p.pregate.double() if gated else 1)
        y = torch.fft.irfft(torch.fft.rfft(v, 64) * torch.fft.rfft(p.k.double(), 64), 64)[..., :length]
        y = y * p.postgate.double() if gated else y
        inputs = [t if t is None else t.clone().requires_grad_() for t in p.tensors[:4]]
        result = conv(*inputs)
        assert relative(result.detach(), y) < 1e-6
        result.sum().backward()
        assert all(t is None or t.grad is not None for t in inputs)
    assert FlashFFTConv(64)(p.u.bfloat16(), p.k).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="FlashFFTConv: u, k: expected at most seqlen = 64 positions, got 65 and 1"):
        conv(torch.randn(1, 3, 65), torch.randn(3, 1))
