"""The one call that scores, selects and removes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from ..distributed import together
from . import checks
from .calibration import Loss, check_data
from .engine import Engine
from .result import PrunePlan, PruneResult, RoundError
from .rules import Rules, default_cap
from .schedule import check_ratio, check_rounds, removed_share
from .scores import Criterion


def prune(
    model: nn.Module,
    example_inputs: Any,
    *,
    criterion: str | Criterion = "fisher",
    ratio: float = 0.5,
    data: Iterable[Any] | None = None,
    loss: Loss | None = None,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    scope: str = "global",
    round_to: int = 1,
    ignored: Iterable[str | nn.Module] = (),
    rounds: int = 1,
    between_rounds: Callable[[nn.Module, int], object] | None = None,
    max_layer_ratio: float | None = None,
    normalize: str | None = None,
    group_reduction: str = "mean",
    bias: bool = False,
    dim: str = "out",
    ema: nn.Module | None = None,
    verify: bool = True,
    target: str = "filters",
    rescore_every: int | None = None,
    dry_run: bool = False,
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

    With torch.distributed initialised this is called on every rank: scores are those of all data,
    and the cut is the same everywhere (:func:`orthoreg_ext.distributed.among` for other groups).

    Args:
        model: any module with convolutions or linear layers, on any device. Its output layer is
            never pruned, nor are fully frozen groups.
        example_inputs: a tensor, a tuple of arguments or a dict of keyword arguments to trace the
            model with; one sample is enough.
        criterion: with w, g the entries of a filter and of its mean gradient: "l1" sum |w|, "l2"
            sqrt(sum w^2), "taylor" |sum w g|, "taylor_sq" sum (w g)^2, "taylor_abs" sum |w g|,
            "fisher" (sum w g)^2; "bn_scale" |gamma| of the BatchNorms behind the filters;
            "bn_taylor", "grasp", "rdt", "fpgm", "repr", "exemplar", "variety", "group_fisher" and
            more, see docs/criteria.md; or a row like those of CRITERIA, e.g. variety("fisher").
        ratio: the share of the target to remove, in (0, 1).
        data: (input, target) batches for criteria with gradients: the gradient of the mean loss
            over all samples, in eval mode. Without it the existing `.grad` is used: compute it in
            eval mode, behind a BatchNorm in train mode sum w g is identically 0. "grasp", "rdt"
            and "group_fisher" have to have data. Of several processes each gives its own.
        loss: (output, target) -> mean loss; cross entropy by default.
        optimizer: one or several whose state (momentum, exp_avg, ...) follows the cut.
        scope: which groups compete. "global": all of them are ranked together; "local": each gives
            the same share; "isomorphic": those of the same kinds of layers are ranked together, and
            each such family gives the same share (Fang et al., ECCV 2024, see
            :func:`~orthoreg_ext.pruning.families.kinds`); "one_at_a_time": "global", and scored
            anew after every `rescore_every` units.
        round_to: the remaining channels of each pruned group are a multiple of it.
        ignored: layers (names or modules, containers for all inside) that keep their filters, and
            with them the groups they are in; their inputs may still be cut.
        rounds: the ratio is reached in so many rounds by OrthoReg's split (:func:`split_ratio`),
            scoring anew in each.
        between_rounds: called as between_rounds(model, round) after every round but the last, e.g.
            to train.
        max_layer_ratio: the largest share of a group's units, of its original count, that may go;
            the most important stay. None: 0.9, or (1 + ratio) / 2 for ratios above 0.8. OrthoReg's
            code has 0.95, which cost 3 to 8 points of accuracy on thin networks that lose three
            quarters of their filters (docs/evidence.md).
        normalize: None, or divide the scores of each group by the "mean", "max" or "sum" of their
            absolute values.
        group_reduction: "mean", "sum", "max", or "first" (the first layer of the group decides).
        bias: count a filter's bias among its entries, as OrthoReg does for VGG.
        dim: score a unit by the filters that make its channels ("out"), by the entries of the
            filters that read them ("in"), or by all of these ("both").
        ema: a copy of the model (or its AveragedModel) that is cut alike.
        verify: check, for every round, that the pruned model computes what the unpruned one does
            with the removed channels at zero (two forward passes on the example inputs; only shapes
            where a LayerNorm, GroupNorm or RMSNorm computes its statistics by hand).
        target: what the ratio is a share of. "filters": the prunable filters, without those of the
            output layer, of ignored and of frozen groups; as many go as come closest. Of the whole
            model, as :func:`count` defines them: "params", "macs", "memory"; of the time of one
            forward pass on the example inputs in eval mode, measured against a copy of the unpruned
            model: "latency". Of these at least the ratio goes, and as little more as the ranking
            allows (latency: as the few comparisons of a bisection find; `result.latency` has them).
        rescore_every: the units that "one_at_a_time" removes between two scorings; by default so
            many that about 64 scorings do for a round. Each costs a pass over `data`, and a check.
        dry_run: return the :class:`PrunePlan` and leave the model alone, bit for bit; see
            :func:`plan`. `between_rounds` is not called.

    Returns:
        what was done; `result.save(directory)` writes it.

    Raises:
        ImportError: Torch-Pruning is not installed.
        TypeError, ValueError: an argument is wrong or cannot be met; nothing was changed.
        RuntimeError: called inside `torch.inference_mode()`, the model cannot be followed, or the
            removal failed, or would differ between ranks; the model was restored.
        RoundError: a round after the first failed, or `between_rounds` did (any Exception; the
            cause is chained) or changed the shape of a layer. The rounds before are done, and in
            the error's `.result`; the model is as the last round and `between_rounds` left it.
        KeyboardInterrupt: passes unchanged; a round that it meets is undone, those before stay.
    """
    with together("checking the arguments"):
        check_ratio(ratio)
        rules = Rules(
            criterion=criterion,
            scope=scope,
            round_to=round_to,
            max_layer_ratio=default_cap(ratio) if max_layer_ratio is None else max_layer_ratio,
            normalize=normalize,
            group_reduction=group_reduction,
            bias=bias,
            dim=dim,
            target=target,
            rescore_every=rescore_every,
        )
        check_rounds(rounds)
        checks.check_callable("loss", loss, "loss(output, target)")
        checks.check_callable("between_rounds", between_rounds, "between_rounds(model, round)")
        if rules.row.needs_grad and data is not None:
            check_data(data, rounds + (scope == "one_at_a_time"))
        engine = Engine(
            model,
            example_inputs,
            rules,
            optimizer=optimizer,
            ignored=ignored,
            ema=ema,
            verify=verify,
        )
    engine.check_ratio(ratio)
    if not dry_run:
        return _in_rounds(engine, ratio, rounds, between_rounds, data, loss)
    with engine.rehearsal():
        try:
            return PrunePlan(**vars(_in_rounds(engine, ratio, rounds, None, data, loss)))
        except RoundError as error:
            raise RuntimeError(f"the rehearsal failed, nothing was changed: {error}") from error


