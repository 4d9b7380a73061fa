"""The emulator stops what a GPU would not run, and finds the bugs that it claims to find."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.emu import bugs, sanitize
from tests.emu import build as emu_build
from tests.emu.build import EMU, Sanitizer, build
from tests.emu.kernels import Kernels, Launches
from tests.emu.ptx2cpp import translate
from tests.emu.ptx_parse import TranslationError

if reason := emu_build.why_not():
    pytest.skip(reason, allow_module_level=True)

ORDERS = ("up", "down", "1")
MEMORY = EMU / "conformance" / "memory.cu"


@pytest.fixture(autouse=True)
def _plain_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_EMU_ORDER", raising=False)
    monkeypatch.delenv("CUDA_EMU_SMS", raising=False)


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    return Kernels(build([MEMORY], tmp_path_factory.mktemp("emulated") / "memory.so"))


# What stops a launch


@pytest.mark.parametrize(
    ("what", "text"),
    [
        (
            1,
            r"memory\.cu:\d+: assertion failed: threadIdx\.x < 3 .*thread \(3,0,0\)",
        ),
        (2, r"memory\.cu:\d+: trap .*thread \(4,0,0\)"),
        (3, r"memory\.cu:\d+: access of 4 bytes through a null pointer"),
        (4, r"memory\.cu:\d+: barrier of 48 threads"),
    ],
)
def test_a_failed_launch_names_its_line_and_harms_no_other(
    emulated: Kernels, what: int, text: str
) -> None:
    out = np.zeros(32, np.int32)
    with pytest.raises(RuntimeError, match=text):
        emulated("run_stops", out, what)
    emulated("run_stops", out, 0)
    assert out.tolist() == list(range(32))


@pytest.mark.parametrize(
    ("launch", "text"),
    [
        ((1, 65, 512, -1), "65 threads, but its __launch_bounds__ say 64"),
        ((1, 0, 512, -1), "InvalidConfiguration"),
        ((1, 2000, 512, -1), "InvalidConfiguration"),
        ((65536, 64, 512, -1), "a grid of 1x65536x1"),
        ((1, 64, 50_000, -1), "cudaFuncSetAttribute"),
        ((1, 64, 512, 232_449), "of 232448"),
        ((1, 64, 60_000, 59_000), "60000 bytes"),
    ],
)
def test_launch_limits_are_the_ones_of_a_gpu(
    tmp_path: Path, launch: tuple[int, int, int, int], text: str
) -> None:
    fresh = Kernels(
        build([MEMORY], tmp_path / "limits.so")
    )  # its own record of cudaFuncSetAttribute
    out = np.zeros(64, np.int32)
    with pytest.raises(RuntimeError, match=text):
        fresh("run_limits", out, *launch)
    fresh("run_limits", out, 1, 64, 60_000, 232_448)
    assert out.tolist() == [1] * 64


def test_an_error_that_nobody_asked_for_fails_the_next_launch(emulated: Kernels) -> None:
    with pytest.raises(RuntimeError, match=r"nobody called cudaGetLastError.*65 threads"):
        emulated("run_unchecked", np.zeros(64, np.int32))


def test_host_code_sees_a_device(emulated: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    out = np.full(7, -1, np.int32)
    monkeypatch.setenv("CUDA_EMU_SMS", "7")
    emulated("run_device", out)
    assert out.tolist() == [0, 7, 232_448, 2, 64, 0, 64]


def test_launches_are_counted(tmp_path: Path) -> None:
    library = build([MEMORY], tmp_path / "counted.so")
    kernels, launches = Kernels(library), Launches(library)
    with launches.counted() as names:
        kernels("run_stops", np.zeros(32, np.int32), 0)
        kernels("run_stops", np.zeros(32, np.int32), 0)
    assert len(names) == 2
    assert all("stops" in name for name in names)


def test_an_unknown_order_is_an_error(emulated: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_EMU_ORDER", "sideways")
    with pytest.raises(
        RuntimeError, match=r"CUDA_EMU_ORDER is 'sideways'; expected up, down or a number"
    ):
        emulated("run_stops", np.zeros(32, np.int32), 0)


def test_a_kernel_may_print(emulated: Kernels, capfd: pytest.CaptureFixture[str]) -> None:
    emulated("run_stops", np.zeros(32, np.int32), 5)
    assert capfd.readouterr().err == f"one 2| 3.25|{1 << 40}%\n"


def test_torch_operators_raise_with_the_line(tmp_path: Path) -> None:
    torch.ops.load_library(str(build([EMU / "conformance" / "operator.cu"], tmp_path / "op.so")))
    x = torch.arange(6.0)
    with pytest.raises(RuntimeError, match=r"operator\.cu:\d+: assertion failed: x\[i\] >= 0"):
        torch.ops.emulator_test.roots(-x)
    torch.testing.assert_close(torch.ops.emulator_test.roots(x), x.sqrt())


# Planted bugs

ROW_BUGS = {
    "": "error ok",
    "MISSING_SYNC": "error",
    "SHARED_OVERRUN": r"wrote past the end of row_sum\(.*\)::part",
    "MISALIGNED": r"row_sum\.cu:\d+: misaligned access of 8 bytes",
    "DIVERGENT": r"row_sum\.cu:\d+: divergent barrier: other threads wait at .*row_sum\.cu:\d+",
    "DEADLOCK": r"deadlock: 16 threads returned, 16 wait at .*row_sum\.cu:\d+, 96 wait at ",
    "SHUFFLE": r"row_sum\.cu:\d+: shuffle reads lane \d+, which is not in its mask",
    "TOO_MANY_THREADS": "256 threads, but its __launch_bounds__ say 128",
    "BLOCK_RACE": "error",
}
PIPELINE_BUGS = {
    "": "error ok",
    "MISSING_SYNC": "error",
    "LAX_WAIT": "error",
    "SWAPPED_OPERANDS": "error",
    "NO_OPT_IN": r"73728 bytes of dynamic shared memory, but 49152 are allowed; call cudaFunc",
}
BUGS = [("row_sum", b, w) for b, w in ROW_BUGS.items()] + [
    ("pipeline", b, w) for b, w in PIPELINE_BUGS.items()
]
SANITIZED: list[tuple[str, str, Sanitizer, str]] = [
    ("row_sum", "", "address", ""),
    ("row_sum", "", "thread", ""),
    ("pipeline", "", "address", ""),
    ("pipeline", "", "thread", ""),
    ("row_sum", "MISSING_SYNC", "thread", r"data race tests/emu/bugs/row_sum\.cu:\d+ "),
    ("row_sum", "BLOCK_RACE", "thread", r"data race tests/emu/bugs/row_sum\.cu:\d+ "),
    ("row_sum", "SHARED_OVERRUN", "address", r"use-after-poison tests/emu/bugs/row_sum\.cu:\d+ "),
    (
        "row_sum",
        "GLOBAL_OVERRUN",
        "address",
        r"heap-buffer-overflow tests/emu/bugs/row_sum\.cu:\d+ ",
    ),
    (
        "pipeline",
        "MISSING_SYNC",
        "thread",
        r"data race[\s\S]*f__Z4gram\S+ tests/emu/bugs/pipeline\.cu:\d+ ",
    ),
    (
        "pipeline",
        "LAX_WAIT",
        "thread",
        r"data race[\s\S]*f__Z4gram\S+ tests/emu/bugs/pipeline\.cu:\d+ ",
    ),
]


@pytest.fixture(scope="session")
def bug_libraries(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder = tmp_path_factory.mktemp("bugs")
    with ThreadPoolExecutor(1) as pool:  # in the order of the tests, ahead of them

        def make(kernel: str, bug: str, checked: Sanitizer | None) -> Path:
            defines = [f"BUG_{bug}"] if bug else []
            out = folder / f"{kernel}-{bug}-{checked}.so"
            return build([bugs.FOLDER / f"{kernel}.cu"], out, sanitize=checked, defines=defines)

        wanted = [(k, b, None) for k, b, _ in BUGS] + [(k, b, s) for k, b, s, _ in SANITIZED]
        futures = {w: pool.submit(make, *w) for w in wanted}
        yield lambda *w: futures[w].result()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("kernel", "bug", "want"), BUGS, ids=[f"{k}-{b or 'clean'}" for k, b, _ in BUGS]
)
def test_planted_bugs_show_in_every_schedule(
    bug_libraries: Any,
    monkeypatch: pytest.MonkeyPatch,
    kernel: str,
    bug: str,
    want: str,
    order: str,
) -> None:
    library = bug_libraries(kernel, bug, None)
    monkeypatch.setenv("CUDA_EMU_ORDER", order)
    if want.startswith("error"):
        error = bugs.run(library)
        assert (error < 2e-4) == (want == "error ok"), f"error {error}"
    else:
        with pytest.raises(RuntimeError, match=want):
            bugs.run(library)


@pytest.mark.parametrize(
    ("kernel", "bug", "checked", "want"), SANITIZED, ids=["-".join(s[:3]) for s in SANITIZED]
)
def test_sanitizers_name_the_line_and_pass_clean_kernels(
    bug_libraries: Any, kernel: str, bug: str, checked: Sanitizer, want: str
) -> None:
    library = bug_libraries(kernel, bug, checked)
    done = sanitize.run_python(checked, ["-m", "tests.emu.bugs", str(library)])
    if want:
        assert done.returncode != 0
        assert re.search(want, done.stderr), done.stderr[-4000:]
    else:
        assert done.returncode == 0, done.stdout + done.stderr
        assert float(done.stdout.split()[-1]) < 2e-4


@pytest.mark.parametrize("checked", ["address", "thread"])
def test_a_failed_launch_is_an_exception_under_sanitizers_too(
    checked: Sanitizer, tmp_path: Path
) -> None:
    library = build([MEMORY], tmp_path / "stops.so", sanitize=checked)
    program = (
        "import numpy, sys; from pathlib import Path; from tests.emu.kernels import Kernels\n"
        "k, x = Kernels(Path(sys.argv[1])), numpy.zeros(32, numpy.int32)\n"
        "try: k('run_stops', x, 2)\n"
        "except RuntimeError as e: print(e)\n"
        "k('run_stops', x, 0); print(x.sum())"
    )
    done = sanitize.run_python(checked, ["-c", program, str(library)])
    assert done.returncode == 0, done.stderr
    assert re.search(r"memory\.cu:\d+: trap", done.stdout)
    assert done.stdout.endswith(f"{sum(range(32))}\n")


def test_a_report_fails_a_run_whose_tests_pass(bug_libraries: Any, tmp_path: Path) -> None:
    library = bug_libraries("row_sum", "MISSING_SYNC", "thread")
    test = tmp_path / "test_bug.py"
    test.write_text(
        "from pathlib import Path\nfrom tests.emu import bugs\n"
        f"def test_it_runs():\n    bugs.run(Path({str(library)!r}))\n"
    )
    done = sanitize.run("thread", ["-q", f"--rootdir={tmp_path}", str(test)])
    assert "1 passed" in done.stdout, done.stdout + done.stderr
    assert done.returncode != 0
    assert re.search(r"data race tests/emu/bugs/row_sum\.cu:\d+", done.stderr)


# The translator and the build


def ptx(body: str) -> str:
    head = ".version 9.0\n.target sm_90\n.address_size 64\n.visible .entry kernel()\n{\n"
    registers = ".reg .pred %p<2>;\n.reg .b32 %r<9>;\n.reg .f32 %f<9>;\n.reg .b64 %rd<9>;\n"
    return f'{head}{registers}.loc 1 17 3\n{body}\nret;\n}}\n.file 1 "some/kernel.cu"\n'


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (
            "frobnicate.b32 %r1, %r2;",
            r"some/kernel\.cu:17: .* instruction 'frobnicate\.b32' .*add a row to EXPRESSIONS",
        ),
        (
            "mul.lo.sat.s32 %r1, %r2, %r3;",
            r"kernel\.cu:17: .*'mul\.lo\.sat\.s32' \(modifier \.sat\)",
        ),
        ("add.s32 %r1, %r2, %nonesuch;", r"the operand '%nonesuch'"),
        ("add.s32 %r1, %r2;", r"2 operands of 'add\.s32 %r1, %r2' \(its row has 3\)"),
        ("mbarrier.init.shared.b64 [%r1], 1;", "mbarriers are not emulated"),
        ("wgmma.fence.sync.aligned;", "warpgroup matrix instructions are not emulated"),
        ("cp.async.bulk.commit_group;", r"bulk copies \(TMA\)"),
        (
            "mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%rd1}, {%rd2}, {%rd3}, {%rd4};",
            "table MMA|modifier .m8n8k4",
        ),
        ("mov.u32 %r1, %cluster_ctaid.x;", "the operand '%cluster_ctaid.x'"),
        (
            "call.uni elsewhere, ();",
            "the function 'elsewhere', which is not in this translation unit",
        ),
    ],
)
def test_what_is_not_known_is_refused_with_line_and_remedy(body: str, text: str) -> None:
    with pytest.raises(TranslationError, match=text):
        translate(ptx(body))


def test_clusters_are_refused() -> None:
    with pytest.raises(TranslationError, match="asks for clusters"):
        translate(
            ptx("").replace("kernel()", "kernel()\n.explicitcluster\n.reqnctapercluster 2, 1, 1")
        )


def test_toolkit_headers_are_reported_at_the_line_that_uses_them() -> None:
    text = translate(
        ptx(".loc 2 5 1, function_name $x, inlined_at 1 23 4\nadd.s32 %r1, %r2, %r3;").replace(
            '.file 1 "some/kernel.cu"',
            '.file 1 "some/kernel.cu"\n.file 2 "/toolkit/include/math.h"',
        ),
        toolkit="/toolkit/include",
    )
    assert '#line 23 "some/kernel.cu"' in text
    assert "math.h" not in text


def test_compiler_errors_come_with_their_command(tmp_path: Path) -> None:
    source = tmp_path / "broken.cu"
    source.write_text("__global__ void k() { nonsense; }\n")
    with pytest.raises(RuntimeError, match=r"nvcc failed[\s\S]*nonsense"):
        build([source])


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CUDACXX", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(shutil, "which", lambda *_: None)
    emu_build.find_nvcc.cache_clear()
    try:
        with pytest.raises(
            emu_build.NvccMissingError, match="install it and put it on the PATH or set CUDA_HOME"
        ):
            emu_build.find_nvcc()
    finally:
        emu_build.find_nvcc.cache_clear()


def test_the_cache_follows_headers_and_defines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ORTHOREG_EMU_CACHE", str(tmp_path / "cache"))
    (tmp_path / "value.h").write_text("#define VALUE 1\n")
    source = tmp_path / "small.cu"
    source.write_text(
        f'''#include "value.h"
#include "{EMU / "harness.h"}"
#ifndef MORE
#define MORE 0
#endif
__global__ void k(int* x) {{ *x = VALUE + MORE; }}
LAUNCHER(run)(int* x) {{ return guarded([&] {{ k<<<1, 1>>>(x); }}); }}
'''
    )

    def value(**options: Any) -> tuple[Path, int]:
        library = build([source], **options)
        out = np.zeros(1, np.int32)
        Kernels(library)("run", out)
        return library, int(out[0])

    first = value()
    assert first[1] == 1
    assert value() == first
    assert value(defines=["MORE=5"])[1] == 6
    (tmp_path / "value.h").write_text("#define VALUE 2\n")
    changed = value()
    assert changed[1] == 2
    assert changed[0] != first[0]
