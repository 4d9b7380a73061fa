"""The table of criteria, and the way from a layer's filters to the units that can go."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .. import functional as F
from ..layers import FilterLayer, filter_layers
from .units import Group, Slot, Structure


@dataclass(frozen=True)
class Criterion:
    """A way to rank filters; low scores go first.

    Attributes:
        kernel: the score of ``functional.filter_scores`` that computes it.
        formula: with w, g the entries of one filter and of its mean gradient.
        needs_grad: whether it reads gradients.
        of: "filters" (weights of convolution and linear layers) or "gamma" (BatchNorm scales).
    """

    kernel: str
    formula: str
    needs_grad: bool = False
    of: str = "filters"


CRITERIA: dict[str, Criterion] = {
    "l1": Criterion("l1", "sum |w|"),
    "l2": Criterion("l2", "sqrt(sum w^2)"),
    "taylor": Criterion("taylor", "|sum w g|", needs_grad=True),
    "taylor_sq": Criterion("taylor_sq", "sum (w g)^2", needs_grad=True),
    "taylor_abs": Criterion("taylor_abs", "sum |w g|", needs_grad=True),
    "fisher": Criterion("fisher", "(sum w g)^2", needs_grad=True),
    "bn_scale": Criterion("l1", "|gamma|", of="gamma"),
}


REDUCTIONS = ("mean", "sum", "max", "first")

NORMALIZERS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": torch.mean,
    "max": torch.max,
    "sum": torch.sum,
}


@dataclass(frozen=True)
class Scored:
    """A slot whose channels have scores, and the parameters they come from."""

    slot: Slot
    weight: nn.Parameter
    bias: nn.Parameter | None
    layer: FilterLayer | None = None  # of a filter slot; None for BatchNorm scales, a row each

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The parameters by name."""
        named = {f"{self.slot.layer}.weight": self.weight}
        return named if self.bias is None else {**named, f"{self.slot.layer}.bias": self.bias}

    def rows(self, tensor: Tensor) -> Tensor:  # [n, ...]
        """A tensor shaped as the weight, with the output dimension first."""
        return tensor if self.layer is None else self.layer.rows(tensor)


def scored_slots(
    model: nn.Module, structure: Structure, criterion: Criterion, bias: bool
) -> list[Scored]:
    """The slots of prunable groups that a criterion scores; shared weights once."""
    wanted = torch.cat([group.units for group in structure.prunable])
    layers = {layer.name: layer for layer in filter_layers(model)}
    found = []
    for slot in structure.slots:
        if not torch.isin(slot.units, wanted).any():
            continue
        module: Any = model.get_submodule(slot.owner)
        if criterion.of == "gamma":
            if isinstance(module, _BatchNorm) and module.weight is not None:
                found.append(Scored(slot, module.weight, None))
        elif slot.has_filters and slot.layer in layers:
            kept = module.bias if bias else None
            found.append(Scored(slot, module.weight, kept, layers[slot.layer]))
    return found


def existing_gradients(parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """The `.grad` of every parameter.

    Raises:
        ValueError: one has none, naming it and what to do.
    """
    missing = [name for name, parameter in parameters.items() if parameter.grad is None]
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise ValueError(
            f"{missing[0]!r}{more} has no gradient: pass data=[(input, target), ...] to compute "
            "it, or call loss.backward() in eval mode before pruning"
        )
    return {name: p.grad for name, p in parameters.items() if p.grad is not None}


def score_slots(
    scored: list[Scored], criterion: Criterion, name: str, gradients: dict[str, Tensor] | None
) -> list[Tensor]:
    """Scores the channels of all slots in one call, [n] float64 on the CPU each.

    Raises:
        ValueError: a score is NaN or infinite, naming layer and criterion.
    """
    weights, grads = [], []
    biases: list[Tensor | None] = []
    bias_grads: list[Tensor | None] = []
    for entry in scored:
        wide = torch.promote_types(entry.weight.dtype, torch.float32)
        weights.append(entry.rows(entry.weight.detach()).to(wide))
        biases.append(None if entry.bias is None else entry.bias.detach().to(wide))
        if gradients is not None:
            grads.append(entry.rows(gradients[f"{entry.slot.layer}.weight"]).to(wide))
            grad = gradients.get(f"{entry.slot.layer}.bias")
            bias_grads.append(None if grad is None else grad.to(wide))
    has_bias = any(bias is not None for bias in biases)
    with torch.no_grad():
        rows = F.filter_scores(
            weights,
            grads if gradients is not None else None,
            (criterion.kernel,),
            biases=biases if has_bias else None,
            bias_grads=bias_grads if has_bias and gradients is not None else None,
        )[criterion.kernel]
    flat = torch.cat(rows).double().cpu()  # the one transfer
    pieces = list(flat.split([len(row) for row in rows]))
    for entry, piece in zip(scored, pieces, strict=True):
        bad = (~torch.isfinite(piece)).nonzero().flatten()
        if len(bad):
            raise ValueError(
                f"criterion {name!r} gives {float(piece[bad[0]])} for filter {int(bad[0])} of "
                f"layer {entry.slot.layer!r} ({len(bad)} of {len(piece)} not finite): the cut "
                "would be arbitrary. Look for NaN or infinity in its weights, or in the gradients "
                "(loss, data)"
            )
    return pieces


def unit_scores(
    groups: list[Group],
    scored: list[Scored],
    pieces: list[Tensor],  # each [n] float64
    reduction: str,
    normalize: str | None,
) -> list[Tensor]:
    """Reduces the scores of all channels of a unit to one, [u] float64 for each group.

    Raises:
        ValueError: a group has no scored layer (``bn_scale`` without a BatchNorm).
    """
    wanted = torch.cat([group.units for group in groups])
    units = torch.cat([entry.slot.units for entry in scored] or [wanted[:0]])
    values = torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.float64)
    index = torch.full((int(wanted.max()) + 2,), len(wanted), dtype=torch.int64)  # last: not wanted
    index[wanted] = torch.arange(len(wanted))
    where = index[units.clamp(max=len(index) - 1)]  # NEVER = -1 reads the last entry
    values, where = values[where < len(wanted)], where[where < len(wanted)]
    counts = torch.bincount(where, minlength=len(wanted))
    for group, held in zip(groups, counts.split([len(g.units) for g in groups]), strict=True):
        if not held.all():
            raise ValueError(
                f"criterion 'bn_scale' needs a BatchNorm with a scale behind layer {group.name!r}, "
                "but the graph shows none; use another criterion, or list the layer in ignored"
            )
    total = torch.zeros(len(wanted), dtype=torch.float64)
    if reduction == "max":
        total = total.scatter_reduce(0, where, values, "amax", include_self=False)
    elif reduction == "first":
        entry_number = torch.arange(len(where))
        total = values[counts.scatter_reduce(0, where, entry_number, "amin", include_self=False)]
    else:
        total = total.index_add(0, where, values)
        total = total / counts if reduction == "mean" else total
    scores = list(total.split([len(group.units) for group in groups]))
    if normalize is None:
        return scores
    return [s / NORMALIZERS[normalize](s).clamp(min=torch.finfo(s.dtype).tiny) for s in scores]


def filters_per_unit(groups: list[Group], scored: list[Scored]) -> list[Tensor]:  # each [u] int64
    """How many filters leave with each unit; the filters of a shared weight count once."""
    units = torch.cat([entry.slot.units for entry in scored])
    counts = torch.bincount(
        units[units >= 0], minlength=max(int(g.units.max()) for g in groups) + 1
    )
    return [counts[group.units] for group in groups]
