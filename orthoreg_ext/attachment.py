"""A term on an optimizer: its gradient is added just before each step, at little cost."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import functional
from .arguments import by_precision, check_layers, choose_sides, scale_of
from .backend import namespace_for
from .in_place import PreparedPenalty, written_in_place
from .penalties import get_penalty
from .plan import Plan, Term
from .precision import selected as selected_precision


class Attachment:
    """A regulariser on one optimizer, with a step number of its own.

    Args:
        optimizer: the optimizer whose gradients are added to before each step.
        add: adds the term of a step number to the gradients of the optimizer's parameters.
        step: the number of the first step.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        add: Callable[[torch.optim.Optimizer, int], None],
        step: int,
    ) -> None:
        self.step = step
        self.active = True
        self._add_term = add
        self._handle = optimizer.register_step_pre_hook(self._before_step)

    def remove(self) -> None:
        """Detaches; the optimizer's steps no longer carry the term."""
        self.active = False
        self._handle.remove()

    def _before_step(
        self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._add(optimizer)
            return None

        def with_term() -> Any:  # the closure zeroes the gradients and fills them anew
            loss = closure()
            self._add(optimizer)
            return loss

        if "closure" in kwargs:
            return args, {**kwargs, "closure": with_term}
        return (args[0], with_term, *args[2:]), kwargs

    def _add(self, optimizer: torch.optim.Optimizer) -> None:
        step, self.step = self.step, self.step + 1
        self._add_term(optimizer, step)


def parameters_of(optimizer: torch.optim.Optimizer) -> set[int]:
    """The identities of the parameters that an optimizer steps."""
    return set(map(id, _stepped(optimizer)))


def _stepped(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return list(chain.from_iterable(group["params"] for group in optimizer.param_groups))


class Settings(NamedTuple):
    """What a prepared term depends on beside the plan and the optimizer."""

    penalty: str
    side: str
    precision: str
    namespaces: list[str | None]  # of each term's operators

    @staticmethod
    def now(plan: Plan, penalty: str, side: str) -> Settings:
        """The settings that a step takes now."""
        namespaces = [namespace_for(term.coefficients.device) for term in plan.terms]
        return Settings(penalty, side, selected_precision(), namespaces)


class PreparedTerm:
    """A term on the parameters of one optimizer.

    Layers whose gradients the operator writes itself are prepared; the others (transposed and
    parametrized weights, shared and partly frozen layers) take the functional call at each step.

    Args:
        term: the layers of one device.
        owned: the identities of the optimizer's parameters, some of these layers among them.
        namespace: of the operators; None: plain PyTorch.
        settings: the penalty, its side and the precision.
    """

    def __init__(
        self, term: Term, owned: set[int], namespace: str | None, settings: Settings
    ) -> None:
        self.stale = False
        self._term, self._owned, self._settings = term, owned, settings
        penalty = get_penalty(settings.penalty)
        taken = term.owned(owned)
        arguments = term.arguments(taken, owned)
        self._layers = check_layers(**arguments)
        self._taken = taken
        self._coefficients = term.coefficients[taken]
        sides = choose_sides(self._layers, penalty, settings.side)
        in_place = [False] * len(taken)
        if namespace is not None and penalty.compiled:
            in_place = written_in_place(arguments["weights"], self._layers)
        self._rest = [i for i, inside in enumerate(in_place) if not inside]
        self._parts: list[tuple[list[int], PreparedPenalty]] = []
        for same_precision in by_precision(self._layers):
            part = [i for i in same_precision if in_place[i]]
            if part:
                layers, sided = self._layers.take(part), sides.take(part)
                prepared = PreparedPenalty(
                    str(namespace), layers, penalty, sided, settings.precision
                )
                self._parts.append((part, prepared))
        self._factor: float | None = None
        self._scales: list[Tensor] = []

    def add(self, factor: float, grad_scale: Tensor | None) -> None:
        """Adds the gradient of factor (times grad_scale) times the term."""
        strength: float | Tensor = factor
        if grad_scale is not None:
            strength = grad_scale.to(self._coefficients.device) * factor
        if self._rest:  # first: what it refuses, it refuses before any gradient is written
            self._add_by_call(self._rest, strength)
        if not self._parts:
            return
        if grad_scale is not None or factor != self._factor:
            scale = scale_of(self._layers, strength, self._coefficients)
            self._scales = [scale[part].to(prepared.dtype) for part, prepared in self._parts]
            self._factor = factor if grad_scale is None else None
        for (part, prepared), scale in zip(self._parts, self._scales, strict=True):
            if not prepared.add(scale):
                self.stale = True
                self._add_by_call(part, strength)

    def _add_by_call(self, indices: list[int], strength: float | Tensor) -> None:
        functional.add_gram_penalty_grad_(
            penalty=self._settings.penalty,
            strength=strength,
            side=self._settings.side,
            coefficients=self._coefficients[indices],
            **self._term.arguments([self._taken[i] for i in indices], self._owned),
        )


class PreparedTerms:
    """The terms of a plan on the parameters of one optimizer, until one of them changes."""

    def __init__(
        self, plan: Plan, optimizer: torch.optim.Optimizer, penalty: str, side: str
    ) -> None:
        self._plan = plan
        self._settings = Settings.now(plan, penalty, side)
        self._stepped = _stepped(optimizer)
        owned = parameters_of(optimizer)
        self.terms = [
            PreparedTerm(term, owned, namespace, self._settings)
            for term, namespace in zip(plan.terms, self._settings.namespaces, strict=True)
            if term.owned(owned)
        ]

    def holds(self, plan: Plan, optimizer: torch.optim.Optimizer, penalty: str, side: str) -> bool:
        """Whether a step with these still is the one that was prepared."""
        stepped = _stepped(optimizer)
        return (
            plan is self._plan
            and len(stepped) == len(self._stepped)
            and all(map(is_, stepped, self._stepped))
            and not any(term.stale for term in self.terms)
            and Settings.now(plan, penalty, side) == self._settings
        )

    def add(self, factor: float, grad_scale: Tensor | None) -> None:
        """Adds the gradients of all terms."""
        for term in self.terms:
            term.add(factor, grad_scale)
