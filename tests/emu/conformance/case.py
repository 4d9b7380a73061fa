"""Every PTX instruction that the emulator knows against an independent definition of it.

`integers.py`, `floats.py` and `warps.py` hold a line an instruction. The kernels made of them
(`source`) run emulated and, where there is a GPU, on it: the emulator is right where both agree
with the definition.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tests.emu.conformance.exact import Array, to_double
from tests.emu.kernels import Kernels

# type -> (C++, inline assembly constraint, numpy)
TYPES: dict[str, tuple[str, str, Any]] = {
    "u16": ("uint16_t", "h", np.uint16),
    "s16": ("int16_t", "h", np.int16),
    "u32": ("uint32_t", "r", np.uint32),
    "s32": ("int32_t", "r", np.int32),
    "u64": ("uint64_t", "l", np.uint64),
    "s64": ("int64_t", "l", np.int64),
    "f16": ("uint16_t", "h", np.float16),
    "bf16": ("uint16_t", "h", np.uint16),
    "f32": ("float", "f", np.float32),
    "f64": ("double", "d", np.float64),
}
COUNT = 1024  # elements a case; element i runs on lane i % 32


@dataclasses.dataclass(frozen=True)
class Case:
    """One instruction: ``%0 ...`` are the outputs, then the inputs.

    Attributes:
        text: PTX, or an opcode alone, whose operands are then all of them in order.
        out: types of the outputs.
        types: types of the inputs.
        oracle: input arrays to output array, or a tuple of them.
        rtol, atol: both 0: equal (any NaN equals any NaN).
        limit: the largest absolute value of floating-point inputs, for functions of a range.
    """

    text: str
    out: Sequence[str]
    types: Sequence[str]
    oracle: Callable[..., Any]
    rtol: float = 0.0
    atol: float = 0.0
    limit: float = 0.0

    @property
    def ptx(self) -> str:
        """The whole PTX."""
        if "%" in self.text:
            return self.text
        return f"{self.text} {', '.join(f'%{i}' for i in range(len(self.out) + len(self.types)))};"

    @property
    def name(self) -> str:
        """For the test's id: its longest opcode."""
        return str(max(re.findall(r"[a-z]\w*(?:\.[\w:]+)+", self.text), key=len))


def source(cases: Sequence[Case]) -> str:
    """The CUDA source with a launcher ``case_<index>(inputs..., outputs..., n)`` for each case."""
    out = ['#include "harness.h"']
    for index, case in enumerate(cases):
        ins = [(TYPES[t], f"i{k}") for k, t in enumerate(case.types)]
        outs = [(TYPES[t], f"o{k}") for k, t in enumerate(case.out)]
        params = ", ".join(
            [*(f"const {t[0]}* {n}" for t, n in ins), *(f"{t[0]}* {n}" for t, n in outs), "int n"]
        )
        results = " ".join(f"{t[0]} {n}_r;" for t, n in outs)
        left = ", ".join(f'"={t[1]}"({n}_r)' for t, n in outs)
        right = ", ".join(f'"{t[1]}"({n}[i])' for t, n in ins)
        store = " ".join(f"{n}[i] = {n}_r;" for _, n in outs)
        names = ", ".join([n for _, n in (*ins, *outs)])
        out.append(
            f"__global__ void k{index}({params}) {{\n"
            f"  const int i = blockIdx.x * blockDim.x + threadIdx.x;\n  if (i >= n) return;\n"
            f'  {results}\n  asm volatile("{case.ptx}" : {left} : {right});\n  {store}\n}}\n'
            f"LAUNCHER(case_{index})({params}) {{\n"
            f"  return guarded([&] {{ k{index}<<<n / 64, 64>>>({names}, n); }});\n}}"
        )
    return "\n".join(out) + "\n"


