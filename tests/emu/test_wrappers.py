"""The PTX wrappers of csrc/cuda/device.cuh do what their comments say, emulated and on a GPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.emu.build import EMU
from tests.emu.kernels import Kernels
from tests.emu.test_conformance import DEVICES, compiled

Array = np.ndarray[Any, Any]
WRAPPERS = EMU / "conformance" / "wrappers.cu"
# Every TF32 operand's lower bits are nothing to the hardware.
TF32 = np.uint32(0xFFFFE000)


@pytest.fixture(scope="session", params=DEVICES)
def wrappers(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    return compiled(WRAPPERS, request.param, tmp_path_factory.mktemp("wrappers"))


@pytest.mark.parametrize("size", [16, 4])
def test_copies_take_any_count_of_bytes_and_zero_the_rest(wrappers: Kernels, size: int) -> None:
    x = np.random.default_rng(0).integers(1, 256, (32, size), dtype=np.uint8)
    out = np.full((17, 32, size), 255, np.uint8)
    wrappers(f"run_copies_{size}", x, out)
    for count in range(17):
        want = x.copy()
        want[:, min(count, size) :] = 0
        np.testing.assert_array_equal(out[count], want)


def test_waits_leave_that_many_groups_under_way(wrappers: Kernels) -> None:
    x = np.random.default_rng(0).standard_normal((4, 32)).astype(np.float32)
    seen = np.zeros((4, 4, 32), np.float32)
    wrappers("run_waits", x, seen)
    for wait in range(4):
        np.testing.assert_array_equal(seen[wait, : wait + 1], x[: wait + 1])


def all_kinds() -> Array:  # float32 [n], n even
    """Every exponent with the bits at which the two formats round, ties included, and specials."""
    high = np.arange(0, 1 << 32, 1 << 16, dtype=np.uint64)  # every bfloat16
    low = np.array([0, 1, 0x0FFF, 0x1000, 0x1001, 0x3000, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    bits = (high[:, None] + low.astype(np.uint64)).astype(np.uint32).ravel()
    return np.asarray(bits.view(np.float32))


def test_to_tf32_takes_the_nearest_and_ties_go_away_from_zero(wrappers: Kernels) -> None:
    x = all_kinds()
    tf32, bf16 = np.zeros(len(x), np.uint32), np.zeros(len(x), np.uint32)
    wrappers("run_conversions", x, tf32, bf16, len(x))
    bits, nan = x.view(np.uint32), np.isnan(x)
    # Half a unit of the last kept bit added to the magnitude, which carries into the exponent, at
    # last into infinity; the dropped bits become zeros, so that x - to_tf32(x) is exact.
    want = np.where(np.isinf(x), bits, bits + np.uint32(0x1000)) & TF32
    np.testing.assert_array_equal(tf32[~nan], want[~nan])
    quiet = nan & (bits & np.uint32(0x400000) != 0)  # others may lose their payload on a GPU
    assert np.isnan(tf32[quiet].view(np.float32)).all()
    assert want[bits == 0x3F801000] == 0x3F802000  # 1 + 2^-11, a tie, from both sides
    assert want[bits == 0x3F803000] == 0x3F804000


def test_pack_bf16_takes_the_nearest_and_ties_go_to_even(wrappers: Kernels) -> None:
    x = all_kinds()
    tf32, bf16 = np.zeros(len(x), np.uint32), np.zeros(len(x), np.uint32)
    wrappers("run_conversions", x, tf32, bf16, len(x))
    bits = x.view(np.uint32).astype(np.uint64)
    want = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint32)
    nan = np.isnan(x)
    for got, values, missing in (
        (bf16 & np.uint32(0xFFFF), want, nan),  # the first argument
        (bf16 >> np.uint32(16), want[::-1], nan[::-1]),
    ):
        np.testing.assert_array_equal(got[~missing], values[~missing])
        assert np.isnan((got[missing] << np.uint32(16)).view(np.float32)).all()


def products(wrappers: Kernels, form: str, a: Array, b: Array, c: Array) -> Array:
    """C + A B by the wrapper; a [n, 16, K], b [n, K, 8], c [n, 16, 8] of float32."""
    out = c.astype(np.float32)
    wrappers(f"run_products_{form}", np.ascontiguousarray(a), np.ascontiguousarray(b), out, len(a))
    return out


DEPTH = {"tf32": 8, "bf16": 16}


@pytest.mark.parametrize("form", DEPTH)
def test_mma_places_every_entry(wrappers: Kernels, form: str) -> None:
    """Small integers: no rounding anywhere, so any two entries swapped show."""
    rng, depth = np.random.default_rng(0), DEPTH[form]
    a = rng.integers(-50, 50, (20, 16, depth)).astype(np.float32)
    b = rng.integers(-50, 50, (20, depth, 8)).astype(np.float32)
    c = rng.integers(-1000, 1000, (20, 16, 8)).astype(np.float32)
    np.testing.assert_array_equal(products(wrappers, form, a, b, c), c + a @ b)


@pytest.mark.parametrize("form", DEPTH)
def test_mma_is_as_exact_as_a_truncating_sum(wrappers: Kernels, form: str) -> None:
    rng, depth = np.random.default_rng(1), DEPTH[form]
    a, b, c = (
        rng.standard_normal((50, *shape)).astype(np.float32)
        for shape in ((16, depth), (depth, 8), (16, 8))
    )
    got = products(wrappers, form, a, b, c)
    if form == "bf16":
        a, b = ((v.view(np.uint32) + 0x8000 & 0xFFFF0000).view(np.float32) for v in (a, b))
        got = products(wrappers, form, a, b, c)  # representable now: nothing depends on ties
    else:
        a, b = ((v.view(np.uint32) & TF32).view(np.float32) for v in (a, b))
    wide, left, right = (v.astype(np.float64) for v in (c, a, b))
    # No term is larger than the sum of the magnitudes; each of the depth + 1 terms and of the sums
    # of one or two steps loses less than one unit of the largest one's last bit.
    size = np.abs(wide) + np.abs(left) @ np.abs(right)
    error = np.abs(got - (wide + left @ right))
    assert (error <= (depth + 4) * 2.0**-23 * size).all(), (error / size).max() * 2**23


def test_raw_floats_as_tf32_operands_are_cut_off(wrappers: Kernels) -> None:
    """The hardware ignores the lower 13 bits; without to_tf32 values are truncated, not rounded."""
    a, b = np.zeros((1, 16, 8), np.float32), np.zeros((1, 8, 8), np.float32)
    values = (np.uint32(0x3F800000) + np.arange(16, dtype=np.uint32) * 0x3FF).view(np.float32)
    a[0, :, 3], b[0, 3, :] = values, -1.0
    got = products(wrappers, "tf32", a, b, np.zeros((1, 16, 8), np.float32))
    want = -(values.view(np.uint32) & TF32).view(np.float32)
    np.testing.assert_array_equal(got[0], np.repeat(want[:, None], 8, axis=1))
    assert (want != -values).any()
    b[0, 3, :] = (np.uint32(0xBF801FFF) * np.ones(8, np.uint32)).view(np.float32)  # of B as well
    again = products(wrappers, "tf32", a, b, np.zeros((1, 16, 8), np.float32))
    np.testing.assert_array_equal(again, got)


def truncating_sum(terms: Array) -> Array:  # [..., terms] of exact values -> [...]
    """Each term cut off at the last bit of the largest one, then the sum at 24 bits."""
    top = np.frexp(np.abs(terms).max(-1))[1] - 1
    unit = np.exp2(np.maximum(top, -126) - 23.0)
    total = np.trunc(terms / unit[..., None]).sum(-1) * unit
    unit = np.exp2(np.maximum(np.frexp(total)[1] - 1, -126) - 23.0)
    return np.asarray(np.trunc(total / unit) * unit)


@pytest.mark.parametrize("wrappers", ["emulated"], indirect=True)
@pytest.mark.parametrize("form", DEPTH)
def test_the_emulated_tensor_core_truncates(wrappers: Kernels, form: str) -> None:
    """The emulator's own model, bit for bit; a GPU may keep more bits."""
    rng, depth = np.random.default_rng(2), DEPTH[form]
    exponents = np.exp2(rng.integers(-12, 12, (50, 16, 8)))
    c = (rng.standard_normal((50, 16, 8)) * exponents).astype(np.float32)
    a, b = (
        (rng.integers(-128, 128, shape) * np.exp2(rng.integers(-8, 8, shape))).astype(np.float32)
        for shape in ((50, 16, depth), (50, depth, 8))
    )
    want = c.astype(np.float64)
    for part in np.split(np.arange(depth), 2):
        terms = a[:, :, None, part].astype(np.float64) * b[:, None, part].transpose(0, 1, 3, 2)
        want = truncating_sum(np.concatenate([terms, want[..., None]], -1))
    np.testing.assert_array_equal(products(wrappers, form, a, b, c), want.astype(np.float32))


