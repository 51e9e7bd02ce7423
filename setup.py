"""Builds the C++ part with CMake and Ninja; everything else is in pyproject.toml.

The build folder is kept (build/cmake-<python>), so one changed kernel file costs seconds, also through pip.
Environment: EFFK_CUDA (AUTO, ON, OFF), EFFK_CUDA_ARCHS (a CMAKE_CUDA_ARCHITECTURES list), EFFK_JOBS (compilers at a
time), EFFK_BUILD_TYPE (Release), CXX and CUDACXX as CMake reads them.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


def package_dir(name: str) -> Path:
    """Folder of an installed package, found without importing it (importing torch takes a second)."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise SystemExit(
            f"effk: {name} is needed to build and is not installed: "
            f"pip install torch cmake ninja pybind11, then pip install --no-build-isolation ."
        )
    return Path(spec.origin).parent


def program(name: str) -> str:
    """Path of a build tool, looked for beside this Python first: a virtual environment need not be activated."""
    path = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if path is None:
        raise SystemExit(f"effk: the program {name} is needed to build and was not found: pip install {name}")
    return path


def compiler() -> str:
    """The C++ compiler that CMake will use."""
    wanted = os.environ.get("CXX", "").split()
    for name in wanted[:1] or ["c++", "g++", "clang++"]:
        path = shutil.which(name)
        if path:
            return path
    raise SystemExit(
        f"effk: a C++17 compiler is needed and {wanted[0] if wanted else 'c++ (or g++, clang++)'} was not found: "
        "apt-get install g++, or set CXX"
    )


def cuda_compiler(env: dict[str, str]) -> str | None:
    """nvcc, also where CMake does not look: CMake itself searches PATH and CUDACXX only."""
    if "CUDACXX" in env or shutil.which("nvcc"):
        return None
    for home in (env.get("CUDA_HOME"), env.get("CUDA_PATH"), "/usr/local/cuda"):
        if home and (nvcc := Path(home) / "bin" / "nvcc").is_file():
            return str(nvcc)
    return None


def run(step: str, command: list[str], env: dict[str, str]) -> None:
    """A failing step has printed its reason; end with one line instead of a traceback of setuptools."""
    if subprocess.run(command, env=env).returncode != 0:
        raise SystemExit(f"effk: {step} failed; the reason is in the lines above")


class CMakeBuild(build_ext):
    """Configures, builds and installs into the wheel or, for an editable install, into python/effk."""

    def run(self) -> None:
        compiler()
        prefix = ROOT / "python" if self.editable_mode else Path(self.build_lib).resolve()
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        env = dict(os.environ)
        if nvcc := cuda_compiler(env):
            env["CUDACXX"] = nvcc
        definitions = {
            "CMAKE_BUILD_TYPE": env.get("EFFK_BUILD_TYPE", "Release"),
            "CMAKE_INSTALL_PREFIX": str(prefix),
            "CMAKE_MAKE_PROGRAM": program("ninja"),
            "EFFK_VERSION": self.distribution.get_version(),
            "Python_EXECUTABLE": sys.executable,
            "TORCH_DIR": str(package_dir("torch")),
            "pybind11_DIR": str(package_dir("pybind11") / "share" / "cmake" / "pybind11"),
        }
        definitions |= {name: env[name] for name in ("EFFK_CUDA", "EFFK_CUDA_ARCHS") if name in env}
        for name in ("EFFK_CUEMU", "EFFK_CPP_TESTS"):  # what only tests use: emulated CUDA kernels, C++ test programs
            definitions[name] = "ON" if self.editable_mode else "OFF"
        cmake = program("cmake")
        run(
            "configuring",
            [cmake, "-S", str(ROOT), "-B", str(build), "-G", "Ninja", *(f"-D{k}={v}" for k, v in definitions.items())],
            env,
        )
        run("compiling", [cmake, "--build", str(build), "--parallel", env.get("EFFK_JOBS", str(os.cpu_count()))], env)
        run("installing", [cmake, "--install", str(build)], env)

    def get_outputs(self) -> list[str]:
        return []


setup(ext_modules=[Extension("effk._C", [])], cmdclass={"build_ext": CMakeBuild})
