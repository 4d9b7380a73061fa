"""Builds every kind of wheel and runs each in a fresh environment without a compiler.

    python scripts/check_wheel.py <constraints.txt>

- from the source tree, with the options of the environment: `cp3X-cp3X`, with `_host`;
- from the sdist, without `_host`: `cp310-abi3`, one for every Python;
- from the sdist, ORTHOREG_EXT_NO_BUILD=1, without compiler and CMake in reach: `py3-none-any`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "check-wheel"
TAG = f"cp{sys.version_info.major}{sys.version_info.minor}"
PROBE = """\
import json, shutil, sys
import torch
import orthoreg_ext as ox
import orthoreg_ext.functional as F

expected = sys.argv[1] == "compiled"
info = ox.build_info()
print(json.dumps(info))
assert ox.__file__.startswith(sys.prefix), ox.__file__
compilers = ("gcc", "g++", "cc", "c++", "clang", "nvcc", "cmake", "ninja")
found = [name for name in compilers if shutil.which(name)]
assert not found, f"a compiler is in reach: {found}"
assert info["compiled"]["loaded"] is expected, info
weights = [torch.randn(6, 3, 3, 3), torch.randn(4, 7)]
for gram, weight in zip(F.gram(weights), weights):
    matrix = weight.flatten(1)
    torch.testing.assert_close(gram, matrix @ matrix.T)
"""


def run(command: list[str], **environment: str) -> None:
    """Runs a command; its output is shown only if it fails."""
    env = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", **environment}
    done = subprocess.run(
        command, env=env, cwd=FOLDER, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode:
        raise SystemExit(f"{done.stdout}\nFAILED ({done.returncode}): {' '.join(command)}")


def build_wheel(source: Path, target: str, **environment: str) -> Path:
    """Builds `source` (a folder or an sdist) into a wheel and returns its path."""
    folder = FOLDER / target
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    run([*command, "-w", str(folder), str(source)], **environment)
    (wheel,) = folder.glob("*.whl")
    print(f"    {target}: {wheel.name}, {wheel.stat().st_size / 1e6:.1f} MB", flush=True)
    return wheel


def build_sdist() -> Path:
    code = f"from setuptools import build_meta; build_meta.build_sdist({str(FOLDER / 'sdist')!r})"
    env = {**os.environ, "ORTHOREG_EXT_NO_BUILD": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    (sdist,) = (FOLDER / "sdist").glob("*.tar.gz")
    return sdist


def main() -> None:
    constraints = Path(sys.argv[1]).resolve()
    shutil.rmtree(FOLDER, ignore_errors=True)
    (FOLDER / "empty").mkdir(parents=True)
    for stale in (ROOT / "build").glob("lib*"):
        shutil.rmtree(stale)

    sdist = build_sdist()
    print(f"    sdist: {sdist.name}, {sdist.stat().st_size / 1e6:.1f} MB", flush=True)
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    wheels = {
        "native": build_wheel(ROOT, "native"),
        "abi3": build_wheel(sdist, "abi3", ORTHOREG_CUDA="OFF", ORTHOREG_HOST_MODULE="0"),
        "pure": build_wheel(sdist, "pure", ORTHOREG_EXT_NO_BUILD="1", PATH=str(FOLDER / "empty")),
    }
    tags = {
        "native": f"{TAG}-{TAG}-{platform}",
        "abi3": f"cp310-abi3-{platform}",
        "pure": "py3-none-any",
    }
    for kind, wheel in wheels.items():
        if not wheel.name.endswith(f"-{tags[kind]}.whl"):
            raise SystemExit(f"{wheel.name} should be tagged {tags[kind]}")

    venv.create(FOLDER / "venv", with_pip=True)
    python = str(FOLDER / "venv" / "bin" / "python")
    install = [python, "-m", "pip", "install", "--only-binary", ":all:"]
    run([*install, "--constraint", str(constraints), str(wheels["native"])])
    bare = {"PATH": str(FOLDER / "empty"), "CC": "", "CXX": "", "CUDA_HOME": "", "PYTHONPATH": ""}
    for kind, wheel in wheels.items():
        run([*install, "--no-deps", "--force-reinstall", str(wheel)])
        run([python, "-c", PROBE, "fallback" if kind == "pure" else "compiled"], **bare)
        print(f"    {kind}: imported and ran without a compiler", flush=True)
    shutil.rmtree(FOLDER / "venv")


if __name__ == "__main__":
    main()
