"""The package as a whole: what importing it does, and that its parts are there."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import effk


def test_import_is_light() -> None:
    """Importing effk costs little more than importing torch: transformers and matplotlib wait until they are used."""
    code = "import sys, effk; print([m for m in ('transformers', 'matplotlib', 'scipy', 'typer') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_parts_are_there() -> None:
    for name in effk.__all__:
        assert getattr(effk, name) is not None
    with pytest.raises(AttributeError, match="module 'effk' has no attribute 'nothing'"):
        effk.nothing  # noqa: B018


def test_every_op_has_a_shape_function_and_runs_on_the_cpu() -> None:
    names = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("effk::")}
    assert {"effk::wq_linear", "effk::wq_multi_linear", "effk::wq_pack"} <= names
    for name in names:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "CPU"), name
        assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA"), name
        assert torch._library.simple_registry.singleton.find(name).fake_impl.kernel is not None, name
