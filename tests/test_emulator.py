"""The emulator of tests/emu: right about every PTX instruction, and able to find what it claims.

The conformance tests also run on a GPU where there is one (-m gpu), with the same sources.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.emu import bugs, conformance, sanitize
from tests.emu import build as emu_build
from tests.emu.build import EMU, Sanitizer, build
from tests.emu.conformance.cases import CASES
from tests.emu.kernels import Kernels, Launches, build_for_gpu
from tests.emu.ptx2cpp import translate
from tests.emu.ptx_parse import TranslationError

try:
    emu_build.find_nvcc()
except emu_build.NvccMissingError as missing:
    pytest.skip(str(missing), allow_module_level=True)

ORDERS = ("up", "down", "1")
MEMORY = EMU / "conformance" / "memory.cu"
DEVICES = [
    "emulated",
    *([pytest.param("cuda", marks=pytest.mark.gpu)] if torch.cuda.is_available() else []),
]


@pytest.fixture(autouse=True)
def _plain_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_EMU_ORDER", raising=False)
    monkeypatch.delenv("CUDA_EMU_SMS", raising=False)


def compiled(source: Path, device: str, folder: Path) -> Kernels:
    if device == "emulated":
        return Kernels(build([source], folder / f"{source.stem}.so"))
    return Kernels(build_for_gpu(source, folder / f"{source.stem}-gpu.so"), gpu=True)


@pytest.fixture(scope="session", params=DEVICES)
def case_kernels(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Kernels:
    # At a fixed place, so that the cache knows it again.
    source = emu_build.cache_folder() / "conformance" / "cases.cu"
    source.parent.mkdir(exist_ok=True)
    text = conformance.source(CASES)
    if not source.exists() or source.read_text() != text:
        part = source.with_suffix(f".{os.getpid()}")
        part.write_text(text)
        os.replace(part, source)
        shutil.copy(EMU / "harness.h", source.parent)
    return compiled(source, request.param, tmp_path_factory.mktemp("cases"))


@pytest.fixture(scope="session", params=DEVICES)
def memory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    return compiled(MEMORY, request.param, tmp_path_factory.mktemp("memory"))


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    return compiled(MEMORY, "emulated", tmp_path_factory.mktemp("emulated"))


# Conformance


@pytest.mark.parametrize(
    "index", range(len(CASES)), ids=[f"{i}-{c.name}" for i, c in enumerate(CASES)]
)
def test_instruction_gives_its_definition(case_kernels: Kernels, index: int) -> None:
    conformance.check(case_kernels, index, CASES[index])


def test_every_expression_of_the_table_has_a_case() -> None:
    from tests.emu import ptx_ops

    text = " ".join(c.ptx for c in CASES) + MEMORY.read_text()
    opcodes = set(re.findall(r"[a-z][\w.:]*\.[\w.:]+", text))
    # No definition to compare with, or addresses that change from run to run.
    unseen = {
        "activemask",
        "cvta",
        "isspacep.shared",
        "isspacep.shared::cta",
        "isspacep.global",
        "fns",
    }
    unseen |= {
        "testp.normal",
        "testp.subnormal",
        "mad24.lo",
        "dp4a.s32.s32",
        "mad",
        "mad.hi",
        "selp",
        "cvta",
    }
    for key in set(ptx_ops.EXPRESSIONS) - unseen:
        words = key.split(".")
        assert any(
            o.split(".")[0] == words[0] and set(words) <= set(o.split(".")) for o in opcodes
        ), f"no case uses {key}"


def test_half_conversions_of_all_patterns(memory: Kernels) -> None:
    bits = np.arange(65536, dtype=np.uint16)
    # Every number of both formats, its neighbours, and the halfway points between two numbers.
    numbers = np.concatenate(
        [bits.view(np.float16).astype(np.float32), (bits.astype(np.uint32) << 16).view(np.float32)]
    )
    middle = np.concatenate([
        (numbers[:65536].view(np.uint32) + np.uint32(0x1000)).view(np.float32),
        (numbers[65536:].view(np.uint32) + np.uint32(0x8000)).view(np.float32),
    ])  # fmt: skip
    x = np.concatenate([numbers, middle])
    x = np.concatenate(
        [
            x,
            (x.view(np.uint32) + np.uint32(1)).view(np.float32),
            (x.view(np.uint32) - np.uint32(1)).view(np.float32),
        ]
    )
    n = len(x)
    widened, narrowed = np.zeros(2 * 65536, np.float32), np.zeros(5 * n, np.uint16)
    memory("run_halves", bits, x, widened, narrowed, n)

    def torch_bits(values: torch.Tensor) -> np.ndarray[Any, Any]:
        out = values.view(torch.int16).numpy().view(np.uint16)
        return np.where(torch.isnan(values).numpy(), 0x7FFF, out)

    raw = torch.from_numpy(bits.view(np.int16))
    for k, kind in enumerate((torch.float16, torch.bfloat16)):
        np.testing.assert_array_equal(
            widened[65536 * k : 65536 * (k + 1)], raw.view(kind).float().numpy()
        )
    half, brain = (
        torch_bits(torch.from_numpy(x).to(kind)) for kind in (torch.float16, torch.bfloat16)
    )
    for got, want in zip(narrowed.reshape(5, n), (half, brain, half, half, brain), strict=True):
        np.testing.assert_array_equal(got, want)


def test_loads_and_stores(memory: Kernels) -> None:
    x = np.random.default_rng(0).integers(0, 256, (64, 16), dtype=np.uint8)
    out = np.zeros((64, 16), np.int64)
    memory("run_loads", x, out)
    i32, u32, i16 = x.view(np.int32), x.view(np.uint32), x.view(np.int16)
    want = np.stack([
        x[:, 0].view(np.int8), x[:, 0], i16[:, 1], x.view(np.uint16)[:, 1], *i32.T, u32[:, 2], u32[:, 3], i32[:, 1], i32[:, 1],
        i32[:, 2], i32[:, 3], np.where(np.arange(64) < 32, x[:, 0].astype(np.int64), -1), i16[:, 7],
    ], 1)  # fmt: skip
    np.testing.assert_array_equal(out, want)


def test_atomics(memory: Kernels) -> None:
    x = np.random.default_rng(0).integers(-1000, 1000, 384, dtype=np.int32)
    i, u = (
        np.array([0, 9999, -9999, 0, 0, 0, 0], np.int32),
        np.array([2**32 - 1, 0, 0, 0, 0, 0, 2**32 - 1, 0], np.uint32),
    )
    f, d, long = np.zeros(1, np.float32), np.zeros(1), np.zeros(2, np.uint64)
    memory("run_atomics", x, i, u, f, d, long)
    total, ux, eight = int(x.sum()), x.view(np.uint32), int(np.fmod(x, 8).sum())
    assert i.tolist() == [total, x.min(), x.max(), -total, total, 0, total]
    down = 0
    for _ in range(384):
        down = 16 if down == 0 else down - 1
    assert u.tolist() == [
        np.bitwise_and.reduce(ux | 0xFFFF0000), np.bitwise_or.reduce(ux), np.bitwise_xor.reduce(ux), 384 % 17, down, ux.max(), ux.min(), 1,
    ]  # fmt: skip
    assert (f[0], d[0]) == (eight, 0.5 * eight)
    assert long.tolist() == [total % 2**64, int(ux.max())]


def test_asynchronous_copies_take_some_bytes_and_zero_the_rest(memory: Kernels) -> None:
    x = np.random.default_rng(0).integers(1, 256, 64 * 32, dtype=np.uint8)
    out = np.zeros(64 * 33, np.uint8)
    memory("run_copies", x, out)
    want = x.reshape(64, 32).copy()
    for t in range(64):
        for start, size in ((0, 16), (16, 8), (24, 4)):
            want[t, start + x[t] % (size + 1) : start + size] = 0
        if t < 32:
            want[t, 28:] = 0  # ignore-src
    np.testing.assert_array_equal(out[: 64 * 32].reshape(64, 32), want)
    np.testing.assert_array_equal(out[64 * 32 :], want[:, 0])


def test_matrix_loads(memory: Kernels) -> None:
    x = np.random.default_rng(0).integers(0, 65536, (4, 8, 8), dtype=np.uint16)
    out = np.zeros((32, 14), np.uint32)
    memory("run_matrices", x, out)
    plain = [np.ascontiguousarray(m).view(np.uint32).reshape(32) for m in x]
    turned = [np.ascontiguousarray(m.T).view(np.uint32).reshape(32) for m in x]
    want = [plain[k] for k in (0, 0, 1, 0, 1, 2, 3)] + [turned[k] for k in (0, 0, 1, 0, 1, 2, 3)]
    np.testing.assert_array_equal(out, np.stack(want, 1))


def test_barriers_votes_and_names(memory: Kernels) -> None:
    x = np.random.default_rng(0).integers(-50, 50, 128, dtype=np.int32)
    for high in (0, 200):
        x[7] = high
        out = np.zeros((128, 3), np.int32)
        memory("run_barriers", x, out)
        t = np.arange(128)
        np.testing.assert_array_equal(out[:, 0], (x > 0).sum() + np.where(t < 64, 0, x[127 - t]))
        np.testing.assert_array_equal(out[:, 1], 1 + 2 * (high > 100))
        np.testing.assert_array_equal(out[:, 2], x[t // 64 * 64])


def test_calls_tables_constants_and_parameters(memory: Kernels) -> None:
    x = np.random.default_rng(0).integers(0, 1000, 64, dtype=np.int32)
    out = np.zeros((64, 8), np.int32)
    memory("run_calls", x, out)
    primes = [2, 3, 5, 7, 11, 13, 17, 19]
    for t, v in enumerate(x.tolist()):
        low, place = v & 0xFF, v >> 3 & 7
        assert out[t].tolist() == [
            2 * low if v & 1 else low * low,
            int(np.prod(range(1, (v & 7) + 1))),
            v + primes[(place + v) & 7] + (1000 if place == v & 7 else 0),
            x[63 - t], 3 * (t % 50), (200, 300)[v & 1] + 5, 10 * (1 + v % 4), x[63 - t],
        ]  # fmt: skip


# What stops a launch


@pytest.mark.parametrize(
    ("what", "text"),
    [
        (
            1,
            r"memory\.cu:\d+: assertion failed: threadIdx\.x < 3 \(block \(0,0,0\) thread \(3,0,0\)\)",
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
    with pytest.raises(RuntimeError, match="nobody called cudaGetLastError.*65 threads"):
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
        RuntimeError, match="CUDA_EMU_ORDER is 'sideways'; expected up, down or a number"
    ):
        emulated("run_stops", np.zeros(32, np.int32), 0)


# Planted bugs

ROW_BUGS = {
    "": "error ok",
    "MISSING_SYNC": "error",
    "SHARED_OVERRUN": r"wrote past the end of row_sum\(.*\)::part",
    "MISALIGNED": r"row_sum\.cu:\d+: misaligned access of 8 bytes",
    "DIVERGENT": r"row_sum\.cu:\d+: divergent barrier: other threads wait at .*row_sum\.cu:\d+",
    "DEADLOCK": r"deadlock: 16 threads returned, 16 wait at .*row_sum\.cu:\d+, 96 wait at .*row_sum\.cu:\d+",
    "SHUFFLE": r"row_sum\.cu:\d+: shuffle reads lane \d+, which is not in its mask",
    "TOO_MANY_THREADS": "256 threads, but its __launch_bounds__ say 128",
    "BLOCK_RACE": "error",
}
PIPELINE_BUGS = {
    "": "error ok",
    "MISSING_SYNC": "error",
    "LAX_WAIT": "error",
    "SWAPPED_OPERANDS": "error",
    "NO_OPT_IN": r"73728 bytes of dynamic shared memory, but 49152 are allowed; call cudaFuncSetAttribute",
}
BUGS = [("row_sum", b, w) for b, w in ROW_BUGS.items()] + [
    ("pipeline", b, w) for b, w in PIPELINE_BUGS.items()
]
SANITIZED: list[tuple[str, str, Sanitizer, str]] = [
    ("row_sum", "", "address", ""),
    ("row_sum", "", "thread", ""),
    ("pipeline", "", "address", ""),
    ("pipeline", "", "thread", ""),
    ("row_sum", "MISSING_SYNC", "thread", r"data race tests/emu/bugs/row_sum\.cu:25 "),
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


# The translator and the build


def ptx(body: str) -> str:
    return (
        ".version 9.0\n.target sm_90\n.address_size 64\n.visible .entry kernel()\n{\n.reg .pred %p<2>;\n.reg .b32 %r<9>;\n"
        f'.reg .f32 %f<9>;\n.reg .b64 %rd<9>;\n.loc 1 17 3\n{body}\nret;\n}}\n.file 1 "some/kernel.cu"\n'
    )


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
        f'#include "value.h"\n#include "{EMU / "harness.h"}"\n#ifndef MORE\n#define MORE 0\n#endif\n'
        "__global__ void k(int* x) { *x = VALUE + MORE; }\nLAUNCHER(run)(int* x) { return guarded([&] { k<<<1, 1>>>(x); }); }\n"
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
