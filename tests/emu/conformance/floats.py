"""Conformance cases: floating-point arithmetic and conversions."""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np

from tests.emu.conformance.case import Case, adder, flag
from tests.emu.conformance.exact import Array, each, exactly, round_exact, to_bf16, to_double

CASES: list[Case] = []
case = adder(CASES)


# Floating-point arithmetic: exact, rounded once
def as_pairs(oracle: Callable[..., Array], half: str) -> Callable[..., Array]:
    """The definition on both halves of 32 bits; any NaN becomes the one that the hardware gives."""

    def part(a: Array, shift: int) -> Array:
        bits = (a >> np.uint32(shift)).astype(np.uint16)
        return np.asarray(bits.view(np.float16) if half == "f16" else bits)

    def lifted(*arrays: Array) -> Array:
        result = np.zeros(len(arrays[0]), np.uint32)
        for shift in (0, 16):
            values = oracle(*(part(a, shift) for a in arrays))
            bits = to_bf16(values) if half == "bf16" else values.astype(np.float16).view(np.uint16)
            bits = np.where(np.isnan(values), np.uint16(0x7FFF), bits)
            result |= bits.astype(np.uint32) << np.uint32(shift)
        return result

    return lifted


def multiply_add(a: Any, b: Any, c: Any) -> Any:
    return (a * b, c)


ARITHMETIC: tuple[tuple[str, Callable[..., Any]], ...] = (  # the terms of the sum
    ("add", lambda a, b: (a, b)),
    ("sub", lambda a, b: (a, -b)),
    ("mul", lambda a, b: (a * b,)),
)
for t in ("f32", "f64"):
    for mode in ("rn", "rz", "rm", "rp"):
        for op, f in ARITHMETIC:
            case(f"{op}.{mode}.{t}", t, f"{t} {t}", exactly(f, t, mode))
        case(f"fma.{mode}.{t}", t, f"{t} {t} {t}", exactly(multiply_add, t, mode), limit=3e4)
    case(f"div.rn.{t}", t, f"{t} {t}", np.divide)
    case(f"sqrt.rn.{t}", t, t, np.sqrt)
    case(f"rcp.rn.{t}", t, t, lambda a: np.divide(a.dtype.type(1), a))
    case(f"neg.{t}", t, t, np.negative)
    case(f"abs.{t}", t, t, np.abs)
    case(f"copysign.{t}", t, f"{t} {t}", lambda a, b: np.copysign(b, a))


def smaller(a: Array, b: Array) -> Array:
    return np.where((a == 0) & (b == 0), np.where(np.signbit(a), a, b), np.fmin(a, b))


def larger(a: Array, b: Array) -> Array:
    return np.where((a == 0) & (b == 0), np.where(np.signbit(a), b, a), np.fmax(a, b))


def with_nan(f: Callable[[Array, Array], Array]) -> Callable[[Array, Array], Array]:
    return lambda a, b: np.where(np.isnan(a) | np.isnan(b), np.nan, f(a, b))


def in_double(f: Callable[[Array, Array], Array], form: str) -> Callable[[Array, Array], Array]:
    return lambda a, b: f(to_double(a, form), to_double(b, form))


for t in ("f32", "f64", "f16", "bf16"):
    for op, f in (("min", smaller), ("max", larger)):
        case(f"{op}.{t}", t, f"{t} {t}", in_double(f, t))
        if t != "f64":
            case(f"{op}.NaN.{t}", t, f"{t} {t}", in_double(with_nan(f), t))
for t in ("f16", "bf16"):
    for op, f in ARITHMETIC:
        case(f"{op}.{t}", t, f"{t} {t}", exactly(f, t))
        case(f"{op}.{t}x2", "u32", "u32 u32", as_pairs(exactly(f, t), t))
    case(f"fma.rn.{t}", t, f"{t} {t} {t}", exactly(multiply_add, t), limit=100)
    case(f"neg.{t}", t, t, lambda a, t=t: -to_double(a, t))
    case(f"abs.{t}", t, t, lambda a, t=t: abs(to_double(a, t)))


