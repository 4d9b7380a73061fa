"""Scores of filters, of input channels and of coupled groups: part of functional.py."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import overload

import torch
from torch import Tensor

from . import reference
from .arguments import (
    Layers,
    by_precision,
    check_fisher,
    check_grads,
    check_layers,
    check_tensor,
    keep_taps_together,
)
from .backend import namespace_for
from .errors import choose, refuse_transforms
from .members import GroupMembers, Member, group_members

Scores = dict[str, list[Tensor]]
"""One tensor a layer for each criterion."""

_AXES = {0: (0,), 1: (1,), (0, 1): (0, 1)}  # the dimensions that `dim` names


@overload
def filter_scores(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor] | None = None,
    criteria: Sequence[str] = ("l1",),
    *,
    dim: int = 0,
    biases: Sequence[Tensor | None] | None = None,
    bias_grads: Sequence[Tensor | None] | None = None,
    groups: Sequence[int] | None = None,
) -> Scores: ...


@overload
def filter_scores(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor] | None = None,
    criteria: Sequence[str] = ("l1",),
    *,
    dim: tuple[int, int],
    biases: Sequence[Tensor | None] | None = None,
    bias_grads: Sequence[Tensor | None] | None = None,
    groups: Sequence[int] | None = None,
) -> tuple[Scores, Scores]: ...


def filter_scores(
    weights: Sequence[Tensor],  # each [n, ...]
    grads: Sequence[Tensor] | None = None,  # like weights
    criteria: Sequence[str] = ("l1",),
    *,
    dim: int | tuple[int, int] = 0,
    biases: Sequence[Tensor | None] | None = None,  # each [n]
    bias_grads: Sequence[Tensor | None] | None = None,  # each [n]
    groups: Sequence[int] | None = None,
) -> Scores | tuple[Scores, Scores]:
    """Scores every filter of every layer in one pass over weight and gradient.

    With w and g the entries of a filter and of its gradient: ``l1`` = sum |w|, ``l2`` =
    sqrt(sum w^2), ``taylor`` = |sum w g|, ``taylor_sq`` = sum (w g)^2, ``taylor_abs`` = sum |w g|,
    ``fisher`` = (sum w g)^2. The last is OrthoReg's released estimator, the square of the mean
    gradient product: take g as the mean over the calibration samples in eval mode, because behind a
    BatchNorm in train mode sum w g is identically 0.

    Args:
        weights: the layers; [n] is allowed, e.g. the scale of a BatchNorm.
        grads: their gradients, needed by every criterion but ``l1`` and ``l2``.
        criteria: any of the names above.
        dim: 0 scores filters (outputs), 1 scores input channels; (0, 1) scores both from the same
            pass.
        biases: one more entry of each filter; input channels have none.
        bias_grads: their gradients, where gradients are needed.
        groups: the filter matrices in each weight; with dim 1 there are groups * i inputs.

    Returns:
        For each criterion one tensor a layer: [n], or [groups * i] with dim 1; float64 for float64
        weights, else float32. With dim (0, 1) two such dicts, first that of the filters.

    Raises:
        TypeError: a weight is no floating-point tensor.
        ValueError: unknown criteria, missing gradients, mismatched shapes, lengths or devices.
    """
    names = _score_names(criteria, reference.SCORES)
    axes = _score_axes(dim)
    if axes == (1,) and biases is not None:
        raise ValueError(
            "biases belong to filters, not to input channels: leave them out with dim=1"
        )
    if biases is None and bias_grads is None:
        unchecked = _scores_of_plain(weights, grads, groups, axes, names)
        if unchecked is not None:
            return unchecked[0] if len(axes) == 1 else (unchecked[0], unchecked[1])
    layers = check_layers(weights, biases, groups, minimum_dim=1)
    slopes = None
    if 1 in axes:
        layers = keep_taps_together(layers)
    if any(name not in reference.WEIGHT_ONLY for name in names):
        layers, slopes = check_grads(layers, grads, bias_grads, names)
    scores = _scores(layers, slopes, None, axes, names)
    return scores[0] if len(axes) == 1 else (scores[0], scores[1])


@overload
def accumulate_fisher_(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    fisher: Sequence[Tensor],
    criteria: Sequence[str] = (reference.FISHER_DIAG,),
    *,
    dim: int = 0,
    groups: Sequence[int] | None = None,
) -> Scores: ...


@overload
def accumulate_fisher_(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    fisher: Sequence[Tensor],
    criteria: Sequence[str] = (reference.FISHER_DIAG,),
    *,
    dim: tuple[int, int],
    groups: Sequence[int] | None = None,
) -> tuple[Scores, Scores]: ...


def accumulate_fisher_(
    weights: Sequence[Tensor],  # each [n, ...]
    grads: Sequence[Tensor],  # like weights
    fisher: Sequence[Tensor],  # like weights, float32, or float64 for float64 weights
    criteria: Sequence[str] = (reference.FISHER_DIAG,),
    *,
    dim: int | tuple[int, int] = 0,
    groups: Sequence[int] | None = None,
) -> Scores | tuple[Scores, Scores]:
    """Adds g^2 to the accumulators and scores every filter, in one pass over weight and gradient.

    With one call a batch (or a sample), `fisher` becomes the diagonal F of the empirical Fisher
    matrix, times the number of calls. ``fisher_diag`` = sum w^2 F, with the F after this call, is
    the saliency of optimal brain damage (LeCun, Denker and Solla, 1989) with F for the diagonal of
    the Hessian, times that number and 2; unlike ``fisher`` it needs no eval mode.

    Args:
        weights: the layers. A bias can be one of them, [n]: each of its entries is a filter.
        grads: their gradients.
        fisher: the accumulators, changed in place; ``torch.zeros_like(weight,
            dtype=torch.float32)`` to start with. Other memory orders than the weight's are copied.
        criteria: ``fisher_diag`` or any name of :func:`filter_scores`.
        dim: as in :func:`filter_scores`.
        groups: as in :func:`filter_scores`.

    Returns:
        As :func:`filter_scores`.

    Raises:
        RuntimeError: inside a transformation of torch.func.
        TypeError: as in :func:`filter_scores`, or an accumulator of another precision.
        ValueError: as in :func:`filter_scores`. Nothing is accumulated in a call that is refused.
    """
    refuse_transforms("accumulate_fisher_ adds to fisher", "call it outside")
    names = _score_names(criteria, (*reference.SCORES, reference.FISHER_DIAG))
    axes = _score_axes(dim)
    layers = check_layers(weights, None, groups, minimum_dim=1)
    if 1 in axes:
        layers = keep_taps_together(layers)
    layers, slopes = check_grads(layers, grads, None, [reference.FISHER_DIAG])
    with torch.no_grad():
        ordered = check_fisher(layers, fisher)
        scores = _scores(layers, slopes, ordered, axes, names)
        for tensor, changed in zip(fisher, ordered, strict=True):
            if changed is not tensor:
                tensor.copy_(changed)
    return scores[0] if len(axes) == 1 else (scores[0], scores[1])


def _score_names(criteria: Sequence[str], known: Collection[str]) -> list[str]:
    if isinstance(criteria, str):
        raise TypeError(f"criteria must be a sequence of names; write ({criteria!r},)")
    if not isinstance(criteria, Iterable):
        raise TypeError(f"criteria must be a sequence of names, got {type(criteria).__name__}")
    names = [choose("criterion", name, known) for name in criteria]
    if not names:
        raise ValueError(f"criteria is empty, expected some of {', '.join(known)}")
    return names


def _score_axes(dim: int | tuple[int, int]) -> tuple[int, ...]:
    key = tuple(dim) if isinstance(dim, (tuple, list)) else dim
    if not isinstance(dim, (int, tuple, list)) or key not in list(_AXES):
        raise ValueError(
            f"dim is {dim!r}, expected 0 (filters), 1 (input channels) or (0, 1) (both)"
        )
    return _AXES[key]


def _scores_of_plain(
    weights: Sequence[Tensor],  # each [n, ...]
    grads: Sequence[Tensor] | None,  # like weights
    groups: Sequence[int] | None,
    axes: tuple[int, ...],
    names: list[str],
) -> list[Scores] | None:  # one for each of the axes
    """The scores of layers that the operator takes as they are; None where it refuses them.

    The operator checks all that it depends on, in a fraction of the time that Python needs for it:
    what it refuses is then converted, or refused with a better message. Networks of many small
    layers gain most.
    """
    if torch.compiler.is_compiling():
        return None
    if not all(a is None or isinstance(a, (list, tuple)) for a in (weights, grads, groups)):
        return None
    if not weights or {*map(type, groups or [1])} != {int}:
        return None
    if not {*map(type, weights), *map(type, grads or [])} <= {Tensor, torch.nn.Parameter}:
        return None
    namespace = namespace_for(weights[0].device)
    if namespace is None:
        return None
    needs_grads = any(name not in reference.WEIGHT_ONLY for name in names)
    counts = [1] * len(weights) if groups is None else groups
    with torch.no_grad():
        try:
            flat = getattr(torch.ops, namespace).filter_scores(
                weights,
                (grads or []) if needs_grads else [],
                [],
                [],
                counts,
                2 if len(axes) == 2 else axes[0],
                names,
            )
        except RuntimeError:
            return None
        lengths = _lengths(weights, counts, axes)
        # No views, since nothing is differentiated: half the time.
        pieces = torch.unsafe_split_with_sizes(flat.view(-1), lengths * len(names))
    count, every = len(weights), len(lengths)
    return [
        {
            name: list(pieces[start : start + count])
            for name, start in zip(
                names, range(axis * count, every * len(names), every), strict=True
            )
        }
        for axis in range(len(axes))
    ]


def _lengths(weights: Sequence[Tensor], groups: Sequence[int], axes: tuple[int, ...]) -> list[int]:
    """How many scores each layer has, for one axis after the other."""
    lengths = [len(w) for w in weights] if 0 in axes else []
    if 1 in axes:
        lengths += [
            g * (w.shape[1] if w.dim() > 1 else 1) for w, g in zip(weights, groups, strict=True)
        ]
    return lengths


def _scores(
    layers: Layers,
    slopes: Layers | None,
    fisher: list[Tensor] | None,
    axes: tuple[int, ...],
    names: list[str],
) -> list[Scores]:  # one for each of the axes
    count = len(layers.weights)
    scores: list[Scores] = [{name: [torch.empty(0)] * count for name in names} for _ in axes]
    for part in by_precision(layers):
        taken = layers.take(part)
        flat = _flat_scores(
            taken,
            slopes.take(part) if slopes else None,
            None if fisher is None else [fisher[i] for i in part],
            2 if len(axes) == 2 else axes[0],
            names,
        )
        places = [(found, i) for found in scores for i in part]
        lengths = _lengths(taken.weights, taken.groups, axes)
        for name, row in zip(names, flat, strict=True):
            for (found, i), piece in zip(places, row.split(lengths), strict=True):
                found[name][i] = piece
    return scores


def _flat_scores(
    layers: Layers,
    slopes: Layers | None,
    fisher: list[Tensor] | None,
    dim: int,
    names: list[str],
) -> Tensor:  # [criteria, scores]
    grads = slopes.weights if slopes else []
    bias_grads = slopes.biases if slopes else []
    namespace = namespace_for(layers.device)
    operators = reference if namespace is None else getattr(torch.ops, namespace)
    with torch.no_grad():
        if fisher is None:
            arguments = (layers.weights, grads, layers.biases, bias_grads, layers.groups)
            flat: Tensor = operators.filter_scores(*arguments, dim, names)
        else:
            flat = operators.accumulate_fisher_(
                layers.weights, grads, fisher, layers.groups, dim, names
            )
            if not torch.compiler.is_compiling():  # the compiler sees it in the schema
                torch.autograd.graph.increment_version(list(fisher))
        return flat


def group_scores(
    scores: Sequence[Tensor],  # each [n]
    members: GroupMembers | Sequence[Sequence[Member]],
    reduction: str = "mean",
) -> list[Tensor]:  # one for each group, [root channels]
    """Reduces the scores of coupled layers to one score a channel of each group, in one launch.

    Channels that can only be removed together (layers that meet in an addition) form a group. Each
    member of a group says which of its scores belongs to which root channel of the group.

    Args:
        scores: the scores of each layer, as :func:`filter_scores` returns them.
        members: what :func:`~orthoreg_ext.members.group_members` makes of the index tables; made
            once, calls move nothing to the device. Or for each group a sequence of (index into
            `scores`, indices [root channels] or None for all in order), as it takes them.
        reduction: ``mean``, ``sum``, ``max`` or ``first`` (the first member that has the channel).

    Returns:
        One tensor a group, in float64 if any score is, else in float32.

    Raises:
        TypeError: the scores are no floating-point tensors.
        ValueError: as :func:`~orthoreg_ext.members.group_members`; scores of another device or
            other lengths than the tables; an unknown reduction.
    """
    choose("reduction", reduction, reference.REDUCTIONS)
    if isinstance(scores, Tensor) or not isinstance(scores, Sequence):
        raise TypeError(f"scores must be a sequence of tensors, got {type(scores).__name__}")
    checked = [check_tensor(f"scores[{i}]", s, 1) for i, s in enumerate(scores)]
    lengths = tuple(s.numel() for s in checked)
    for i, tensor in enumerate(checked):
        if tensor.dim() != 1 or tensor.device != checked[0].device:
            raise ValueError(
                f"scores[{i}] has shape {tuple(tensor.shape)} on {tensor.device}, expected [n] on "
                f"{checked[0].device}"
            )
    if not isinstance(members, GroupMembers):
        members = group_members(members, lengths, checked[0].device if checked else "cpu")
    if members.lengths != lengths:
        raise ValueError(
            f"scores have the lengths {lengths}, but the members were made for {members.lengths}"
        )
    if not members.sizes:
        return []
    if members.entries.device != checked[0].device:
        raise ValueError(
            f"the members are on {members.entries.device}, but the scores are on "
            f"{checked[0].device}; make them for that device"
        )
    double = any(s.dtype == torch.float64 for s in checked)
    wide = torch.float64 if double else torch.float32
    namespace = namespace_for(checked[0].device)
    operators = reference if namespace is None else getattr(torch.ops, namespace)
    with torch.no_grad():
        ready = [s.to(wide).contiguous() for s in checked]
        flat = operators.group_scores(ready, members.entries, members.starts, reduction)
    return list(flat.split(members.sizes))