@pytest.mark.parametrize("form", DEPTH)
def test_mma_passes_infinities_and_nan_on(wrappers: Kernels, form: str) -> None:
    depth = DEPTH[form]
    a, b = np.ones((1, 16, depth), np.float32), np.ones((1, depth, 8), np.float32)
    a[0, 0, 0], a[0, 1, 1], a[0, 2, 2], a[0, 3, :2] = np.inf, -np.inf, np.nan, (np.inf, -np.inf)
    got = products(wrappers, form, a, b, np.zeros((1, 16, 8), np.float32))[0]
    assert (got[0] == np.inf).all()
    assert (got[1] == -np.inf).all()
    assert np.isnan(got[2:4]).all()
    assert (got[4:] == depth).all()


def test_promotion_keeps_a_long_product_accurate(wrappers: Kernels) -> None:
    """What the kernels' second accumulators are for: in k = 4608 the truncation adds up."""
    rng, depth = np.random.default_rng(3), 4608
    basis = np.linalg.qr(rng.standard_normal((depth, 16)))[0].T
    a = np.ascontiguousarray(basis * (1 + 1e-3 * rng.standard_normal((16, 1))), np.float32)
    wide = a.astype(np.float64)
    want = (wide @ wide[:8].T) - np.eye(16, 8)
    error = {}
    for promoted in (4, depth):
        got = np.zeros((16, 8), np.float32)
        wrappers("run_long_products", a, a[:8].copy(), got, depth, promoted)
        error[promoted] = np.linalg.norm(got - np.eye(16, 8) - want) / np.linalg.norm(want)
    assert error[4] < 1e-3, error
    if not wrappers.gpu:  # the emulator is the pessimistic model
        assert error[depth] > 1e-2, error
        assert error[4] < error[depth] / 20, error
