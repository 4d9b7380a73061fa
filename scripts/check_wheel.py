"""Checks the wheels that scripts/wheels.py made, or makes them first; uses them without a compiler.

    python scripts/check_wheel.py <constraints.txt> [--wheels dist] [--pythons "python3.10 ..."]

- each compiled one: its manylinux tag is what auditwheel reads from the binaries; nothing but one
  `_C` (the same file in all, of nothing but the stable ABI) and the `_host` of its CPython is
  compiled in it, and no library came along; that CPython, where it is here, imports `_host`;
- the one of this Python, the pure one, and one built from the sdist without `_host` (`cp310-abi3`)
  are installed and run in a fresh environment that has no compiler.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import sys
import venv
import zipfile
from pathlib import Path

import stable_abi
import wheels as make

FOLDER = make.BUILD / "check-wheel"
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
HOST = """\
import json, sys
sys.path[0] = sys.argv[1]
import _host
print(json.dumps(_host.build_info()))
"""


class Held:
    """What a compiled wheel holds, unpacked."""

    def __init__(self, wheel: Path) -> None:
        self.wheel, self.tag = wheel, wheel.name.split("-")[2]
        self.folder = FOLDER / "unpacked" / self.tag
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(self.folder)
        self.binaries = sorted(p.relative_to(self.folder) for p in self.folder.rglob("*.so*"))
        self.operators = self.folder / "orthoreg_ext" / "_C.abi3.so"

    def problems(self) -> list[str]:
        """What is wrong with the names, the tags and `_C`, one line each."""
        digits = self.tag.removeprefix("cp")
        host = rf"orthoreg_ext/_host\.cpython-{digits}-[\w-]+\.so"
        names = [str(path) for path in self.binaries]
        if names[:1] != ["orthoreg_ext/_C.abi3.so"] or not re.fullmatch(host, ",".join(names[1:])):
            return [f"holds {names}, expected _C.abi3.so and the _host of {self.tag}"]
        found = stable_abi.problems(self.operators)
        # sym_tag: by the versions of the symbols; torch's libraries, which no policy knows, aside.
        said = json.loads(make.auditwheel("show", "--json", str(self.wheel)))
        (metadata,) = self.folder.glob("*.dist-info/WHEEL")
        tags = re.findall(r"^Tag: (\S+)$", metadata.read_text(), re.MULTILINE)
        named = self.wheel.stem.split("-", 2)[2]
        platforms = named.split("-")[2].split(".")
        if not said["sym_tag"].startswith("manylinux_") or said["sym_tag"] not in platforms:
            found.append(f"is tagged {named}, but its symbols allow {said['sym_tag']}")
        if said["unsupported_isa"]:
            found.append("needs a newer processor than the tag says")
        if sorted(tags) != sorted(f"{self.tag}-{self.tag}-{p}" for p in platforms):
            found.append(f"is named {named}, but says of itself {tags}")
        return found


def check_compiled(compiled: list[Path], pythons: str) -> None:
    """Checks the wheels with binaries beside each other."""
    held = [Held(wheel) for wheel in compiled]
    said = [f"{h.wheel.name} {line}" for h in held for line in h.problems()]
    if len({hashlib.sha256(h.operators.read_bytes()).digest() for h in held}) > 1:
        said.append("the wheels hold different files _C.abi3.so")
    if said:
        raise SystemExit("\n".join(said))
    here = {interpreter.tag: interpreter for interpreter in make.interpreters(pythons)}
    built = {}
    for h in held:
        if h.tag not in here:
            print(f"    {h.tag}: contents and tags are right; no such Python here to import it")
            continue
        folder = str(h.folder / "orthoreg_ext")
        built[h.tag] = json.loads(make.run([here[h.tag].executable, "-c", HOST, folder]))
        print(f"    {h.tag}: {h.wheel.name} holds what it says; _host imports", flush=True)
    if any(info != next(iter(built.values())) for info in built.values()):
        raise SystemExit(f"the modules _host were built in different ways: {built}")


def check_runs(wheels: dict[str, Path], constraints: Path) -> None:
    """Installs and runs each wheel of this Python in an environment without a compiler."""
    empty = FOLDER / "empty"
    bare = {"PATH": str(empty), "CC": "", "CXX": "", "CUDA_HOME": "", "PYTHONPATH": ""}
    venv.create(FOLDER / "venv", with_pip=True)
    python = str(FOLDER / "venv" / "bin" / "python")
    install = [python, "-m", "pip", "install", "--only-binary", ":all:"]
    for kind, wheel in wheels.items():
        options = ["--no-deps", "--force-reinstall"]
        if kind == next(iter(wheels)):
            options = ["--constraint", str(constraints)]
        make.run([*install, *options, str(wheel)], cwd=FOLDER)
        expected = "fallback" if kind == "pure" else "compiled"
        make.run([python, "-c", PROBE, expected], cwd=FOLDER, **bare)
        print(f"    {kind}: imported and ran without a compiler", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("constraints", type=Path, help="binds pip to the torch to test with")
    parser.add_argument("--wheels", type=Path, help="where they lie; without it they are made")
    parser.add_argument("--pythons", default=os.environ.get("PYTHONS", ""))
    arguments = parser.parse_args()
    shutil.rmtree(FOLDER, ignore_errors=True)
    (FOLDER / "empty").mkdir(parents=True)
    folder = (arguments.wheels or FOLDER / "dist").resolve()
    if arguments.wheels is None:
        make.build_all(folder, arguments.pythons)
    (sdist,) = folder.glob("*.tar.gz")
    (pure,) = folder.glob("*-py3-none-any.whl")
    compiled = sorted(set(folder.glob("*.whl")) - {pure})
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    own = [wheel for wheel in compiled if f"-{tag}-" in wheel.name]
    if not own:
        raise SystemExit(f"{folder} has no wheel for this Python, {tag}: {compiled}")
    check_compiled(compiled, arguments.pythons)
    plain = {"ORTHOREG_CUDA": "OFF", "ORTHOREG_HOST_MODULE": "0"}
    abi3 = make.build_wheel(sdist, FOLDER / "abi3", **plain)
    make.show("abi3, from the sdist", abi3)
    if "-cp310-abi3-linux" not in abi3.name:
        raise SystemExit(f"{abi3.name} should be tagged cp310-abi3")
    # The sdist is enough for the fallback, with nothing in reach that compiles.
    bare = {"ORTHOREG_EXT_NO_BUILD": "1", "PATH": str(FOLDER / "empty")}
    again = make.build_wheel(sdist, FOLDER / "pure", **bare)
    if again.name != pure.name:
        raise SystemExit(f"{again.name} should be {pure.name}")
    check_runs({"native": own[0], "abi3": abi3, "pure": again}, arguments.constraints.resolve())
    shutil.rmtree(FOLDER / "venv")


if __name__ == "__main__":
    main()
