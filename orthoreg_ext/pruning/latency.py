"""How much faster a pruned model is, measured against the unpruned one in the same rounds."""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from ..timing import measure, watch
from .inputs import call, device_of, to_device, undisturbed

SECONDS = 1.0
"""For one comparison; twice as long where others disturb it."""

POINTS = 8
"""Comparisons of one search, beside those of nothing and everything removed."""


@dataclass(frozen=True)
class Reading:
    """One comparison."""

    filters: int  # of the pruned model
    share: float  # of the unpruned model's time that is saved
    state: str  # as of `timing.Timing`: "quiet", "contended" or "unwatched"


class Stopwatch:
    """Compares a model with a copy of what it was.

    Both run the example inputs in eval mode without gradients, turn by turn, so that drifts of the
    machine meet both alike; rounds that other processes disturbed do not count, and a GPU is
    waited for.

    Args:
        model: as it is now; a copy is kept.
        example_inputs: a tensor, a tuple of arguments or a dict of keyword arguments.

    Attributes:
        readings: every comparison, in order.

    Raises:
        ValueError: the model cannot be copied.
    """

    def __init__(self, model: nn.Module, example_inputs: Any) -> None:
        try:
            self.before = copy.deepcopy(model)
        except Exception as error:
            raise ValueError(
                f"target='latency' times the model against a copy of itself, and copy.deepcopy "
                f"fails ({type(error).__name__}: {error}); use target='macs'"
            ) from error
        for parameter in self.before.parameters():
            parameter.grad = None
        self.inputs = to_device(example_inputs, device_of(model))
        self.readings: list[Reading] = []

    def saved(self, model: nn.Module, filters: int) -> float:
        """The share of the time that the model, of so many filters, no longer needs."""
        ratio, state = time_ratio(self.before, model, self.inputs)
        self.readings.append(Reading(filters, 1 - ratio, state))
        return 1 - ratio

    def report(self) -> dict[str, Any]:
        """The last comparison, and all of them, for JSON."""
        last = asdict(self.readings[-1])
        return {**last, "readings": [asdict(reading) for reading in self.readings]}


def time_ratio(before: nn.Module, after: nn.Module, inputs: Any) -> tuple[float, str]:
    """The time of one model over that of the other, and how quiet the machine was."""
    device = device_of(after).type
    calls = {"before": partial(call, before, inputs), "after": partial(call, after, inputs)}
    with undisturbed(before), undisturbed(after), torch.no_grad():
        timing = measure(calls, device, SECONDS, load=watch(device))
    return timing.ratio("after", "before").median, timing.state
