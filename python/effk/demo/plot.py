"""The picture of a plan: how sensitive every layer is, and how many bits it was given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ..compress import Plan


def plot_layers(
    path: Path, plans: Mapping[str, Plan], scores: Mapping[str, Sequence[float]], blocks: Mapping[str, str | None]
) -> None:
    """Write a PNG of grids, blocks across and kinds of layers down: the sensitivity, then the bits of each plan.

    Args:
        path: of the PNG.
        plans: name -> plan.
        scores: layer -> scores of its choices by rising bits; the first, at the fewest bits, is drawn.
        blocks: layer -> its block's name.
    """
    import matplotlib

    matplotlib.use("Agg")  # no display is needed
    from matplotlib import pyplot
    from matplotlib.colors import BoundaryNorm
    from matplotlib.ticker import MaxNLocator

    names = [name for name in scores if blocks.get(name)]
    columns = list(dict.fromkeys(blocks[name] for name in names))
    rows = list(dict.fromkeys(name.removeprefix(f"{blocks[name]}.") for name in names))

    def grid(values: Mapping[str, float]) -> np.ndarray:
        cells = np.full((len(rows), len(columns)), np.nan)
        for name in values:
            cells[rows.index(name.removeprefix(f"{blocks[name]}.")), columns.index(blocks[name])] = values[name]
        return cells

    width = max(6.0, 2.5 + 0.25 * len(columns))
    count = 1 + len(plans)
    figure, grids = pyplot.subplots(count, 1, figsize=(width, 2.1 * count), layout="constrained", squeeze=False)
    axes = grids[:, 0]
    sensitivity = grid({name: np.log10(max(scores[name][0], 1e-30)) for name in names})
    image = axes[0].imshow(sensitivity, aspect="auto", cmap="viridis")
    axes[0].set_title("sensitivity at the fewest bits: log10 of the predicted rise of the loss", fontsize=9)
    figure.colorbar(image, ax=axes[0])
    colours = pyplot.get_cmap("cividis", 3)
    for axis, (title, plan) in zip(axes[1:], plans.items(), strict=True):
        bits = grid({name: entry.bits for name, entry in plan.layers.items() if name in scores and blocks.get(name)})
        image = axis.imshow(bits, aspect="auto", cmap=colours, norm=BoundaryNorm([1.5, 2.5, 3.5, 4.5], 3))
        axis.set_title(f"bits, {title}", fontsize=9)
        figure.colorbar(image, ax=axis, ticks=[2, 3, 4])
    for axis in axes:
        axis.set_yticks(range(len(rows)), [row.rpartition(".")[2] for row in rows], fontsize=7)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.tick_params(axis="x", labelsize=7)
    axes[-1].set_xlabel("block")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
