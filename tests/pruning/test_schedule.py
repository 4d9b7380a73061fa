from __future__ import annotations

import pytest

from orthoreg_ext.pruning import split_ratio
from orthoreg_ext.pruning.schedule import removed_share


@pytest.mark.parametrize(
    ("total", "rounds", "expected"),
    [
        (0.5, 1, [0.5]),
        (0.5, 2, [1 / 3, 1 / 4]),
        (0.9, 5, [0.643, 0.391, 0.281, 0.220, 0.180]),
    ],
)
def test_rounds_follow_the_released_split(total: float, rounds: int, expected: list[float]) -> None:
    assert split_ratio(total, rounds) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("total", [0.01, 0.3, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("rounds", [1, 2, 3, 10])
def test_the_rounds_together_remove_the_total(total: float, rounds: int) -> None:
    left = 1.0
    for ratio in split_ratio(total, rounds):
        left *= 1 - ratio
    assert left == pytest.approx(1 - total)
    shares = removed_share(total, rounds)
    assert shares == sorted(shares)
    assert shares[-1] == total


@pytest.mark.parametrize("total", [0, 1, -0.1, 1.5, float("nan"), "half", True])
def test_a_ratio_outside_zero_and_one_is_refused(total: object) -> None:
    with pytest.raises(ValueError, match=r"ratio is .*expected a number in \(0, 1\)"):
        split_ratio(total, 1)  # type: ignore[arg-type]


@pytest.mark.parametrize("rounds", [0, -1, 1.5, True])
def test_rounds_must_be_a_positive_integer(rounds: object) -> None:
    with pytest.raises(ValueError, match=r"rounds is .*expected an integer of at least 1"):
        split_ratio(0.5, rounds)  # type: ignore[arg-type]
