"""Conformance cases: integers, bits, moves and comparisons."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tests.emu.conformance.case import Case, adder, flag
from tests.emu.conformance.exact import Array, each, to_double

CASES: list[Case] = []
case = adder(CASES)


def quotient(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def bits_of(value: int, width: int) -> int:
    return value & ((1 << width) - 1)


# Integer arithmetic
for t in ("s16", "u16", "s32", "u32", "s64", "u64"):
    width = int(t[1:])
    case(f"add.{t}", t, f"{t} {t}", each(lambda a, b: a + b))
    case(f"sub.{t}", t, f"{t} {t}", each(lambda a, b: a - b))
    case(f"mul.lo.{t}", t, f"{t} {t}", each(lambda a, b: a * b))
    case(f"mul.hi.{t}", t, f"{t} {t}", each(lambda a, b, w=width: (a * b) >> w))
    case(f"mad.lo.{t}", t, f"{t} {t} {t}", each(lambda a, b, c: a * b + c))
    case(f"min.{t}", t, f"{t} {t}", np.minimum)
    case(f"max.{t}", t, f"{t} {t}", np.maximum)
    # a zero divisor and the overflow of min / -1 are not defined
    if t[0] == "u":
        zero = f"setp.eq.{t} p, %2, 0; selp.b{width} d, 7, %2, p;"
        guard = f"{{{{.reg .pred p; .reg .b{width} d; {zero} {{op}} %0, %1, d;}}}}"
        for op, f in (("div", lambda a, b: a // (b or 7)), ("rem", lambda a, b: a % (b or 7))):
            case(guard.format(op=f"{op}.{t}"), t, f"{t} {t}", each(f))
    else:
        large = f"abs.{t} d, %2; shr.u{width} d, d, 1; add.{t} d, d, 2;"
        guard = f"{{{{.reg .b{width} d; {large} {{op}} %0, %1, d;}}}}"
        for op, g in (("div", quotient), ("rem", lambda a, d: a - quotient(a, d) * d)):
            bounded = each(lambda a, b, g=g, w=width: g(a, (bits_of(abs(b), w) >> 1) + 2))
            case(guard.format(op=f"{op}.{t}"), t, f"{t} {t}", bounded)
for t in ("s16", "u16", "s32", "u32"):
    wide = t[0] + str(2 * int(t[1:]))
    case(f"mul.wide.{t}", wide, f"{t} {t}", each(lambda a, b: a * b))
    case(f"mad.wide.{t}", wide, f"{t} {t} {wide}", each(lambda a, b, c: a * b + c))
for t in ("s16", "s32", "s64"):
    case(f"abs.{t}", t, t, each(abs))
    case(f"neg.{t}", t, t, each(lambda a: -a))
case("sad.s32", "s32", "s32 s32 s32", each(lambda a, b, c: c + abs(a - b)))
case("sad.u32", "u32", "u32 u32 u32", each(lambda a, b, c: c + abs(a - b)))
case("mul24.lo.u32", "u32", "u32 u32", each(lambda a, b: (a & 0xFFFFFF) * (b & 0xFFFFFF)))
case("{add.cc.u32 %0, %2, %4; addc.u32 %1, %3, %5;}", "u32 u32", "u32 u32 u32 u32",
     lambda a, b, c, d: (a + c, b + d + (a.astype(np.uint64) + c >= 1 << 32)))  # fmt: skip
case("{sub.cc.u32 %0, %2, %4; subc.u32 %1, %3, %5;}", "u32 u32", "u32 u32 u32 u32",
     lambda a, b, c, d: (a - c, b - d - (a < c)))  # fmt: skip
case("{mad.lo.cc.u32 %0, %2, %3, %4; madc.hi.u32 %1, %2, %3, %5;}", "u32 u32", "u32 u32 u32 u32",
     lambda a, b, c, d: ((a.astype(np.uint64) * b + c) & 0xFFFFFFFF,
                         ((a.astype(np.uint64) * b + c) >> np.uint64(32)) + d))  # fmt: skip
case(
    "dp4a.u32.u32",
    "u32",
    "u32 u32 u32",
    each(lambda a, b, c: c + sum((a >> k & 255) * (b >> k & 255) for k in (0, 8, 16, 24))),
)


# Bits
def lop3(a: int, b: int, c: int) -> int:  # table 0xd8: a ? b : c, then some
    return sum(
        (0xD8 >> ((a >> k & 1) * 4 + (b >> k & 1) * 2 + (c >> k & 1)) & 1) << k for k in range(32)
    )


def bfe(a: int, position: int, length: int, width: int, signed: bool) -> int:
    position, length = position & 255, length & 255
    sign = signed and length and (a >> min(position + length - 1, width - 1)) & 1
    return sum(
        (a >> (position + k) & 1 if k < length and position + k < width else sign) << k
        for k in range(width)
    )


def bfi(field: int, into: int, position: int, length: int, width: int) -> int:
    for k in range(length & 255):
        if (at := (position & 255) + k) < width:
            into = into & ~(1 << at) | (field >> k & 1) << at
    return into


def prmt(a: int, b: int, selector: int) -> int:
    data = [(a | b << 32) >> (8 * k) & 255 for k in range(8)]
    picks = [(selector >> (4 * k) & 7, selector >> (4 * k) & 8) for k in range(4)]
    return sum(
        (255 * (data[i] >> 7) if sign else data[i]) << (8 * k) for k, (i, sign) in enumerate(picks)
    )


for n in ("16", "32", "64"):
    t = f"u{n}"
    case(f"and.b{n}", t, f"{t} {t}", np.bitwise_and)
    case(f"or.b{n}", t, f"{t} {t}", np.bitwise_or)
    case(f"xor.b{n}", t, f"{t} {t}", np.bitwise_xor)
    case(f"not.b{n}", t, t, np.bitwise_not)
    case(f"cnot.b{n}", t, t, lambda a: a == 0)
    case(f"shl.b{n}", t, f"{t} u32", each(lambda a, s: a << min(s, 64)))
    case(f"shr.u{n}", t, f"{t} u32", each(lambda a, s: a >> min(s, 64)))
    case(f"shr.s{n}", f"s{n}", f"s{n} u32", each(lambda a, s: a >> min(s, 64)))
for w in (32, 64):
    t = f"u{w}"
    case(f"popc.b{w}", "u32", t, each(lambda a: a.bit_count()))
    case(f"clz.b{w}", "u32", t, each(lambda a, w=w: w - a.bit_length()))
    case(f"brev.b{w}", t, t, each(lambda a, w=w: int(f"{a:0{w}b}"[::-1], 2)))
    case(f"bfind.u{w}", "u32", t, each(lambda a: a.bit_length() - 1))
    case(f"bfind.shiftamt.u{w}", "u32", t, each(lambda a, w=w: w - a.bit_length() if a else -1))
    case(f"bfind.s{w}", "u32", f"s{w}", each(lambda a: (a if a >= 0 else ~a).bit_length() - 1))
    case(f"bfe.u{w}", t, f"{t} u32 u32", each(lambda a, p, n, w=w: bfe(a, p, n, w, False)))
    case(f"bfe.s{w}", f"s{w}", f"s{w} u32 u32", each(lambda a, p, n, w=w: bfe(a, p, n, w, True)))
    case(f"bfi.b{w}", t, f"{t} {t} u32 u32", each(lambda a, b, p, n, w=w: bfi(a, b, p, n, w)))
case("prmt.b32", "u32", "u32 u32 u32", each(prmt))
case("lop3.b32 %0, %1, %2, %3, 0xd8;", "u32", "u32 u32 u32", each(lop3))
case(
    "shf.l.wrap.b32", "u32", "u32 u32 u32", each(lambda a, b, s: ((b << 32 | a) << (s & 31)) >> 32)
)
case("shf.r.wrap.b32", "u32", "u32 u32 u32", each(lambda a, b, s: (b << 32 | a) >> (s & 31)))
case(
    "shf.l.clamp.b32",
    "u32",
    "u32 u32 u32",
    each(lambda a, b, s: ((b << 32 | a) << min(s, 32)) >> 32),
)
case("shf.r.clamp.b32", "u32", "u32 u32 u32", each(lambda a, b, s: (b << 32 | a) >> min(s, 32)))

# Moves and selections
case("mov.b64 %0, {%1, %2};", "u64", "u32 u32", each(lambda a, b: b << 32 | a))
case("mov.b64 {%0, %1}, %2;", "u32 u32", "u64", lambda a: (a & 0xFFFFFFFF, a >> np.uint64(32)))
case("mov.b32 %0, {%1, %2};", "u32", "u16 u16", each(lambda a, b: b << 16 | a))
case("mov.b32 {%0, %1}, %2;", "u16 u16", "u32", lambda a: (a & 0xFFFF, a >> np.uint32(16)))
case("mov.b32", "u32", "f32", lambda a: a.view(np.uint32))
case("mov.b64", "f64", "u64", lambda a: a.view(np.float64))
case("slct.f32.s32", "f32", "f32 f32 s32", lambda a, b, c: np.where(c >= 0, a, b))
case("slct.s32.f32", "s32", "s32 s32 f32", lambda a, b, c: np.where(c >= 0, a, b))

# Comparisons
RELATIONS: dict[str, Callable[[Array, Array], Array]] = {
    "eq": np.equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
ORDERED, UNORDERED = "eq ne lt le gt ge", "equ neu ltu leu gtu geu num nan"


def ordered(form: str, relation: str) -> Callable[[Array, Array], Array]:
    def oracle(a: Array, b: Array) -> Array:
        x, y = (to_double(v, form) if form[0] in "fb" else v for v in (a, b))
        unordered = np.isnan(x) | np.isnan(y) if form[0] in "fb" else np.zeros(len(x), bool)
        if relation in ("num", "nan"):
            return unordered if relation == "nan" else ~unordered
        name = (
            relation.removesuffix("u")
            if form[0] in "fb"
            else {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}.get(relation, relation)
        )
        result = ~np.equal(x, y) if name == "ne" else RELATIONS[name](x, y)
        return (
            result | unordered
            if relation.endswith("u") and form[0] in "fb"
            else result & ~unordered
        )

    return oracle


for t in ("s32", "u32", "s64", "u16"):
    for r in (ORDERED + (" lo ls hi hs" if t == "u32" else "")).split():
        case(flag(f"setp.{r}.{t} p, %1, %2;"), "u32", f"{t} {t}", ordered(t, r))
for t in ("f32", "f64", "f16", "bf16"):
    for r in f"{ORDERED} {UNORDERED}".split():
        case(flag(f"setp.{r}.{t} p, %1, %2;"), "u32", f"{t} {t}", ordered(t, r))
negated = "setp.lt.s32 q, %1, 0; setp.gt.or.s32 p, %1, %2, !q;"
case(flag(f".reg .pred q; {negated}"), "u32", "s32 s32", lambda a, b: (a > b) | ~(a < 0))
both = ".reg .pred q; setp.lt.s32 p|q, %2, %3; selp.u32 %1, 1, 0, q;"
case(flag(both), "u32 u32", "s32 s32", lambda a, b: (a < b, ~(a < b)))
guarded = "setp.ge.u32 p, %1, %2; mov.u32 %0, 5; @p mov.u32 %0, 6; @!p add.u32 %0, %0, 2;"
case(f"{{.reg .pred p; {guarded}}}", "u32", "u32 u32", lambda a, b: np.where(a >= b, 6, 7))


def chosen(form: str, relation: str, yes: float) -> Callable[[Array, Array], Array]:
    return lambda a, b: np.where(ordered(form, relation)(a, b), yes, 0)


case("set.lt.u32.f32", "u32", "f32 f32", chosen("f32", "lt", 0xFFFFFFFF))
case("set.gtu.f32.f32", "f32", "f32 f32", chosen("f32", "gtu", 1.0))
case("set.eq.f16.f16", "f16", "f16 f16", chosen("f16", "eq", 1.0))
