"""The one call that scores, selects and removes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import choose
from . import checks
from .calibration import Loss, check_data, mean_gradients
from .checkpoint import fingerprint
from .counts import count, widths
from .equivalence import checked_commit
from .removal import Edit, check_optimizer, commit, removal_edits
from .result import PruneResult, RoundError, layer_widths, records
from .schedule import check_ratio, check_rounds, removed_share
from .scores import (
    CRITERIA,
    NORMALIZERS,
    REDUCTIONS,
    existing_gradients,
    filters_per_unit,
    score_slots,
    scored_slots,
    unit_scores,
)
from .selection import SCOPES, Limits, Pool, check_reachable
from .structure import trace
from .units import Group, Structure


@dataclass(frozen=True)
class _Job:
    """What stays the same over the rounds of one call."""

    model: nn.Module
    inputs: Any
    structure: Structure
    criterion: str
    scope: str
    limits: Limits
    reduction: str
    normalize: str | None
    bias: bool
    data: Iterable[Any] | None
    loss: Loss | None
    optimizers: list[Optimizer]
    ema: nn.Module | None
    verify: bool
    original: dict[int, int]  # id of a group -> its filters before the first round


def prune(
    model: nn.Module,
    example_inputs: Any,
    *,
    criterion: str = "fisher",
    ratio: float = 0.5,
    data: Iterable[Any] | None = None,
    loss: Loss | None = None,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    scope: str = "global",
    round_to: int = 1,
    ignored: Iterable[str | nn.Module] = (),
    rounds: int = 1,
    between_rounds: Callable[[nn.Module, int], object] | None = None,
    max_layer_ratio: float = 0.95,
    normalize: str | None = None,
    group_reduction: str = "mean",
    bias: bool = False,
    ema: nn.Module | None = None,
    verify: bool = True,
) -> PruneResult:
    """Removes filters from a model in place: scores them, selects, and cuts whole channels.

    Channels that are coupled (residual additions, depthwise and grouped convolutions, shared
    weights) leave together, as one unit. A unit's score is the `group_reduction` of the scores of
    its filters, over all layers it is in; with the default, the mean, a unit counts by what is lost
    for each filter removed, whatever its size. Global selection ranks the raw unit scores of the
    whole model, as OrthoReg's released code does (pruner.py:193-248); that code caps layers by
    protecting the last-indexed filters, here the most important are protected.

    Everything about the model survives: parameters keep dtype, device, memory format and
    requires_grad, `.grad` and optimizer state are cut alike, shared parameters stay shared,
    training flags, BatchNorm statistics and the random state are not touched by scoring. Parameters
    that lose channels are new objects: the optimizer is told, hooks on the old ones are not kept.

    Args:
        model: any module with convolutions or linear layers, on any device. Its output layer is
            never pruned, nor are fully frozen groups.
        example_inputs: a tensor, a tuple of arguments or a dict of keyword arguments to trace the
            model with; one sample is enough.
        criterion: with w, g the entries of a filter and of its mean gradient: "l1" sum |w|, "l2"
            sqrt(sum w^2), "taylor" |sum w g|, "taylor_sq" sum (w g)^2, "taylor_abs" sum |w g|,
            "fisher" (sum w g)^2; "bn_scale" |gamma| of the BatchNorms behind the filters.
        ratio: the share of the prunable filters to remove, in (0, 1); the filters of the output
            layer, of ignored and of frozen groups are not counted.
        data: (input, target) batches for criteria with gradients: the gradient of the mean loss
            over all samples, in eval mode. Without it the existing `.grad` is used: compute it in
            eval mode, behind a BatchNorm in train mode sum w g is identically 0.
        loss: (output, target) -> mean loss; cross entropy by default.
        optimizer: one or several whose state (momentum, exp_avg, ...) follows the cut.
        scope: "global" ranks all units together, "local" removes the ratio from every group.
        round_to: the remaining channels of each pruned group are a multiple of it.
        ignored: layers (names or modules, containers for all inside) that keep their filters, and
            with them the groups they are in; their inputs may still be cut.
        rounds: the ratio is reached in so many rounds by OrthoReg's split (:func:`split_ratio`),
            scoring anew in each.
        between_rounds: called as between_rounds(model, round) after every round but the last, e.g.
            to train.
        max_layer_ratio: the largest share of a group's units, of its original count, that may go.
        normalize: None, or divide the scores of each group by their "mean", "max" or "sum".
        group_reduction: "mean", "sum", "max", or "first" (the first layer of the group decides).
        bias: count a filter's bias among its entries, as OrthoReg does for VGG.
        ema: a copy of the model (or its AveragedModel) that is cut alike.
        verify: check, for every round, that the pruned model computes what the unpruned one does
            with the removed channels at zero (two forward passes on the example inputs; only shapes
            where LayerNorm or GroupNorm normalise over removed channels).

    Returns:
        what was done; `result.save(directory)` writes it.

    Raises:
        ImportError: Torch-Pruning is not installed.
        TypeError, ValueError: an argument is wrong or cannot be met; nothing was changed.
        RuntimeError: called inside `torch.inference_mode()`, the model cannot be followed, or the
            removal failed; the model was restored.
        RoundError: a round after the first failed, or `between_rounds` did (any Exception; the
            cause is chained) or changed the shape of a layer. The rounds before are done, and in
            the error's `.result`; the model is as the last round and `between_rounds` left it.
        KeyboardInterrupt: passes unchanged; a round that it meets is undone, those before stay.
    """
    limits = _check_choices(criterion, scope, normalize, group_reduction, round_to, max_layer_ratio)
    check_ratio(ratio)
    check_rounds(rounds)
    checks.refuse_inference_mode()
    checks.check_model(model)
    checks.check_callable("loss", loss, "loss(output, target)")
    checks.check_callable("between_rounds", between_rounds, "between_rounds(model, round)")
    names = checks.layer_names(model, ignored)
    if CRITERIA[criterion].needs_grad and data is not None:
        check_data(data, rounds)
    optimizers = checks.optimizer_list(optimizer)
    copy = None if ema is None else checks.check_copy(model, ema)

    architecture, before = fingerprint(model), count(model, example_inputs)
    width_of = widths(model)
    structure = trace(model, example_inputs, names)
    checks.keep_frozen(model, structure)
    checks.require_prunable(structure)
    checks.refuse_reparametrized(model, structure)
    job = _Job(
        model,
        example_inputs,
        structure,
        criterion,
        scope,
        limits,
        group_reduction,
        normalize,
        bias,
        data,
        loss,
        optimizers,
        copy,
        verify,
        {id(g): int(n.sum()) for g, n in _filters(model, structure)},
    )
    check_reachable(scope, _pools(job, None), ratio, limits)

    history: list[dict[str, Any]] = []
    settings = {
        "criterion": criterion,
        "ratio": ratio,
        "scope": scope,
        "rounds": rounds,
        "round_to": round_to,
        "max_layer_ratio": max_layer_ratio,
        "normalize": normalize,
        "group_reduction": group_reduction,
        "bias": bias,
        "ignored": sorted(names),
    }

    def result() -> PruneResult:
        try:
            after = count(model, example_inputs)
        except ValueError as error:  # it ran before, so the cut is to blame, not the inputs
            raise RuntimeError(
                f"the pruned model does not run on example_inputs any more ({error.__cause__}), "
                "and it stays so: verify=False skipped the check that would have restored it"
            ) from error
        layers = layer_widths(model, structure, width_of)
        return PruneResult(list(history), before, after, layers, settings, architecture, model)

    done: PruneResult | None = None
    for number, share in enumerate(removed_share(ratio, rounds), start=1):
        try:
            history += _round(job, share, number)
        except (ValueError, RuntimeError) as error:
            if done is None:
                raise
            raise RoundError(
                f"round {number} of {rounds} failed: {error} The model is as round {number - 1} "
                "and its training left it; the result so far is in this error's .result",
                done,
            ) from error
        done = result()  # now: after a failed between_rounds the model may not run any more
        if between_rounds is None or number == rounds:
            continue
        try:
            between_rounds(model, number)
            checks.check_unchanged(model, structure)
        except Exception as error:
            raise RoundError(
                f"between_rounds failed after round {number} of {rounds} "
                f"({type(error).__name__}: {error}); the model is as between_rounds left it, and "
                "the result so far is in this error's .result",
                done,
            ) from error
    assert done is not None  # rounds >= 1
    return done


def _check_choices(
    criterion: str,
    scope: str,
    normalize: str | None,
    group_reduction: str,
    round_to: int,
    max_layer_ratio: float,
) -> Limits:
    choose("criterion", criterion, CRITERIA)
    choose("scope", scope, SCOPES)
    choose("group_reduction", group_reduction, REDUCTIONS)
    if normalize is not None:
        choose("normalize", normalize, NORMALIZERS)
    if not isinstance(round_to, int) or isinstance(round_to, bool) or round_to < 1:
        raise ValueError(f"round_to is {round_to!r}, expected an integer of at least 1, e.g. 8")
    if not isinstance(max_layer_ratio, (int, float)) or not 0 < max_layer_ratio <= 1:
        raise ValueError(
            f"max_layer_ratio is {max_layer_ratio!r}, expected a number in (0, 1]: the largest "
            "share of a layer that may be removed"
        )
    return Limits(float(max_layer_ratio), round_to)


def _filters(model: nn.Module, structure: Structure) -> list[tuple[Group, Tensor]]:
    groups = structure.prunable
    slots = scored_slots(model, structure, CRITERIA["l1"], bias=False)
    return list(zip(groups, filters_per_unit(groups, slots), strict=True))


def _pools(job: _Job, scores: list[Tensor] | None) -> list[Pool]:
    """The groups as selection sees them; without scores all units are equal."""
    pools = []
    for i, (group, filters) in enumerate(_filters(job.model, job.structure)):
        values = torch.zeros(len(group.units), dtype=torch.float64) if scores is None else scores[i]
        total = job.original[id(group)]
        pools.append(Pool(group.name, values, filters, group.original, total, group.channels))
    return pools


def _round(job: _Job, share: float, number: int) -> list[dict[str, Any]]:
    """Scores, selects and removes once; returns the history of the round."""
    row, structure = CRITERIA[job.criterion], job.structure
    for optimizer in job.optimizers:
        check_optimizer(optimizer, job.model)
    scored = scored_slots(job.model, structure, row, job.bias)
    gradients = None
    if row.needs_grad:
        parameters = {name: p for entry in scored for name, p in entry.parameters.items()}
        if job.data is None:
            gradients = existing_gradients(parameters)
        else:
            gradients = mean_gradients(job.model, parameters, job.data, job.loss)
    pieces = score_slots(scored, row, job.criterion, gradients) if scored else []
    groups = structure.prunable
    scores = unit_scores(groups, scored, pieces, job.reduction, job.normalize)
    blocks = SCOPES[job.scope](_pools(job, scores), share, job.limits)
    if not blocks:
        return []
    removed = torch.cat([groups[block.pool].units[list(block.units)] for block in blocks])
    _remove(job, removed)
    entries = records(structure, removed, number)
    structure.shrink(removed)
    return entries


def _remove(job: _Job, removed: Tensor) -> None:
    edits: list[Edit] = removal_edits(job.model, job.structure, removed, job.optimizers)
    if job.ema is not None:
        edits += removal_edits(job.ema, job.structure, removed, label="ema")
    if job.verify:
        checked_commit(job.model, job.structure, removed, edits, job.inputs)
    else:
        commit(edits)
