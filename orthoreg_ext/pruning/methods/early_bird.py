"""EarlyBird: stop the first training when the set of filters that would go stands still."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ...regularizer import OrthoRegularizer
from ..held import check_gradients
from ..result import PruneResult
from ..schedule import check_ratio
from .checks import positive, steps, weights_alone
from .method import Method
from .regularised import Phased


class EarlyBird(Method):
    """Early-bird tickets (You et al., ICLR 2020, arXiv 1909.11957).

    Every step adds the slimming penalty's gradient to the scale of every BatchNorm ::

        grad(gamma) += strength * sign(gamma)

    After every epoch the units that `ratio` would remove, the lowest |gamma| of the whole net, make
    a mask. Its distance to an older one is the share of the units whose fate differs. The ticket is
    drawn once the newest mask is within `distance` of every other of the last `window`; the method
    is done then, and :meth:`finish` removes what that mask says. Without a ticket it is done after
    `duration`, and the mask of that moment counts.

    With a `regularizer` the filters are trained towards orthonormality meanwhile (Lubana et al.,
    arXiv 2009.05014), with weight decay 0; it ends with the ticket. That paper's code draws no
    ticket: it prunes after 25 epochs, as :class:`~.orthoreg.OrthoReg` does.

    Against the released code: it also takes a mask before the first epoch; a channel of coupled
    layers counts once here; no layer is emptied (`max_layer_ratio`); and its retraining keeps the
    slimming penalty, which is up to the loop here.

    Args:
        model: as for :class:`~.method.Method`, like all that is not named here; by default
            criterion "bn_scale" and scope "global". Criteria with gradients are refused.
        example_inputs: as for :class:`~.method.Method`.
        distance: the largest distance between masks that are held to be the same.
        window: how many masks are compared, the newest included.
        strength: s, of the slimming penalty; 0 leaves it out.
        duration: the epochs after which to wait for no ticket any more.
        regularizer: an OrthoRegularizer of this model, attached to nothing; it needs `optimizer`.
        keep_weight_decay: leave weight decay on beside the regulariser.

    Attributes:
        ticket: the epochs after which the ticket was drawn, None as long as it is not.
        distances: of the newest mask to the older ones in the window, the oldest first.
    """

    DEFAULTS: ClassVar[dict[str, Any]] = {"criterion": "bn_scale", "scope": "global"}

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        *,
        distance: float = 0.1,
        window: int = 5,
        strength: float = 1e-4,
        duration: int = 160,
        regularizer: OrthoRegularizer | None = None,
        keep_weight_decay: bool = False,
        **arguments: Any,
    ) -> None:
        self.distance = positive("distance", distance, zero=True)
        self.window = steps("window", window)
        if window < 2:
            raise ValueError("window is 1, expected at least 2: a mask is compared with older ones")
        self.strength = positive("strength", strength, zero=True)
        self.duration = steps("duration", duration)
        super().__init__(model, example_inputs, **arguments)
        check_ratio(self.ratio)
        weights_alone(self.engine.rules)
        self.engine.score()  # refuses a layer without a BatchNorm now, not after the training
        self.ticket: int | None = None
        self.masks: list[Tensor] = []  # the last ones, each the units to remove, [r] int64
        self.phased: Phased | None = None
        if regularizer is not None:
            optimizers = self.engine.optimizers
            self.phased = Phased(model, regularizer, optimizers, keep_weight_decay)
            self.phased.start()

    @property
    def distances(self) -> list[float]:  # noqa: D102
        total = sum(group.original for group in self.engine.structure.prunable)
        newest = set(self.masks[-1].tolist()) if self.masks else set()
        return [len(newest ^ set(mask.tolist())) / total for mask in self.masks[:-1]]

    @property
    def done(self) -> bool:  # noqa: D102
        over = self.ticket is not None or self.epochs >= self.duration
        return super().done or over

    @torch.no_grad()
    def _before_step(self) -> None:
        if self.strength == 0 or self.done:
            return
        norms = [module for module in self.model.modules() if isinstance(module, _BatchNorm)]
        scales = [module.weight for module in norms if module.weight is not None]
        check_gradients(scales)
        for gamma in scales:
            if gamma.requires_grad and gamma.grad is not None:
                gamma.grad.add_(gamma.sign(), alpha=self.strength)

    def after_epoch(self) -> None:  # noqa: D102
        if self.done:
            super().after_epoch()
            return
        mask = self.lowest()
        super().after_epoch()
        self.masks = [*self.masks, mask][-self.window :]
        near = all(distance <= self.distance + 1e-12 for distance in self.distances)
        if len(self.masks) == self.window and near:
            self.ticket = self.epochs
        if self.done:
            self.close()

    def close(self) -> None:
        """Detaches the regulariser, if any, and gives the weight decay back; removes nothing."""
        if self.phased is not None:
            self.phased.stop()

    def finish(self) -> PruneResult:  # noqa: D102
        result = super().finish()
        self.close()
        return result

    def _finish(self) -> None:
        self.remove(self.lowest() if self.ticket is None else self.masks[-1])

    def _settings(self) -> dict[str, Any]:
        own = ("distance", "window", "strength", "duration")
        settings = {name: getattr(self, name) for name in own}
        if self.phased is not None:
            settings["regularizer"] = self.phased.settings()
        return {**super()._settings(), **settings}

    def _state(self) -> dict[str, Any]:
        masks = [mask.tolist() for mask in self.masks]
        phased = {} if self.phased is None else self.phased.state()
        return {"ticket": self.ticket, "masks": masks, **phased}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: D102
        if self.phased is not None and "weight_decays" in state:
            self.phased.check(state)
        super().load_state_dict(state)

    def _load(self, state: Mapping[str, Any]) -> None:
        self.ticket = state["ticket"]
        self.masks = [torch.tensor(mask, dtype=torch.int64) for mask in state["masks"]]
        if self.phased is not None:
            self.phased.load(state)
