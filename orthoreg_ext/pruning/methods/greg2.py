"""GReg-2: a small L2 penalty grows on all filters, which parts them; then S is picked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..schedule import check_ratio
from .checks import positive, weights_alone
from .greg1 import GReg1


class GReg2(GReg1):
    """Growing regularisation that picks the set itself (Wang et al., ICLR 2021, arXiv 2012.09243).

    First the lambda of every filter grows by `pick_delta` at each growth (before step 0, `every`,
    2 * `every` ...): weights of large curvature shrink less, so that the magnitudes part. With
    lambda at `pick_ceiling` the set S is picked, the lowest L1 norms of every layer. From the next
    growth on the lambda of S goes on from there by `delta`, as in :class:`GReg1`, and that of the
    kept filters is -`recover`, which lets them grow back. A layer stops growing by itself, at
    `ceiling` or `ratio_limit`; after the last one has, training goes on for `hold` steps, the
    method is done, and :meth:`finish` removes S.

    Paper against code: as for :class:`GReg1`; the released code also averages the ratios of the
    sets it would pick before it picks, here the average begins with S.

    Args:
        model: as for :class:`GReg1`, like all that is not named here.
        example_inputs: as for :class:`GReg1`.
        pick_delta: what the lambda of all filters grows by before S is picked.
        pick_ceiling: the lambda at which S is picked.
        recover: minus the lambda of the kept filters afterwards; 0 leaves them alone.

    Attributes:
        picks: how often the lambda of all filters has grown.
        picked: whether S is chosen; before, `chosen` is empty.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        *,
        pick_delta: float = 1e-5,
        pick_ceiling: float = 1e-2,
        recover: float = 1e-4,
        **arguments: Any,
    ) -> None:
        self.pick_delta = positive("pick_delta", pick_delta)
        self.pick_ceiling = positive("pick_ceiling", pick_ceiling)
        self.recover = positive("recover", recover, zero=True)
        self.picks, self.picked = 0, False
        super().__init__(model, example_inputs, **arguments)
        check_ratio(self.ratio)
        weights_alone(self.engine.rules)
        if self.ceiling < self.pick_ceiling:
            raise ValueError(
                f"ceiling is {self.ceiling!r}, expected at least pick_ceiling="
                f"{self.pick_ceiling!r}: lambda goes on from there"
            )
        self._stopped: set[str] = set()  # the groups whose lambda grows no more

    @property
    def strengths(self) -> dict[str, float]:
        """The lambda of the filters in S (of all before S is picked), by group."""
        start = min(self.pick_delta * self.picks, self.pick_ceiling)
        return {n: min(start + self.delta * k, self.ceiling) for n, k in self.growths.items()}

    def _first_choice(self) -> Tensor:
        return torch.empty(0, dtype=torch.int64)

    def _update(self) -> None:
        if self.picked:
            self.growths = {n: k + (n not in self._stopped) for n, k in self.growths.items()}
        else:
            self.picks += 1
            if self.pick_delta * self.picks < self.pick_ceiling - 1e-6 * self.pick_delta:
                return
            self.chosen, self.picked = self.lowest(), True
        self._measure()
        self._stopped |= {
            name
            for name, strength in self.strengths.items()
            if self.ratios.get(name, math.inf) >= self.ratio_limit or self._at_ceiling(strength)
        }
        if len(self._stopped) == len(self.growths):
            self._ended = self.steps

    def _strength_of_units(self) -> Tensor:  # [size]
        vector = super()._strength_of_units()
        strengths = self.strengths
        for group in self.engine.structure.prunable:
            kept = group.units[~torch.isin(group.units, self.chosen)]
            grown = self.growths[group.name] > 0  # the kept filters follow at the next growth
            vector[kept] = -self.recover if grown else strengths[group.name]
        return vector

    def _finish(self) -> None:
        if not self.picked:
            self.chosen = self.lowest()
        super()._finish()

    def _settings(self) -> dict[str, Any]:
        own = ("pick_delta", "pick_ceiling", "recover")
        return {**super()._settings(), **{name: getattr(self, name) for name in own}}

    def _state(self) -> dict[str, Any]:
        own = {"picks": self.picks, "picked": self.picked, "stopped": sorted(self._stopped)}
        return {**super()._state(), **own}

    def _load(self, state: Mapping[str, Any]) -> None:
        super()._load(state)
        self.picks, self.picked = state["picks"], state["picked"]
        self._stopped = set(state["stopped"])
