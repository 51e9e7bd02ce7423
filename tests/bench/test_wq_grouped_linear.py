"""The bench of wq_grouped_linear on a tiny layer: every backend is right, and a wrong result would be seen."""

from __future__ import annotations

import pytest
import torch
from rich.console import Console

from bench import machine
from bench import wq_grouped_linear as table


def test_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "N", 48)
    monkeypatch.setattr(table, "K", 256)
    monkeypatch.setattr(machine, "copies", lambda nbytes: 2)
    rows = table.run(1, True, (3,), Console(quiet=True))
    assert len(rows) == 2 * 5 and all(row.op == "wq_grouped_linear" and row.us > 0 for row in rows)
    assert all(row.match <= 1 for row in rows) and sum(row.vs_best is not None for row in rows) == 2 * 2
    layer, routing = table.Layer(3), table.routed(4, 0)
    weight = layer.weight.dequantize().view(table.EXPERTS, 48, 256)
    assert routing.bounds[-1] == 8 and routing.bounds == sorted(routing.bounds)
    right = layer.together(0, routing, "float")
    assert torch.equal(right, layer.loop(1, routing, "float"))
    for compute in ("float", "int8"):
        assert table.match(layer.together(1, routing, compute), routing, weight, compute) <= 1
        assert table.match(right.roll(1, 0), routing, weight, compute) > 1
