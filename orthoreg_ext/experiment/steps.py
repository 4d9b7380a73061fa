"""The way of a network through a run, and what its cuts add up to."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from .. import pruning
from .record import Cut
from .settings import Settings


@dataclass(frozen=True)
class Step:
    """One step of a network's way: an epoch, or a cut (``epochs`` 0)."""

    stage: str  # "train", "cut" or "tune"
    cut: int  # rounds that were cut before it
    epoch: int = 0  # from 0
    epochs: int = 0  # of its stage
    gone: float = 0.0  # share of the prunable filters that is gone after a cut


def plan(settings: Settings) -> list[Step]:
    """Returns the steps of one network; the fine-tuning epochs are shared among the rounds."""
    rounds = settings.rounds
    steps = [Step("train", 0, epoch, settings.epochs) for epoch in range(settings.epochs)]
    ratios = pruning.split_ratio(settings.ratio, rounds)
    left = 1.0
    for cut in range(rounds):
        left *= 1 - ratios[cut]
        steps.append(Step("cut", cut, gone=1 - left))
        epochs = (cut + 1) * settings.finetune_epochs // rounds
        epochs -= cut * settings.finetune_epochs // rounds
        steps += [Step("tune", cut + 1, epoch, epochs) for epoch in range(epochs)]
    return steps


def extended(checkpoint: Mapping[str, Any], cut: Mapping[str, Any], number: int) -> dict[str, Any]:
    """Joins the checkpoint of all cuts before with the one of cut ``number``, made after them.

    A checkpoint counts the filters of the unpruned network, so the later cut's are translated.
    """
    if not checkpoint:
        return copy.deepcopy(dict(cut))
    joined = copy.deepcopy(dict(checkpoint))
    gone: dict[str, set[int]] = {}
    for entry in joined["history"]:
        gone.setdefault(entry["layer"], set()).update(entry["removed"])
    for entry in cut["history"]:
        lost = gone.get(entry["layer"], set())
        width = entry["filters"] + len(entry["removed"]) + len(lost)
        left = [index for index in range(width) if index not in lost]
        removed = [left[index] for index in entry["removed"]]
        joined["history"].append({**entry, "round": number, "removed": removed})
    joined["sizes"]["after"] = cut["sizes"]["after"]
    joined["widths"] = cut["widths"]
    return joined


def no_cut(last: Cut, accuracy: float) -> Cut:
    """The cut after ``last`` that removes nothing."""
    return replace(
        last,
        ratio=0.0,
        saved=0.0,
        accuracy_before=accuracy,
        accuracy_after=accuracy,
        before=last.after,
        prunable=(last.prunable[1], last.prunable[1]),
        layers=[(name, after, after) for name, _, after in last.layers],
        scores=None,
    )
