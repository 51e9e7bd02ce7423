"""Fine-tuning a pruned model: masks that hold, and distillation from the dense model layer by layer.

Recipe of Kurtic et al., "Sparse Fine-tuning for Inference Acceleration of Large Language Models", 2023 (arXiv:2310.06927):
fine-tune the dense model, the teacher; prune it; fine-tune it further with fixed zeros and :func:`squarehead_loss` added to the
task's loss; then ``effk.compress(model, Sparse(method="keep"))``::

    keeper = MaskKeeper(student)
    for batch in data:
        out = student(**batch, output_hidden_states=True)
        with torch.no_grad():
            states = teacher(**batch, output_hidden_states=True).hidden_states
        loss = out.loss + squarehead_loss(out.hidden_states, states, batch["attention_mask"])
        ...
        optimizer.step()
        keeper.apply()
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

EPS = 2.0**-7  # the machine epsilon of bf16, as in the released code


def squarehead_loss(
    student_states: Sequence[Tensor],
    teacher_states: Sequence[Tensor],
    attention_mask: Tensor | None = None,
    eps: float = EPS,
) -> Tensor:
    """``sum_l mean((s_l - t_l)^2) / (mean(t_l^2) + eps)`` over the states ``[batch, length, hidden]`` of all layers.

    The first state, the embeddings, does not count; means are over tokens whose ``attention_mask`` ``[batch, length]``
    is 1, in fp32 (fp64 states: in fp64). The teacher gets no gradient. Normalising layer by layer keeps the deep ones,
    whose states are large, from drowning the others.

    Raises:
        ValueError: not as many states on both sides, or of different shapes; no valid token.
    """
    if len(student_states) != len(teacher_states) or len(student_states) < 2:
        raise ValueError(
            f"squarehead_loss: teacher_states: expected {len(student_states)} states, at least two, as the student has, "
            f"got {len(teacher_states)}"
        )
    total = None
    for s, t in zip(student_states[1:], teacher_states[1:], strict=True):
        if s.shape != t.shape:
            raise ValueError(f"squarehead_loss: expected states of one shape, got {list(s.shape)} and {list(t.shape)}")
        dtype = torch.float64 if s.dtype == torch.float64 else torch.float32
        s, t = s.to(dtype), t.detach().to(dtype)
        if attention_mask is not None:
            valid = attention_mask.bool()
            if not bool(valid.any()):
                raise ValueError("squarehead_loss: attention_mask: expected a valid token, got none")
            s, t = s[valid], t[valid]
        term = (s - t).square().mean() / (t.square().mean() + eps)
        total = term if total is None else total + term
    return total


class MaskKeeper:
    """The zeros of a pruned model's linear layers, restored after every step.

    Masking gradients alone is not enough: momentum and weight decay move pruned weights too.

    Args:
        model: its ``nn.Linear`` weights with at least ``min_sparsity`` zeros get a mask. Tied weights get one, too.
    """

    def __init__(self, model: nn.Module, min_sparsity: float = 0.1) -> None:
        self._masks: dict[str, tuple[nn.Parameter, Tensor]] = {}
        seen: set[int] = set()
        for name, module in model.named_modules():
            if not isinstance(module, nn.Linear) or id(module.weight) in seen:
                continue
            seen.add(id(module.weight))
            keep = module.weight.detach() != 0
            if float((~keep).float().mean()) >= min_sparsity:
                self._masks[name] = (module.weight, keep)

    def __len__(self) -> int:
        """Layers with a mask."""
        return len(self._masks)

    @torch.no_grad()
    def apply(self) -> None:
        """Make the masked weights zero again; after every step of the optimizer."""
        for weight, keep in self._masks.values():
            weight.masked_fill_(~keep, 0.0)

    def report(self) -> dict[str, float]:
        """The share of zeros of every layer, now.

        Raises:
            RuntimeError: a layer has lost zeros, because :meth:`apply` was not called after a step.
        """
        shares = {}
        for name, (weight, keep) in self._masks.items():
            lost = int(((weight != 0) & ~keep).sum())
            if lost:
                raise RuntimeError(
                    f"MaskKeeper: {name}: expected zeros where the mask has them, got {lost} other weights"
                )
            shares[name] = float((weight == 0).float().mean())
        return shares

    def merge_lora(self, name: str, b: Tensor, a: Tensor, scale: float = 1.0) -> None:
        """Add ``scale * b a`` to layer ``name`` inside its mask; without the mask the sum would be dense.

        Raises:
            KeyError: the layer has no mask.
        """
        weight, keep = self._masks[name]
        with torch.no_grad():
            weight += (scale * (b @ a)).to(weight.dtype) * keep
