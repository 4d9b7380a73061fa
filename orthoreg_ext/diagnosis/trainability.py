"""Trainability accuracy: how fast a pruned network gets back to work."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def trainability_accuracy(accuracies: Sequence[float], first_stage_epochs: int) -> float:
    """Returns the mean test accuracy over the epochs of the first learning-rate stage.

    (1 / N) sum_{e = 1..N} accuracy_e, N epochs before the learning rate first falls (Wang et al.,
    "Why is the State of Neural Network Pruning so Confusing?", 2023, eq. 1). A schedule without
    stages (half a cosine, as in ``orthoreg prune``) has no such N: choose one and keep to it.

    Args:
        accuracies: of every epoch of fine-tuning, in order; see :func:`recorded_accuracies`.
        first_stage_epochs: N.

    Raises:
        ValueError: N is not from 1 to the number of epochs, or one of the N is no finite number.
    """
    if not isinstance(first_stage_epochs, int) or not 1 <= first_stage_epochs <= len(accuracies):
        raise ValueError(
            f"first_stage_epochs is {first_stage_epochs!r}, expected 1 to {len(accuracies)}, the "
            "number of accuracies"
        )
    first = [float(value) for value in accuracies[:first_stage_epochs]]
    for epoch, value in enumerate(first):
        if not math.isfinite(value):
            raise ValueError(f"accuracies[{epoch}] is {value}, expected a finite number")
    return math.fsum(first) / first_stage_epochs


def recorded_accuracies(
    history: str | Path | Mapping[str, Any],
    *,
    regularised: bool = True,
    seed: int | None = None,
    stage: str = "tune",
) -> list[float]:
    """Returns the accuracy of every epoch that ``orthoreg prune`` recorded, in percent.

    Args:
        history: its ``history.json``, the folder that holds it, or the contents.
        regularised: of the regularised network, or of its twin.
        seed: of which seed; the first by default.
        stage: ``"tune"`` after the cuts, ``"train"`` before.

    Raises:
        ValueError: it is no such history, or has no such network or epochs.
    """
    if isinstance(history, Mapping):
        record, name = history, "history"
    else:
        path = Path(history)
        path, name = (path / "history.json" if path.is_dir() else path), repr(str(history))
        record = json.loads(path.read_text())
    try:
        arms = [arm for arm in record["run"]["arms"] if arm["regularised"] is regularised]
        wanted = arms[0]["seed"] if seed is None and arms else seed
        epochs = [e for arm in arms if arm["seed"] == wanted for e in arm["epochs"]]
        found = [float(epoch["accuracy"]) for epoch in epochs if epoch["stage"] == stage]
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{name} holds no run of `orthoreg prune` ({type(error).__name__}: {error}); pass its "
            "history.json, or a list of accuracies to trainability_accuracy"
        ) from error
    if not found:
        seeds = sorted({arm["seed"] for arm in arms})
        raise ValueError(
            f"{name} has no epochs of stage {stage!r}, seed {seed!r}; it has seeds {seeds}, and "
            "the stages are 'train' and 'tune'"
        )
    return found
