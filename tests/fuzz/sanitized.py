"""Builds `_C` under AddressSanitizer and UBSan, and runs the fuzzing with it.

    python -m tests.fuzz.sanitized [pytest arguments]

The module lies in build/sanitized and takes the place of the installed one in the process that runs
pytest. The sanitizers' runtimes are preloaded, since Python itself is not built with them; what
they report ends the process. ORTHOREG_FUZZ_EXAMPLES (10 000 here) and ORTHOREG_FUZZ_SEED say how
many examples are drawn and which; ORTHOREG_EXT_CPU which instructions the kernels take.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent.parent
BUILD = ROOT / "build" / "sanitized"
MODULE = BUILD / "_C.abi3.so"
NAME = "orthoreg_ext._C"
EXAMPLES = "10000"


class Finder(MetaPathFinder):
    """Finds the sanitized module wherever the compiled one is looked for."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """The spec of `_C`, else None."""
        if fullname != NAME:
            return None
        return importlib.util.spec_from_file_location(NAME, MODULE)


def torch_folder() -> str:
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("torch is not installed here")
    return spec.submodule_search_locations[0]


def build() -> None:
    """Compiles the CPU code for the sanitizers; what has not changed is kept."""
    scripts = sysconfig.get_path("scripts")
    environment = os.environ | {"PATH": os.pathsep.join([scripts, os.environ.get("PATH", "")])}
    define = {
        "ORTHOREG_SANITIZE": "ON",
        "ORTHOREG_CUDA": "OFF",
        "ORTHOREG_HOST_MODULE": "OFF",
        "ORTHOREG_TORCH_DIR": torch_folder(),
        "Python_EXECUTABLE": sys.executable,
    }
    options = [f"-D{name}={value}" for name, value in define.items()]
    for command in (
        ["cmake", "-S", str(ROOT), "-B", str(BUILD), "-G", "Ninja", *options],
        ["cmake", "--build", str(BUILD), "--parallel", os.environ.get("MAX_JOBS") or "2"],
    ):
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{done.stdout}{done.stderr}\nFAILED: {' '.join(command)}")


def runtimes() -> str:
    """What is preloaded; AddressSanitizer looks for the C++ runtime's throw when it starts."""
    paths = []
    for name in ("libasan.so", "libubsan.so", "libstdc++.so.6"):
        command = ["g++", f"-print-file-name={name}"]
        path = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        if not os.path.isabs(path):
            raise SystemExit(f"g++ has no {name}: install your compiler's sanitizer runtimes")
        paths.append(os.path.realpath(path))
    return " ".join(paths)


def run(arguments: Sequence[str]) -> int:
    """Runs pytest in a process of its own with the sanitized module."""
    environment = os.environ | {
        "LD_PRELOAD": runtimes(),
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1:abort_on_error=0",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
        "ORTHOREG_FUZZ_EXAMPLES": os.environ.get("ORTHOREG_FUZZ_EXAMPLES", EXAMPLES),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "tests.fuzz.sanitized", "--inside", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment).returncode


def inside(arguments: Sequence[str]) -> int:
    """What the process with the runtimes does."""
    del os.environ["LD_PRELOAD"]  # not for what it starts in turn
    sys.meta_path.insert(0, Finder())
    import pytest

    from orthoreg_ext import _C  # type: ignore[attr-defined]

    if Path(_C.__file__) != MODULE:
        raise SystemExit(f"{_C.__file__} was loaded instead of {MODULE}")
    return int(pytest.main(["-p", "no:cacheprovider", "-p", "no:benchmark", *arguments]))


def main(arguments: Sequence[str]) -> int:
    if arguments[:1] == ["--inside"]:
        return inside(arguments[1:])
    build()
    return run(arguments or ["-q", str(Path(__file__).parent)])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
