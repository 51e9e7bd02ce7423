"""The Hyena block: trains, decodes, keeps its filter."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from effk.nn import HyenaOperator
from fftconv_cases import relative


def test_hyena_trains_and_decodes() -> None:
    torch.manual_seed(0)
    block, x = HyenaOperator(16, 200), torch.randn(2, 150, 16)
    y = block(x)
    y.square().mean().backward()
    y = y.detach()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in block.parameters())
    for prompt in (0, 1, 100):
        first, state = block.prefill(x[:, :prompt], 150 - prompt)
        steps = [block.step(x[:, t], state) for t in range(prompt, 150)]
        assert relative(torch.cat((first, torch.stack(steps, 1)), 1), y.double()) < 2e-6
    changed = x.clone()
    changed[:, 100:] += 1
    with torch.no_grad():
        assert float((block(changed)[:, :100] - y[:, :100]).abs().max()) < 1e-5 * float(y.abs().max())


def test_hyena_learns_to_repeat() -> None:
    """A few steps of training bring the loss down: gradients through gates, filter and skip point the right way."""
    torch.manual_seed(0)
    block, head = HyenaOperator(16, 64), nn.Linear(16, 4)
    embed = nn.Embedding(4, 16)
    tokens = torch.randint(0, 4, (8, 16)).repeat(1, 4)
    optimizer = torch.optim.Adam([*block.parameters(), *head.parameters(), *embed.parameters()], 1e-2)
    losses = []
    for _ in range(60):
        loss = nn.functional.cross_entropy(head(block(embed(tokens[:, :-1]))).flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_hyena_keeps_filter_and_spectrum(prepared: list[tuple]) -> None:
    block, x = HyenaOperator(8, 64), torch.randn(1, 50, 8)
    with torch.no_grad():
        y = block(x)
        assert torch.equal(block(x), y) and len(prepared) == 1
        block.filter.last.weight.mul_(2)
        assert not torch.equal(block(x), y) and len(prepared) == 2
    with torch.inference_mode():
        block(x)
        block(x)
        assert len(prepared) == 2
    with pytest.raises(ValueError, match="HyenaFilter: length: expected at most 64, got 65"):
        block(torch.randn(1, 65, 8))


def test_hyena_in_low_precision_and_compiled() -> None:
    block, x = HyenaOperator(8, 64), torch.randn(2, 50, 8)
    y = block(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert relative(block(x).detach(), y.detach().double()) < 0.03
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    assert relative(compiled(x).detach(), y.detach().double()) < 1e-5
    assert relative(copy.deepcopy(block).bfloat16()(x.bfloat16()).detach(), y.detach().double()) < 0.03
