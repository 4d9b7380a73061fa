"""The emulator is right about every PTX instruction that it knows.

The same kernels run on a GPU where there is one (-m gpu): then the emulator is checked against it.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.emu import build as emu_build
from tests.emu import ptx_ops
from tests.emu.build import EMU, build
from tests.emu.conformance import CASES, case
from tests.emu.kernels import Kernels, build_for_gpu

if reason := emu_build.why_not():
    pytest.skip(reason, allow_module_level=True)

LOGIC = (np.bitwise_and, np.bitwise_or, np.bitwise_xor)
MEMORY = EMU / "conformance" / "memory.cu"
DEVICES = ["emulated"]
if torch.cuda.is_available():
    DEVICES.append(pytest.param("cuda", marks=pytest.mark.gpu))  # type: ignore[arg-type]


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
    text = case.source(CASES)
    if not source.exists() or source.read_text() != text:
        part = source.with_suffix(f".{os.getpid()}")
        part.write_text(text)
        os.replace(part, source)
        shutil.copy(EMU / "harness.h", source.parent)
    return compiled(source, request.param, tmp_path_factory.mktemp("cases"))


@pytest.fixture(scope="session", params=DEVICES)
def memory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    return compiled(MEMORY, request.param, tmp_path_factory.mktemp("memory"))


@pytest.mark.parametrize(
    "index", range(len(CASES)), ids=[f"{i}-{c.name}" for i, c in enumerate(CASES)]
)
def test_instruction_gives_its_definition(case_kernels: Kernels, index: int) -> None:
    case.check(case_kernels, index, CASES[index])


def test_every_expression_of_the_table_has_a_case() -> None:
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
    u8, s8, u16 = x[:, 0], x[:, 0].view(np.int8), x.view(np.uint16)
    first_warp = np.where(np.arange(64) < 32, u8.astype(np.int64), -1)
    columns = [s8, u8, i16[:, 1], u16[:, 1], *i32.T, u32[:, 2], u32[:, 3]]
    columns += [i32[:, 1], i32[:, 1], i32[:, 2], i32[:, 3], first_warp, i16[:, 7]]
    want = np.stack(columns, 1)
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
    bits = [op.reduce(a) for op, a in zip(LOGIC, (ux | 0xFFFF0000, ux, ux), strict=True)]
    assert u.tolist() == [*bits, 384 % 17, down, ux.max(), ux.min(), 1]
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
