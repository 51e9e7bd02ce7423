"""The load program on a tiny model: nothing is lost, and both rates are there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer

from bench.serve import main
from cli.tiny import write_tiny


def test_the_load_program_reports_both_rates(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    with pytest.raises(typer.Exit) as ended:
        main(str(write_tiny(tmp_path)), clients=3, seconds=1.0, prompt=5, new=9, threads=1)
    record = json.loads(capfd.readouterr().out)
    assert ended.value.exit_code == 0 and record["lost"] == []
    assert record["completions"] >= 3 and record["tokens"] == 9 * record["completions"]
    assert record["share"] > 0 and len(record["library_tokens_per_second"]) == 2
