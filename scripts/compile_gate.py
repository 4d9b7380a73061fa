"""Checks what ptxas reported of every CUDA kernel: registers, shared memory, stack frames, spills.

    python scripts/compile_gate.py [BUILD_FOLDER] [--out FILE]

Reads the reports that a build with ORTHOREG_WERROR=1 leaves beside its objects (build/cmake-*; see
cmake/keep_ptxas_report.py), prints a table of kernels and architectures, and fails if

- a .cu file of csrc/cuda, or an architecture of cmake/OrthoregCuda.cmake that nvcc knows, has no
  report, so that nothing passes unseen;
- a kernel spills registers, or ptxas warns;
- a kernel uses more registers a thread than LIMITS grants it, or a larger stack frame (local
  memory) than STACKS does, or a row of one of them names no kernel.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# Registers a thread: the first row whose expression is found in a kernel's demangled name.
LIMITS: tuple[tuple[str, int], ...] = (
    (r"Tensor\w*<64\b", 128),  # 4 warps, 4 blocks a multiprocessor
    (r"", 255),  # what the hardware has
)
# Bytes of local memory a thread, found alike: an array with a computed index lies there, not in
# registers.
STACKS: tuple[tuple[str, int], ...] = (
    (r"^finish_scores_kernel\b", 64),  # its sums, a loop over criteria picks from them: 56
    (r"", 0),
)

ENTRY = re.compile(r"ptxas info\s*: Compiling entry function '(\w+)' for 'sm_(\w+)'")
SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"ptxas info\s*: Used (\d+) registers")
SHARED = re.compile(r"(\d+) bytes smem")
WARNING = re.compile(r"ptxas \S*\s*(warning|error|fatal)\s*:|: warning[ #]|\bwarning\s*:")


@dataclass
class Kernel:
    """One kernel on one architecture, as ptxas reports it."""

    name: str
    architecture: str
    registers: int = -1
    shared: int = 0  # bytes, static
    stack: int = 0  # bytes of local memory a thread, what is spilled included
    spilled: int = 0  # bytes stored and loaded


def parse(text: str) -> tuple[list[Kernel], list[str]]:
    """The kernels of a report (mangled names), and every warning in it."""
    kernels: list[Kernel] = []
    warnings = []
    for line in text.splitlines():
        if entry := ENTRY.search(line):
            kernels.append(Kernel(entry[1], entry[2]))
        elif used := USED.search(line):
            if not kernels or kernels[-1].registers >= 0:
                raise ValueError(f"registers of no kernel: {line!r}")
            kernels[-1].registers = int(used[1])
            if shared := SHARED.search(line):
                kernels[-1].shared = int(shared[1])
        elif WARNING.search(line):
            warnings.append(line.strip())
        elif kernels and kernels[-1].registers < 0 and (spills := SPILLS.search(line)):
            kernels[-1].stack = int(spills[1])
            kernels[-1].spilled = int(spills[2]) + int(spills[3])
    if unfinished := [k.name for k in kernels if k.registers < 0]:
        raise ValueError(f"no registers are reported of {unfinished[0]}: the report is cut off")
    return kernels, warnings


def demangle(names: Iterable[str]) -> dict[str, str]:
    """Readable names without the project's namespaces and the parameters."""
    unique = sorted(set(names))
    text = "\n".join(unique)
    done = subprocess.run(["c++filt"], input=text, capture_output=True, text=True, check=True)
    readable = {}
    for name, line in zip(unique, done.stdout.splitlines(), strict=True):
        line = re.sub(r"orthoreg::cuda::|orthoreg::|\(anonymous namespace\)::", "", line)
        line = re.sub(r"\((?:bool|int|unsigned int|long)\)(?=[\d-])", "", line)
        line = line.removeprefix("void ")
        line = line.replace("> >", ">>")
        if line.endswith(")"):
            line = line[: _opening(line)]
        readable[name] = line
    return readable


def _opening(line: str) -> int:
    """Where the parenthesis opens that the last character closes."""
    depth = 0
    for at in range(len(line) - 1, -1, -1):
        depth += {")": 1, "(": -1}.get(line[at], 0)
        if depth == 0:
            return at
    return len(line)


def limit_of(name: str, limits: tuple[tuple[str, int], ...] = LIMITS) -> int:
    return next(limit for expression, limit in limits if re.search(expression, name))