def inputs(case: Case, seed: int) -> list[Array]:
    """Random values of every scale, and every pair of special ones in front."""
    rng = np.random.default_rng(seed)
    arrays: list[Array] = []
    for position, kind in enumerate(case.types):
        dtype = TYPES[kind][2]
        if kind[0] in "us":
            special = np.array(
                [
                    0,
                    1,
                    2,
                    31,
                    32,
                    33,
                    0x7FFFFFFF,
                    1 << 31,
                    (1 << 64) - 1,
                    1 << 63,
                    (1 << 63) - 1,
                    0x80,
                ],
                np.uint64,
            )
            bits = rng.integers(0, 1 << 64, COUNT, np.uint64) >> rng.integers(
                0, 64, COUNT, np.uint64
            )
            values = bits.astype(dtype)
            edge = special.astype(dtype)
        else:
            info = {"f16": np.finfo(np.float16), "f64": np.finfo(np.float64)}.get(
                kind, np.finfo(np.float32)
            )
            top, tiny = float(info.max), float(info.smallest_subnormal)
            edge64 = np.array(
                [
                    0,
                    -0.0,
                    1,
                    -1,
                    0.5,
                    1.5,
                    2.5,
                    np.inf,
                    -np.inf,
                    np.nan,
                    top,
                    -top,
                    tiny,
                    float(info.tiny),
                ]
            )
            scale = np.exp2(rng.uniform(-12, 12, COUNT))
            values64 = rng.standard_normal(COUNT) * scale
            if case.limit:
                edge64, values64 = (
                    np.array([0.0, 1.0, -1.0]),
                    rng.uniform(-case.limit, case.limit, COUNT),
                )
            values, edge = _narrow(values64, kind), _narrow(edge64, kind)
        for warp in range(512, COUNT, 64):  # some warps agree
            values[warp : warp + 32] = values[warp]
        n = len(edge)
        index = np.arange(n * n)
        values[: n * n] = edge[index % n if position % 2 == 0 else index // n]
        arrays.append(values)
    return arrays


def _narrow(values: Array, kind: str) -> Array:
    with np.errstate(all="ignore"):
        if kind == "bf16":
            return np.asarray((values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16))
        return np.asarray(values.astype(TYPES[kind][2]))


def check(kernels: Kernels, index: int, case: Case, seed: int = 0) -> None:
    """Run a case and compare.

    Raises:
        AssertionError: a value differs; the text holds the operands.
    """
    ins = inputs(case, seed)
    outs = [np.zeros(COUNT, TYPES[t][2]) for t in case.out]
    kernels(f"case_{index}", *ins, *outs, COUNT)
    with np.errstate(all="ignore"):
        want = case.oracle(*ins)
    for k, (got, expected) in enumerate(
        zip(outs, want if isinstance(want, tuple) else (want,), strict=True)
    ):
        kind = case.out[k]
        if kind[0] in "us":
            g, w = got, np.asarray(expected).astype(got.dtype)
            wrong = g != w
        else:
            g = to_double(got, kind)
            w = (
                to_double(np.asarray(expected), kind)
                if np.asarray(expected).dtype == np.uint16
                else np.asarray(expected, np.float64)
            )
            same = (g == w) & (np.signbit(g) == np.signbit(w)) | (np.isnan(g) & np.isnan(w))
            with np.errstate(all="ignore"):
                close = (np.abs(g - w) <= case.atol + case.rtol * np.abs(w)) & (case.rtol > 0)
            wrong = ~(same | close)
        if wrong.any():
            at = int(np.flatnonzero(wrong)[0])
            operands = ", ".join(f"{t} {a[at]!r}" for t, a in zip(case.types, ins, strict=True))
            raise AssertionError(
                f"{case.ptx} output {k}: {int(wrong.sum())} of {COUNT} differ; the first, {at}: "
                f"({operands}) gave {g[at]!r}, expected {w[at]!r} (seed {seed})"
            )


def flag(text: str, output: int = 0) -> str:
    """PTX that sets the predicate p, and gives it as 0 or 1."""
    return f"{{.reg .pred p; {text} selp.u32 %{output}, 1, 0, p;}}"


def adder(cases: list[Case]) -> Callable[..., None]:
    """A function that adds a case, its types written as one string."""

    def case(text: str, out: str, types: str, oracle: Callable[..., Any], **options: float) -> None:
        cases.append(Case(text, out.split(), types.split(), oracle, **options))

    return case
