"""SquareHead and masks: the fixture by hand, gradients, invariances, zeros that hold under momentum, a short fine-tune."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from effk.compress.solvers.prune import magnitude
from effk.compress.sparse_training import MaskKeeper, squarehead_loss
from small_models import VOCABULARY, small_model, token_batches


def test_fixture() -> None:
    t = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [9.0, 9.0]]])
    s = torch.tensor([[[1.0, 1.0], [3.0, 6.0], [0.0, 0.0]]])
    mask = torch.tensor([[1, 1, 0]])
    ignored = torch.full_like(t, 5.0)  # embeddings
    assert squarehead_loss((ignored, s), (t, t), mask).item() == pytest.approx(1.25 / 7.5078125, abs=1e-7)
    assert squarehead_loss((t, s), (t, t), mask, 0.0).item() == pytest.approx(1 / 6, abs=1e-7)
    assert squarehead_loss((t, s.bfloat16()), (t, t), mask).item() == pytest.approx(0.1664932, abs=1e-6)


def test_gradient_and_invariances() -> None:
    states = [torch.randn(2, 3, 4, dtype=torch.float64) for _ in range(3)]
    teacher = [torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    assert torch.autograd.gradcheck(
        lambda *s: squarehead_loss(s, teacher, mask), [s.clone().requires_grad_() for s in states]
    )
    student = [s.clone().requires_grad_() for s in states]
    loss = squarehead_loss(student, teacher, mask)
    loss.backward()
    assert student[0].grad is None and not student[1].grad[1, 2].any() and all(t.grad is None for t in teacher)
    with torch.no_grad():
        padded = [s.clone() for s in states]
        for s in padded:
            s[1, 2] = 100.0
        assert squarehead_loss(padded, teacher, mask) == loss
        scaled = squarehead_loss(
            [states[0], states[1] * 10, states[2]], [teacher[0], teacher[1] * 10, teacher[2]], mask, 0.0
        )
        assert torch.isclose(scaled, squarehead_loss(states, teacher, mask, 0.0))


def test_bad_states() -> None:
    s = torch.ones(1, 2, 3)
    with pytest.raises(ValueError, match="teacher_states: expected 2 states"):
        squarehead_loss((s, s), (s,))
    with pytest.raises(ValueError, match="states of one shape"):
        squarehead_loss((s, s), (s, s[:, :1]))
    with pytest.raises(ValueError, match="a valid token"):
        squarehead_loss((s, s), (s, s), torch.zeros(1, 2))


def steps(keep: bool, count: int = 50) -> float:
    """Share of the first zeros that are left after some steps with momentum."""
    torch.manual_seed(1)
    layer = nn.Linear(40, 20)
    layer.weight.data = magnitude(layer.weight.data, 0.5)
    zeros = layer.weight == 0
    keeper = MaskKeeper(layer)
    optimizer = torch.optim.AdamW(layer.parameters(), 1e-2)
    for _ in range(count):
        optimizer.zero_grad()
        (layer(torch.randn(8, 40)) - 1).square().mean().backward()
        optimizer.step()
        if keep:
            keeper.apply()
    if keep:
        assert keeper.report()[""] >= 0.5
    else:
        with pytest.raises(RuntimeError, match="expected zeros where the mask has them"):
            keeper.report()
    return float((layer.weight[zeros] == 0).float().mean())


def test_masks_hold_only_when_applied() -> None:
    assert steps(True) == 1.0
    assert steps(False) < 0.1


def test_which_layers_get_a_mask() -> None:
    model = nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 20))
    model[1].weight.data = magnitude(model[1].weight.data, 0.5)
    keeper = MaskKeeper(model)
    assert len(keeper) == 1
    b, a = torch.randn(20, 2), torch.randn(2, 20)
    before = model[1].weight.detach().clone()
    keeper.merge_lora("1", b, a, 0.5)
    assert keeper.report()["1"] == 0.5
    assert torch.allclose(model[1].weight, before + 0.5 * (b @ a) * (before != 0))


def test_distillation_recovers_more() -> None:
    """Pruned to 70 % and trained alike, the student that also sees the teacher's states ends nearer to the teacher."""
    teacher = small_model("llama")
    batches = token_batches(8)
    ends = {}
    for weight in (0.0, 1.0):
        student = copy.deepcopy(teacher)
        for name, module in student.named_modules():
            if isinstance(module, nn.Linear) and "layers." in name:
                module.weight.data = magnitude(module.weight.data, 0.7)
        keeper = MaskKeeper(student)
        optimizer = torch.optim.AdamW(student.parameters(), 1e-3, weight_decay=0.0)
        for step in range(60):
            ids = batches[step % len(batches)]
            out = student(ids, labels=ids, output_hidden_states=True)
            with torch.no_grad():
                expected = teacher(ids, output_hidden_states=True)
            loss = out.loss * (1 - weight) + weight * squarehead_loss(out.hidden_states, expected.hidden_states)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            keeper.apply()
        keeper.report()
        with torch.no_grad():
            ends[weight] = float(sum((student(b).logits - teacher(b).logits).square().mean() for b in batches))
    assert ends[1.0] < 0.5 * ends[0.0]


def sentences(count: int, seed: int, states: int = 12) -> list[Tensor]:
    """``count`` batches of sequences in which a token depends on the two before it."""
    odds = torch.randn(states, states, states, generator=torch.Generator().manual_seed(0)).mul(3).softmax(2)
    rng = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(count):
        ids = list(torch.randint(0, states, (2, 16, 1), generator=rng))
        while len(ids) < 32:
            ids.append(torch.multinomial(odds[ids[-2][:, 0], ids[-1][:, 0]], 1, generator=rng))
        batches.append(torch.cat(ids, 1) + VOCABULARY - states)
    return batches


def fine_tune(
    model: nn.Module, batches: list[Tensor], steps: int, rate: float, teacher: nn.Module | None = None
) -> nn.Module:
    """Trained on the task, with a teacher on its states too; zeros stay."""
    keeper = MaskKeeper(model)
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.0)
    for step in range(steps):
        ids = batches[step % len(batches)]
        out = model(ids, labels=ids, output_hidden_states=True)
        loss = out.loss
        if teacher is not None:
            with torch.no_grad():
                states = teacher(ids, output_hidden_states=True).hidden_states
            loss = loss + squarehead_loss(out.hidden_states, states)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        keeper.apply()
    keeper.report()
    return model


def test_sparse_fine_tuning_end_to_end() -> None:
    """The recipe: a dense teacher of the task, half of its weights pruned, 200 steps on little data from the same start. With the
    teacher's states the loss on new text ends below that without, which is what was asked for, and below that of pruning alone."""
    teacher = fine_tune(small_model("llama"), sentences(100, 1), 300, 3e-3)
    pruned = copy.deepcopy(teacher)
    for name, module in pruned.named_modules():
        if isinstance(module, nn.Linear) and "layers." in name:
            module.weight.data = magnitude(module.weight.data, 0.5)
    few, new = sentences(8, 2), torch.cat(sentences(6, 3))
    task = fine_tune(copy.deepcopy(pruned), few, 200, 1e-3)
    both = fine_tune(copy.deepcopy(pruned), few, 200, 1e-3, teacher)
    with torch.no_grad():
        before, alone, taught = (float(m(new, labels=new).loss) for m in (pruned, task, both))
    assert len(MaskKeeper(both)) == len(MaskKeeper(pruned)) == 21
    assert taught < 0.95 * alone and taught < 0.95 * before