def flush(a: Array) -> Array:
    return np.where(np.abs(a) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), a), a)


case("add.ftz.f32", "f32", "f32 f32", lambda a, b: flush(flush(a) + flush(b)))
case("mul.ftz.f32", "f32", "f32 f32", lambda a, b: flush(flush(a) * flush(b)))
case("add.sat.f32", "f32", "f32 f32", lambda a, b: np.where(a + b > 0, np.minimum(a + b, 1), 0))


def positive(a: Array, b: Array, c: Array) -> Array:
    return np.maximum(exactly(multiply_add, "f16")(a, b, c), 0) + 0.0


case("fma.rn.relu.f16", "f16", "f16 f16 f16", positive, limit=100)


# Approximate functions: the ISA's error bounds, with room. `a` is made of the input first, so that
# no function is asked where its bound does not hold.
def approximate(
    setup: str, operation: str, f: Callable[..., Any], *, rtol: float = 1e-6, limit: float = 1e4
) -> None:
    kinds = "f32 f32" if "%2" in setup else "f32"
    case(f"{{.reg .f32 a; {setup} {operation}}}", "f32", kinds, f, rtol=rtol, limit=limit)


SMALL, SIZE, FOUR = "0f3C000000", "abs.f32 a, %1;", "add.f32 %0, a, 0f40800000;"
tiny = np.float32(2**-7)
approximate("mov.f32 a, %1;", "ex2.approx.f32 %0, a;", np.exp2, limit=100)
approximate("mov.f32 a, %1;", "tanh.approx.f32 %0, a;", np.tanh, rtol=1e-3, limit=8)
approximate(SIZE, "sqrt.approx.f32 %0, a;", lambda x: np.sqrt(abs(x)))
approximate(
    f"{SIZE} add.f32 a, a, {SMALL};",
    "rsqrt.approx.f32 %0, a;",
    lambda x: 1 / np.sqrt(abs(x) + tiny),
)
approximate(
    f"{SIZE} add.f32 a, a, 0f40000000;",
    "lg2.approx.f32 %0, a;",
    lambda x: np.log2(abs(x) + np.float32(2)),
)
approximate(
    f"abs.f32 a, %2; add.f32 a, a, {SMALL};",
    "div.approx.f32 %0, %1, a;",
    lambda x, y: x / (abs(y) + tiny),
)
approximate("sin.approx.f32 a, %1;", FOUR, lambda x: np.sin(x) + 4, limit=3)
approximate("cos.approx.f32 a, %1;", FOUR, lambda x: np.cos(x) + 4, limit=3)


# Conversions
def rounded(form: str, to: str, mode: str) -> Callable[[Array], Array]:
    """Values of `form` rounded once to a floating-point format."""
    return exactly_to(lambda a: to_double(a, form) if form[0] in "fb" else a, to, mode)


def exactly_to(wide: Callable[[Array], Array], to: str, mode: str) -> Callable[[Array], Array]:
    def one(v: Any) -> float:
        x = v.item()
        if isinstance(x, float) and (x == 0 or not np.isfinite(x)):
            return x
        return round_exact(Fraction(x), to, mode)

    return lambda a: np.array([one(v) for v in wide(a)])


def integral(mode: str) -> Callable[[Array], Array]:
    return {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}[mode]


def saturating(form: str, to: str, mode: str) -> Callable[[Array], Array]:
    info = np.iinfo(f"{'u' if to[0] == 'u' else ''}int{to[1:]}")
    low, high = int(info.min), int(info.max)
    nan = 0 if form != "f64" and to[1:] != "64" else 1 << (int(to[1:]) - 1)

    def one(v: float) -> int:
        return nan if np.isnan(v) else low if v <= low else high if v >= high else int(v)

    return lambda a: np.array(
        [one(v) & 0xFFFFFFFFFFFFFFFF for v in integral(mode)(to_double(a, form))], np.uint64
    )


