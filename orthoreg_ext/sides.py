"""Which Gram matrix is formed for each layer, and which of its rows are pruned or have targets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from operator import index
from typing import TypeGuard

import torch
from torch import Tensor

from .arguments import DTYPES, Layers
from .errors import wrong_length
from .penalties import Row
from .reference import compute_dtype

SIDES = ("rows", "cols", "small")


@dataclass(frozen=True)
class Sides:
    """Which Gram matrix is formed for each layer, and what its value differs by."""

    columns: list[bool]
    offsets: list[float]
    dropped: list[float]  # what each pruned filter adds to the offset: -1 to 1

    def take(self, indices: Sequence[int]) -> Sides:
        """The sides of some of the layers."""
        return Sides(
            [self.columns[i] for i in indices],
            [self.offsets[i] for i in indices],
            [self.dropped[i] for i in indices],
        )


def is_tall(n: int, k: int) -> bool:
    """Whether the columns of a matrix [n, k] have the smaller Gram matrix."""
    if n > k:  # noqa: SIM103 - where shapes are dynamic the comparison itself stays a symbol
        return True
    return False


def choose_sides(
    layers: Layers,
    penalty: Row,
    side: str,
    masks: Sequence[Tensor] = (),  # each bool [n] or empty, or none at all
    targets: Sequence[Tensor] = (),  # each [n] or empty, or none at all
) -> Sides:
    """Picks the Gram matrix of each layer: the smaller one where the gradient is the same.

    Raises:
        ValueError: the columns are asked for where marks or targets belong to the rows.
    """
    columns, offsets, dropped = [], [], []
    for i, group in enumerate(layers.groups):
        n, k = layers.filters(i), layers.fan_in(i)
        of_filters = penalty.of_filters or bool(targets and targets[i].numel())
        # the host does not count the filters that are left out, whose number is below the root
        agree = penalty.sides_agree and not (penalty.root and masks and masks[i].numel())
        if of_filters and side == "cols":
            what = f"penalty {penalty.name!r}" if penalty.of_filters else "targets"
            raise ValueError(f"{what} and side='cols' exclude each other: filters are compared")
        wanted = not of_filters and (is_tall(n, k) if side == "small" else side == "cols")
        asked = 0.5 if penalty.both_sides else float(wanted)  # the share of the columns
        column = is_tall(n, k) if agree and not of_filters else wanted
        columns.append(column)
        # value(rows) - value(cols) = n - k in each group, where the sides agree; of pruned filters
        # none counts in n
        change = asked - column  # with one, a graph of dynamic shapes is for these numbers only
        offsets.append(group * change * index(k - n) if change else 0.0)
        dropped.append(change)
    return Sides(columns, offsets, dropped)


def _is_plain(value: object) -> TypeGuard[Tensor]:
    """Whether it is a tensor that is neither sparse nor nested."""
    if not isinstance(value, Tensor) or value.layout is not torch.strided:
        return False
    return torch.compiler.is_compiling() or not value.is_nested


def check_pruned(
    layers: Layers, pruned: Sequence[Tensor | None] | None, penalty: Row
) -> list[Tensor]:  # each bool [n] or empty
    """Returns the pruned filters as masks on the layers' device; no list for no mask at all.

    Raises:
        TypeError: one is neither a bool mask nor a tensor of indices.
        ValueError: one does not fit its layer, not every layer has an entry, or there are none
            and the penalty is about them.
    """
    if pruned is None:
        if penalty.counts is not None:
            raise ValueError(
                f"penalty {penalty.name!r} is {penalty.formula}: pass pruned=, a bool mask or "
                "indices of the filters that are to be pruned, for each of the weights"
            )
        return []
    if isinstance(pruned, Tensor) or not isinstance(pruned, Sequence):
        raise TypeError("pruned must be a sequence with one entry for each of the weights")
    if len(pruned) != len(layers.weights):
        raise wrong_length("pruned", len(pruned), len(layers.weights), "weights")
    if all(mask is None for mask in pruned):
        return []
    masks: list[Tensor] = []
    for i, (mask, weight) in enumerate(zip(pruned, layers.weights, strict=True)):
        if mask is None:
            masks.append(weight.new_empty(0, dtype=torch.bool))
            continue
        if not _is_plain(mask) or mask.dtype not in (torch.bool, torch.int64):
            raise TypeError(
                f"pruned[{i}] must be a bool mask [{weight.shape[0]}] or an int64 tensor of indices"
            )
        if mask.dtype == torch.int64:
            count = weight.shape[0]
            outside = mask.device.type == "cpu" and bool(((mask < 0) | (mask >= count)).any())
            if mask.dim() != 1 or outside:
                raise ValueError(
                    f"pruned[{i}] is {mask.tolist() if outside else tuple(mask.shape)}, expected "
                    f"a list of indices from 0 to {count - 1}, or a bool mask [{count}]"
                )
        mask = mask.to(weight.device)
        if mask.dtype == torch.int64:
            none = torch.zeros(weight.shape[0], dtype=torch.bool, device=weight.device)
            mask = none.index_fill(0, mask, True)
        if mask.shape != weight.shape[:1]:
            raise ValueError(
                f"pruned[{i}] has shape {tuple(mask.shape)}, expected [{weight.shape[0]}]: "
                "one entry for each filter"
            )
        masks.append(mask.contiguous())
    return masks


def check_targets(
    layers: Layers, targets: Sequence[float | Tensor | None] | None, penalty: Row
) -> list[Tensor]:  # each [n] or empty
    """Returns what each filter's G_ii is driven to, on the layers' device; no list for none at all.

    Raises:
        TypeError: one is neither a number nor a tensor of real numbers.
        ValueError: one does not fit its layer, not every layer has an entry, or the penalty leaves
            the norms free.
    """
    if targets is None:
        return []
    if isinstance(targets, Tensor) or not isinstance(targets, Sequence):
        raise TypeError("targets must be a sequence with one entry for each of the weights")
    if len(targets) != len(layers.weights):
        raise wrong_length("targets", len(targets), len(layers.weights), "weights")
    if all(target is None for target in targets):
        return []
    if penalty.diagonal != "target" or penalty.both_sides:
        raise ValueError(
            f"penalty {penalty.name!r} is {penalty.formula}: it has no target for the norms of "
            "filters; leave targets= out"
        )
    found: list[Tensor] = []
    for i, (target, weight) in enumerate(zip(targets, layers.weights, strict=True)):
        wide = compute_dtype(weight.dtype)
        if target is None:
            found.append(weight.new_empty(0, dtype=wide))
        elif isinstance(target, Real):
            if not abs(target) <= torch.finfo(wide).max:
                raise ValueError(f"targets[{i}] is {target!r}, expected a finite number of {wide}")
            found.append(weight.new_full((weight.shape[0],), float(target), dtype=wide))
        elif not _is_plain(target) or target.dtype not in DTYPES:
            raise TypeError(f"targets[{i}] must be a number or a real tensor [{weight.shape[0]}]")
        elif target.shape != weight.shape[:1] or target.device != weight.device:
            raise ValueError(
                f"targets[{i}] has shape {tuple(target.shape)} on {target.device}, expected "
                f"[{weight.shape[0]}] on {weight.device}: one entry for each filter"
            )
        elif target.requires_grad:
            raise ValueError(f"targets[{i}] requires a gradient, which it would not get: detach it")
        else:
            found.append(target.to(wide).contiguous())
    return found


def count_pruned(
    values: Tensor,  # [L]
    sides: Sides,
    masks: list[Tensor],  # each bool [n] or empty, or none at all
) -> Tensor:  # [L]
    """Corrects the offsets for pruned filters, which are not counted on the host."""
    if not any(mask.numel() and change for mask, change in zip(masks, sides.dropped, strict=False)):
        return values
    counts = [change * mask.sum() for mask, change in zip(masks, sides.dropped, strict=True)]
    return values + torch.stack(counts).to(values.dtype)
