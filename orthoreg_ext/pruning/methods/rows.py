"""Scores of units from comparisons of filters within each filter matrix."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..engine import Engine
from ..evidence import Evidence, Scored


def compared_slots(engine: Engine, name: str) -> tuple[Evidence, list[Scored]]:
    """The layers whose filters a method of that name compares with each other.

    Raises:
        ValueError: a unit is in none, naming its layer.
    """
    rules = engine.rules
    evidence = Evidence(
        name,
        engine.model,
        engine.structure,
        bias=rules.bias,
        reduction=rules.group_reduction,
        normalize=rules.normalize,
    )
    return evidence, evidence.slots("matrices")


def scores_by_matrix(
    engine: Engine,
    name: str,
    compare: Callable[[Tensor, Tensor], Tensor],  # [n, k], [n] -> [n]
    others: Tensor | None = None,  # [r] int64
) -> list[Tensor]:  # each [u] float64, CPU
    """The score of every unit, reduced over its filters, of every prunable group.

    Args:
        engine: of the model.
        name: of the method, for messages.
        compare: from a filter matrix, and a mask of the filters to compare with, to scores.
        others: the units whose filters are compared with; all without it.

    Raises:
        ValueError: a score is not finite, or a unit has none, naming the layer.
    """
    evidence, scored = compared_slots(engine, name)
    rows = []
    for entry in scored:
        mask = torch.ones(len(entry.slot.units), dtype=torch.bool)
        if others is not None:
            mask = torch.isin(entry.slot.units, others)
        masks = mask.to(entry.weight.device).chunk(entry.groups)
        parts = zip(entry.matrices(), masks, strict=True)
        rows.append(torch.cat([compare(matrix, part) for matrix, part in parts]))
    return evidence.units(scored, rows)
