"""k-means with clusters of equal size."""

from __future__ import annotations

import torch
from torch import Tensor


def balanced_kmeans(rows: Tensor, clusters: int, iterations: int, seed: int) -> Tensor:
    """The cluster of every row ``[f, d]``, each with ``f / clusters`` rows.

    Rows choose in order of what the second-best cluster would cost them more, each the nearest with a free place;
    centres are means. It ends early where nothing changes.
    """
    f = len(rows)
    if clusters < 1 or f % clusters:
        raise ValueError(f"balanced_kmeans: clusters: expected a divisor of {f}, got {clusters}")
    size = f // clusters
    centres = rows[torch.randperm(f, generator=torch.Generator().manual_seed(seed))[:clusters]]
    chosen = torch.full((f,), -1)
    for _ in range(iterations):
        distance = torch.cdist(rows.float(), centres.float())
        regret = torch.zeros(f) if clusters == 1 else distance.topk(2, largest=False).values.diff(dim=1).flatten()
        new, free = torch.empty(f, dtype=torch.int64), torch.full((clusters,), size)
        for row in regret.argsort(descending=True, stable=True).tolist():
            cluster = int(distance[row].argmin())
            new[row] = cluster
            free[cluster] -= 1
            if free[cluster] == 0:
                distance[:, cluster] = torch.inf
        if torch.equal(new, chosen):
            break
        chosen = new
        centres = torch.zeros_like(centres).index_add(0, chosen, rows) / size
    return chosen
