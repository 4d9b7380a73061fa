"""Floating-point arithmetic with one exact rounding: the oracle of the conformance cases."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

# name -> (bits of the significand with the hidden one, smallest and largest exponent)
FORMATS = {
    "f16": (11, -14, 15),
    "bf16": (8, -126, 127),
    "tf32": (11, -126, 127),
    "f32": (24, -126, 127),
    "f64": (53, -1022, 1023),
}


def round_exact(x: Fraction, form: str, mode: str = "rn") -> float:
    """x rounded to a format: rn nearest even, rna nearest away, rz to zero, rm down, rp up."""
    bits, low, high = FORMATS[form]
    if x == 0:
        return 0.0
    size = abs(x)
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    exponent -= size < Fraction(2) ** exponent
    unit = Fraction(2) ** (max(exponent, low) - bits + 1)
    whole, rest = divmod(size / unit, 1)
    up = {
        "rn": rest > Fraction(1, 2) or (rest == Fraction(1, 2) and whole % 2 == 1),
        "rna": rest >= Fraction(1, 2),
        "rz": False,
        "rm": rest > 0 and x < 0,
        "rp": rest > 0 and x > 0,
    }[mode]
    result = (whole + up) * unit
    largest = (2 - Fraction(2) ** (1 - bits)) * Fraction(2) ** high
    if result > largest:
        infinite = mode in ("rn", "rna") or (mode == "rp" and x > 0) or (mode == "rm" and x < 0)
        return (math.inf if infinite else float(largest)) * (1 if x > 0 else -1)
    return float(result) * (1 if x > 0 else -1)


def exactly(terms: Callable[..., Any], form: str, mode: str = "rn") -> Callable[..., Array]:
    """The oracle of an instruction whose value is the sum of `terms`, rounded once.

    Where an operand is not finite, arithmetic in double gives the same. An exact zero has the sign
    of all terms or, where they differ, the one that IEEE 754 gives it in this rounding mode.
    """

    def one(*values: float) -> float:
        with np.errstate(all="ignore"):
            plain = terms(*map(np.float64, values))
        if not all(map(math.isfinite, values)):
            return float(sum(plain[1:], plain[0]))
        exact = sum(terms(*map(Fraction, values)))
        if exact:
            return round_exact(exact, form, mode)
        negative = [bool(np.signbit(p)) for p in plain]
        return -0.0 if all(negative) or (any(negative) and mode == "rm") else 0.0

    def oracle(*arrays: Array) -> Array:
        wide = [to_double(a, form).tolist() for a in arrays]
        return np.array([one(*values) for values in zip(*wide, strict=True)])

    return oracle


def to_double(a: Array, form: str) -> Array:
    """Values as float64; bf16 travels as its bits in uint16."""
    if a.dtype == np.uint16 and form == "bf16":
        return (a.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return a.astype(np.float64)


def to_bf16(values: Array) -> Array:
    """float64 values that are bf16 numbers, as bits."""
    with np.errstate(all="ignore"):
        return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def each(function: Callable[..., int]) -> Callable[..., Array]:
    """A definition on Python integers, taken element by element; the result wraps."""

    def oracle(*arrays: Array) -> Array:
        values = [function(*map(int, v)) for v in zip(*arrays, strict=True)]
        return np.array([v & 0xFFFFFFFFFFFFFFFF for v in values], np.uint64)

    return oracle
