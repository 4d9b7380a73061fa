"""Slimming: an L1 penalty on the scales of BatchNorms; the channels of small scale go."""

from __future__ import annotations

from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..held import Held, check_gradients
from ..schedule import check_ratio
from .checks import positive, steps, weights_alone
from .method import Method


class Slimming(Method):
    """Network slimming (Liu et al., ICCV 2017, arXiv 1708.06519).

    Each step adds to the gradients, after ``loss.backward()``, that of ::

        strength * sum |gamma|

    over the scales of the BatchNorms that the graph puts behind prunable filters, with sign(0) = 0.
    After `duration` epochs the method is done; :meth:`finish` removes the channels of smallest
    |gamma| in the whole model. For a coupled unit that is the mean over its BatchNorms
    (``group_reduction``).

    Paper against code: the released code shrinks all BatchNorms, also those of channels that
    cannot go, and has no floor, so that a whole layer can vanish; here ``max_layer_ratio`` keeps a
    part of each. It removes |gamma| <= the quantile, here the exact number.

    Args:
        model: as for :class:`~.method.Method`, like all that is not named here; by default
            criterion "bn_scale" and scope "global".
        example_inputs: as for :class:`~.method.Method`.
        strength: s: 1e-4 for VGG, 1e-5 for ResNet-164 and DenseNet-40.
        duration: the epochs to train with the penalty.

    Raises:
        TypeError, ValueError: an argument is wrong or cannot be met, a layer has no BatchNorm
            behind it among them; nothing was changed.
    """

    DEFAULTS: ClassVar[dict[str, Any]] = {"criterion": "bn_scale", "scope": "global"}

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        *,
        strength: float = 1e-4,
        duration: int = 160,
        **arguments: Any,
    ) -> None:
        self.strength, self.duration = positive("strength", strength), steps("duration", duration)
        super().__init__(model, example_inputs, **arguments)
        check_ratio(self.ratio)
        weights_alone(self.engine.rules)
        self.engine.score()  # refuses a layer without a BatchNorm now, not after the training
        if not any(held.parameter.requires_grad for held, _ in self._scales):
            raise ValueError(
                "Slimming has no scale to shrink: no prunable layer has a BatchNorm with a "
                "trainable weight behind it; unfreeze them, or use a method that needs none, e.g. "
                "GReg1"
            )

    @property
    def done(self) -> bool:  # noqa: D102
        return super().done or self.epochs >= self.duration

    @torch.no_grad()
    def _before_step(self) -> None:
        if super().done:
            return
        check_gradients([held.parameter for held, _ in self._scales])
        for held, mask in self._scales:
            gamma = held.parameter
            if gamma.requires_grad and gamma.grad is not None:
                gamma.grad.addcmul_(gamma.sign(), mask.to(gamma), value=self.strength)

    @cached_property
    def _scales(self) -> list[tuple[Held, Tensor]]:
        """The scales, and the mask of the channels that can go."""
        units = torch.cat([group.units for group in self.engine.structure.prunable])
        prunable = self.holders.values(units)
        return [
            (held, held.spread(prunable))
            for held in self.holders.norms
            if isinstance(held.module, _BatchNorm) and held.attribute == "weight"
        ]

    def _finish(self) -> None:
        self.remove(self.lowest())

    def _settings(self) -> dict[str, Any]:
        own = {"strength": self.strength, "duration": self.duration}
        return {**super()._settings(), **own}
