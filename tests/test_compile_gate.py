"""scripts/compile_gate.py sees a spill, a stack frame, a warning, too many registers, gaps."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent


def script(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


gate = script("scripts/compile_gate.py")


def report(
    registers: int = 96, spilled: int = 0, architecture: str = "90", stack: tuple[int, int] = (8, 0)
) -> str:
    """What ptxas -v prints of two kernels."""
    return f"""\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z5firstPf' for 'sm_{architecture}'
ptxas info    : Function properties for _Z5firstPf
    {stack[0] + spilled} bytes stack frame, {spilled} bytes spill stores, 0 bytes spill loads
ptxas info    : Used {registers} registers, used 1 barriers, 9280 bytes smem, 8 bytes cmem[2]
ptxas info    : Compile time = 72.062 ms
ptxas info    : Compiling entry function '_Z6secondPf' for 'sm_{architecture}'
ptxas info    : Function properties for _Z6secondPf
    {stack[1]} bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 12 registers, used 0 barriers
"""


LIMITS = (("first", 128), ("", 255))
STACKS = (("first", 64), ("", 0))


def found(text: str, architectures: tuple[str, ...] = ("90",)) -> list[str]:
    kernels, warnings = gate.parse(text)
    return list(gate.problems(kernels, warnings, architectures, LIMITS, STACKS))


def test_a_clean_report_passes_and_is_read() -> None:
    kernels, warnings = gate.parse(report())
    assert warnings == []
    assert [(k.name, k.registers, k.shared, k.stack, k.spilled) for k in kernels] == [
        ("_Z5firstPf", 96, 9280, 8, 0),
        ("_Z6secondPf", 12, 0, 0, 0),
    ]
    assert found(report()) == []
    assert found(report(registers=128, stack=(64, 0))) == []


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (report(spilled=24), "_Z5firstPf on sm_90 spills 24 bytes"),
        (report(registers=129), "_Z5firstPf on sm_90 uses 129 registers, allowed 128"),
        (report(stack=(72, 0)), "_Z5firstPf on sm_90 has a stack frame of 72 bytes, allowed 64"),
        (report(stack=(0, 8)), "_Z6secondPf on sm_90 has a stack frame of 8 bytes, allowed 0"),
        (report().replace("first", "other"), "the row 'first' of LIMITS names no kernel"),
        (report().replace("first", "other"), "the row 'first' of STACKS names no kernel"),
        (report() + "ptxas warning : Registers are spilled to local memory", "warning: ptxas"),
        (report() + 'a.cu(3): warning #177-D: variable "x" was declared', "warning: a.cu(3)"),
        ("", "the row 'first' of LIMITS names no kernel"),
    ],
)
def test_what_is_wrong_is_named(text: str, problem: str) -> None:
    assert any(line.startswith(problem) for line in found(text)), found(text)


def test_every_architecture_must_be_there() -> None:
    both = report() + report(architecture="80")
    assert found(both, ("80", "90")) == []
    assert "_Z5firstPf is not reported on sm_80" in found(report(), ("80", "90"))


def test_a_report_that_is_cut_off_is_an_error() -> None:
    with pytest.raises(ValueError, match="_Z6secondPf: the report is cut off"):
        gate.parse(report().rpartition("ptxas info    : Used")[0])


def test_names_are_readable() -> None:
    name = "_ZN8orthoreg4cuda11gram_kernelIfNS0_10TensorTileILi64ELb1EEEEEvNS0_8ProblemsEPT_Pd"
    assert gate.demangle([name])[name] == "gram_kernel<float, TensorTile<64, true>>"
    assert gate.limit_of("gram_kernel<float, TensorTile<64, true>>") == 128
    assert gate.limit_of("gram_kernel<float, TensorTile<640, true>>") == 255


def test_the_table_shows_every_kernel_and_marks_spills() -> None:
    kernels, _ = gate.parse(report(spilled=4) + report(architecture="80", stack=(56, 0)))
    text = gate.table(kernels, ["80", "90"])
    assert "sm_80  sm_90" in text
    assert [line.split() for line in text.splitlines()[1:3]] == [
        ["_Z5firstPf", "9280", "56", "96", "96!"],
        ["_Z6secondPf", "0", "0", "12", "12"],
    ]


@pytest.mark.parametrize("code", [0, 2])
def test_the_launcher_keeps_the_report_and_shows_the_rest(tmp_path: Path, code: int) -> None:
    out = tmp_path / "kernels.cu.o"
    kept = Path(f"{out}.ptxas.txt")
    kept.write_text("of an earlier build")
    print_it = f"import sys; print({report()!r} + 'some warning'); sys.exit({code})"
    launcher = [sys.executable, str(ROOT / "cmake" / "keep_ptxas_report.py")]
    done = subprocess.run(
        [*launcher, sys.executable, "-c", print_it, "-o", str(out)], capture_output=True, text=True
    )
    assert done.returncode == code
    assert done.stdout == "some warning\n"
    assert kept.exists() == (code == 0)
    if code == 0:
        assert kept.read_text() == report() + "some warning\n"
