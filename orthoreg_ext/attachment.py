"""A term on an optimizer: its gradient is added just before each step, at little cost."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from itertools import chain
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import functional
from .arguments import by_precision, check_layers
from .backend import namespace_for
from .distributed import is_fully_sharded, is_sharded
from .in_place import PreparedPenalty, is_capturing, written_in_place
from .options import split_groups
from .penalties import Penalty, get_penalty
from .plan import Plan, Term
from .precision import selected as selected_precision
from .sides import choose_sides


class Attachment:
    """A regulariser on one optimizer, with a step number of its own.

    Args:
        optimizer: the optimizer whose gradients are added to before each step.
        add: adds the term of a step number to the gradients of the optimizer's parameters.
        step: the number of the first step.
        hook: whether the optimizer's step adds the term; else :meth:`add` does.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        add: Callable[[torch.optim.Optimizer, int], None],
        step: int,
        hook: bool = True,
    ) -> None:
        self.step = step
        self.active = True
        self._add_term = add
        self._optimizer = weakref.ref(optimizer)
        self._handle = optimizer.register_step_pre_hook(self._before_step) if hook else None

    @property
    def by_hand(self) -> bool:
        """Whether :meth:`add` adds the term, not the optimizer's step."""
        return self._handle is None

    def add(self) -> None:
        """Adds the term's gradient now, which counts as a step; for attach(hook=False) only.

        Raises:
            RuntimeError: the optimizer's step adds it already, or this was removed.
        """
        optimizer = self._optimizer()
        if self._handle is not None:
            raise RuntimeError("the optimizer adds the term itself: attach it with hook=False")
        if optimizer is None or not self.active:
            raise RuntimeError("the optimizer is gone or was detached: attach it again")
        self._add(optimizer)

    def remove(self) -> None:
        """Detaches; the optimizer's steps no longer carry the term."""
        self.active = False
        if self._handle is not None:
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
        # whatever mode the step is in: weights may be views or functions of parameters
        with torch.inference_mode(False), torch.enable_grad():
            self._add_term(optimizer, self.step)
        self.step += 1


def check_hooks(optimizer: torch.optim.Optimizer) -> None:
    """Some wrappers of optimizers are optimizers whose step runs no hooks of theirs.

    Raises:
        ValueError: this is one of them, so that the term would be lost silently.
    """
    if getattr(type(optimizer).step, "hooked", False) and hasattr(
        optimizer, "_optimizer_step_pre_hooks"
    ):
        return
    inside = [name for name, of in vars(optimizer).items() if isinstance(of, torch.optim.Optimizer)]
    remedy = f"the one inside, optimizer.{inside[0]}" if inside else "one that does"
    raise ValueError(
        f"the step of {type(optimizer).__name__} runs no hooks, so the term would be lost: attach "
        f"to {remedy}"
    )


def parameters_of(optimizer: torch.optim.Optimizer) -> set[int]:
    """The identities of the parameters that an optimizer steps."""
    return set(map(id, _stepped(optimizer)))


def _stepped(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return list(chain.from_iterable(group["params"] for group in optimizer.param_groups))


def refuse_gathered(model: nn.Module, plan: Plan, optimizer: torch.optim.Optimizer) -> None:
    """Refuses a step in which FSDP2 has gathered layers, for their gradients are elsewhere then.

    Raises:
        RuntimeError: naming the layer and what to call.
    """
    if not is_fully_sharded(model):
        return
    owned = parameters_of(optimizer)
    for term in plan.terms:
        for i, layer in enumerate(term.layers):
            parameters = term.parameters(i)
            if not any(id(p) in owned or is_sharded(p) for p in parameters):
                raise RuntimeError(
                    f"layer {layer.name!r} is gathered (fully_shard) while the optimizer steps, so "
                    "its term would be lost: call model.reshard() after a forward without backward"
                )


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


class Part(NamedTuple):
    """Layers of a term that are treated alike."""

    layers: list[int]  # of the term
    coefficients: Tensor  # [L]
    prepared: PreparedPenalty | None  # None: by the functional call


class PreparedTerm:
    """A term on the parameters of one optimizer.

    Layers whose gradients the operator writes itself are prepared; the others (transposed and
    parametrized weights, shared and partly frozen layers) take the functional call at each step.
    Each part has its coefficients on the device, so that a step copies nothing from the host.

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
        layers = check_layers(arguments["weights"], arguments["biases"], arguments["groups"])
        layers = split_groups(layers, penalty, arguments.get("num_groups"))
        sides = choose_sides(layers, penalty, settings.side)
        in_place = [False] * len(taken)
        if namespace is not None and penalty.compiled:
            in_place = written_in_place(arguments["weights"], layers)
        rest = [layer for layer, inside in zip(taken, in_place, strict=True) if not inside]
        self._parts: list[Part] = []
        if rest:  # first: what the call refuses, it refuses before any gradient is written
            factors = term.coefficients_of(rest, term.coefficients.dtype)
            self._parts.append(Part(rest, factors, None))
        for same_precision in by_precision(layers):
            part = [i for i in same_precision if in_place[i]]
            if part:
                assert isinstance(penalty, Penalty)  # the others are not compiled
                prepared = PreparedPenalty(
                    str(namespace), layers.take(part), penalty, sides.take(part), settings.precision
                )
                mine = [taken[i] for i in part]
                factors = term.coefficients_of(mine, prepared.dtype)
                self._parts.append(Part(mine, factors, prepared))
        self._factor: float | None = None
        self._scales: list[Tensor] = []  # of the factor
        self._is_kept = False

    def add(self, factor: float, grad_scale: Tensor | None) -> None:
        """Adds the gradient of factor (times grad_scale) times the term."""
        device = self._term.coefficients.device
        strength: float | Tensor = factor
        if grad_scale is not None:
            strength = grad_scale.to(device) * factor
        for part, scale in zip(self._parts, self._scaled(device, strength), strict=True):
            if part.prepared is None:
                self._add_by_call(part.layers, scale)
            elif not part.prepared.add(scale):
                self.stale = True
                self._add_by_call(part.layers, scale)

    def _scaled(self, device: torch.device, strength: float | Tensor) -> list[Tensor]:
        """The coefficients of each part times the strength."""
        capturing = is_capturing(device)
        if capturing:
            self._keep_for_replays()
        if capturing or isinstance(strength, Tensor):
            # inside a capture nothing is computed yet, and a replay must not read what a later
            # step replaces: it computes its own
            return [part.coefficients * strength for part in self._parts]
        if strength != self._factor:
            self._scales = [part.coefficients * strength for part in self._parts]
            self._factor = strength
        return self._scales

    def _keep_for_replays(self) -> None:
        """Replays read coefficients and eigenvectors at any later time.

        So they live as long as a parameter.
        """
        if not self._is_kept:
            parameter = self._term.layers[self._parts[0].layers[0]].weight_parameters()[0]
            kept = [part.coefficients for part in self._parts]
            kept += self._term.by_layer.get("vectors", [])
            weakref.finalize(parameter, kept.clear).atexit = False
            self._is_kept = True

    def _add_by_call(self, layers: list[int], scale: Tensor) -> None:
        functional.add_gram_penalty_grad_(
            penalty=self._settings.penalty,
            strength=1.0,
            side=self._settings.side,
            coefficients=scale,
            **self._term.arguments(layers, self._owned),
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
