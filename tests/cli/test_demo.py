"""The demo on a tiny model, through the same code as on the real one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import effk as package


def test_demo_compares_five_versions(tiny: Path, effk: Callable, tmp_path: Path) -> None:
    out = tmp_path / "demo"
    ran = effk("demo", tiny, "--out", out, "--json")
    assert ran.status == 0, ran.stderr
    record = ran.json
    assert json.loads((out / "demo.json").read_text()) == record
    versions = record["versions"]
    assert list(versions) == ["PyTorch bf16", "RTN 4-bit", "RTN 3-bit", "LLM-MQ 4.0", "LLM-MQ 3.0"]
    for name, version in versions.items():
        assert version["perplexity"] > 1 and version["tokens_per_second"] > 0 and version["sample"]
        if name != "PyTorch bf16":
            assert version["nominal_bits"] <= float(name.split()[1].removesuffix("-bit")) < version["true_bits"]
            model = package.load(out / name.lower().replace(" ", "-"))
            assert (
                sum(1 for module in model.modules() if isinstance(module, package.nn.WqLinear)) == 15
            )  # 14 and the embedding

    for step in range(1, 8):
        assert f"step {step} of 7" in ran.stderr
    assert (out / "layers.png").read_bytes().startswith(b"\x89PNG")
    table = (out / "table.md").read_text()
    assert all(f"| {name} |" in table for name in versions) and "layers.png" in table
    assert any("non-overlapping windows" in note for note in record["notes"])
    assert not any("Q4_1" in note for note in record["notes"])  # that caveat is of another model
