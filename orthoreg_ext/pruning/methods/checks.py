"""The numbers that methods take; every refusal comes before anything is changed."""

from __future__ import annotations

import math

from ..rules import Rules


def positive(argument: str, value: object, *, zero: bool = False) -> float:
    """A finite number above zero (or of at least zero).

    Raises:
        ValueError: it is none.
    """
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value < 0 or (value == 0 and not zero):  # type: ignore[arg-type,operator]
        bound = "of at least" if zero else "above"
        raise ValueError(f"{argument} is {value!r}, expected a finite number {bound} 0")
    return float(value)  # type: ignore[arg-type]


def steps(argument: str, value: object, *, zero: bool = False) -> int:
    """A number of steps or epochs, at least 1 (or 0).

    Raises:
        ValueError: it is none.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < int(not zero):
        raise ValueError(
            f"{argument} is {value!r}, expected an integer of at least {int(not zero)}"
        )
    return value


def weights_alone(rules: Rules) -> None:
    """Refuses criteria of gradients in methods that score amid the training, without data.

    The `.grad` of that moment is of one batch and in train mode, where sum w g behind a BatchNorm
    is 0 but for rounding.

    Raises:
        ValueError: the criterion reads more than weights.
    """
    if rules.row.needs_grad:
        raise ValueError(
            f"criterion {rules.row.name!r} needs gradients over data, which this method does not "
            "take; use 'bn_scale', 'l1' or 'l2', or the method OrthoReg"
        )
