"""``effk info``: what this machine has and which kernels a call uses on it."""

from __future__ import annotations

import os
import platform
from typing import Any

import torch
from rich.table import Table

from .. import _C, isa
from .terminal import Json, result

FORMS = ("int8", "bf16", "fp32")  # how activations meet the weights, see csrc/ops/wq_linear/kernels.h


def info(as_json: Json = False) -> None:
    """Show CPU tiers, the chosen kernels, the build, and CUDA."""
    record = facts()
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_row("cpu", f"{record['cpu']}, {record['threads']} threads")
    tiers = record["isa"]
    absent = {name: "" if name in tiers["supported"] else " (not on this CPU)" for name in tiers["names"]}
    table.add_row("tiers", ", ".join(name + note for name, note in absent.items()))
    forced = f", forced by EFFK_ISA={tiers['environment']}" if tiers["environment"] else ""
    table.add_row("active", f"{tiers['active']}, bf16 dot products {'on' if tiers['bf16'] else 'off'}{forced}")
    for op, forms in record["kernels"].items():
        for form, kernel in forms.items():
            table.add_row(f"{op}, {form}", kernel)
    build = record["build"]
    needs = f"torch {build['oldest_torch']} or later"
    table.add_row("build", f"effk {build['version']}, {build['compiler']}, {build['build_type']}, {needs}")
    table.add_row("running on", f"torch {record['torch']}, Python {record['python']}")
    table.add_row("cuda", record["cuda"]["summary"])
    result(record, as_json, table)


def facts() -> dict[str, Any]:
    """Everything that ``effk info`` knows, as JSON values."""
    return {
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "isa": {
            "names": isa.names(),
            "supported": isa.supported(),
            "active": isa.active(),
            "bf16": isa.bf16(),
            "environment": os.environ.get("EFFK_ISA"),
        },
        "kernels": chosen_kernels(),
        "kernel_table": list(_C.kernel_table()),
        "build": dict(_C.build_info()),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cuda": _cuda(),
    }


def chosen_kernels() -> dict[str, dict[str, str]]:
    """Op -> form -> the kernel that the active tier uses: the first of the table that it allows."""
    tiers = isa.names()
    allowed = tiers[: tiers.index(isa.active()) + 1]
    chosen: dict[str, dict[str, str]] = {}
    for row in _C.kernel_table():
        if row["tier"] in allowed and (isa.bf16() or not row["needs_bf16"]):
            chosen.setdefault(row["op"], {}).setdefault(row["form"], row["name"])
    return {op: {form: names[form] for form in FORMS if form in names} for op, names in chosen.items()}


def cpu_name() -> str:
    """The processor's name as the system gives it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def _cuda() -> dict[str, Any]:
    built = _C.build_info()["cuda"]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    kernels = f"kernels built ({built})" if built else "kernels not built (no nvcc at build time)"
    if device is not None:
        machine = f"device {device}"
    else:
        machine = "no device" if torch.version.cuda else "this torch has no CUDA"
    return {"built": built or None, "torch": torch.version.cuda, "device": device, "summary": f"{kernels}; {machine}"}
