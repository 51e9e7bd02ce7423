"""``python -m effk.demo.gemma3n_ffn``: the feed-forward network of Gemma 3n with its exact gate, dense in PyTorch and
skipping.

Layers 0 to 9 of Gemma 3n let only gates above the mean plus 1.64 standard deviations through (Spark Transformer,
2506.06644): 95 % of the neurons are exactly zero, and engines that mask after computing read them all the same.
Random weights of the shapes of the released models, one token at a time, weights from memory. Figures:
docs/activation-sparsity.md.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated

import torch
import typer
from torch import Tensor, nn

from .. import isa
from ..compress.activation import pack_network
from ..compress.activation_convert import install_network
from ..compress.sparse_networks import SparseNetwork, find_sparse_networks

SHAPES = {"E2B": (2048, 8192), "E4B": (2048, 16384)}
_CACHE = 256e6  # bytes that weights rotate over at least
_TOKENS = 64  # that density and error are measured on


@dataclass
class Row:
    """One shape and dtype: density, microseconds of each way, error of the skipping layer against transformers'
    module."""

    shape: str
    dtype: str
    density: float = 0.0
    us: dict[str, float] = field(default_factory=dict)
    error: float = 0.0


def module(d: int, f: int, sparsity: float, dtype: torch.dtype, seed: int) -> nn.Module:
    """transformers' own network, inside the names that a model gives it."""
    from transformers import Gemma3nTextConfig
    from transformers.models.gemma3n.modeling_gemma3n import Gemma3nTextMLP

    torch.manual_seed(seed)
    config = Gemma3nTextConfig(
        hidden_size=d, intermediate_size=[f], num_hidden_layers=1, activation_sparsity_pattern=[sparsity],
        layer_types=["full_attention"],
    )  # fmt: skip
    block = nn.Module()
    block.mlp = Gemma3nTextMLP(config)
    model = nn.Module()
    model.layers = nn.ModuleList([block])
    return model.to(dtype).eval()


def median_us(calls: list[Callable[[Tensor], Tensor]], xs: Tensor, rounds: int) -> float:
    """Of one call; the calls in turn, so that weights come from memory."""
    taken = []
    with torch.inference_mode():
        for number in range(rounds + len(calls)):
            x = xs[number % len(xs)][None]
            start = time.perf_counter()
            calls[number % len(calls)](x)
            taken.append(time.perf_counter() - start)
    return 1e6 * statistics.median(taken[len(calls) :])


def measure(
    shape: str, dtype: torch.dtype, rows: tuple[str, ...], rounds: int, sizes: tuple[int, int] | None = None
) -> Row:
    """One line of the table; ``rows`` are the kinds of neuron rows to run, the first of the model's own dtype."""
    d, f = sizes or SHAPES[shape]
    copies = max(2, round(_CACHE / (3 * d * f * dtype.itemsize)))
    models = [module(d, f, 0.95, dtype, seed) for seed in range(copies)]
    xs = torch.randn(_TOKENS, d).to(dtype)
    row = Row(shape, str(dtype).removeprefix("torch."))
    row.us["PyTorch, dense"] = median_us([model.layers[0].mlp for model in models], xs, rounds)
    with torch.no_grad():
        expected = models[0].layers[0].mlp(xs).float()
    packed = {kind: [pack_network(_network(model), {"rows": kind, "group": 0}) for model in models] for kind in rows}
    install_network(models[0], _network(models[0]), packed[rows[0]][0])
    first = models[0].layers[0].mlp
    with torch.no_grad():
        got = torch.cat([first(x[None]) for x in xs]).float()
        row.density = float(first.activity(xs).float().mean())
    row.error = float((got - expected).norm() / expected.norm())
    for kind, layers in packed.items():
        for mode in ("dense", "sparse"):
            for layer in layers:
                layer.modes = {1: mode}
            name = f"{kind}, {'every neuron' if mode == 'dense' else 'skipping'}"
            row.us[name] = median_us(layers, xs, rounds)
    return row


def _network(model: nn.Module) -> SparseNetwork:
    (network,), _ = find_sparse_networks(model)
    return network


def table(rows: list[Row]) -> list[str]:
    """Markdown lines."""
    ways = [way for row in rows for way in row.us]
    ways = list(dict.fromkeys(ways))
    lines = [
        "| network | dtype | density | error | "
        + " | ".join(f"us, {way}" for way in ways)
        + " | skipping over PyTorch |",
        "|---" * (5 + len(ways)) + "|",
    ]
    for row in rows:
        d, f = SHAPES.get(row.shape, ("", ""))
        own = next(value for way, value in row.us.items() if "skipping" in way)
        cells = " | ".join(f"{row.us[way]:.0f}" if way in row.us else "" for way in ways)
        gain = row.us["PyTorch, dense"] / own
        lines.append(
            f"| {row.shape}, {d} / {f} | {row.dtype} | {row.density:.3f} | {row.error:.1e} | {cells} | {gain:.2f} × |"
        )
    return [*lines, "", f"{torch.get_num_threads()} threads, {isa.active()}; the error is that of 64 tokens, relative."]


def main(
    rounds: Annotated[int, typer.Option(help="Timed calls of each kind.")] = 30,
    threads: Annotated[int, typer.Option(help="Threads; 0: PyTorch's default.")] = 0,
) -> None:
    """Time Gemma 3n's networks with random weights (about a minute, 2 GB)."""
    if threads:
        torch.set_num_threads(threads)
    rows = [measure("E2B", torch.float32, ("fp32",), rounds)]
    rows += [measure(shape, torch.bfloat16, ("bf16", "int8"), rounds) for shape in SHAPES]
    print("\n".join(table(rows)))


if __name__ == "__main__":
    typer.run(main)
