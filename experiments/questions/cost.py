"""What does the regulariser cost? Seconds of a training step: without it, with ours, with eager's.

All ways are timed in turn, round by round, on a batch of the training images; rounds that other
processes disturbed are left out. Run it with one process, on a machine that does nothing else.

options.batch_size: images a step; options.budget: seconds of one unit.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

import orthoreg_ext as ox
from benchmarks.baselines import eager_penalty
from benchmarks.steps import Training, step
from experiments.config import Config, check_options
from experiments.lab import Lab
from experiments.runner import Unit, Values
from experiments.training import sgd
from orthoreg_ext import timing
from orthoreg_ext.bench import StillOptimizer

STRENGTH, RATE = 1e-4, 1e-4  # the loss must stay finite for as long as it is timed
WITHOUT = "without"


def stages(config: Config) -> Sequence[Sequence[Unit]]:
    """One unit a network."""
    check_options(config, {"batch_size": int, "budget": float})
    pairs = itertools.product(config.seeds, config.models)
    return [[{"model": model, "seed": seed} for seed, model in pairs]]


def measure(lab: Lab, unit: Unit) -> Values:
    """Milliseconds and ratios, each the median and where the middle half of the rounds lies."""
    options, device = lab.config.options, lab.config.device
    images, labels = lab.train.batch(slice(0, options["batch_size"]))
    steps = {
        name: _step(lab.fresh(unit["model"], unit["seed"]).train(), images, labels, add)
        for name, add in WAYS.items()
    }
    alone = {name: make(lab.fresh(unit["model"], unit["seed"])) for name, make in ALONE.items()}
    calls, load = {**steps, **alone}, timing.watch(device)
    found = timing.measure(calls, device, options["budget"], load=load)
    return {
        "ms": {name: found.spread(name, 1e3).as_dict() for name in calls},
        "ratio": {name: found.ratio(name, WITHOUT).as_dict() for name in calls},
        **found.about(),
    }


Term = Callable[[], Tensor]
Add = Callable[[nn.Module, torch.optim.Optimizer], Term | None]


def _without(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    return None


def _attached(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    _regularizer(net).attach(optimizer)


def _in_the_loss(net: nn.Module, optimizer: torch.optim.Optimizer) -> Term:
    return _regularizer(net)


def _eager(net: nn.Module, optimizer: torch.optim.Optimizer) -> Term:
    rows = _regularizer(net).report()
    weights: list[Tensor] = [net.get_submodule(row.name).weight for row in rows]  # type: ignore[misc]
    return lambda: STRENGTH * eager_penalty(weights)


def _regularizer(net: nn.Module) -> ox.OrthoRegularizer:
    return ox.OrthoRegularizer(net, "so", STRENGTH, side="rows", layer_weights="uniform")


WAYS: dict[str, Add] = {
    WITHOUT: _without,
    "reg.attach": _attached,
    "loss + reg()": _in_the_loss,
    "eager": _eager,
}


def _attached_alone(net: nn.Module) -> Callable[[], None]:
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer = StillOptimizer(list(net.parameters()))
    _regularizer(net).attach(optimizer)
    return optimizer.step


def _eager_alone(net: nn.Module) -> Callable[[], None]:
    term = _eager(net, sgd(net, 0.0))
    return lambda: term().backward()


# Only what they add, which is less than a whole step varies: a share of the step in the same round.
ALONE: dict[str, Callable[[nn.Module], Callable[[], None]]] = {
    "reg.attach, alone": _attached_alone,
    "eager, alone": _eager_alone,
}


def _step(net: nn.Module, images: Tensor, labels: Tensor, add: Add) -> Callable[[], None]:
    optimizer = sgd(net, 0.0)
    for group in optimizer.param_groups:
        group["lr"] = RATE
    return step(Training(net, images, labels), optimizer, add(net, optimizer))
