"""What is in the compiled objects: no code of a tier may reach a CPU without it, nor a symbol of a newer torch a user.

A tier's object must define no weak symbol. A weak symbol (an inline function that was not inlined, a template) may exist
in several objects, of which the linker keeps the first: if that is the one of AVX-512, baseline code dies on older CPUs.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import effk

BUILD = Path(__file__).parents[1] / "build" / f"cmake-{sys.implementation.cache_tag}"
LIBRARY = Path(effk.__file__).parent / "effk_ops.so"

pytestmark = pytest.mark.skipif(shutil.which("nm") is None, reason="needs binutils")


def objects(tier: str) -> list[Path]:
    """The object files of one tier in the build folder."""
    found = sorted((BUILD / "CMakeFiles" / f"effk_{tier}.dir").rglob("*.o"))
    if not found:
        pytest.skip(f"no build folder with {tier} objects: effk was installed from a wheel, or the CPU is not x86")
    return found


def output(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize("tier", ("avx2", "avx512", "avx512vnni", "avx512bf16"))
def test_no_weak_symbols(tier: str) -> None:
    for path in objects(tier):
        weak = [line for line in output("nm", "-C", "--defined-only", path).splitlines() if re.search(r" [WVu] ", line)]
        assert weak == [], f"{path.name}: linkage across tiers"


@pytest.mark.parametrize("tier", ("avx2", "avx512", "avx512vnni", "avx512bf16"))
def test_symbols_live_in_the_namespace_of_the_tier(tier: str) -> None:
    """Only the kernel entries of the dispatch table are visible to the linker, and they carry the tier in their name."""
    for path in objects(tier):
        for line in output("nm", "-C", "--defined-only", "--extern-only", path).splitlines():
            name = line.split(maxsplit=2)[2]
            assert re.fullmatch(
                r"effk::(wq|fft|depthwise|gemm|gemm8|quik|relu_ffn|attention|bitmask|decoder)::kAvx\w+", name
            ), f"{path.name}: {name}"


@pytest.mark.parametrize(
    ("tier", "forbidden"),
    (
        ("avx2", r"%zmm|%k[0-7]|vpdpbusd|vdpbf16ps"),
        ("avx512", r"vpdpbusd|vdpbf16ps|vpermb |vpmultishiftqb|vpexpand[bw]|vpcompress[bw]|gf2p8"),
        ("avx512vnni", r"vdpbf16ps|vcvtne2ps2bf16|vcvtneps2bf16"),
    ),
)
def test_no_instruction_above_the_tier(tier: str, forbidden: str) -> None:
    for path in objects(tier):
        lines = output("objdump", "-d", "--no-show-raw-insn", path).splitlines()
        above = [line for line in lines if re.search(forbidden, line)]
        assert above == [], f"{path.name}: {len(above)} instructions, the first is {above[:1]}"


def test_baseline_objects_use_baseline_instructions() -> None:
    """The driver and the portable tier run on any x86-64: no VEX or EVEX instruction, which all begin with v."""
    if not list((BUILD / "CMakeFiles" / "effk_avx2.dir").rglob("*.o")):
        pytest.skip("no build folder with x86 objects")
    for path in sorted((BUILD / "CMakeFiles" / "effk_kernels.dir").rglob("*.o")):
        lines = output("objdump", "-d", "--no-show-raw-insn", path).splitlines()
        vex = [line for line in lines if re.search(r"\t(v[a-z0-9]+|[a-z0-9]+.*%[yz]mm)", line) and "\tverr" not in line]
        assert vex == [], f"{path.name}: {vex[:1]}"


# Functions of torch's C shim that the library calls. Every one exists since torch 2.11 or longer; a new name must be
# looked up in torch/csrc/stable/c/shim_function_versions.txt of torch's sources before it is added.
TORCH_SHIM = {
    "aoti_torch_abi_version", "aoti_torch_aten_fill__Scalar", "aoti_torch_aten_narrow",
    "aoti_torch_create_device_guard", "aoti_torch_delete_device_guard",
    "aoti_torch_delete_library_object", "aoti_torch_delete_tensor_object", "aoti_torch_device_type_cpu",
    "aoti_torch_device_type_cuda", "aoti_torch_device_type_meta", "aoti_torch_device_type_mps",
    "aoti_torch_device_type_privateuse1", "aoti_torch_device_type_xpu", "aoti_torch_empty_strided",
    "aoti_torch_get_data_ptr", "aoti_torch_get_device_index", "aoti_torch_get_device_type", "aoti_torch_get_dim",
    "aoti_torch_get_dtype", "aoti_torch_get_sizes", "aoti_torch_is_contiguous", "aoti_torch_library_def",
    "aoti_torch_new_uninitialized_tensor",
    "aoti_torch_library_init_def", "aoti_torch_library_init_impl", "aoti_torch_new_tensor_handle",
    "torch_call_dispatcher", "torch_delete_list", "torch_delete_string", "torch_from_blob",
    "torch_get_const_data_ptr", "torch_get_mutable_data_ptr", "torch_get_num_threads", "torch_library_impl", "torch_list_get_item", "torch_new_string_handle",
    "torch_list_push_back", "torch_list_size", "torch_new_list_reserve_size", "torch_parallel_for",
    "torch_string_c_str", "torch_string_length",
}  # fmt: skip


def test_only_known_functions_of_torch() -> None:
    undefined = {
        line.split()[-1].split("@")[0] for line in output("nm", "-D", "--undefined-only", LIBRARY).splitlines()
    }
    torch_names = {
        name for name in undefined if "torch" in name or name.startswith("_ZN2at") or name.startswith("_ZN3c10")
    }
    known = {
        name
        for name in torch_names
        if name in TORCH_SHIM or re.match(r"(aoti_)?torch_(dtype|layout|memory_format)_", name)
    }
    assert torch_names - known == set()


def test_no_openmp_of_its_own() -> None:
    """Threads come from torch's pool; a second OpenMP runtime beside it would fight it for the cores."""
    needed = output("readelf", "-d", LIBRARY)
    assert not re.search(r"NEEDED.*lib(gomp|omp|iomp)", needed)


def test_exports_are_few() -> None:
    """Hidden visibility by default: what is exported is what effk._C links to."""
    exported = [line.split(maxsplit=2)[2] for line in output("nm", "-DC", "--defined-only", LIBRARY).splitlines()]
    ours = {name.split("(")[0] for name in exported if name.startswith("effk::")}
    linked = {f"effk::isa::{f}" for f in ("name", "parse", "detected", "detected_bf16", "active", "has_bf16", "force",
                                          "environment_error")}  # fmt: skip
    linked |= {
        f"effk::{family}::kKernel{what}"
        for family in ("wq", "fft", "depthwise", "gemm", "gemm8", "quik", "relu_ffn", "attention", "bitmask", "decoder")
        for what in ("s", "Count")
    }
    linked |= {"effk::fft::describe[abi:cxx11]", "effk::fftconv_spec_floats"}
    assert ours <= linked
