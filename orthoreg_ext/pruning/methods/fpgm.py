"""FPGM: silence, epoch after epoch, the filters that the others can stand in for."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..held import Spread
from ..redundancy import distances
from ..schedule import check_ratio
from .checks import positive, steps
from .method import Method
from .rows import scores_by_matrix


class FPGM(Method):
    """Filter pruning via geometric median (He et al., CVPR 2019, arXiv 1811.00250).

    In every layer, the share `norm_ratio` of the filters with the smallest L2 norms goes, and of
    the others those nearest to the geometric median: the smallest ::

        sum_j |w_i - w_j|        over the filters j that the norms leave

    until `ratio` is chosen. The chosen filters are set to zero, and their gradients too, until the
    choice is made anew: at the start and after every `every` epochs. The method is done after
    `duration`; :meth:`finish` removes the last choice.

    Paper against code: the paper takes distances alone (`norm_ratio` 0) or mixes them with norms;
    the code's default keeps 0.9 by norm and takes 0.1 by distance, which is ratio 0.2 here. The
    code masks gradients alone, so that momentum moves what was set to zero; here it stays at zero.
    As in
    that code biases and norms are left alone, so that a filter of zeros still passes the constant
    that they make; ``silence=True`` zeroes those too. The
    code's "cos" distance is never used, nor is one here.

    Args:
        model: as for :class:`~.method.Method`, like all that is not named here; by default scope
            "local". The filters of the first choice are set to zero at once.
        example_inputs: as for :class:`~.method.Method`.
        norm_ratio: the share of the filters chosen by norm, below `ratio`: 1 - rate_norm.
        every: epochs between two choices.
        duration: 200 for CIFAR, 100 for ImageNet.
        silence: also zero the biases of the chosen filters, and the scales and shifts of the norms
            behind them. A filter that is silent once stays so, chosen again or not.

    Attributes:
        chosen: the units that are at zero, [r] int64.
    """

    DEFAULTS: ClassVar[dict[str, Any]] = {"criterion": "fpgm", "scope": "local"}

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        *,
        norm_ratio: float = 0.1,
        every: int = 1,
        duration: int = 200,
        silence: bool = False,
        **arguments: Any,
    ) -> None:
        self.norm_ratio = positive("norm_ratio", norm_ratio, zero=True)
        self.every, self.duration = steps("every", every), steps("duration", duration)
        self.silence = bool(silence)
        if "criterion" in arguments:
            raise ValueError("FPGM ranks by its own criterion; leave criterion out")
        super().__init__(model, example_inputs, **arguments)
        if self.norm_ratio >= check_ratio(self.ratio):
            raise ValueError(
                f"norm_ratio is {norm_ratio}, expected less than ratio ({self.ratio}): what is "
                "left is chosen by distance"
            )
        self.chosen = self._choose()
        self._zeros.scale_()

    @property
    def done(self) -> bool:  # noqa: D102
        return super().done or self.epochs >= self.duration

    def _before_step(self) -> None:
        if not super().done:
            self._zeros.scale_gradients_()

    def after_step(self) -> None:  # noqa: D102
        super().after_step()
        if not super().done:
            self._zeros.scale_()  # momentum has moved them

    def after_epoch(self) -> None:  # noqa: D102
        if not super().done and (self.epochs + 1) % self.every == 0:
            self.chosen = self._choose()
            self.__dict__.pop("_zeros", None)
            self._zeros.scale_()
        super().after_epoch()

    @cached_property
    def _zeros(self) -> Spread:
        """Zeros for what is chosen."""
        factors = self.holders.values(self.chosen, 0.0, rest=1.0)
        return self.holders.spread(factors, biases=self.silence, norms=self.silence)

    def _choose(self) -> Tensor:  # [r] int64
        norms = scores_by_matrix(self.engine, lambda rows, _: rows.norm(dim=1))
        small = self.engine.select(norms, self.norm_ratio)
        groups = self.engine.structure.prunable
        others = torch.cat([group.units[~torch.isin(group.units, small)] for group in groups])
        scores = scores_by_matrix(self.engine, distance_sums, others)
        for group, score, norm in zip(groups, scores, norms, strict=True):
            chosen = torch.isin(group.units, small)
            score[chosen] = norm[chosen] - 1 - norm.max()  # below every distance, in their order
        return self.engine.select(scores, check_ratio(self.ratio))

    def _finish(self) -> None:
        self.remove(self.chosen)

    def _settings(self) -> dict[str, Any]:
        own = ("norm_ratio", "every", "duration", "silence")
        return {**super()._settings(), **{name: getattr(self, name) for name in own}}

    def _state(self) -> dict[str, Any]:
        return {"chosen": self.chosen.tolist()}

    def _load(self, state: Mapping[str, Any]) -> None:
        self.chosen = torch.tensor(state["chosen"], dtype=torch.int64)
        self.__dict__.pop("_zeros", None)


def distance_sums(rows: Tensor, others: Tensor) -> Tensor:  # [n, k], [n] -> [n]
    """The sum of the distances of each row to the others."""
    return (distances(rows) * others).sum(1)
