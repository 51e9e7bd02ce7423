"""``effk auto`` on a tiny model: a table, a model that loads, a log that is used again, and refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import effk as package

QUICK = ("--context", 32, "--windows", 2, "--calib-length", 32, "--calib-sequences", 2, "--groups", 32)


def test_search_write_and_search_again(tiny: Path, effk: Callable, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "model"
    options = ("--out", out, "--algorithms", "rtn,gptq", "--bits", "2,8", "--target-loss", 0.5, *QUICK)
    ran = effk("auto", tiny, *options)
    assert ran.status == 0, ran.stderr
    assert "chosen" in ran.stdout and "as it is" in ran.stdout and "perplexity" in ran.stderr
    assert package.load(out) is not None and (out / "plan.json").is_file() and (out / "tokenizer.json").is_file()
    log = json.loads((tmp_path / "deep" / "model.auto.json").read_text())
    again = effk("auto", tiny, *options, "--json")
    assert again.status == 0, again.stderr
    record = again.json
    assert [t["seconds"] for t in record["trials"]] == [t["seconds"] for t in log["trials"]]  # nothing was repeated
    assert record["recipe"] == next(t["recipe"] for t in record["trials"] if t["accepted"])
    assert record["report"]["model_bytes_after"] == record["trials"][-1]["bytes"]


def test_nothing_good_enough(tiny: Path, effk: Callable, tmp_path: Path) -> None:
    out = tmp_path / "model"
    ran = effk("auto", tiny, "--out", out, "--algorithms", "rtn", "--bits", "8", "--budget", 0.001, *QUICK)
    assert ran.status == 2 and ran.stderr.splitlines()[-1].startswith("effk: error: --budget: expected a candidate")
    assert not out.exists()


@pytest.mark.parametrize(
    ("options", "expected"),
    (
        (("--algorithms", "magic"), "algorithms: expected some of"),
        (("--bits", "four"), "--bits: expected numbers"),
        (("--bits", "5", "--algorithms", "rtn"), "bits: expected one of"),
        (("--context", 4096), "--context: expected at most the model's 128"),
        (("--target-loss", -1), "target_loss: expected 0 or more"),
    ),
)
def test_bad_input(tiny: Path, effk: Callable, tmp_path: Path, options: tuple, expected: str) -> None:
    ran = effk("auto", tiny, "--out", tmp_path / "model", *QUICK, *options)
    assert ran.status == 2 and expected in ran.stderr and not (tmp_path / "model").exists()
    assert effk("auto", tiny, *QUICK).status == 2  # no --out
