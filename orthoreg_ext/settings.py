"""The arguments of OrthoRegularizer, checked before anything is made."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import nn

from .arguments import is_count, is_factor
from .errors import choose
from .options import check_num_groups, check_taken
from .penalties import Row, get_penalty
from .plan import LAYER_WEIGHTS, LayerWeights
from .schedules import BansalSteps


def check_numbers(
    model: nn.Module,
    strength: float,
    every: int,
    max_dim: int,
    schedule: Callable[[int], float] | None,
) -> None:
    """Checks what has to be a number, a function of one, or a module.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if not is_factor(strength):
        raise ValueError(f"strength is {strength!r}, expected a finite number of at least 0")
    if not is_count(every):
        raise ValueError(f"every is {every!r}, expected a positive number of steps")
    if not is_count(max_dim):
        raise ValueError(f"max_dim is {max_dim!r}, expected a positive number of rows")
    if schedule is not None and not callable(schedule):
        raise TypeError(f"schedule is {schedule!r}, expected a function of the step number")
    if isinstance(schedule, BansalSteps):
        schedule.check_strength(strength)


def check_penalty(
    penalty: str,
    side: str,
    layer_weights: LayerWeights,
    bias: bool | str,
    num_groups: int | None,
) -> tuple[Row, int | None]:
    """Returns the penalty and its number of groups, if it takes one.

    Raises:
        TypeError, ValueError: an argument is unknown, or does not go with the penalty.
    """
    if not isinstance(bias, (bool, str)) or bias not in (True, False, "conv"):
        raise ValueError(f"bias is {bias!r}, expected True, False or 'conv'")
    if isinstance(layer_weights, str):
        choose("layer_weights", layer_weights, LAYER_WEIGHTS)
    elif not isinstance(layer_weights, Mapping):
        raise TypeError(
            f"layer_weights is {layer_weights!r}, expected {', '.join(LAYER_WEIGHTS)} or a "
            "dict from layer name to factor"
        )
    row = get_penalty(penalty)
    if row.counts is not None:
        raise ValueError(
            f"penalty {penalty!r} is about the filters to prune, which a regulariser of "
            "a whole model does not know: use functional.add_gram_penalty_grad_ with pruned="
        )
    if row.convolutional and bias is True:
        raise ValueError(f"bias is True, but a bias has no part in penalty {penalty!r}")
    if row.of_filters and side == "cols":
        raise ValueError(f"penalty {penalty!r} compares filters: side cannot be 'cols'")
    check_taken(row, num_groups=num_groups)
    return row, check_num_groups(num_groups) if "num_groups" in row.takes else num_groups
