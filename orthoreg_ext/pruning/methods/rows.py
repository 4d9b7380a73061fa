"""Scores of units from comparisons of filters within each filter matrix."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..engine import Engine
from ..scores import CRITERIA, Scored, scored_slots, unit_scores


def compared_slots(engine: Engine) -> list[Scored]:
    """The layers of the prunable groups whose filters can be compared with each other.

    The filters of a depthwise layer see different inputs each, so it says nothing of its group if
    another layer of the group does.
    """
    scored = scored_slots(engine.model, engine.structure, CRITERIA["l1"], bias=False)
    compared = [entry for entry in scored if not _is_depthwise(entry)]
    known = torch.cat([entry.slot.units for entry in compared] or [torch.empty(0)])
    rest = [e for e in scored if _is_depthwise(e) and not torch.isin(e.slot.units, known).any()]
    return compared + rest


def matrices_of(entry: Scored) -> list[Tensor]:  # each [n, k]
    """The filter matrix of each group of a layer, in at least float32."""
    assert entry.layer is not None
    rows = entry.rows(entry.weight.detach()).flatten(1)
    wide = torch.promote_types(rows.dtype, torch.float32)
    return list(rows.to(wide).chunk(entry.layer.groups))


def scores_by_matrix(
    engine: Engine,
    compare: Callable[[Tensor, Tensor], Tensor],  # [n, k], [n] -> [n]
    alive: Tensor | None = None,  # [r] int64
) -> list[Tensor]:  # each [u] float64, CPU
    """The score of every unit, reduced over its filters, of every prunable group.

    Args:
        engine: of the model.
        compare: from a filter matrix, and a mask of the filters to compare with, to scores.
        alive: the units whose filters are compared with; all without it.

    Raises:
        ValueError: a score is not finite, naming the layer.
    """
    scored, pieces = compared_slots(engine), []
    for entry in scored:
        mask = torch.ones(len(entry.slot.units), dtype=torch.bool)
        if alive is not None:
            mask = torch.isin(entry.slot.units, alive)
        matrices = matrices_of(entry)
        masks = mask.to(entry.weight.device).chunk(len(matrices))
        rows = [compare(m, part) for m, part in zip(matrices, masks, strict=True)]
        piece = torch.cat(rows).double().cpu()
        if not torch.isfinite(piece).all():
            raise ValueError(
                f"the filters of layer {entry.slot.layer!r} cannot be compared: their scores are "
                "not finite. Look for NaN or infinity in its weights"
            )
        pieces.append(piece)
    rules = engine.rules
    return unit_scores(
        engine.structure.prunable, scored, pieces, rules.group_reduction, rules.normalize
    )


def _is_depthwise(entry: Scored) -> bool:
    return entry.layer is not None and entry.layer.filters == entry.layer.groups > 1
