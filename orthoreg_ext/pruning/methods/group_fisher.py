"""GroupFisher: one channel after the other leaves while the net trains."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...distributed import sum_over_ranks
from ...errors import choose
from ..activations import FREED, Contributions, check_read
from ..counts import work
from ..inputs import call_examples, device_of, tensors_in, to_device, undisturbed
from ..result import PruneResult
from ..schedule import check_ratio
from ..selection import Block, blocks_of
from ..units import Slot
from .checks import steps
from .method import Method

TARGETS = ("filters", "params", "macs", "memory")


class GroupFisher(Method):
    """Group Fisher pruning (Liu et al., ICML 2021, arXiv 2108.00708).

    While the net trains, each unit (channels that can only leave together) collects, sample by
    sample, what the layers x that read it make of it ::

        s = sum_n (sum_x sum_hw a_x * da_x)^2 / freed

    so the sum over the coupled layers is inside the square (their eq. 4). After every `every` steps
    the unit of smallest s is removed and the sums start from 0, until `ratio` is gone; then the
    method is done, and the authors train on as long as the unpruned net was trained.

    `freed` is the memory that a unit gives back, which is what the layers in front write for it, or
    the multiply-accumulates of the layers in front and behind at their present
    widths.

    Paper against code: the code masks channels while it trains, here they leave at once, with their
    momentum; the net computes the same. It has no rule for grouped convolutions, whose channels are
    summed here as the paper says. It takes the gradients of the mean loss as they are; here they
    are multiplied by the samples of the batch, so that batches of different sizes count alike.

    Hooks on the layers read the activations and their gradients in the training's own forward and
    backward passes, of which there may be several a step. They go with :meth:`finish`, with
    :meth:`close`, and when a removal fails. A pass with infinite gradients (a loss scale that was
    too large) is left out. The first dimension of what a layer reads has to be that of the samples.

    Args:
        model: as for :class:`~.method.Method`, like all that is not named here; there is neither
            criterion nor scope, and `target` is "filters", "params", "macs" or "memory".
        example_inputs: as for :class:`~.method.Method`.
        every: d, the steps between two removals: 25 for classification, 10 for detection.
        freed: "memory", "macs" or "nothing": what the sum is divided by.

    Raises:
        ImportError, TypeError, ValueError: an argument is wrong or cannot be met; nothing was
            changed.
    """

    DEFAULTS: ClassVar[dict[str, Any]] = {"criterion": "group_fisher", "scope": "global"}

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        *,
        ratio: float = 0.5,
        every: int = 25,
        freed: str = "memory",
        **arguments: Any,
    ) -> None:
        for name in ("criterion", "scope"):
            if name in arguments:
                raise ValueError(f"GroupFisher ranks by its own criterion; leave {name} out")
        self.every = steps("every", every)
        self.freed = choose("freed", freed, FREED)
        choose("target", arguments.get("target", "filters"), TARGETS)
        super().__init__(model, example_inputs, ratio=ratio, **arguments)
        check_ratio(self.ratio)
        check_read(self.engine.structure)
        self._rehearse()
        self._fisher = torch.zeros(self._units, dtype=torch.float64)
        self._passes = torch.zeros((), dtype=torch.int64)  # in the sums
        self._stale = False  # whether the sums are from before the last removal
        self._collected: Contributions | None = None
        self._handle: Any = None
        self._listen()

    @cached_property
    def share(self) -> float:
        """The share of the target that is gone."""
        if self.engine.rules.target != "filters":
            return self.engine.saved(torch.empty(0, dtype=torch.int64))
        pools = self.engine.pools()
        return sum(pool.gone for pool in pools) / sum(pool.original_filters for pool in pools)

    @property
    def done(self) -> bool:  # noqa: D102
        return super().done or self.share >= self._goal - 1e-9

    @property
    def _progress(self) -> str:
        target = self.engine.rules.target
        return f"{self.share:.3f} of the {target} are gone, expected {self._goal:.3f}"

    @cached_property
    def _goal(self) -> float:
        ratio = check_ratio(self.ratio)
        if self.engine.rules.target != "filters":
            return ratio
        total = sum(pool.original_filters for pool in self.engine.pools())
        return math.floor(ratio * total + 1e-9) / total  # as prune counts

    def _before_step(self) -> None:
        self._gather()

    def after_step(self) -> None:
        """To be called after ``optimizer.step()``; every so many steps it removes one unit.

        Raises:
            ValueError: no gradient was seen since the last removal, or an optimizer's state cannot
                follow. The hooks are gone then.
            RuntimeError: the hooks are gone, but not all that should go.
        """
        super().after_step()
        if self.done:
            return
        if self._collected is None:
            raise RuntimeError(
                f"{self._progress}, and the hooks are gone (close() was called, or a removal or "
                "finish() failed), so that no more is seen of the training. Load the state_dict() "
                "into a GroupFisher made anew for the unpruned model, or call finish()"
            )
        if self.steps % self.every:
            return
        try:
            if not self._sums()[2]:
                raise ValueError(
                    f"no finite gradient was seen in {self.every} steps, so no channel can be "
                    "chosen: call before_step() after loss.backward(), and look for NaN in the loss"
                )
            self._remove_one()
        except BaseException:
            self.close()
            raise
        if self.done:
            self.close()

    def scores(self) -> list[Tensor]:  # each [u] float64, CPU
        """The scores of the units of every prunable group, from the passes collected so far.

        Of several ranks the passes of all are added; each has to call this.
        """
        fisher = self._sums()[0] / self._freed()
        return [fisher[group.units] for group in self.engine.structure.prunable]

    def close(self) -> None:
        """Removes the hooks; removes no channel."""
        if self._collected is not None:
            self._collected.__exit__()
            self._handle.remove()
            self._collected = None

    def finish(self) -> PruneResult:
        """Removes what is left to remove, by the sums as they are, and the hooks.

        Raises:
            ValueError: something is left, but no gradient was seen yet.
        """
        try:
            return super().finish()
        finally:
            self.close()

    def _finish(self) -> None:
        while not self.done:
            if not self._sums()[1]:
                raise ValueError(
                    f"{self._progress}, and no finite gradient was seen to choose more by; make "
                    "the method anew and train at least one step before finish()"
                )
            self._remove_one()

    def _listen(self) -> None:
        """Puts the hooks on, for the units as they are now."""
        self.close()
        self._collected = Contributions(self.model, self.engine.structure).__enter__()
        self._collected.take()  # it need not measure what is freed

        def start(model: nn.Module, _: Any) -> None:
            if model is self.model:  # and no copy of it, which has the hooks too
                self._gather()  # what the pass before left belongs to other samples

        self._handle = self.model.register_forward_pre_hook(start)

    def _gather(self) -> None:
        """Adds the squares of what the last pass has left."""
        found = self._collected.take() if self._collected is not None else None
        if found is None:
            return
        squares = (found.double() * len(found)).square().sum(0)
        finite = torch.isfinite(squares).all()
        if self._stale or self._fisher.device != squares.device:
            keep = 0 if self._stale else 1
            self._fisher = self._fisher.to(squares.device) * keep
            self._passes = self._passes.to(squares.device) * keep
            self._stale = False
        self._fisher[: len(squares)] += torch.where(finite, squares, 0)
        self._passes += finite

    def _sums(self) -> tuple[Tensor, int, bool]:  # [units] float64, CPU
        """The sums of all ranks, their passes, and whether these are since the last removal."""
        self._gather()
        device = device_of(self.model)  # where the ranks can add
        kinds = torch.tensor([1, not self._stale], dtype=torch.float64, device=device)  # all, new
        fisher = kinds.unsqueeze(1) * self._fisher.to(device)
        passes = kinds * self._passes.to(device)
        sum_over_ranks([fisher, passes])
        every, new = (int(count) for count in passes.tolist())
        return fisher[int(new > 0)].cpu(), every, new > 0

    def _remove_one(self) -> None:
        pools, groups = self.engine.pools(self.scores()), self.engine.structure.prunable
        first: list[Block] = []
        for i, pool in enumerate(pools):
            first += blocks_of(i, pool, self.engine.rules.limits)[:1]
        if not first:
            raise ValueError(
                f"{self._progress}, but every layer is at its limit; lower ratio or raise "
                "max_layer_ratio"
            )
        least = min(first, key=lambda block: block.score)
        listening = self._collected is not None
        self.remove(groups[least.pool].units[list(least.units)])
        self.__dict__.pop("share", None)
        self._stale = True
        if listening:
            self._listen()

    @property
    def _units(self) -> int:
        return 1 + max(int(slot.units.max()) for slot in self._filter_slots())

    def _filter_slots(self) -> list[Slot]:
        return [slot for slot in self.engine.structure.slots if slot.kind == "filters"]

    def _freed(self) -> Tensor:  # [units] float64
        """What each unit gives back at the present widths."""
        freed = torch.zeros(len(self._fisher), dtype=torch.float64)
        if self.freed == "nothing":
            return freed + 1
        done = work(self.model, self.engine.inputs)
        for slot in self._filter_slots():
            if slot.layer not in done:
                continue
            layer = done[slot.layer]
            total = layer.macs if self.freed == "macs" else layer.output_bytes * slot.has_filters
            share = total / len(slot.units)
            units = slot.units[slot.units >= 0]
            freed.index_add_(0, units, torch.full((len(units),), share, dtype=torch.float64))
        return freed.clamp(min=1.0)

    def _rehearse(self) -> None:
        """Refuses a model whose layers read anything but one row a sample, before it is trained."""
        with undisturbed(self.model), Contributions(self.model, self.engine.structure) as trial:
            inputs = to_device(self.engine.inputs, device_of(self.model))
            outputs = [t for t in tensors_in(call_examples(self.model, inputs)) if t.requires_grad]
            total = torch.stack([t.float().sum() for t in outputs]).sum()
            if trial.inputs:
                torch.autograd.grad(total, trial.inputs, allow_unused=True)

    def _settings(self) -> dict[str, Any]:
        return {**super()._settings(), "every": self.every, "freed": self.freed}

    def _state(self) -> dict[str, Any]:
        self._gather()
        return {
            "fisher": self._fisher.tolist(),
            "passes": int(self._passes),
            "stale": self._stale,
        }

    def _load(self, state: Mapping[str, Any]) -> None:
        self._fisher = torch.tensor(state["fisher"], dtype=torch.float64)
        self._passes = torch.tensor(int(state["passes"]))
        self._stale = bool(state["stale"])
        self.__dict__.pop("share", None)
        if state["finished"] or self.done:
            self.close()
        else:
            self._listen()
