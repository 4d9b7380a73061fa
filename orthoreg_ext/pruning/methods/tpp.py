"""TPP: decorrelate the filters that will go from those that stay, and quiet their BatchNorm."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ... import functional
from ...layers import FilterLayer
from .checks import positive, steps
from .method import Method


class TPP(Method):
    """Trainability preserving pruning (Wang and Fu, ICLR 2023, arXiv 2207.12534).

    The set S of the filters to go is fixed at the start: the lowest L1 norms of every layer. Each
    step adds to the gradients, after ``loss.backward()``, those of ::

        weight * lambda * sum_l 1 / n_l^2 * sum_{i or j in S} G_ij^2    (G = W W^T of layer l)
        lambda / 2 * sum_{i in S} (|w_i|^2 + b_i^2 + gamma_i^2 + beta_i^2)

    with lambda = min(delta * floor(step / every), ceiling), steps from 0. Once lambda is at the
    ceiling, training goes on for `hold` steps, in which the filters of S are set to zero, layer by
    layer: layer i from the step (i + 1) * zero_every of these on. Then the method is done, and
    :meth:`finish` removes S.

    Paper against code: the released code takes the mean over the n^2 entries and the weight 1000
    where the paper sums; it adds the decay of the weights in S, which the paper may not have; and
    it quiets the BatchNorm registered next, here it is the one that follows in the graph.

    Args:
        model: as for :class:`~.method.Method`, like all that is not named here; by default
            criterion "l1" and scope "local".
        example_inputs: as for :class:`~.method.Method`.
        delta: what lambda grows by.
        every: K_u, the steps between two growths: 10 for CIFAR, 5 for ImageNet.
        ceiling: the largest lambda.
        hold: K_s, the steps with lambda at the ceiling: 10 000 for CIFAR, 40 000 for ImageNet.
        zero_every: the steps between two layers that are set to zero.
        weight: the weight of the decorrelation beside the decay.
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
        hold: int = 10_000,
        zero_every: int = 100,
        weight: float = 1000.0,
        **arguments: Any,
    ) -> None:
        self.delta, self.ceiling = positive("delta", delta), positive("ceiling", ceiling)
        self.every, self.hold = steps("every", every), steps("hold", hold)
        self.zero_every = steps("zero_every", zero_every)
        self.weight = positive("weight", weight, zero=True)
        super().__init__(model, example_inputs, **arguments)
        self.chosen = self.lowest()  # S

    @property
    def strength(self) -> float:
        """The lambda of the step that comes."""
        return min(self.delta * (self.steps // self.every), self.ceiling)

    @property
    def held(self) -> int:
        """The steps done with lambda at the ceiling."""
        growths = math.ceil(self.ceiling / self.delta - 1e-6)  # 1 / 1e-4 is 10000 and no more
        return max(0, self.steps - self.every * growths)

    @property
    def done(self) -> bool:  # noqa: D102
        return super().done or self.held >= self.hold

    def before_step(self) -> None:  # noqa: D102
        strength = self.strength
        if strength == 0 or super().done:
            return
        chosen, masks = self._chosen
        layers = [layer for layer, _ in masks if layer.trainable]
        functional.add_gram_penalty_grad_(
            [layer.weight for layer in layers],
            "tpp",
            strength=strength * self.weight,
            coefficients=[(layer.groups / layer.filters) ** 2 for layer in layers],
            pruned=[mask for layer, mask in masks if layer.trainable],
            groups=[layer.groups for layer in layers],
        )
        self.holders.add_decay_(chosen * strength)

    def after_step(self) -> None:  # noqa: D102
        super().after_step()
        _, masks = self._chosen
        silent = min(self.held // self.zero_every, len(masks))
        if silent and not super().done:
            layers = {layer.name for layer, _ in masks[:silent]}
            units = [m.units for m in self.holders.matrices if m.layer.name in layers]
            zeros = torch.cat(units).cpu()
            zeros = zeros[torch.isin(zeros, self.chosen)]
            self.holders.scale_(self.holders.values(zeros, 0.0, rest=1.0))

    @cached_property
    def _chosen(self) -> tuple[Tensor, list[tuple[FilterLayer, Tensor]]]:
        """S as a vector over the units, and as a mask for each layer that has filters in S."""
        chosen = self.holders.values(self.chosen)
        masks = [(m.layer, m.of_units(chosen) > 0) for m in self.holders.matrices]
        return chosen, [(layer, mask) for layer, mask in masks if mask.any()]

    def _finish(self) -> None:
        self.remove(self.chosen)

    def _settings(self) -> dict[str, Any]:
        own = ("delta", "every", "ceiling", "hold", "zero_every", "weight")
        return {**super()._settings(), **{name: getattr(self, name) for name in own}}

    def _state(self) -> dict[str, Any]:
        return {"chosen": self.chosen.tolist()}

    def _load(self, state: Mapping[str, Any]) -> None:
        self.chosen = torch.tensor(state["chosen"], dtype=torch.int64)
        self.__dict__.pop("_chosen", None)
