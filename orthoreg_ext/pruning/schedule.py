"""How a ratio is spread over rounds."""

from __future__ import annotations


def split_ratio(total: float, rounds: int) -> list[float]:
    """Splits a total pruning ratio over rounds as OrthoReg does.

    Round k removes r_k = p / (k p + N (1 - p)) of what remains, so that after N rounds the share p
    of the original is gone: 0.5 in 2 rounds is [1/3, 1/4] (released code, main.py:806-810).

    Args:
        total: p, in (0, 1).
        rounds: N, at least 1.

    Raises:
        ValueError: either is out of range.
    """
    check_ratio(total)
    check_rounds(rounds)
    return [total / (k * total + rounds * (1 - total)) for k in range(1, rounds + 1)]


def removed_share(total: float, rounds: int) -> list[float]:
    """The share of the original filters that is gone after each round of :func:`split_ratio`.

    The last entry is exactly `total`.
    """
    shares, left = [], 1.0
    for ratio in split_ratio(total, rounds):
        left *= 1 - ratio
        shares.append(1 - left)
    return [*shares[:-1], total]


def check_ratio(ratio: object) -> float:
    """Returns the ratio, and refuses anything but a number in (0, 1)."""
    number = isinstance(ratio, (int, float)) and not isinstance(ratio, bool)
    if not number or not 0 < float(ratio) < 1:  # type: ignore[arg-type]
        raise ValueError(
            f"ratio is {ratio!r}, expected a number in (0, 1): the share of filters to remove, "
            "e.g. 0.5"
        )
    return float(ratio)  # type: ignore[arg-type]


def check_rounds(rounds: object) -> None:
    """Refuses anything but a positive integer."""
    if not isinstance(rounds, int) or isinstance(rounds, bool) or rounds < 1:
        raise ValueError(f"rounds is {rounds!r}, expected an integer of at least 1")
