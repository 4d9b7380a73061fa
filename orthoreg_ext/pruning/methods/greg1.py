"""GReg-1: an L2 penalty on the smallest filters that grows until they are gone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..held import Spread
from .checks import positive, steps
from .method import Method


class GReg1(Method):
    """Growing regularisation with a fixed set (Wang et al., ICLR 2021, arXiv 2012.09243).

    The set S of the filters to go is fixed at the start: the lowest L1 norms of every layer. Each
    step adds to the gradients, after ``loss.backward()``, that of ::

        lambda / 2 * sum_{i in S} |w_i|^2

    on the weights alone, no bias and no BatchNorm, as the released code does. Before step
    0, `every`, 2 * `every` ... lambda grows by `delta`, until it is `ceiling` or, in every layer,
    mean |w| of the kept filters is `ratio_limit` times that of S (an average over the growths, 0.9
    of the old to 0.1 of the new). Training then goes on for `hold` steps with that lambda; the
    method is done, and :meth:`finish` removes S.

    The means are read from the device at each growth, once in `every` steps.

    Paper against code: none is known in the schedule; the released code lets lambda pass the
    ceiling by one growth and holds for one step more, and its S has ceil(ratio * n) filters of a
    layer, here floor. A layer stands for all layers coupled with it.

    Args:
        model: as for :class:`~.method.Method`, like all that is not named here; by default
            criterion "l1" and scope "local".
        example_inputs: as for :class:`~.method.Method`.
        delta: what lambda grows by.
        every: K_u, the steps between two growths: 10 for CIFAR, 5 for ImageNet.
        ceiling: tau, the largest lambda.
        ratio_limit: the ratio of magnitudes at which S counts as gone.
        hold: K_s, the steps after the last growth: 10 000 for CIFAR, 40 000 for ImageNet.

    Attributes:
        chosen: S, [r] int64.
        growths: prunable group (its first layer) -> how often lambda has grown.
        ratios: group -> the averaged ratio of magnitudes, once it is known; a group without filters
            in S has none.
    """

    DEFAULTS: ClassVar[dict[str, Any]] = {"criterion": "l1", "scope": "local"}

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        *,
        delta: float = 1e-4,
        every: int = 10,
        ceiling: float = 1.0,
        ratio_limit: float = 1000.0,
        hold: int = 10_000,
        **arguments: Any,
    ) -> None:
        self.delta, self.ceiling = positive("delta", delta), positive("ceiling", ceiling)
        self.every, self.hold = steps("every", every), steps("hold", hold)
        self.ratio_limit = positive("ratio_limit", ratio_limit)
        super().__init__(model, example_inputs, **arguments)
        self.chosen = self._first_choice()
        self.growths = {group.name: 0 for group in self.engine.structure.prunable}
        self.ratios: dict[str, float] = {}
        self._ended: int | None = None  # the step of the last growth
        self._grown: int | None = None  # the step that grew last; a closure may run twice in one
        self._decay: Spread | None = None

    @property
    def strengths(self) -> dict[str, float]:
        """The lambda of the filters in S, by group."""
        return {name: min(self.delta * n, self.ceiling) for name, n in self.growths.items()}

    @property
    def done(self) -> bool:  # noqa: D102
        held = self._ended is not None and self.steps - self._ended >= self.hold
        return super().done or held

    def _before_step(self) -> None:
        if super().done:
            return
        due = self._ended is None and self.steps % self.every == 0
        if due and self._grown != self.steps:
            self._update()
            self._grown, self._decay = self.steps, None
        if self._decay is None:
            vector = self._strength_of_units()
            self._decay = self.holders.spread(vector, biases=False, norms=False)
        self._decay.add_decay_()

    def _first_choice(self) -> Tensor:  # [r] int64
        return self.lowest()

    def _update(self) -> None:
        """Measures the ratios, lets lambda grow, and sees where it has to stop."""
        self._measure()
        self.growths = {name: n + 1 for name, n in self.growths.items()}
        gone = all(ratio >= self.ratio_limit for ratio in self.ratios.values())
        if gone or self._at_ceiling(max(self.strengths.values())):
            self._ended = self.steps

    def _at_ceiling(self, strength: float) -> bool:
        return strength >= self.ceiling - 1e-6 * self.delta  # sums of 0.1 are not quite 0.3

    def _measure(self) -> None:
        """Takes the ratio of magnitudes of each group into its average."""
        groups, side = self.engine.structure.prunable, self._side
        total = torch.zeros(2 * len(groups) + 1, dtype=torch.float64, device=side.device)
        total.index_add_(0, side, self.holders.magnitudes())
        counts = torch.bincount(side, minlength=len(total))
        rows = (total / counts)[:-1].view(-1, 2).tolist()  # the one transfer
        for group, (kept, gone) in zip(groups, rows, strict=True):
            if not math.isnan(gone):  # 0 / 0: no filters in S
                ratio = kept / max(gone, 1e-9 * kept) if kept > 0 else 0.0  # finite, also for 0 / 0
                old = self.ratios.get(group.name, ratio)
                self.ratios[group.name] = 0.9 * old + 0.1 * ratio

    @cached_property
    def _side(self) -> Tensor:  # [size] int64
        """2 g for the kept units of group g, 2 g + 1 for those in S; S is chosen once."""
        groups = self.engine.structure.prunable
        side = torch.full((self.holders.size,), 2 * len(groups), dtype=torch.int64)
        for g, group in enumerate(groups):
            side[group.units] = 2 * g + torch.isin(group.units, self.chosen).long()
        return side.to(self.holders.device)

    def _strength_of_units(self) -> Tensor:  # [size]
        """The lambda of every unit."""
        vector = torch.zeros(self.holders.size, dtype=torch.float64)
        strengths = self.strengths
        for group in self.engine.structure.prunable:
            vector[group.units[torch.isin(group.units, self.chosen)]] = strengths[group.name]
        return vector

    def _finish(self) -> None:
        self.remove(self.chosen)

    def _settings(self) -> dict[str, Any]:
        own = ("delta", "every", "ceiling", "ratio_limit", "hold")
        return {**super()._settings(), **{name: getattr(self, name) for name in own}}

    def _state(self) -> dict[str, Any]:
        return {
            "chosen": self.chosen.tolist(),
            "growths": dict(self.growths),
            "ratios": dict(self.ratios),
            "ended": self._ended,
        }

    def _load(self, state: Mapping[str, Any]) -> None:
        self.chosen = torch.tensor(state["chosen"], dtype=torch.int64)
        self.growths, self.ratios = dict(state["growths"]), dict(state["ratios"])
        self._ended, self._decay = state["ended"], None
        self.__dict__.pop("_side", None)  # before_step may have run once
