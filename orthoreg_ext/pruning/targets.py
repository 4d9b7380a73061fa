"""What a ratio is a share of, and how many of the ranked blocks reach it."""

from __future__ import annotations

from collections.abc import Callable

_FUZZ = 1e-9

TARGETS = {
    "filters": "the prunable filters",
    "params": "the parameters of the model",
    "macs": "the multiply-accumulates of a forward pass",
    "memory": "the bytes of parameters, buffers and feature maps",
    "latency": "the measured time of a forward pass",
}
"""Name -> what the share is of; those between the first and the last are fields of `Counts`."""


def reaches(saved: float, share: float) -> bool:
    """Whether a saved share is the one that was asked for, or more."""
    return saved >= share - _FUZZ


def fewest(
    saved: Callable[[int], float], most: int, share: float, points: int | None = None
) -> int:
    """The fewest blocks from the front of a ranking that save a share, by bisection.

    Args:
        saved: the share that the first n blocks save, which grows with n.
        most: the number of all blocks, which save it.
        share: what has to be reached.
        points: evaluate so many n between none and all at most; the answer is one that was
            evaluated (or all), and reaches the share.
    """
    if reaches(saved(0), share):
        return 0
    low, high, left = 0, most, most if points is None else points
    while high - low > 1 and left > 0:
        middle, left = (low + high) // 2, left - 1
        low, high = (low, middle) if reaches(saved(middle), share) else (middle, high)
    return high
