"""Bad input: one line on stderr that says what was expected and what came, exit code 2, nothing on stdout or disk."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from effk.cli import evaluate as evaluate_module

CASES = {
    "no such model": (["eval", "{tmp}/none"], "no such folder"),
    "a file as model": (["eval", "{tmp}/file"], "a file"),
    "a folder without a model": (["eval", "{tmp}"], "a folder without one"),
    "a damaged config": (["eval", "{tmp}/broken"], "expected JSON"),
    "a config of something else": (["eval", "{tmp}/alien"], "decoder that transformers can load"),
    "an unknown command": (["squeeze"], "squeeze"),
    "an unknown option": (["eval", "{tiny}", "--frobnicate"], "--frobnicate"),
    "a missing argument": (["eval"], "MODEL"),
    "no prompt": (["generate", "{tiny}", "--prompt", ""], "--prompt"),
    "no room for the answer": (["generate", "{tiny}", "--prompt", "x", "--max-new-tokens", "128"], "128 positions, got 129"),
    "a negative temperature": (["generate", "{tiny}", "--prompt", "x", "--temperature", "-1"], "--temperature"),
    "no share of probability": (["generate", "{tiny}", "--prompt", "x", "--top-p", "0"], "--top-p: expected a number above 0"),
    "an unknown drafter": (["generate", "{tiny}", "--prompt", "x", "--speculate", "exit:x"], "--speculate: expected none"),
    "blocks that are not there": (["generate", "{tiny}", "--prompt", "x", "--speculate", "exit:2"], "expected 1 to 1, got 2"),
    "an unknown cache": (["generate", "{tiny}", "--prompt", "x", "--cache", "int3"], "--cache: expected one of fp16"),
    "no threads": (["serve", "{tiny}", "--threads", "0"], "--threads: expected at least 1"),
    "no such port": (["serve", "{tiny}", "--port", "70000"], "--port: expected 0 to 65535"),
    "no rows": (["serve", "{tiny}", "--rows", "0"], "rows: expected a positive number"),
    "no such address": (["serve", "{tiny}", "--host", "203.0.113.7"], "expected a free address"),
    "an unknown dtype": (["eval", "{tiny}", "--dtype", "int3"], "--dtype: expected auto or one of fp32, bf16, fp16, got 'int3'"),
    "too long windows": (["eval", "{tiny}", "--context", "256"], "128 positions, got 256"),
    "too many windows": (["eval", "{tiny}", "--context", "64", "--windows", "1000000"], "tokens, got"),
    "no windows": (["eval", "{tiny}", "--windows", "0"], "--windows: expected at least 1, got 0"),
    "no such text": (["eval", "{tiny}", "--text", "{tmp}/none"], "--text: expected a text file"),
    "a text that is none": (["eval", "{tiny}", "--text", "{tmp}/binary"], "--text: expected UTF-8"),
    "nowhere to write": (["compress", "{tiny}"], "--out"),
    "a file in the way": (["compress", "{tiny}", "--out", "{tmp}/file"], "--out: expected a folder, got the file"),
    "the source as target": (["compress", "{tiny}", "--out", "{tiny}"], "holds another model"),
    "a compressed source": (["compress", "{compressed}", "--out", "{tmp}/new"], "not compressed yet"),
    "an unknown recipe": (["compress", "{tiny}", "--out", "{tmp}/new", "--recipe", "zip"], "error: --recipe: expected one of "),
    "bits that do not exist": (["compress", "{tiny}", "--out", "{tmp}/new", "--recipe", "rtn", "--bits", "5"], "bits"),
    "half bits for rtn": (["compress", "{tiny}", "--out", "{tmp}/new", "--recipe", "rtn", "--bits", "3.5"], "bits"),
    "groups that do not exist": (["compress", "{tiny}", "--out", "{tmp}/new", "--group", "48"], "group_size"),
    "a field that does not exist": (["compress", "{tiny}", "--out", "{tmp}/new", "--set", "zeal=3"], "zeal"),
    "a setting without value": (["compress", "{tiny}", "--out", "{tmp}/new", "--set", "zeal"], "field=value"),
    "a setting of another type": (["compress", "{tiny}", "--out", "{tmp}/new", "--set", "per_layer=5"], "llm-mq"),
    "layers that the model lacks": (
        ["compress", "{tiny}", "--out", "{tmp}/new", "--recipe", "rtn", "--set", 'per_layer={{"*.conv":{{"bits":2}}}}'],
        "per_layer",
    ),
    "an infeasible budget": (["compress", "{tiny}", "--out", "{tmp}/new", "--bits", "1.5", "--calib-length", "64"], "--bits"),
    "no calibration": (["compress", "{tiny}", "--out", "{tmp}/new", "--calib-sequences", "0"], "--calib-sequences"),
    "no such plan": (["compress", "{tiny}", "--out", "{tmp}/new", "--plan", "{tmp}/none"], "--plan: expected a text file"),
    "a plan that is none": (["compress", "{tiny}", "--out", "{tmp}/new", "--plan", "{tmp}/file"], "plan: expected JSON"),
    "a plan and its opposite": (["compress", "{tiny}", "--out", "{tmp}/new", "--plan", "{tmp}/file", "--bits", "2"], "--bits"),
    "a model without tokenizer": (["eval", "{bare}", "--context", "64"], "tokenizer"),
    "a demo onto a file": (["demo", "{tiny}", "--out", "{tmp}/file"], "--out"),
}  # fmt: skip


@pytest.fixture
def places(tiny: Path, compressed: Path, tmp_path: Path) -> dict[str, Path]:
    """The folders that the cases name."""
    (tmp_path / "file").write_text("no JSON", encoding="utf-8")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for name, config in (("broken", "{"), ("alien", json.dumps({"model_type": "toaster"}))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(config, encoding="utf-8")
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(tiny / name, bare)
    return {"tiny": tiny, "compressed": compressed, "tmp": tmp_path, "bare": bare}


@pytest.mark.parametrize("case", CASES)
def test_one_line_says_what_is_wrong(case: str, places: dict[str, Path], effk: Callable) -> None:
    args, expected = CASES[case]
    before = sorted(path for place in places.values() for path in place.rglob("*"))
    ran = effk(*(arg.format(**places) for arg in args))
    assert ran.status == 2, ran.stderr
    assert ran.stdout == ""
    errors = [line for line in ran.stderr.splitlines() if line.startswith("effk: error: ")]
    assert len(errors) == 1 and errors[0] == ran.stderr.splitlines()[-1]
    assert expected in errors[0]
    assert "Traceback" not in ran.stderr
    assert sorted(path for place in places.values() for path in place.rglob("*")) == before


def test_a_damaged_weights_file_is_named(compressed: Path, effk: Callable, tmp_path: Path) -> None:
    copy = shutil.copytree(compressed, tmp_path / "copy")
    (weights,) = copy.glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1])
    ran = effk("eval", copy, "--context", 64)
    assert ran.status == 2 and "damaged" in ran.stderr and weights.name in ran.stderr


def test_debug_shows_the_traceback_wherever_it_stands(effk: Callable, tmp_path: Path) -> None:
    for args in (["--debug", "eval", tmp_path], ["eval", tmp_path, "--debug"]):
        ran = effk(*args)
        assert ran.status == 2 and "Traceback" in ran.stderr and "effk: error: " in ran.stderr


def test_a_mistake_of_the_program_says_so(effk: Callable, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **options: object) -> None:
        raise KeyError("lost")

    monkeypatch.setattr(evaluate_module, "perplexity", broken)
    ran = effk("eval", tiny, "--context", 64)
    assert (
        ran.status == 1
        and "KeyError: 'lost'; this is a mistake of effk" in ran.stderr
        and "Traceback" not in ran.stderr
    )


def test_the_real_program_exits_with_two_and_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "effk", "eval", str(tmp_path / "none")]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 2 and ran.stdout == ""
    assert ran.stderr.startswith("effk: error: MODEL: expected") and ran.stderr.count("\n") == 1
