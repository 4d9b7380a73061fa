"""How well does what is left train on? TPP against L1 and GReg, with equal budgets.

A network is trained, brought to a ratio by a method, and fine-tuned. The methods with a schedule
have `options.epochs` for it; the others are cut at once and are fine-tuned for as much longer.
One of these named "NAME, short" is not: what the longer budget alone is worth.

options.methods: names of METHODS.
options.ratio, options.lr: lists, of the cut and of the fine-tuning's first learning rate.
options.epochs, options.method_lr: of the methods' schedules.
options.jacobian: images of which the mean singular value of the Jacobian is; 0 or missing for none.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

import orthoreg_ext as ox
from experiments.config import Config, check_options, checked
from experiments.lab import Lab, check_cut
from experiments.runner import Unit, Values
from experiments.training import Fit, fit, steps_an_epoch
from orthoreg_ext import pruning
from orthoreg_ext.errors import choose
from orthoreg_ext.layers import filter_layers
from orthoreg_ext.pruning.methods.method import Method

Make = Callable[..., Method]
HOLD = 1 / 11  # of the schedule: 10 000 of 110 000 steps in TPP's and GReg's released code
PARTS = 10  # of these steps at least: after each TPP sets one more layer to zero


def _greg1(net: nn.Module, example: Any, *, steps: int, **arguments: Any) -> Method:
    hold = _hold(steps, 1)
    delta = 1.0 / (steps - hold)
    return pruning.GReg1(net, example, delta=delta, every=1, hold=hold, **arguments)


def _tpp(net: nn.Module, example: Any, *, steps: int, **arguments: Any) -> Method:
    layers = len(filter_layers(net))
    hold = _hold(steps, layers)
    arguments |= {"every": 1, "hold": hold, "zero_every": max(1, hold // max(PARTS, layers + 1))}
    return pruning.TPP(net, example, delta=1.0 / (steps - hold), **arguments)


def _hold(steps: int, least: int) -> int:
    """The steps at the end of a schedule, when it is at its ceiling."""
    hold = round(steps * HOLD)
    if hold < least:
        raise ValueError(
            f"options.epochs makes {steps} steps, of which the last {hold} are at the ceiling: "
            f"expected {least} of them at least, {round(least / HOLD)} steps in all"
        )
    return hold


SCHEDULED: Mapping[str, Make] = {"greg1": _greg1, "tpp": _tpp}
AT_ONCE: Mapping[str, Callable[[nn.Module], object]] = {
    "l1": lambda net: None,
    "l1, orthp": pruning.orthogonalise,
}
SHORT = ", short"
METHODS = (*AT_ONCE, *SCHEDULED, *(name + SHORT for name in AT_ONCE))


def stages(config: Config) -> Sequence[Sequence[Unit]]:
    """Networks, what the schedules make of them, then the fine-tuning."""
    options = config.options
    lists = {"methods": list, "ratio": list, "lr": list}
    check_options(config, {**lists, "epochs": int, "method_lr": float}, {"jacobian": int})
    for lr in options["lr"]:
        checked("options.lr", lr, float)
    for method, ratio in itertools.product(options["methods"], options["ratio"]):
        choose("method", method, METHODS)
        check_cut({"criterion": "l1", "ratio": ratio}, "options")
    nets = config.networks
    cuts = [
        {**net, "method": method, "ratio": ratio}
        for net in nets
        for method, ratio in itertools.product(options["methods"], options["ratio"])
    ]
    tuned = [{**cut, "lr": lr} for cut in cuts for lr in options["lr"]]
    return nets, [cut for cut in cuts if cut["method"] in SCHEDULED], tuned


def measure(lab: Lab, unit: Unit) -> Values:
    """A trained network, one that a schedule has cut, or a fine-tuned one."""
    net = lab.trained(unit["model"], unit["arm"], unit["seed"])
    if "method" not in unit:
        return {"accuracy": lab.accuracy(net), **_jacobian(lab, net)}
    cut_by(lab, net, unit)
    found = {"cut": lab.accuracy(net), **_jacobian(lab, net)}
    if "lr" not in unit:
        return found
    options, method = lab.config.options, unit["method"]
    how = replace(lab.second(unit["seed"]), lr=unit["lr"])
    if method in AT_ONCE:
        how = replace(how, epochs=how.epochs + options["epochs"])
    lab.finetuned(net, unit, how)
    return {**found, "finetuned": lab.accuracy(net)}


def cut_by(lab: Lab, net: nn.Module, unit: Unit) -> None:
    """Removes the same share of every layer, by the unit's method; of a schedule once."""
    options, ratio, seed = lab.config.options, unit["ratio"], unit["seed"]
    name = unit["method"].removesuffix(SHORT)
    if name in AT_ONCE:
        lab.prune(net, "l1", ratio, scope="local")
        AT_ONCE[name](net)
        return
    recipe, epochs = lab.config.recipe, options["epochs"]
    how = Fit(
        epochs,
        options["method_lr"],
        seed + 250_000,
        recipe.batch_size,
        recipe.weight_decay,
        recipe.flip,
        constant=True,
    )
    steps = epochs * steps_an_epoch(lab.train, recipe.batch_size)
    cap = recipe.max_layer_ratio  # as Lab.prune has it
    make = partial(SCHEDULED[name], net, lab.example, ratio=ratio, max_layer_ratio=cap, steps=steps)
    key = {key: unit[key] for key in ("model", "arm", "seed", "method", "ratio")}
    store = lab.store("cut", **key)
    fit(net, lab.train, how, method=lambda optimizer: make(optimizer=optimizer), store=store)


def _jacobian(lab: Lab, net: nn.Module) -> dict[str, float]:
    """The mean singular value of d outputs / d input, and the mean of (value - 1)^2."""
    count = lab.config.options.get("jacobian", 0)
    if not count:
        return {}
    with torch.random.fork_rng(devices=[]):
        found = ox.diagnose(net, lab.calibration(count), samples=1, jacobian_samples=count).spectrum
    assert found is not None
    return {"jsv": found.mean, "jsv_distance": found.distance}
