"""What pruning methods add to a training step, beside the loops that research scripts write."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.baselines import Call, Way
from benchmarks.steps import STEP, Training
from orthoreg_ext.pruning.methods import TPP, GReg1
from orthoreg_ext.pruning.methods.method import Method

STRENGTH = 1e-3  # lambda, from the first timed step on


def _begun(kind: Callable[..., Method], subject: Training) -> Method:
    """A method on the way up, which stays there."""
    method = kind(
        subject.model,
        subject.images[:1],
        optimizer=subject.optimizer(),
        delta=STRENGTH,
        every=1,
        ceiling=STRENGTH,
        hold=10**9,
        **({"zero_every": 10**9} if kind is TPP else {}),
    )
    for parameter in subject.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for _ in range(2):
        method.before_step()
        method.after_step()
    return method


def _own(kind: Callable[..., Method]) -> Callable[[Training], Call]:
    def prepare(subject: Training) -> Call:
        method = _begun(kind, subject)

        def call() -> None:
            method.before_step()
            method.after_step()

        return call

    return prepare


def _chosen(subject: Training) -> list[tuple[nn.Parameter, list[nn.Parameter], Tensor]]:
    """Each filter matrix with filters to go, the norms behind them, and the filters' numbers."""
    method: Any = _begun(TPP, subject)
    chosen = method.holders.values(method.chosen)
    named, left = dict(subject.model.named_parameters()), list(method.holders.norms)
    found = []
    for matrix in method.holders.matrices:
        mask = matrix.of_units(chosen) > 0
        if mask.any():
            mine = {held.name for held in left if torch.equal(held.units, matrix.units)}
            left = [held for held in left if held.name not in mine]  # coupled layers share theirs
            norms = [named[name] for name in sorted(mine)]
            found.append((matrix.layer.module.weight, norms, mask.nonzero().flatten()))
    return found


def _decay_by_loop(subject: Training) -> Call:
    chosen = _chosen(subject)

    def call() -> None:
        with torch.no_grad():
            for weight, _, filters in chosen:
                assert weight.grad is not None
                weight.grad[filters] += STRENGTH * weight[filters]

    return call


def _tpp_by_autograd(subject: Training) -> Call:
    """The masked Gram matrix of each layer by autograd, then the decay of filters and norms."""
    chosen = _chosen(subject)
    masks = []
    for weight, _, filters in chosen:
        kept = torch.ones(len(weight), device=weight.device)
        kept[filters] = 0
        masks.append(1 - kept.outer(kept))

    def call() -> None:
        total = torch.zeros((), device=subject.images.device)
        for (weight, _, _), mask in zip(chosen, masks, strict=True):
            matrix = weight.flatten(1)
            total = total + ((matrix @ matrix.t()) * mask).square().mean()
        (1000 * STRENGTH * total).backward()
        with torch.no_grad():
            for weight, norms, filters in chosen:
                for parameter in (weight, *norms):
                    assert parameter.grad is not None
                    parameter.grad[filters] += STRENGTH * parameter[filters]

    return call


METHODS = {
    "plain": STEP["plain"],
    "orthoreg_ext-tpp": Way("TPP's before_step and after_step", _own(TPP), "term"),
    "eager-tpp": Way("masked Grams by autograd, a loop for the decay", _tpp_by_autograd, "term"),
    "orthoreg_ext-greg1": Way("GReg1's before_step and after_step", _own(GReg1), "term"),
    "eager-greg1": Way("a loop for the decay", _decay_by_loop, "term"),
}
