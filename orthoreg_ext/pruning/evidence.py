"""What a criterion can read, and the way from the scores of filters to those of units."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..distributed import mean_of_ranks, together
from ..layers import FilterLayer, filter_layers
from .calibration import Loss, mean_gradients
from .units import Group, Slot, Structure

REDUCTIONS = ("mean", "sum", "max", "first")

NORMALIZERS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": torch.mean,
    "max": torch.max,
    "sum": torch.sum,
}

DIMS = {"out": (0,), "in": (1,), "both": (0, 1)}
"""Which filters stand for a unit: those that make its channels, those that read them, or both."""

_MISSING = {
    "filters": "needs a convolution or linear layer that makes (dim='out') or reads (dim='in')",
    "matrices": "needs a filter matrix with several filters (no depthwise one) for",
    "gamma": "needs a BatchNorm with a scale behind",
}


@dataclass(frozen=True)
class Scored:
    """A slot whose channels have scores, and the parameters they come from."""

    slot: Slot
    weight: nn.Parameter
    bias: nn.Parameter | None
    layer: FilterLayer | None = None  # of a filter slot; None for BatchNorm scales, a row each
    dim: int = 0  # 0: the channels are filters, 1: the inputs of filters

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The parameters by name."""
        named = {f"{self.slot.layer}.weight": self.weight}
        return named if self.bias is None else {**named, f"{self.slot.layer}.bias": self.bias}

    @property
    def groups(self) -> int:
        """The filter matrices in the weight."""
        return 1 if self.layer is None else self.layer.groups

    def rows(self, tensor: Tensor) -> Tensor:  # [n, ...]
        """A tensor shaped as the weight, with the output dimension first."""
        return tensor if self.layer is None else self.layer.rows(tensor)

    def of(self, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:  # [n, ...], [n]
        """What belongs to the weight and to the bias, output dimension first, float32 or wider."""
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        weight = self.rows(tensors[f"{self.slot.layer}.weight"].detach()).to(wide)
        bias = tensors.get(f"{self.slot.layer}.bias") if self.bias is not None else None
        return weight, None if bias is None else bias.detach().to(wide)

    def matrices(self) -> list[Tensor]:  # each [n / groups, k] float64
        """The filters of each convolution group, the bias as one more column where it counts."""
        weight, bias = self.of(dict(self.parameters))
        flat = weight.flatten(1).double()
        if bias is not None:
            flat = torch.cat([flat, bias.double().unsqueeze(1)], 1)
        return list(flat.chunk(self.groups))


def scored_slots(
    model: nn.Module,
    structure: Structure,
    of: str = "filters",
    *,
    bias: bool = False,
    dim: str = "out",
) -> list[Scored]:
    """The slots of prunable groups that a criterion scores; shared weights once.

    Args:
        model: the model.
        structure: its units.
        of: "filters" (weights of convolution and linear layers), "matrices" (the same where filters
            can be compared: a depthwise layer has one in each matrix) or "gamma" (scales of
            BatchNorms).
        bias: count the bias, or the shift of a BatchNorm.
        dim: a name of DIMS, for "filters".
    """
    wanted = torch.cat([group.units for group in structure.prunable])
    layers = {layer.name: layer for layer in filter_layers(model)}
    found = []
    for slot in structure.slots:
        if not torch.isin(slot.units, wanted).any():
            continue
        module: Any = model.get_submodule(slot.owner)
        if of == "gamma":
            if isinstance(module, _BatchNorm) and module.weight is not None:
                found.append(Scored(slot, module.weight, module.bias if bias else None))
        elif slot.kind == "filters" and slot.layer in layers:
            layer = layers[slot.layer]
            if of == "matrices" and layer.filters == layer.groups > 1:
                continue
            for axis in DIMS[dim]:
                if slot.side in ("both", "in" if axis else "out"):
                    kept = module.bias if bias and axis == 0 else None
                    found.append(Scored(slot, module.weight, kept, layer, axis))
    return found


def existing_gradients(parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """The `.grad` of every parameter, or, of several ranks, its mean over them.

    Raises:
        ValueError: one has none, naming it and what to do.
    """
    missing = [name for name, parameter in parameters.items() if parameter.grad is None]
    with together("scoring"):
        if missing:
            more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
            raise ValueError(
                f"{missing[0]!r}{more} has no gradient: pass data=[(input, target), ...] to "
                "compute it, or call loss.backward() in eval mode before pruning"
            )
    grads = [p.grad for p in parameters.values() if p.grad is not None]
    return dict(zip(parameters, mean_of_ranks(grads), strict=True))


@dataclass(frozen=True)
class Evidence:
    """All that the scores of a criterion are computed from.

    Attributes:
        name: of the criterion, for messages.
        model: the model.
        structure: its units; those of the prunable groups are scored.
        data: (input, target) batches, if there are any.
        loss: (output, target) -> mean loss; None for cross entropy.
        bias: count a filter's bias among its entries.
        dim: a name of DIMS.
        reduction: how the scores of the channels of a unit become one.
        normalize: None, or a name of NORMALIZERS.
    """

    name: str
    model: nn.Module
    structure: Structure
    data: Iterable[Any] | None = None
    loss: Loss | None = None
    bias: bool = False
    dim: str = "out"
    reduction: str = "mean"
    normalize: str | None = None

    def slots(self, of: str = "filters") -> list[Scored]:
        """What there is to score; `of` as for :func:`scored_slots`.

        Raises:
            ValueError: a unit has no such slot, naming its layer.
        """
        scored = scored_slots(self.model, self.structure, of, bias=self.bias, dim=self.dim)
        wanted = torch.cat([group.units for group in self.structure.prunable])
        held = torch.cat([entry.slot.units for entry in scored] or [wanted[:0]])
        for group in self.structure.prunable:
            if not torch.isin(group.units, held).all():
                raise ValueError(
                    f"criterion {self.name!r} {_MISSING[of]} layer {group.name!r}, but the graph "
                    "shows none; use another criterion, or list the layer in ignored"
                )
        return scored

    def batches(self) -> Iterable[Any]:
        """The data.

        Raises:
            ValueError: there is none.
        """
        if self.data is None:
            raise ValueError(
                f"criterion {self.name!r} is computed on samples, not from .grad: pass "
                "data=[(input, target), ...]"
            )
        return self.data

    def gradients(self, scored: list[Scored]) -> dict[str, Tensor]:
        """The mean gradients on the data in eval mode; without data those that are there.

        Raises:
            ValueError: one is missing, or the data is unusable.
        """
        parameters = parameters_of(scored)
        if self.data is None:
            return existing_gradients(parameters)
        return mean_gradients(self.model, parameters, self.data, self.loss)

    def units(
        self,
        scored: list[Scored],
        rows: list[Tensor],  # [channels] each, any device
    ) -> list[Tensor]:  # each [u] float64, CPU
        """From the scores of channels to those of units, a tensor for each prunable group.

        Raises:
            ValueError: a score is not finite, naming layer and criterion.
        """
        flat = torch.cat([row.double() for row in rows]).cpu()  # the one transfer
        pieces = list(flat.split([len(row) for row in rows]))
        for entry, piece in zip(scored, pieces, strict=True):
            self._check_finite(entry, piece)
        units = [entry.slot.units for entry in scored]
        return self.normalized(unit_scores(self.structure.prunable, units, pieces, self.reduction))

    def normalized(self, scores: list[Tensor]) -> list[Tensor]:  # each [u] float64
        """The scores of each group divided by the mean, maximum or sum of their sizes."""
        if self.normalize is None:
            return scores
        divide, tiny = NORMALIZERS[self.normalize], torch.finfo(torch.float64).tiny
        return [s / divide(s.abs()).clamp(min=tiny) for s in scores]

    def _check_finite(self, entry: Scored, piece: Tensor) -> None:  # [channels] float64
        bad = (~torch.isfinite(piece)).nonzero().flatten()
        if len(bad):
            what = "filter" if entry.dim == 0 else "input channel"
            raise ValueError(
                f"criterion {self.name!r} gives {float(piece[bad[0]])} for {what} {int(bad[0])} of "
                f"layer {entry.slot.layer!r} ({len(bad)} of {len(piece)} not finite): the cut "
                "would be arbitrary. Look for NaN or infinity in its weights, or in the gradients "
                "(loss, data)"
            )


def parameters_of(scored: list[Scored]) -> dict[str, nn.Parameter]:
    """All parameters by name."""
    return {name: p for entry in scored for name, p in entry.parameters.items()}


def positions_in(groups: list[Group], units: Tensor) -> Tensor:  # [c] int64
    """Where each unit stands in the row of the units of all groups, or their number for none."""
    wanted = torch.cat([group.units for group in groups])
    index = torch.full((int(wanted.max()) + 2,), len(wanted), dtype=torch.int64)  # last: not wanted
    index[wanted] = torch.arange(len(wanted))
    return index[units.clamp(max=len(index) - 1)]  # NEVER = -1 reads the last entry


def unit_scores(
    groups: list[Group],
    units: list[Tensor],  # each [channels] int64
    pieces: list[Tensor],  # each [channels] float64
    reduction: str,
) -> list[Tensor]:  # each [u] float64
    """Reduces the scores of all channels of a unit to one; every unit has to have one."""
    sizes = [len(group.units) for group in groups]
    length = sum(sizes)
    values, where = torch.cat(pieces), positions_in(groups, torch.cat(units))
    values, where = values[where < length], where[where < length]
    counts = torch.bincount(where, minlength=length)
    total = torch.zeros(length, dtype=torch.float64)
    if reduction == "max":
        total = total.scatter_reduce(0, where, values, "amax", include_self=False)
    elif reduction == "first":
        entry_number = torch.arange(len(where))
        total = values[counts.scatter_reduce(0, where, entry_number, "amin", include_self=False)]
    else:
        total = total.index_add(0, where, values)
        total = total / counts if reduction == "mean" else total
    return list(total.split(sizes))


def filters_per_unit(groups: list[Group], scored: list[Scored]) -> list[Tensor]:  # each [u] int64
    """How many filters leave with each unit; the filters of a shared weight count once."""
    units = torch.cat([entry.slot.units for entry in scored])
    counts = torch.bincount(
        units[units >= 0], minlength=max(int(g.units.max()) for g in groups) + 1
    )
    return [counts[group.units] for group in groups]
