"""setuptools front of the CMake build; every compile option lives in CMakeLists.txt.

Environment (docs/building.md describes each): ORTHOREG_EXT_NO_BUILD, ORTHOREG_CUDA,
ORTHOREG_HOST_MODULE, ORTHOREG_WERROR, ORTHOREG_TORCH_TARGET, CMAKE_CUDA_ARCHITECTURES,
TORCH_CUDA_ARCH_LIST, CMAKE_ARGS, MAX_JOBS.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.dist_info import dist_info

ROOT = Path(__file__).parent.resolve()
# Handed to CMake when set, and taken out of its cache when not.
CMAKE_OPTIONS = (
    "ORTHOREG_CUDA",
    "ORTHOREG_WERROR",
    "ORTHOREG_TORCH_TARGET",
    "CMAKE_CUDA_ARCHITECTURES",
)
BUILD_TOOLS = ["cmake>=3.24", "ninja", "pybind11>=2.13"]
NO_TORCH = """\
orthoreg_ext is compiled against the torch that is installed, and there is none for
{python}.
Install torch first, then build without pip's isolated environment:

    pip install torch
    pip install "setuptools>=77" cmake ninja pybind11
    pip install --no-build-isolation .

Or install the pure-Python fallback, which needs no compiler:

    ORTHOREG_EXT_NO_BUILD=1 pip install .
"""
FIND_TORCH = "import importlib.util as u; print(u.find_spec('torch').submodule_search_locations[0])"


if int(setuptools.__version__.split(".")[0]) < 77:
    raise SystemExit(
        f"\nsetuptools {setuptools.__version__} is too old: run  pip install 'setuptools>=77'\n"
    )


def flag(name: str, default: bool) -> bool:
    value = os.environ.get(name, "").strip().lower()
    if value in ("", "1", "on", "true", "yes"):
        return default if value == "" else True
    if value in ("0", "off", "false", "no"):
        return False
    raise SystemExit(f"{name} must be 0 or 1, got {value!r}")


NO_BUILD = flag("ORTHOREG_EXT_NO_BUILD", False)
WITH_HOST = flag("ORTHOREG_HOST_MODULE", True)


def torch_folder() -> str:
    """The folder of the installed torch, also from inside pip's isolated build environment.

    pip isolates a build by PYTHONPATH alone: the same interpreter without it sees what the user has
    installed, and that is the torch the package will run with.
    """
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.submodule_search_locations:
        return spec.submodule_search_locations[0]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    found = subprocess.run(
        [sys.executable, "-c", FIND_TORCH], env=environment, capture_output=True, text=True, cwd="/"
    )
    if found.returncode:
        raise SystemExit("\n" + NO_TORCH.format(python=sys.executable))
    return found.stdout.strip()


def tool(name: str) -> str:
    """The path of cmake or ninja: of its wheel if the build environment has it, else on PATH."""
    if importlib.util.find_spec(name) is not None:
        module = importlib.import_module(name)
        folder = module.CMAKE_BIN_DIR if name == "cmake" else module.BIN_DIR
        return str(Path(folder) / name)
    found = shutil.which(name)
    if found is None:
        raise SystemExit(
            f"\n{name} is not found: run  pip install cmake ninja pybind11  or install without "
            "compiled kernels:  ORTHOREG_EXT_NO_BUILD=1 pip install .\n"
        )
    return found


def pybind11_folder() -> str:
    if importlib.util.find_spec("pybind11") is None:
        raise SystemExit(
            "\npybind11 is not found: run  pip install pybind11  or build without the module "
            "_host: ORTHOREG_HOST_MODULE=0\n"
        )
    return str(importlib.import_module("pybind11").get_cmake_dir())


def cmake_definitions(prefix: Path, debug: bool) -> list[str]:
    torch = torch_folder()
    version = next(
        line.split('"')[1]
        for line in (ROOT / "pyproject.toml").read_text().splitlines()
        if line.startswith("version = ")
    )
    define = {
        "CMAKE_BUILD_TYPE": "Debug" if debug else "Release",
        "CMAKE_INSTALL_PREFIX": str(prefix),
        "CMAKE_MAKE_PROGRAM": tool("ninja"),
        "Python_EXECUTABLE": sys.executable,
        "ORTHOREG_TORCH_DIR": torch,
        "ORTHOREG_VERSION": version,
        "ORTHOREG_HOST_MODULE": "ON" if WITH_HOST else "OFF",
    }
    if WITH_HOST:
        define["pybind11_DIR"] = pybind11_folder()
    define.update({name: os.environ[name] for name in CMAKE_OPTIONS if os.environ.get(name)})
    unset = [f"-U{name}" for name in CMAKE_OPTIONS if name not in define]
    return [
        *unset,
        *(f"-D{name}={value}" for name, value in define.items()),
        *shlex.split(os.environ.get("CMAKE_ARGS", "")),
    ]


class CMakeBuild(build_ext):
    """Runs CMake once; `cmake --install` puts every module beside the package.

    Wheels and editable installs share the build folder, so a rebuild compiles what changed.
    """

    def run(self) -> None:
        prefix = Path(self.get_ext_fullpath("orthoreg_ext._C")).parent.resolve()
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}-{sysconfig.get_platform()}"
        jobs = os.environ.get("MAX_JOBS", "").strip() or str(os.cpu_count() or 1)
        if not jobs.isdigit() or jobs == "0":
            raise SystemExit(f"MAX_JOBS must be a positive number, got {jobs!r}")
        definitions = cmake_definitions(prefix, bool(self.debug))
        cmake = tool("cmake")
        for command in (
            [cmake, "-S", str(ROOT), "-B", str(build), "-G", "Ninja", *definitions],
            [cmake, "--build", str(build), "--parallel", jobs],
        ):
            if subprocess.run(command).returncode:
                raise SystemExit(
                    "\nThe build failed: the reason is printed above. It was:\n  "
                    + shlex.join(command)
                    + "\nLess memory is used with MAX_JOBS=1; ORTHOREG_CUDA=OFF builds no CUDA "
                    "kernels; ORTHOREG_EXT_NO_BUILD=1 compiles nothing.\n"
                )
        prefix.mkdir(parents=True, exist_ok=True)
        for stale in prefix.glob("_host.*"):  # of an earlier build with other options
            if not WITH_HOST and stale.suffix == ".so":
                stale.unlink()
        subprocess.run([cmake, "--install", str(build)], check=True)

    def get_outputs(self) -> list[str]:
        return []


class DistInfo(dist_info):
    """Says that torch is missing before pip downloads the dependencies of a build bound to fail."""

    def run(self) -> None:
        if not NO_BUILD:
            torch_folder()
        super().run()


compiled = {
    "ext_modules": [Extension("orthoreg_ext._C", [], py_limited_api=True)],
    "cmdclass": {"build_ext": CMakeBuild, "dist_info": DistInfo},
    "setup_requires": BUILD_TOOLS if WITH_HOST else BUILD_TOOLS[:2],
    "options": {} if WITH_HOST else {"bdist_wheel": {"py_limited_api": "cp310"}},
}
setup(**({} if NO_BUILD else compiled))
