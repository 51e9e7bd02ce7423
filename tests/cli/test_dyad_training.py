"""The training example at sizes that take seconds: alone, compiled, and in two processes with the same losses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from effk.demo.dyad_training import Settings, build, plot, run, table

TINY = Settings(width=32, hidden=128, blocks=2, heads=4, length=32, batch=4, steps=8, windows=4, rounds=1)
_OPTIONS = ["--steps", "6", "--width", "32", "--blocks", "2", "--length", "32", "--batch", "4"]


def test_the_example_runs_and_reports(tmp_path: Path) -> None:
    outcome = run(TINY)
    assert list(outcome.versions) == ["dense", "DYAD-IT n = 4", "DYAD-IT n = 8"]
    dense, four, eight = outcome.versions.values()
    assert (four.feedforward, eight.feedforward) == (dense.feedforward // 2, dense.feedforward // 4)
    for version in outcome.versions.values():
        assert len(version.losses) == TINY.steps and version.losses[0] == pytest.approx(5.545, abs=0.05)  # log 256
        assert version.losses[-1] < version.losses[0] - 0.1 and 0 < version.evaluation < 6
        assert version.step_ms > 0 and version.forward_ms > 0
    lines = "\n".join(table(outcome))
    assert all(f"| {name} |" in lines for name in outcome.versions)
    plot(outcome, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_all_models_start_from_the_same_numbers() -> None:
    dense, dyad = (dict(build(TINY, n).named_parameters()) for n in (None, 4))
    shared = set(dense) & set(dyad)
    assert all(torch.equal(dense[name], dyad[name]) for name in shared if ".fc" not in name)
    assert {name for name in dense if ".fc" not in name} <= shared
    again = dict(build(TINY, 4).named_parameters())
    assert all(torch.equal(dyad[name], again[name]) for name in dyad)


@pytest.mark.slow
def test_compiling_changes_nothing_but_rounding() -> None:
    settings = Settings(**{**TINY.__dict__, "steps": 4, "blocks": 1, "blocks_per_component": (4,)})
    plain, compiled = run(settings), run(settings, compiled=True)
    for name, version in plain.versions.items():
        # Sums in another order: a few 2^-24 a step, which Adam's first steps (sign-like) amplify on tiny gradients.
        assert compiled.versions[name].losses == pytest.approx(version.losses, rel=1e-4)


@pytest.mark.slow
def test_two_processes_have_the_losses_of_one(tmp_path: Path) -> None:
    """Each process has half of every batch; losses move by 0.05 and more a step, so that 1e-4 tells them apart."""
    module = ["-m", "effk.demo.dyad_training", *_OPTIONS, "--threads", "1"]
    two = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *module]
    outcomes = []
    for name, command in (("one", module), ("two", two)):
        ran = subprocess.run(
            [sys.executable, *command, "--out", str(tmp_path / name)], capture_output=True, text=True, timeout=600
        )
        assert ran.returncode == 0, ran.stderr
        outcomes.append(json.loads((tmp_path / name / "training.json").read_text()))
    one, two = outcomes
    assert (one["processes"], two["processes"]) == (1, 2) and one["versions"].keys() == two["versions"].keys()
    for name, version in one["versions"].items():
        steps = [abs(a - b) for a, b in zip(version["losses"], version["losses"][1:], strict=False)]
        assert max(steps) > 0.02
        assert two["versions"][name]["losses"] == pytest.approx(version["losses"], rel=1e-4)
        assert two["versions"][name]["evaluation"] == pytest.approx(version["evaluation"], rel=1e-4)