FLOATING = """
f32 f16 rn rz    f32 bf16 rn rz   f64 f16 rn     f64 bf16 rn   f64 f32 rn rz rm rp
s32 f32 rn rz rm rp   u32 f32 rn   s64 f32 rn rz   u64 f64 rn rm   s64 f64 rn
s32 f16 rn rz    u32 f16 rn       s16 f16 rn     s32 bf16 rn   u32 bf16 rn   s64 bf16 rn
"""
for form, to, modes in re.findall(r"(\w+\d\d) (\w+\d\d) ((?:r\w ?)+)", FLOATING):
    for mode in modes.split():
        case(f"cvt.{mode}.{to}.{form}", to, form, rounded(form, to, mode))
for form in ("f16", "bf16", "f32", "f64"):
    for to in ("s32", "u32", "s64", "u64", "s16", "u16"):
        for mode in ("rni", "rzi", "rmi", "rpi") if to == "s32" else ("rzi",):
            case(f"cvt.{mode}.{to}.{form}", to, form, saturating(form, to, mode))
for form in ("f16", "f32", "f64"):
    for mode in ("rni", "rzi", "rmi", "rpi"):
        case(f"cvt.{mode}.{form}.{form}", form, form, integral(mode))
case("cvt.f32.f16", "f32", "f16", lambda a: a.astype(np.float32))
case("cvt.f32.bf16", "f32", "bf16", lambda a: to_double(a, "bf16"))
case("cvt.f64.f16", "f64", "f16", lambda a: a.astype(np.float64))
case("cvt.f64.f32", "f64", "f32", lambda a: a.astype(np.float64))
case("cvt.sat.f32.f32", "f32", "f32", lambda a: np.where(a > 0, np.minimum(a, 1), 0))


def rounded_bits(form: str, mode: str) -> Callable[[Array], Array]:
    """The bits of float32 inputs rounded to a format, as uint32."""

    def oracle(a: Array) -> Array:
        values = rounded("f32", form, mode)(a)
        if form == "tf32":
            return values.astype(np.float32).view(np.uint32)
        bits = to_bf16(values) if form == "bf16" else values.astype(np.float16).view(np.uint16)
        return bits.astype(np.uint32)

    return oracle


def packed(form: str) -> Callable[[Array, Array], Array]:
    one = rounded_bits(form, "rn")
    return lambda high, low: one(high) << np.uint32(16) | one(low)


case("cvt.rna.tf32.f32", "u32", "f32", rounded_bits("tf32", "rna"), limit=1e3)
case("cvt.rn.f16x2.f32", "u32", "f32 f32", packed("f16"), limit=1e5)
case("cvt.rn.bf16x2.f32", "u32", "f32 f32", packed("bf16"), limit=1e38)
for pair in [
    "s32-s64",
    "u32-u64",
    "s64-s32",
    "u64-u32",
    "u16-u32",
    "s16-s32",
    "s32-s16",
    "u32-s64",
]:
    form, to = pair.split("-")
    case(f"cvt.{to}.{form}", to, form, each(lambda a: a))
case("cvt.s32.s8", "s32", "u32", lambda a: a.astype(np.uint8).view(np.int8).astype(np.int32))
case("cvt.u32.u8", "u32", "u32", lambda a: a & 255)
case("cvt.s8.s32", "s32", "s32", lambda a: a.astype(np.int8).astype(np.int32))
case("cvt.sat.u16.s32", "u16", "s32", lambda a: np.clip(a, 0, 65535))
case("cvt.sat.s16.s64", "s16", "s64", lambda a: np.clip(a, -32768, 32767))
TESTS: dict[str, Callable[[Array], Array]] = {
    "finite": np.isfinite,
    "infinite": np.isinf,
    "notanumber": np.isnan,
    "number": lambda a: ~np.isnan(a),
    "normal": lambda a: np.isfinite(a) & (abs(a) >= np.finfo(np.float32).tiny),
    "subnormal": lambda a: (a != 0) & (abs(a) < np.finfo(np.float32).tiny),
}
for name, test in TESTS.items():
    case(flag(f"testp.{name}.f32 p, %1;"), "u32", "f32", test)
