"""What `prune` and every method share: scoring, choosing and removing units of one model."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..distributed import mean_over_ranks, require_same_cut, together
from . import checks
from .calibration import Loss
from .checkpoint import fingerprint
from .counts import count, widths
from .equivalence import checked_commit
from .evidence import Evidence, filters_per_unit, scored_slots
from .families import kinds
from .history import check_history, units_of
from .latency import POINTS, Stopwatch
from .ledger import Ledger
from .removal import Edit, check_optimizer, commit, removal_edits, undo
from .result import PruneResult, layer_widths, merged, records
from .rules import Rules
from .selection import (
    Block,
    Pool,
    check_reachable,
    first_blocks,
    limits_of,
    ranking,
    select,
)
from .structure import trace
from .targets import TARGETS, fewest, reaches

SCORINGS = 64
"""How often scope "one_at_a_time" scores a round by default."""


class Engine:
    """A traced model from which units are removed, with the optimizers and the copy that follow.

    Args:
        model: pruned in place.
        example_inputs: a tensor, a tuple of arguments or a dict of keyword arguments.
        rules: how units are ranked and limited.
        optimizer: one or several whose state follows the cut.
        ignored: layers (names or modules) that keep their filters.
        ema: a copy of the model (or its AveragedModel) that is cut alike.
        verify: check that every cut leaves what the model computes without the removed channels.

    Raises:
        ImportError: Torch-Pruning is not installed.
        TypeError, ValueError: an argument is wrong; nothing was changed.
        RuntimeError: the model cannot be followed, or inside `torch.inference_mode()`.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        rules: Rules,
        *,
        optimizer: Optimizer | Sequence[Optimizer] | None = None,
        ignored: Iterable[str | nn.Module] = (),
        ema: nn.Module | None = None,
        verify: bool = True,
    ) -> None:
        checks.refuse_inference_mode()
        self.model = checks.check_model(model)
        checks.require_values(model)
        self.inputs = example_inputs
        self.rules = rules
        self.ignored = checks.layer_names(model, ignored)
        self.optimizers = checks.optimizer_list(optimizer)
        self.ema = None if ema is None else checks.check_copy(model, ema)
        self.verify = verify
        self.architecture, self.before = fingerprint(model), count(model, example_inputs)
        self.structure = trace(model, example_inputs, self.ignored)
        checks.keep_frozen(model, self.structure)
        checks.require_prunable(self.structure)
        checks.check_work(self.before)
        checks.refuse_reparametrized(model, self.structure)
        self.history: list[dict[str, Any]] = []
        self.rounds = 0  # how often something was removed
        self._widths = widths(model)
        self._originals = [int(filters.sum()) for filters in self._filters()]
        self._kinds = kinds(model, self.structure)
        # now, while the model is whole
        self._stopwatch = Stopwatch(model, example_inputs) if rules.target == "latency" else None
        self._first: dict[Hashable, Edit] | None = None  # what to take back, see _undone

    def check_ratio(self, ratio: float) -> None:
        """Refuses a ratio that would empty a layer, break a limit or remove nothing.

        Raises:
            ValueError: naming the layers at their limit, or the share that can be reached.
        """
        pools, rules = self.pools(), self.rules
        if rules.target == "latency":  # measured by all ranks
            self._check_saved(ranking(rules.scope, pools, rules.limits), ratio)
            return
        with together("checking the ratio"):
            if rules.target == "filters":
                check_reachable(rules.scope, pools, ratio, rules.limits)
            else:
                self._check_saved(ranking(rules.scope, pools, rules.limits), ratio)

    def score(
        self, data: Iterable[Any] | None = None, loss: Loss | None = None
    ) -> list[Tensor]:  # each [u] float64, CPU
        """The scores of the units of every prunable group by the criterion of the rules.

        Args:
            data: (input, target) batches for criteria with gradients; without it those of weights
                alone use the existing `.grad`.
            loss: (output, target) -> mean loss; cross entropy by default.

        Raises:
            ValueError: a gradient is missing, or a score is not finite.
        """
        return self.rules.row.score(self.evidence(data, loss))

    def evidence(self, data: Iterable[Any] | None = None, loss: Loss | None = None) -> Evidence:
        """What a criterion can read of the model as it is now; for methods with their own scores.

        Args:
            data: as for :meth:`score`.
            loss: as for :meth:`score`.

        Raises:
            RuntimeError, ValueError: a layer was replaced, or has other channels or a
                parametrization, since the model was traced.
        """
        self._check_model()
        rules = self.rules
        return Evidence(
            name=rules.row.name,
            model=self.model,
            structure=self.structure,
            data=data if rules.row.needs_grad else None,
            loss=loss,
            bias=rules.bias,
            dim=rules.dim,
            reduction=rules.group_reduction,
            normalize=rules.normalize,
        )

    def pools(self, scores: Sequence[Tensor] | None = None) -> list[Pool]:
        """The prunable groups as selection sees them; without scores all units are equal."""
        groups, pools = self.structure.prunable, []
        for i, (group, filters) in enumerate(zip(groups, self._filters(), strict=True)):
            values = torch.zeros(len(group.units), dtype=torch.float64)
            values = values if scores is None else scores[i]
            original = group.original, self._originals[i]
            sizes = (filters, *original, group.channels)
            pools.append(Pool(group.name, values, *sizes, self._kinds[i]))
        return pools

    def select(self, scores: Sequence[Tensor], share: float) -> Tensor:  # [r] int64
        """The units to remove now, for `share` of the target to be gone in total.

        Scope "one_at_a_time" chooses as "global" does here; see :meth:`prune_to`.

        Raises:
            ValueError: all that may go does not save that share.
        """
        return self._units(self._blocks(scores, share))

    def saved(self, removed: Tensor) -> float:  # [r] int64
        """The share of the model's params, macs, memory or latency that is gone without units."""
        sizes = self.ledger.after(removed)
        if self.rules.target != "latency":
            after, before = vars(sizes), vars(self.before)
            return 1 - float(after[self.rules.target] / before[self.rules.target])
        assert self._stopwatch is not None
        if not len(removed) and not self.history:
            return 0.0
        with self.rehearsal():
            self._cut(removed, False)
            return mean_over_ranks(self._stopwatch.saved(self.model, sizes.filters))

    @cached_property
    def ledger(self) -> Ledger:
        """What the model would cost without units."""
        return Ledger(self.model, self.structure, self.inputs)

    def remove(self, units: Tensor) -> None:  # [r] int64
        """Removes units from the model and all that follows it, as one round of the history.

        Raises:
            ValueError: an optimizer's state cannot follow.
            RuntimeError: the removal failed, or a layer has changed shape since; the model was
                restored.
        """
        self._remove(units, self.rounds + 1)

    def prune_to(
        self, share: float, data: Iterable[Any] | None = None, loss: Loss | None = None
    ) -> None:
        """One round, all or nothing: scores, chooses and removes, until the share is gone in total.

        Scope "one_at_a_time" removes the first few of the chosen units, scores what is left, and so
        on; any other scope scores once.

        Raises:
            ValueError, RuntimeError: as :meth:`score`, :meth:`select` and :meth:`remove`.
        """
        number, every = self.rounds + 1, self.rules.rescore_every
        with self.attempt():
            while True:
                blocks = step = self._blocks(self.score(data, loss), share)
                if self.rules.scope == "one_at_a_time":
                    every = every or math.ceil(sum(len(b.units) for b in blocks) / SCORINGS)
                    step = first_blocks(blocks, every)
                self._remove(self._units(step), number)
                if len(step) == len(blocks):
                    return

    def rehearsal(self) -> AbstractContextManager[None]:
        """Inside, units may be removed; all of it is taken back at the end, bit for bit."""
        return self._undone(always=True)

    def attempt(self) -> AbstractContextManager[None]:
        """Inside, units may be removed; all of it is taken back if it fails."""
        return self._undone()

    def replay(self, history: Sequence[dict[str, Any]]) -> None:
        """Repeats the cuts of a history on the unpruned model, e.g. to resume.

        Raises:
            ValueError: it is no history of this architecture, or something was removed already.
        """
        if self.history:
            raise ValueError("a history can only be repeated on the unpruned model")
        units = units_of(self.structure, check_history(history))
        self._cut(units, False)
        self.structure.shrink(units)
        self.history = list(history)
        self.rounds = max((entry["round"] for entry in history), default=0)

    def result(self, **settings: Any) -> PruneResult:
        """What was done so far; `settings` stand beside those of the rules.

        Raises:
            RuntimeError: the pruned model does not run on the example inputs.
        """
        try:
            after = count(self.model, self.inputs)
        except ValueError as error:  # it ran before, so the cut is to blame, not the inputs
            raise RuntimeError(
                f"the pruned model does not run on example_inputs any more ({error.__cause__}), "
                "and it stays so: verify=False skipped the check that would have restored it"
            ) from error
        layers = layer_widths(self.model, self.structure, self._widths)
        settings = {**self.rules.document(), "ignored": sorted(self.ignored), **settings}
        history, more = list(self.history), {}
        if self._stopwatch is not None:
            self._stopwatch.saved(self.model, after.filters)
            more["latency"] = self._stopwatch.report()
        return PruneResult(
            history, self.before, after, layers, settings, self.architecture, self.model, **more
        )

    def _filters(self) -> list[Tensor]:  # each [u] int64
        slots = scored_slots(self.model, self.structure)
        return filters_per_unit(self.structure.prunable, slots)

    def _blocks(self, scores: Sequence[Tensor], share: float) -> list[Block]:
        rules, pools = self.rules, self.pools(scores)
        if rules.target == "filters":
            return select(rules.scope, pools, share, rules.limits)
        order = ranking(rules.scope, pools, rules.limits)
        self._check_saved(order, share)
        points = POINTS if rules.target == "latency" else None
        count = fewest(lambda n: self.saved(self._units(order[:n])), len(order), share, points)
        return order[:count]

    def _check_saved(self, order: Sequence[Block], share: float) -> None:
        """Refuses a share of a cost that all blocks together do not save."""
        rules, room = self.rules, self.saved(self._units(order))
        if not reaches(room, share):
            raise ValueError(
                f"ratio={share:.3g} of target={rules.target!r} cannot be reached: with all that "
                f"may go, {room:.3f} of {TARGETS[rules.target]} is saved, with "
                f"max_layer_ratio={rules.max_layer_ratio}, round_to={rules.round_to}; at the limit "
                f"are {limits_of(self.pools(), rules.limits)}. Lower ratio, raise max_layer_ratio "
                "or lower round_to"
            )

    def _units(self, blocks: Sequence[Block]) -> Tensor:  # [r] int64
        groups = self.structure.prunable
        chosen = [groups[block.pool].units[list(block.units)] for block in blocks]
        return torch.cat(chosen) if chosen else torch.empty(0, dtype=torch.int64)

    def _check_model(self) -> None:
        checks.check_unchanged(self.model, self.structure)
        checks.refuse_reparametrized(self.model, self.structure)

    def _remove(self, units: Tensor, number: int) -> None:
        with together("removing channels"):
            for optimizer in self.optimizers:
                check_optimizer(optimizer, self.model)
            self._check_model()
            checks.check_finite(self.model, self.structure)
        require_same_cut(self._described(units))
        with self.attempt(), together("removing channels"):
            if len(units):
                self._cut(units, self.verify)
        self.rounds = number
        self.history = merged([*self.history, *records(self.structure, units, number)])
        self.structure.shrink(units)

    def _described(self, units: Tensor) -> list[str]:
        """The units to remove by their layers, to be compared with those of other ranks."""
        found = []
        for group in self.structure.groups:
            gone = torch.isin(group.units, units).nonzero().flatten().tolist()
            found.append(f"channels {gone} of {len(group.units)} of layer {group.name!r}")
        return found

    def _cut(self, units: Tensor, verify: bool) -> None:
        edits = removal_edits(self.model, self.structure, units, self.optimizers)
        if self.ema is not None:
            edits += removal_edits(self.ema, self.structure, units, label="ema")
        if self._first is not None:  # before they are applied: undoing what is not done is harmless
            for edit in edits:
                self._first.setdefault(edit.place, edit)
        if verify:
            checked_commit(self.model, self.structure, units, edits, self.inputs)
        else:
            commit(edits)

    @contextmanager
    def _undone(self, always: bool = False) -> Iterator[None]:
        """Takes back all that is removed inside if it fails, or always."""
        outer, self._first = self._first, {}
        slots = [(slot, slot.units, slot.channels) for slot in self.structure.slots]
        groups = [(group, group.units) for group in self.structure.groups]
        history, rounds, stays = self.history, self.rounds, False
        try:
            yield
            stays = not always
        finally:
            inner, self._first = self._first, outer
            if stays and outer is not None:
                self._first = {**inner, **outer}
            elif not stays:
                undo(list(inner.values()))
                for slot, units, channels in slots:
                    slot.units, slot.channels = units, channels
                for group, units in groups:
                    group.units = units
                self.history, self.rounds = history, rounds