def problems(
    kernels: list[Kernel],  # demangled
    warnings: list[str],
    architectures: Iterable[str],
    limits: tuple[tuple[str, int], ...] = LIMITS,
    stacks: tuple[tuple[str, int], ...] = STACKS,
) -> list[str]:
    """What is wrong, one line each."""
    found = [f"warning: {line}" for line in warnings]
    for kernel in kernels:
        where = f"{kernel.name} on sm_{kernel.architecture}"
        if kernel.spilled:
            found.append(f"{where} spills {kernel.spilled} bytes")
        if kernel.registers > (limit := limit_of(kernel.name, limits)):
            found.append(f"{where} uses {kernel.registers} registers, allowed {limit}")
        if kernel.stack > (limit := limit_of(kernel.name, stacks)):
            found.append(f"{where} has a stack frame of {kernel.stack} bytes, allowed {limit}")
    for name in dict.fromkeys(k.name for k in kernels):
        has = {k.architecture for k in kernels if k.name == name}
        if missing := [a for a in architectures if a not in has]:
            found.append(f"{name} is not reported on sm_{', sm_'.join(missing)}")
    for name, rows in (("LIMITS", limits), ("STACKS", stacks)):
        for expression, _ in rows:
            if not any(re.search(expression, k.name) for k in kernels):
                found.append(f"the row {expression!r} of {name} names no kernel: was it renamed?")
    return found


def table(kernels: list[Kernel], architectures: list[str]) -> str:
    """Kernels down, architectures across: registers, the most shared and stack bytes, spills."""
    cells = {(k.name, k.architecture): k for k in kernels}
    names = list(dict.fromkeys(k.name for k in kernels))
    width = max((len(n) for n in names), default=6)
    lines = [
        f"{'kernel':{width}} {'smem':>6} {'stack':>6} "
        + " ".join(f"{'sm_' + a:>6}" for a in architectures)
    ]
    for name in names:
        row = [cells.get((name, a)) for a in architectures]
        shared = max((k.shared for k in row if k), default=0)
        stack = max((k.stack for k in row if k), default=0)
        text = [
            f"{'-' if k is None else str(k.registers) + ('!' if k.spilled else ''):>6}" for k in row
        ]
        lines.append(f"{name:{width}} {shared:6} {stack:6} " + " ".join(text))
    legend = (
        "registers a thread, ! where they spill; smem: static bytes a block; stack: bytes a thread"
    )
    return "\n".join([*lines, legend])


def expected_architectures() -> list[str]:
    """The list of cmake/OrthoregCuda.cmake, as far as the nvcc at hand knows it."""
    text = (ROOT / "cmake" / "OrthoregCuda.cmake").read_text()
    named = re.search(r"set\(ORTHOREG_DEFAULT_ARCHITECTURES ([\d ]+)\)", text)
    assert named is not None, "cmake/OrthoregCuda.cmake names no architectures"
    sys.path.insert(0, str(ROOT))
    from tests.emu.build import find_nvcc

    known = subprocess.run(
        [find_nvcc(), "--list-gpu-arch"], capture_output=True, text=True, check=True
    ).stdout
    return [a for a in named[1].split() if f"compute_{a}" in known.split()]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("build", type=Path, nargs="?", help="default: the one build/cmake-*")
    parser.add_argument("--out", type=Path, help="where to write the table too")
    options = parser.parse_args()
    tag = f"cmake-{sys.implementation.cache_tag}-*"
    build = options.build or next((ROOT / "build").glob(tag), ROOT / "build")
    architectures = expected_architectures()
    kernels: list[Kernel] = []
    found, warnings = [], []
    for source in sorted((ROOT / "csrc" / "cuda").glob("*.cu")):
        reports = list(build.rglob(f"csrc/cuda/{source.name}.o.ptxas.txt"))
        if not reports:
            found.append(f"no report of csrc/cuda/{source.name} under {build}: make build-test")
            continue
        some, said = parse(reports[0].read_text())
        kernels += some
        warnings += said
    readable = demangle(k.name for k in kernels)
    for kernel in kernels:
        kernel.name = readable[kernel.name]
    text = table(kernels, architectures)
    print(text)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text + "\n")
    found += problems(kernels, warnings, architectures)
    for line in found:
        print(f"compile gate: {line}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
