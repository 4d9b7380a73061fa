"""Kernels with planted bugs, and how to run one: see `run`."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tests.emu.kernels import Kernels

FOLDER = Path(__file__).parent


def run(library: Path) -> float:
    """Run the kernel of a library built from a file of this folder on fixed data.

    Returns:
        The largest error relative to the largest value; NaN where the kernel gave NaN.

    Raises:
        RuntimeError: the emulator stopped the kernel.
    """
    n, k = 67, 268
    x = np.random.default_rng(0).standard_normal((n, k), dtype=np.float32)
    name = library.name.partition("-")[0]
    want = x.astype(np.float64)
    want = want.sum(1) if name == "row_sum" else want @ want.T
    # Blocks of their own, of the exact size: AddressSanitizer sees an access past their ends.
    got = np.zeros(want.shape, np.float32)
    Kernels(library)("run", x, got, n, k)
    return float(np.abs(got - want).max() / np.abs(want).max())
