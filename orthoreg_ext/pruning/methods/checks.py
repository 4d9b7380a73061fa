"""The numbers that methods take; every refusal comes before anything is changed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from ...errors import unknown_name
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


def check_rules(method: str, rules: Mapping[str, Any]) -> None:
    """Refuses what is no rule, and the one that only `prune` follows.

    Raises:
        TypeError: there is no such argument.
        ValueError: `rescore_every`, which belongs to scope "one_at_a_time".
    """
    known = [field.name for field in dataclasses.fields(Rules)]
    for name in rules:
        if name not in known:
            raise TypeError(str(unknown_name(f"argument of {method}", name, known)))
    if rules.get("rescore_every") is not None:
        raise ValueError(
            f"{method} chooses its filters at once, so it does not take rescore_every; leave it out"
        )


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
