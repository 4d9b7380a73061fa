"""The layers of a term dealt to the ranks of a process group, and what the ranks exchange."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from operator import is_
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from .attachment import parameters_of
from .distributed import Flat, Group, is_sharded, require_same
from .plan import Plan, Term, widest


def deal(costs: Sequence[int], ranks: int) -> list[int]:
    """The rank of each layer: the most costly first, each to the rank with the least so far.

    No rank has more than 4/3 of what the best choice gives the busiest one (Graham, 1969). The
    same on all ranks: equal costs go in the order of the layers, equal ranks in that of numbers.
    """
    loads, owners = [0] * ranks, [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        owners[i] = loads.index(min(loads))
        loads[owners[i]] += costs[i]
    return owners


def weighted_sum(terms: Sequence[Term], values: Sequence[Tensor], factor: float) -> Tensor:
    """Sum of factor * coefficient * value over the layers of all terms, on the first device."""
    total: Tensor | None = None
    for term, own in zip(terms, values, strict=True):
        part = (own * term.coefficients.to(own.dtype)).sum() * factor
        total = part if total is None else total + part.to(total.device)
    assert total is not None
    return total


class Shares:
    """A plan of which every rank of a group computes some layers.

    Made on all ranks at once, for it compares their layers.

    Args:
        plan: all layers, the same on every rank.
        group: the process group.
        settings: what else has to be the same, in words.

    Attributes:
        own: the layers of this rank.

    Raises:
        RuntimeError: the ranks have other layers or settings.
        TypeError: a layer is sharded itself (DTensor).
    """

    def __init__(self, plan: Plan, group: Group, settings: Sequence[str] = ()) -> None:
        self.plan, self.group = plan, group
        self._check(settings)
        self.ranks, rank = dist.get_world_size(group), dist.get_rank(group)
        owners = iter(deal([cost for term in plan.terms for cost in term.costs], self.ranks))
        self._mine = [
            [i for i in range(len(term.layers)) if next(owners) == rank] for term in plan.terms
        ]
        parts = zip(plan.terms, self._mine, strict=True)
        self.own = Plan([term.take(mine) for term, mine in parts if mine], plan.skipped)
        self._values: Flat | None = None  # of all layers, and the eigenvectors
        self._exchanges: weakref.WeakKeyDictionary[torch.optim.Optimizer, Exchange] = (
            weakref.WeakKeyDictionary()
        )

    def _check(self, settings: Sequence[str]) -> None:
        described = list(settings)
        for term in self.plan.terms:
            for i, layer in enumerate(term.layers):
                if any(map(is_sharded, term.parameters(i))):
                    raise TypeError(
                        f"layer {layer.name!r} is a DTensor, sharded already (fully_shard or "
                        "tensor parallelism), so shard=True cannot deal it out: leave shard out"
                    )
                bias = " and a bias" if term.with_bias[i] else ""
                described.append(f"layer {layer.name!r} of {layer.filters} x {layer.fan_in}{bias}")
        for term in self.plan.terms:  # after all layers: one layer more changes every weight
            pairs = zip(term.layers, term.factors, strict=True)
            described += [f"layer {of.name!r} with the weight {factor}" for of, factor in pairs]
        require_same(
            self.group,
            "the regularised layers or the settings",
            described,
            "With shard=True every rank needs the same model, pruned alike, and the same arguments",
        )

    def total(self, values: Callable[[Term], Tensor], factor: float) -> Tensor:
        """The whole term, whose gradient is that of this rank's layers, times the ranks.

        So the mean of the gradients over the ranks, which DDP takes, is the term's gradient.

        Args:
            values: of the layers of a term, differentiable.
            factor: of the term.
        """
        own = [values(term) for term in self.own.terms]
        whole = weighted_sum(self.plan.terms, self._of_all_ranks(own), factor)
        if not torch.is_grad_enabled():
            return whole
        mine = set(map(id, _parameters(self.own)))
        others = [p for p in _parameters(self.plan) if p.requires_grad and id(p) not in mine]
        share = weighted_sum(self.own.terms, own, factor) if own else torch.zeros_like(whole)
        result: Tensor = _Whole.apply(  # type: ignore[no-untyped-call]
            whole, share.to(whole), self.ranks, *others
        )
        return result

    @torch.inference_mode(False)
    @torch.no_grad()
    def _of_all_ranks(self, own: Sequence[Tensor]) -> list[Tensor]:  # each [L]
        """The values of all layers of each term; eigenvectors are exchanged along."""
        plan = self.plan
        if self._values is None:
            like = [term.coefficients.to(widest(term.layers)) for term in plan.terms]
            self._values = Flat([*like, *plan.vectors().values()])
        self._values.clear()
        views, found = self._values.views[: len(plan.terms)], iter(own)
        for view, mine in zip(views, self._mine, strict=True):
            for i, value in zip(mine, next(found) if mine else (), strict=True):
                view[i] = value
        with _exchanged(self._values.views[len(plan.terms) :], plan, self.own):
            self._values.sum(self.group)
        return views

    def add(self, optimizer: torch.optim.Optimizer, compute: Callable[[], None]) -> bool:
        """Adds on all ranks what `compute` adds to the gradients of an optimizer on each.

        Returns:
            Whether the optimizer steps any of the layers, of whichever rank.
        """
        found = self._exchanges.get(optimizer)
        owned = parameters_of(optimizer)
        wanted = [p for p in _parameters(self.plan) if p.requires_grad and id(p) in owned]
        if found is None or not found.is_of(wanted):
            found = self._exchanges[optimizer] = Exchange(wanted, self)
        if wanted:
            found.add(compute)
        return bool(wanted)


@torch.compiler.disable(reason="the ranks talk with shard=True")  # type: ignore[untyped-decorator]
def shared_total(
    shares: Callable[[], Shares], values: Callable[[Term], Tensor], factor: float
) -> Tensor:
    """:meth:`Shares.total`, between two graphs of a compiled function."""
    return shares().total(values, factor)


class Exchange:
    """Gradients that each rank computes of its layers and then all ranks add.

    They go through one buffer in which a rank leaves 0 what is not its own, so that their sum is
    exact, and the same on every rank.

    Args:
        parameters: those that take the gradients.
        shares: the layers.
    """

    def __init__(self, parameters: list[Tensor], shares: Shares) -> None:
        self.parameters, self._shares = parameters, shares
        self._flat = Flat([*parameters, *shares.plan.vectors().values()])

    def is_of(self, parameters: list[Tensor]) -> bool:
        """Whether these are its parameters."""
        own = self.parameters
        return len(own) == len(parameters) and all(map(is_, own, parameters))

    def add(self, compute: Callable[[], None]) -> None:
        """Adds to the gradients on all ranks what `compute` adds on each."""
        shares, count = self._shares, len(self.parameters)
        views, before = self._flat.views[:count], [p.grad for p in self.parameters]
        self._flat.clear()
        try:
            for parameter, view in zip(self.parameters, views, strict=True):
                parameter.grad = view
            compute()
        finally:
            for parameter, grad in zip(self.parameters, before, strict=True):
                parameter.grad = grad
        with torch.no_grad():
            with _exchanged(self._flat.views[count:], shares.plan, shares.own):
                self._flat.sum(shares.group)
            for parameter, view in zip(self.parameters, views, strict=True):
                if parameter.grad is None:
                    parameter.grad = view.clone()
                else:
                    parameter.grad.add_(view)


class _Whole(torch.autograd.Function):
    """The value of the whole term with the gradient of one rank's share, times the ranks.

    The parameters of other ranks' layers get zeros: whoever averages finds a gradient of each.
    """

    @staticmethod
    def forward(ctx: Any, whole: Tensor, share: Tensor, ranks: int, *others: Tensor) -> Tensor:
        ctx.ranks, ctx.others = ranks, [(p.shape, p.dtype, p.device) for p in others]
        return whole.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        zeros = [
            torch.zeros((), dtype=dtype, device=device).expand(shape)
            for shape, dtype, device in ctx.others
        ]
        return None, grad * ctx.ranks, None, *zeros


@contextmanager
def _exchanged(
    views: Sequence[Tensor],  # of all vectors, each [g, m]
    plan: Plan,
    own: Plan,
) -> Iterator[None]:
    """Puts the eigenvectors of a rank's layers into the buffer, and takes out those of all.

    Every rank has to know them: the layers are dealt anew after a cut, and are saved by one rank.
    """
    mine = own.vectors()
    pairs = list(zip(plan.vectors().items(), views, strict=True))
    for (name, vector), view in pairs:
        if name in mine:
            view.copy_(vector)
    yield
    for (_, vector), view in pairs:
        vector.copy_(view)


def _parameters(plan: Plan) -> list[Tensor]:
    """The parameters of all layers, each once."""
    found = (p for t in plan.terms for i in range(len(t.layers)) for p in t.parameters(i))
    return list({id(p): p for p in found}.values())
