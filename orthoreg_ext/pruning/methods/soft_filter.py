"""SoftFilter: after every epoch the smallest filters are made smaller, and may grow back."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from ...errors import choose
from ..schedule import check_ratio
from .checks import steps, weights_alone
from .method import Method

KINDS = ("sfp", "asfp", "srfp", "asrfp")
DECAYS: dict[str, Callable[[float], float]] = {
    "linear": lambda t: 1 - t,
    "cosine": lambda t: (1 + math.cos(math.pi * t)) / 2,
    "exponential": lambda t: (math.exp(-5 * t) - math.exp(-5)) / (1 - math.exp(-5)),
}
"""alpha over the share t of the epochs that is over: from 1 to 0."""


class SoftFilter(Method):
    """Soft filter pruning and its three variants.

    After epoch t = `every`, 2 * `every` ... and after the last one, `duration`, ::

        S_t = the filters of lowest L2 norm, the share P_t of every layer
        w_i <- alpha_t w_i   for i in S_t

    and all filters train on. :meth:`finish` chooses once more, so it takes those of the last S if
    nothing was trained since, and removes them.

    ========  =======================================  =======  ======================
    kind      source                                   P_t      alpha_t
    ========  =======================================  =======  ======================
    "sfp"     He et al., IJCAI 2018, 1808.06866        ratio    0
    "asfp"    He et al., IEEE TCyb 2019, 1808.07471    growing  0
    "srfp"    Cai et al., ICPR 2020, 2010.09498        ratio    `decay`, from 1 to 0
    "asrfp"   the same                                 growing  `decay`, from 1 to 0
    ========  =======================================  =======  ======================

    The growing share is P_t = ratio (1 - x^(8 t / T)) / (1 - x^8) with x = 0.25: through (0, 0),
    (T, ratio) and, to 1e-4, (T / 8, 3/4 ratio), which is a exp(-k t) + b with k T = 11.09.

    Paper against code: SFP's released code also cuts once before the first epoch, and with
    `every` > 1 after epochs 1, 1 + `every` ...; here the first cut is that after epoch `every`. As
    in that code weights alone are scaled: a filter of zeros still passes the constant that its bias
    and BatchNorm make (with those at zero too it could never grow back), and behind a BatchNorm in
    train mode its gradient is 1 / sqrt(eps) times as large, so that with a large learning rate it
    comes back larger than the filters that were kept. ASFP's code is not public; the
    three points are those of a third-party port. The form of SRFP's alpha_t is not public either:
    the three offered ones are ours.

    Args:
        model: as for :class:`~.method.Method`, like all that is not named here; by default
            criterion "l2" and scope "local".
        example_inputs: as for :class:`~.method.Method`.
        kind: "sfp", "asfp", "srfp" or "asrfp".
        duration: T, the epochs in all, after which the method is done.
        every: the epochs between two cuts.
        decay: "linear" 1 - t / T, "cosine" (1 + cos(pi t / T)) / 2, or "exponential"
            (e^(-5 t / T) - e^-5) / (1 - e^-5); not used where alpha is 0.

    Attributes:
        chosen: S of the last cut, [r] int64.
    """

    DEFAULTS: ClassVar[dict[str, Any]] = {"criterion": "l2", "scope": "local"}

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        *,
        kind: str = "sfp",
        duration: int = 200,
        every: int = 1,
        decay: str = "linear",
        **arguments: Any,
    ) -> None:
        self.kind, self.decay = choose("kind", kind, KINDS), choose("decay", decay, DECAYS)
        self.duration, self.every = steps("duration", duration), steps("every", every)
        super().__init__(model, example_inputs, **arguments)
        check_ratio(self.ratio)
        weights_alone(self.engine.rules)
        self.chosen = torch.empty(0, dtype=torch.int64)

    @property
    def share(self) -> float:
        """P_t, the share of filters that a cut at this epoch takes."""
        ratio = check_ratio(self.ratio)
        if not self.kind.startswith("a"):
            return ratio
        return ratio * (1 - math.pow(0.25, 8 * self._progress)) / (1 - 0.25**8)

    @property
    def factor(self) -> float:
        """alpha_t, what a cut at this epoch multiplies with."""
        return DECAYS[self.decay](self._progress) if "r" in self.kind else 0.0

    @property
    def done(self) -> bool:  # noqa: D102
        return super().done or self.epochs >= self.duration

    def after_epoch(self) -> None:  # noqa: D102
        super().after_epoch()
        if super().done or (self.epochs % self.every and self.epochs != self.duration):
            return
        self.chosen = self.engine.select(self.engine.score(), self.share)
        factors = self.holders.values(self.chosen, self.factor, rest=1.0)
        self.holders.scale_(factors, biases=False, norms=False)

    @property
    def _progress(self) -> float:
        return min(self.epochs / self.duration, 1.0)

    def _finish(self) -> None:
        self.remove(self.lowest())

    def _settings(self) -> dict[str, Any]:
        own = ("kind", "duration", "every", "decay")
        return {**super()._settings(), **{name: getattr(self, name) for name in own}}

    def _state(self) -> dict[str, Any]:
        return {"chosen": self.chosen.tolist()}

    def _load(self, state: Mapping[str, Any]) -> None:
        self.chosen = torch.tensor(state["chosen"], dtype=torch.int64)
