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
from ..held import Spread
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
    :meth:`finish` removes S. Of a grouped convolution every group has its own G and n_l.

    Paper against code: the released code takes the mean over the n^2 entries and the weight 1000
    where the paper sums; it adds the decay of the weights in S, which the paper may not have; and
    it quiets the BatchNorm registered next, here it is the one that follows in the graph. There S
    has ceil(ratio * n) filters of a layer, here floor; there the steps at the ceiling are one more
    than `hold`, and layers without filters in S count in the order of the zeroing too.

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
        self._silent: tuple[int, Spread] | None = None  # how many layers are zero, and their masks

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

    def _before_step(self) -> None:
        strength = self.strength
        if strength == 0 or super().done:
            return
        layers, masks, coefficients, decay = self._chosen
        decay.add_decay_(strength)  # first: it refuses gradients that are not there
        functional.add_gram_penalty_grad_(
            [layer.weight for layer in layers],
            "tpp",
            strength=strength * self.weight,
            coefficients=coefficients,
            pruned=masks,
            groups=[layer.groups for layer in layers],
        )

    def after_step(self) -> None:  # noqa: D102
        super().after_step()
        silent = self.held // self.zero_every
        if silent and not super().done:
            self._silence(silent)

    def _silence(self, count: int) -> None:
        """Sets S to zero in the first layers that have filters in S."""
        if self._silent is None or self._silent[0] != count:
            chosen = self.holders.values(self.chosen)
            parts = [m.units[m.of_units(chosen) > 0].cpu() for m in self.holders.matrices]
            units = torch.cat([part for part in parts if len(part)][:count])
            zeros = self.holders.spread(self.holders.values(units, 0.0, rest=1.0))
            self._silent = count, zeros
        self._silent[1].scale_()

    @cached_property
    def _chosen(self) -> tuple[list[FilterLayer], list[Tensor], Tensor, Spread]:
        """The trainable layers with filters in S, their masks and factors, and S for the decay."""
        chosen = self.holders.values(self.chosen)
        found = [(m.layer, m.of_units(chosen) > 0) for m in self.holders.matrices]
        found = [(layer, mask) for layer, mask in found if layer.trainable and mask.any()]
        coefficients = [(layer.groups / layer.filters) ** 2 for layer, _ in found]
        return (
            [layer for layer, _ in found],
            [mask for _, mask in found],
            torch.tensor(coefficients, dtype=torch.float64, device=self.holders.device),
            self.holders.spread(chosen),
        )

    def _finish(self) -> None:
        self.remove(self.chosen)

    def _settings(self) -> dict[str, Any]:
        own = ("delta", "every", "ceiling", "hold", "zero_every", "weight")
        return {**super()._settings(), **{name: getattr(self, name) for name in own}}

    def _state(self) -> dict[str, Any]:
        return {"chosen": self.chosen.tolist()}

    def _load(self, state: Mapping[str, Any]) -> None:
        self.chosen = torch.tensor(state["chosen"], dtype=torch.int64)
