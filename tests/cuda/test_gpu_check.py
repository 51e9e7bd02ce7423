"""tools/gpu_check.py where there is nothing to check: it says so at once, and does not pass."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "tools" / "gpu_check.py"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_says_why_it_cannot_run(tmp_path: Path) -> None:
    result = subprocess.run([sys.executable, SCRIPT, "--out", tmp_path / "results"], capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr.startswith("gpu-check: torch ") and "nothing was checked" in result.stderr
    assert not (tmp_path / "results").exists()