def plan(model: nn.Module, example_inputs: Any, **options: Any) -> PrunePlan:
    """What :func:`prune` would cut with the same arguments, and what that saves.

    The cut is really made, checked, counted and taken back: the same objects are in their places
    afterwards, bit for bit.

    Args:
        model: as for :func:`prune`.
        example_inputs: as for :func:`prune`.
        options: the other arguments of :func:`prune`.

    Raises:
        As :func:`prune`; nothing was changed.
    """
    planned = prune(model, example_inputs, **options, dry_run=True)
    assert isinstance(planned, PrunePlan)
    return planned


def _in_rounds(
    engine: Engine,
    ratio: float,
    rounds: int,
    between_rounds: Callable[[nn.Module, int], object] | None,
    data: Iterable[Any] | None,
    loss: Loss | None,
) -> PruneResult:
    done: PruneResult | None = None
    for number, share in enumerate(removed_share(ratio, rounds), start=1):
        try:
            engine.prune_to(share, data, loss)
        except (ValueError, RuntimeError) as error:
            if done is None:
                raise
            raise RoundError(
                f"round {number} of {rounds} failed: {error} The model is as round {number - 1} "
                "and its training left it; the result so far is in this error's .result",
                done,
            ) from error
        # now: after a failed between_rounds the model may not run any more
        done = engine.result(ratio=ratio, rounds=rounds)
        if between_rounds is None or number == rounds:
            continue
        try:
            between_rounds(engine.model, number)
            checks.check_unchanged(engine.model, engine.structure)
        except Exception as error:
            raise RoundError(
                f"between_rounds failed after round {number} of {rounds} "
                f"({type(error).__name__}: {error}); the model is as between_rounds left it, and "
                "the result so far is in this error's .result",
                done,
            ) from error
    assert done is not None  # rounds >= 1
    return done
