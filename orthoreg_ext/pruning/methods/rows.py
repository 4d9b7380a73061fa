"""Scores of units from comparisons of filters within each filter matrix."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..engine import Engine


def scores_by_matrix(
    engine: Engine,
    compare: Callable[[Tensor, Tensor], Tensor],  # [n, k], [n] -> [n]
    others: Tensor | None = None,  # [r] int64
) -> list[Tensor]:  # each [u] float64, CPU
    """The score of every unit, reduced over its filters, of every prunable group.

    Args:
        engine: of the model.
        compare: from a filter matrix, and a mask of the filters to compare with, to scores.
        others: the units whose filters are compared with; all without it.

    Raises:
        ValueError: a score is not finite, or a unit has none, naming the layer.
    """
    evidence = engine.evidence()
    scored = evidence.slots("matrices")
    rows = []
    for entry in scored:
        mask = torch.ones(len(entry.slot.units), dtype=torch.bool)
        if others is not None:
            mask = torch.isin(entry.slot.units, others)
        masks = mask.to(entry.weight.device).chunk(entry.groups)
        parts = zip(entry.matrices(), masks, strict=True)
        rows.append(torch.cat([compare(matrix, part) for matrix, part in parts]))
    return evidence.units(scored, rows)
