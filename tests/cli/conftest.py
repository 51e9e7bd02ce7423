"""A tiny model on disk, and the command line as a function."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cli.tiny import write_tiny
from effk.cli.app import app


@dataclass(frozen=True)
class Ran:
    """One run of ``effk``."""

    status: int
    stdout: str
    stderr: str

    @property
    def json(self) -> Any:
        """The whole of stdout as JSON."""
        return json.loads(self.stdout)


@pytest.fixture(scope="session")
def effk() -> Callable[..., Ran]:
    """``effk("eval", folder)`` runs the command in this process."""

    def run(*args: object, stdin: str | None = None) -> Ran:
        outcome = CliRunner().invoke(app, [str(arg) for arg in args], input=stdin)
        assert outcome.exception is None or isinstance(outcome.exception, SystemExit), outcome.exception
        return Ran(outcome.exit_code, outcome.stdout, outcome.stderr)

    return run


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an uncompressed model of 128 positions; nobody changes it."""
    return write_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def compressed(tiny: Path, effk: Callable[..., Ran], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model through ``effk compress`` with rtn; nobody changes it."""
    out = tmp_path_factory.mktemp("compressed") / "model"
    ran = effk("compress", tiny, "--recipe", "rtn", "--bits", 8, "--compute", "float", "--out", out)
    assert ran.status == 0, ran.stderr
    return out
