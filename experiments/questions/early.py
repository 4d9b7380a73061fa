"""How early can one prune? Cut after a share of the training; the budget in epochs is the same.

Until the cut the learning rate stays where it begins, from the cut to the end it falls by half a
cosine. Only a cut after all of the first training finds a network that was trained to the end, and
is fine-tuned with the recipe's own rate. A regulariser is on until the cut.

options.at: shares of the first training after which to cut.
options.criterion, options.ratio: lists; every combination is cut.
options.masks: criteria of which the mask is drawn after every epoch of a training that is as long
    as the first one but keeps its learning rate, by the first ratio; its distances to the masks
    before are those of EarlyBird, without that method's penalty on the scales.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from experiments.config import Config, check_options, checked
from experiments.lab import Lab, check_cut, saved
from experiments.runner import Unit, Values
from experiments.training import Fit, fit

WINDOW = 5  # masks that are compared, as in EarlyBird's released code
Mask = frozenset[tuple[str, int]]


def stages(config: Config) -> Sequence[Sequence[Unit]]:
    """The cuts, and the trainings that are watched; every unit trains its own network."""
    options = config.options
    check_options(config, {"at": list, "criterion": list, "ratio": list, "masks": list})
    for at in options["at"]:
        if not 0 < checked("options.at", at, float) <= 1:
            raise ValueError(f"options.at is {at!r}, expected shares in (0, 1]")
    if options["masks"] and not options["ratio"]:
        raise ValueError("options.ratio is [], expected a ratio for the masks of options.masks")
    if config.recipe.epochs < 1:
        raise ValueError("recipe.epochs is 0, expected one at least: a cut comes after a share")
    names = [*options["criterion"], *options["masks"]]
    for criterion, ratio in itertools.product(names, options["ratio"]):
        check_cut({"criterion": criterion, "ratio": ratio}, "options")
    nets = config.networks
    ways = list(itertools.product(options["at"], options["criterion"], options["ratio"]))
    cuts = [
        {**net, "at": at, "criterion": criterion, "ratio": ratio}
        for net in nets
        for at, criterion, ratio in ways
    ]
    return [{**net, "masks": name} for net in nets for name in options["masks"]], cuts


def measure(lab: Lab, unit: Unit) -> Values:
    """One cut, or the masks of one training."""
    if "masks" in unit:
        return _watched(lab, unit)
    recipe, arm = lab.config.recipe, lab.config.arms[unit["arm"]]
    net, whole = lab.fresh(unit["model"], unit["seed"]), lab.first(unit["seed"], arm)
    before = max(1, round(unit["at"] * recipe.epochs))
    late = before == recipe.epochs
    first = whole if late else replace(whole, epochs=before, constant=True)
    fit(net, lab.train, first, regularizer=lab.regularizer(net, arm))
    dense = lab.accuracy(net)
    result = lab.prune(net, unit["criterion"], unit["ratio"])
    cut = lab.accuracy(net)
    rest = replace(
        lab.second(unit["seed"]),
        epochs=recipe.epochs + recipe.finetune_epochs - before,
        lr=recipe.finetune_lr if late else recipe.lr,
    )
    lab.finetuned(net, unit, rest)
    found = {"epochs": before, "dense": dense, "cut": cut, "finetuned": lab.accuracy(net)}
    return {**found, "saved": saved(result)}


def _watched(lab: Lab, unit: Unit) -> Values:
    """The largest distance of every epoch's mask to those in its window, and to the last one."""
    arm, masks = lab.config.arms[unit["arm"]], list[Mask]()
    net = lab.fresh(unit["model"], unit["seed"])
    ratio = lab.config.options["ratio"][0]
    how: Fit = replace(lab.first(unit["seed"], arm), constant=True)

    def draw(epoch: int) -> None:
        masks.append(_mask(lab, net, unit["masks"], ratio))

    fit(net, lab.train, how, regularizer=lab.regularizer(net, arm), note=draw)
    total = len(masks[-1]) / ratio
    windows = [masks[max(0, i + 1 - WINDOW) : i] for i in range(len(masks))]
    return {
        "distance": [
            max((len(mask ^ old) / total for old in window), default=None)
            for mask, window in zip(masks, windows, strict=True)
        ],
        "to_last": [len(mask ^ masks[-1]) / total for mask in masks],
    }


def _mask(lab: Lab, net: nn.Module, criterion: str, ratio: float) -> Mask:
    """The filters that would go now."""
    planned = lab.prune(net, criterion, ratio, dry_run=True)
    return frozenset((e["layer"], i) for e in planned.history for i in e["removed"])
