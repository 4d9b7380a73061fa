"""IncReg: every filter has its own L2 penalty, which rises and falls with its rank."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..held import Spread
from .checks import positive, steps
from .method import Method


class IncReg(Method):
    """Incremental regularisation (Wang et al., IEEE J-STSP 2020, arXiv 1811.08390).

    Each step adds to the gradients, after ``loss.backward()``, lambda_i w_i for every filter i, on
    the weights alone. Before every `every`-th step the filters of each layer are ranked by their
    L1 norms; the ranks are averaged over time, and by the order r = 0, 1, ... of the averages ::

        lambda_i <- max(0, lambda_i + Delta(r))
        Delta(r) = A exp(-alpha r)                        for r <= r*
        Delta(r) = 2 u A - A exp(-alpha (2 r* - r))       for r > r*
        alpha = ln(2 / u) / R,   r* = -ln(u) / alpha

    with R the filters that the layer has still to lose: A at rank 0, u A at r*, 0 at rank R, less
    beyond, so that a filter that becomes important is let go. A filter whose lambda has come to
    `ceiling` is set to zero and stays zero. A layer that has lost all it should is left alone; when
    every layer has, the method is done, and :meth:`finish` removes the zero filters. Called before
    that, it takes the filters of largest lambda for the rest.

    All of it stays on the device; :attr:`done` reads one number.

    Paper against code: the released code (Caffe) prunes columns of the weight matrix by default,
    and rows, as here, by an option; its layers lose ceil(ratio * n), here what the rules choose
    (floor by default). A layer stands for all layers coupled with it, and the mean |w| of a unit's
    filters for the L1 norm, which is the same order in a single layer.

    Args:
        model: as for :class:`~.method.Method`, like all that is not named here; by default
            criterion "l1" and scope "local", which say how many filters each layer loses.
        example_inputs: as for :class:`~.method.Method`.
        delta: A, the largest change of a lambda; in the paper the weight decay.
        middle: u, in (0, 1).
        ceiling: the lambda at which a filter goes; 10 000 * A by default, recommended are 5 000 to
            10 000.
        every: the steps between two changes.

    Raises:
        TypeError, ValueError: an argument is wrong or cannot be met; nothing was changed.
    """

    DEFAULTS: ClassVar[dict[str, Any]] = {"criterion": "l1", "scope": "local"}

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        *,
        delta: float = 2.5e-4,
        middle: float = 0.25,
        ceiling: float | None = None,
        every: int = 1,
        **arguments: Any,
    ) -> None:
        self.delta, self.middle = positive("delta", delta), positive("middle", middle)
        if self.middle >= 1:
            raise ValueError(f"middle is {middle!r}, expected a number in (0, 1)")
        self.ceiling = 1e4 * self.delta if ceiling is None else positive("ceiling", ceiling)
        self.every = steps("every", every)
        super().__init__(model, example_inputs, **arguments)
        groups, chosen = self.engine.structure.prunable, self.lowest()
        device = self.holders.device
        self._units = torch.cat([group.units for group in groups]).to(device)
        sizes = torch.tensor([len(group.units) for group in groups])
        self._group = torch.repeat_interleave(torch.arange(len(groups)), sizes).to(device)
        self._start = (sizes.cumsum(0) - sizes).to(device)[self._group]  # of each unit's group
        quotas = [int(torch.isin(group.units, chosen).sum()) for group in groups]
        self._quota = torch.tensor(quotas, device=device)  # [groups]: the units to go
        count = len(self._units)
        self._lambda = torch.zeros(count, dtype=torch.float64, device=device)
        self._rank = torch.zeros(count, dtype=torch.float64, device=device)  # averaged over time
        self._gone = torch.zeros(count, dtype=torch.bool, device=device)
        self._decay: Spread | None = None
        self._live: Spread | None = None
        self._updated: int | None = None  # the last such step; a closure may run twice in one

    @property
    def strengths(self) -> dict[str, Tensor]:  # each [u] float64
        """The lambda of the units of each prunable group, named by its first layer."""
        groups = self.engine.structure.prunable
        pieces = self._lambda.cpu().split(self._group.bincount().tolist())
        return {group.name: piece for group, piece in zip(groups, pieces, strict=True)}

    @property
    def gone(self) -> Tensor:  # [r] int64
        """The units whose filters are zero for good."""
        return self._units[self._gone].cpu()

    @property
    def done(self) -> bool:  # noqa: D102
        return super().done or not bool((self._left() > 0).any())

    @torch.no_grad()
    def _before_step(self) -> None:
        if super().done:
            return
        due = self.steps % self.every == 0 and self._updated != self.steps
        if due:
            self._update()
            self._updated = self.steps
        if due or self._decay is None:
            self._lay_out()
        assert self._decay is not None
        self._decay.add_decay_()

    def after_step(self) -> None:  # noqa: D102
        super().after_step()
        if self._live is not None and not super().done:
            self._live.scale_()  # a filter that is gone must not come back by momentum

    def _update(self) -> None:
        """Ranks the units, changes every lambda, and marks those that have come to the ceiling."""
        magnitudes = self.holders.magnitudes()[self._units]
        number = self.steps // self.every + 1
        rank = self._ranks(magnitudes)
        self._rank = torch.where(self._gone, self._rank, self._rank + (rank - self._rank) / number)
        left = self._left()[self._group]
        lost = torch.zeros_like(self._quota).index_add_(0, self._group, self._gone.long())
        rank = self._ranks(self._rank) - lost[self._group]  # of those still there, from 0
        active = ~self._gone & (left > 0)
        moved = (self._lambda + self._change(rank.double(), left.clamp(min=1))).clamp(min=0)
        self._lambda = torch.where(active, moved, self._lambda)
        self._gone |= active & (rank < left) & (self._lambda >= self.ceiling * (1 - 1e-9))

    def _change(self, rank: Tensor, left: Tensor) -> Tensor:  # both [u] -> [u]
        alpha = math.log(2 / self.middle) / left.double()
        turn = -math.log(self.middle) / alpha
        early = self.delta * torch.exp(-alpha * rank)
        late = 2 * self.middle * self.delta - self.delta * torch.exp(-alpha * (2 * turn - rank))
        return torch.where(rank <= turn, early, late)

    def _ranks(self, values: Tensor) -> Tensor:  # [u] -> [u] int64
        """The rank of each unit in its group, those that are gone first."""
        order = torch.argsort(values.masked_fill(self._gone, -1), stable=True)
        order = order[torch.argsort(self._group[order], stable=True)]
        ranks = torch.empty_like(order)
        ranks[order] = torch.arange(len(order), device=order.device)
        return ranks - self._start

    def _left(self) -> Tensor:  # [groups]
        """The units that each group has still to lose."""
        return self._quota - torch.zeros_like(self._quota).index_add_(
            0, self._group, self._gone.long()
        )

    def _lay_out(self) -> None:
        """Lays lambda and the mask of those still there out along the weights."""
        acts = ~self._gone & (self._left() > 0)[self._group]
        decay = self._lambda.new_zeros(self.holders.size)
        live = torch.ones_like(decay)
        decay[self._units] = torch.where(acts, self._lambda, 0.0)
        live[self._units] = (~self._gone).double()
        self._decay = self.holders.spread(decay, biases=False, norms=False)
        self._live = self.holders.spread(live, biases=False, norms=False)

    def _finish(self) -> None:
        self.engine.score()  # refuses NaN
        order = torch.argsort(self._lambda.masked_fill(self._gone, math.inf), descending=True)
        chosen = [
            self._units[order[self._group[order] == g][:quota]]
            for g, quota in enumerate(self._quota.tolist())
        ]
        self.remove(torch.cat(chosen).cpu())

    def _settings(self) -> dict[str, Any]:
        own = ("delta", "middle", "ceiling", "every")
        return {**super()._settings(), **{name: getattr(self, name) for name in own}}

    def _state(self) -> dict[str, Any]:
        return {
            "quota": self._quota.tolist(),
            "lambda": self._lambda.tolist(),
            "rank": self._rank.tolist(),
            "gone": self._gone.tolist(),
        }

    def _load(self, state: Mapping[str, Any]) -> None:
        device = self._units.device
        self._quota = torch.tensor(state["quota"], device=device)
        self._lambda = torch.tensor(state["lambda"], dtype=torch.float64, device=device)
        self._rank = torch.tensor(state["rank"], dtype=torch.float64, device=device)
        self._gone = torch.tensor(state["gone"], dtype=torch.bool, device=device)
        self._decay = self._live = None
