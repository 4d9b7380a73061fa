"""Train every arm, cut every network in every way, fine-tune; all with the same budget.

options.cuts: tables of lists of arguments of ``Lab.prune``; every combination in a table is a cut.
options.samples: images of which the additivity gap is; 0 or missing for none.
options.ablate: images on which filters are silenced in groups; 0 or missing for none.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

import orthoreg_ext as ox
from experiments.ablation import group_errors
from experiments.config import Config, check_options, checked
from experiments.lab import Lab, check_cut, saved
from experiments.runner import Unit, Values
from orthoreg_ext import functional as F
from orthoreg_ext.experiment.measure import correlation_by_layer
from orthoreg_ext.layers import filter_layers


def stages(config: Config) -> Sequence[Sequence[Unit]]:
    """Networks first, then their cuts; all of a seed before the next one."""
    check_options(config, {"cuts": list}, {"samples": int, "ablate": int})
    cuts = [cut for grid in config.options["cuts"] for cut in _cuts(grid)]
    nets = config.networks
    return nets, [{**net, "cut": cut} for net in nets for cut in cuts]


def _cuts(grid: object) -> list[dict[str, Any]]:
    """Every combination of the lists of a table."""
    table = checked("options.cuts", grid, Mapping)
    lists = [checked(f"options.cuts.{key}", values, list) for key, values in table.items()]
    if [] in lists:  # it would be a table of no cut
        raise ValueError(
            f"options.cuts: an empty list in {dict(table)}, expected one value at least"
        )
    cuts = [dict(zip(table, way, strict=True)) for way in itertools.product(*lists)]
    for cut in cuts:
        check_cut(cut, "options.cuts")
    return cuts


def measure(lab: Lab, unit: Unit) -> Values:
    """A trained network, or what is left of it after a cut."""
    net = lab.trained(unit["model"], unit["arm"], unit["seed"])
    if "cut" not in unit:
        return {"accuracy": lab.accuracy(net), "layers": _layers(lab, net, unit["seed"])}
    rarity = rarities(net)
    result = lab.prune(net, **unit["cut"])
    cut = lab.accuracy(net)
    kept = rare_kept(rarity, result)
    lab.finetuned(net, unit)
    return {"cut": cut, "finetuned": lab.accuracy(net), "saved": saved(result), "rare_kept": kept}


def _layers(lab: Lab, net: nn.Module, seed: int) -> dict[str, dict[str, float]]:
    """Of every layer: how correlated its filters are, and whether their importances add up."""
    found = {name: {"correlation": value} for name, value in correlation_by_layer(net).items()}
    options = lab.config.options
    if count := options.get("samples", 0):
        for row in ox.diagnose(net, lab.calibration(count), samples=count, jacobian_samples=0):
            if row.additivity is not None and row.name in found:
                parts = ("gap", "floor", "ratio")
                found[row.name].update({part: getattr(row.additivity, part) for part in parts})
    if count := options.get("ablate", 0):
        norms = group_errors(net, lab.some(count), seed)
        for name, groups in zip(_in_front(net), norms.values(), strict=True):
            if name in found:
                found[name]["error"] = groups.error
    return found


def _in_front(net: nn.Module) -> list[str]:
    """The convolution that is registered in front of each BatchNorm."""
    names, last = [], ""
    for name, module in net.named_modules():
        if isinstance(module, nn.Conv2d):
            last = name
        elif isinstance(module, nn.BatchNorm2d):
            names.append(last)
    return names


def rarities(net: nn.Module) -> dict[str, list[float]]:
    """Of every filter of every convolution: 1 less its largest |cosine| to another one."""
    layers = [layer for layer in filter_layers(net) if layer.kind == "conv"]
    matrices = F.filter_correlation([layer.weight.detach() for layer in layers])
    return {
        layer.name: (1 - matrix.abs().fill_diagonal_(0).amax(1)).tolist()
        for layer, matrix in zip(layers, matrices, strict=True)
    }


def rare_kept(rarity: dict[str, list[float]], result: ox.pruning.PruneResult) -> float:
    """The share that is left of the rarest quarter of the filters of each layer that was cut."""
    gone = defaultdict[str, set[int]](set)
    for entry in result.history:  # one a round and layer
        gone[entry["layer"]].update(entry["removed"])
    kept, total = 0, 0
    for layer, removed in gone.items():
        values = rarity.get(layer, [])
        order = sorted(range(len(values)), key=values.__getitem__, reverse=True)
        rare = set(order[: len(values) // 4])
        kept, total = kept + len(rare - removed), total + len(rare)
    return kept / total if total else 1.0
