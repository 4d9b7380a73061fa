"""Conformance cases: what the lanes of a warp do together; element i of an array is lane i % 32."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np

from tests.emu.conformance.case import Case, adder, flag
from tests.emu.conformance.exact import Array, to_double

CASES: list[Case] = []
case = adder(CASES)


# The warp: 32 consecutive elements
def warps(f: Callable[..., Any]) -> Callable[..., Array]:
    """A definition on lists of 32 lanes."""

    def oracle(*arrays: Array) -> Any:
        out = [f(*(a[w : w + 32] for a in arrays)) for w in range(0, len(arrays[0]), 32)]
        if isinstance(out[0], tuple):
            return tuple(
                np.concatenate([np.asarray(o[k]) for o in out]) for k in range(len(out[0]))
            )
        return np.concatenate([np.asarray(o) for o in out])

    return oracle


LANES = np.arange(32)


def same(lanes: Array) -> bool:
    return len(set(lanes.tolist())) == 1


def shuffle(operands: str, source: Callable[[Array], Array], valid: Array) -> None:
    kind, *rest = operands.split()
    text = flag(f"shfl.sync.{kind}.b32 %0|p, %2, {', '.join(rest)}, -1;", output=1)
    taken = np.where(valid, source(LANES), LANES)
    case(text, "u32 u32", "u32", warps(lambda a: (a[taken], valid)))


ALWAYS = LANES >= 0
shuffle("up 3 0", lambda i: i - 3, LANES >= 3)
shuffle("down 5 31", lambda i: i + 5, LANES + 5 < 32)
shuffle("down 2 0x181f", lambda i: i + 2, LANES % 8 + 2 < 8)  # in eights
shuffle("bfly 16 31", lambda i: i ^ 16, ALWAYS)
shuffle("idx 9 31", lambda i: 9 + 0 * i, ALWAYS)
shuffle("idx 1 0x181f", lambda i: i // 8 * 8 + 1, ALWAYS)


def vote(text: str, f: Callable[[Array], Any]) -> None:
    """`f` of the lanes whose value is small, the same for all."""
    prepared = f".reg .pred q; setp.lt.u32 q, %1, 0x10000; {text}"
    case(flag(prepared), "u32", "u32", warps(lambda a: [f(a < 0x10000)] * 32))


def bits(lanes: Array) -> int:
    return sum(1 << k for k, lane in enumerate(lanes) if lane)


vote("vote.sync.any.pred p, q, -1;", lambda a: a.any())
vote("vote.sync.all.pred p, q, -1;", lambda a: a.all())
vote("vote.sync.all.pred p, !q, -1;", lambda a: not a.any())
vote("vote.sync.uni.pred p, q, -1;", lambda a: a.all() or not a.any())
case(
    "{.reg .pred q; setp.lt.u32 q, %1, 0x10000; vote.sync.ballot.b32 %0, q, -1;}",
    "u32",
    "u32",
    warps(lambda a: [bits(a < 0x10000)] * 32),
)
case(
    "{.reg .b32 a; and.b32 a, %1, 3; match.any.sync.b32 %0, a, -1;}",
    "u32",
    "u32",
    warps(lambda a: [bits(a & 3 == v & 3) for v in a]),
)
case(
    flag(".reg .b32 a; shr.u32 a, %2, 31; match.all.sync.b32 %0|p, a, -1;", output=1),
    "u32 u32",
    "u32",
    warps(lambda a: ([0xFFFFFFFF * same(a >> 31)] * 32, [same(a >> 31)] * 32)),
)
for t in ("s32", "u32"):
    case(f"redux.sync.add.{t} %0, %1, -1;", t, t, warps(lambda a: [a.sum(dtype=a.dtype)] * 32))
    case(f"redux.sync.min.{t} %0, %1, -1;", t, t, warps(lambda a: [a.min()] * 32))
    case(f"redux.sync.max.{t} %0, %1, -1;", t, t, warps(lambda a: [a.max()] * 32))
for op, u in (("and", np.bitwise_and), ("or", np.bitwise_or), ("xor", np.bitwise_xor)):
    case(f"redux.sync.{op}.b32 %0, %1, -1;", "u32", "u32", warps(lambda a, u=u: [u.reduce(a)] * 32))
for relation in ("lt", "le", "eq", "ge", "gt"):
    mask = np.array([bits(getattr(operator, relation)(LANES, i)) for i in range(32)], np.uint32)
    text = f"{{mov.u32 %0, %%lanemask_{relation}; xor.b32 %0, %0, %1;}}"
    case(text, "u32", "u32", warps(lambda a, mask=mask: a ^ mask))
number = LANES.astype(np.uint32)
case("{mov.u32 %0, %%laneid; add.u32 %0, %0, %1;}", "u32", "u32", warps(lambda a: a + number))


# Tensor cores: lane 4 g + q holds rows g, g + 8 of A, column g of B, columns 2 q, 2 q + 1 of D
def mma(form: str, depth: int, registers: int) -> Callable[..., Any]:
    pack = 1 if form == "tf32" else 2

    def unpack(a: Array) -> list[Array]:
        if form == "tf32":
            return [(a.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64)]
        halves = [(a >> np.uint32(s)).astype(np.uint16) for s in (0, 16)]
        return [to_double(h if form == "bf16" else h.view(np.float16), form) for h in halves]

    def one(*lanes: Array) -> Any:
        a_regs, b_regs, c = (
            lanes[:registers],
            lanes[registers : registers * 3 // 2],
            lanes[registers * 3 // 2 :],
        )
        a, b, d = np.zeros((16, depth)), np.zeros((depth, 8)), np.zeros((16, 8))
        g, q = LANES // 4, LANES % 4
        for k, register in enumerate(a_regs):
            for e, values in enumerate(unpack(register)):
                a[g + 8 * (k % 2), 4 * pack * (k // 2) + pack * q + e] = values
        for k, register in enumerate(b_regs):
            for e, values in enumerate(unpack(register)):
                b[4 * pack * k + pack * q + e, g] = values
        for k, values in enumerate(c):
            d[g + k // 2 * 8, 2 * q + k % 2] = values
        d += a @ b
        return tuple(d[g + k // 2 * 8, 2 * q + k % 2] for k in range(4))

    return warps(one)


MODERATE = {
    "tf32": (0x807FE000, 0x3F800000),
    "f16": (0x83FF83FF, 0x3C003C00),
    "bf16": (0x807F807F, 0x3F803F80),
}


def matrix_product(shape: str, form: str, registers: int) -> None:
    """The operands get random bits, but the exponent of one: they are between 1 and 2 in size."""
    n = registers * 3 // 2
    keep, put = MODERATE[form]
    temps = [f"t{i}" for i in range(n)]
    fix = "".join(
        f"and.b32 {t}, %{4 + i}, {keep:#x}; or.b32 {t}, {t}, {put:#x};" for i, t in enumerate(temps)
    )
    sums = [f"%{4 + n + i}" for i in range(4)]
    vectors = (["%0", "%1", "%2", "%3"], temps[:registers], temps[registers:], sums)
    fragments = ", ".join(f"{{{', '.join(v)}}}" for v in vectors)
    text = f"mma.sync.aligned.{shape}.row.col.f32.{form}.{form}.f32 {fragments};"
    product = mma(form, int(shape[6:]), registers)

    def oracle(*lanes: Array) -> Any:
        return product(*(v & np.uint32(keep) | np.uint32(put) for v in lanes[:n]), *lanes[n:])

    whole = f"{{.reg .b32 {', '.join(temps)}; {fix} {text}}}"
    types = "u32 " * n + "f32 f32 f32 f32"
    case(whole, "f32 f32 f32 f32", types, oracle, rtol=1e-5, atol=1e-3, limit=1000)


matrix_product("m16n8k4", "tf32", 2)
matrix_product("m16n8k8", "tf32", 4)
for half in ("f16", "bf16"):
    matrix_product("m16n8k8", half, 2)
    matrix_product("m16n8k16", half, 4)
