"""Documents as the runner writes them, with numbers that can be checked by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from experiments.config import Config
from experiments.report.results import Row

MACHINE = {"name": "Some CPU", "slug": "some-cpu", "device": "cpu", "threads": 1, "torch": "2.13"}
GONE = {"filters": 0.5, "params": 0.7, "macs": 0.75}


def result(
    question: str,
    units: Sequence[tuple[dict[str, Any], dict[str, Any]]],
    *,
    seeds: int = 2,
    planned: int | None = None,
    **config: Any,
) -> dict[str, Any]:
    """A document as the runner writes it."""
    whole = {"name": f"{question}-x", "title": "?", "question": question, **config}
    return {
        "config": Config.of({**whole, "seeds": list(range(seeds))}).document(),
        "machine": MACHINE,
        "data": "01234567",
        "planned": len(units) if planned is None else planned,
        "seconds": 7200.0,
        "units": [{"unit": u, "values": v, "seconds": 1.0} for u, v in units],
    }


def cut_unit(
    arm: str, criterion: str, ratio: float, seed: int, tuned: float, cut: float = 10.0, **more: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
    where = {"scope": "local", "criterion": criterion, "ratio": ratio, **more}
    unit = {"model": "vgg", "arm": arm, "seed": seed, "cut": where}
    values = {"cut": cut, "finetuned": tuned, "saved": GONE, "rare_kept": tuned / 100}
    return unit, values


def net_unit(
    arm: str, seed: int, correlation: float, error: float
) -> tuple[dict[str, Any], dict[str, Any]]:
    layers = {
        "conv1": {
            "correlation": correlation,
            "gap": 0.75,
            "floor": 0.5,
            "ratio": 2,
            "error": error,
        },
        "conv2": {"correlation": 3 * correlation, "gap": 0.5, "floor": 0.5, "ratio": 4, "error": 0},
    }
    return {"model": "vgg", "arm": arm, "seed": seed}, {"accuracy": 98.0 + seed, "layers": layers}


TUNED = {  # (arm, criterion, ratio) -> one accuracy a seed
    ("none", "l1", 0.5): (90.0, 92.0),
    ("none", "fisher", 0.5): (93.0, 93.0),
    ("none", "l1", 0.75): (80.0, 80.0),
    ("none", "fisher", 0.75): (85.0, 79.0),
    ("so", "l1", 0.5): (91.0, 94.0),
    ("so", "fisher", 0.5): (92.0, 95.0),
    ("so", "l1", 0.75): (70.0, 90.0),
    ("so", "fisher", 0.75): (75.0, 85.0),
}


def cross() -> dict[str, Any]:
    nets = [net_unit(arm, s, 0.1 * (s + 1), 0.4) for s in (0, 1) for arm in ("none", "so")]
    cuts = [
        cut_unit(*key, seed, tuned[seed], cut=tuned[seed] - 50)
        for seed in (0, 1)
        for key, tuned in TUNED.items()
    ]
    return result("cross", [*nets, *cuts], arms={"none": {}, "so": {"penalty": "so"}})


def early() -> dict[str, Any]:
    base = {"model": "vgg", "criterion": "l1", "ratio": 0.5}
    tuned = {("none", 0.05): 80, ("none", 1.0): 90, ("so", 0.05): 85, ("so", 1.0): 91}
    units = [
        (
            {**base, "arm": arm, "seed": seed, "at": at},
            {"cut": 20, "finetuned": x + seed, "epochs": {0.05: 1, 1.0: 8}[at]},
        )
        for (arm, at), x in tuned.items()
        for seed in (0, 1)
    ]
    masks = [
        (
            {"model": "vgg", "arm": "none", "seed": seed, "masks": "bn_scale"},
            {"distance": [None, 0.5 - 0.1 * seed, 0.25], "to_last": [0.75, 0.25, 0.0]},
        )
        for seed in (0, 1)
    ]
    return result("early", [*masks, *units], arms={"none": {}, "so": {"penalty": "so"}})


def trainability() -> dict[str, Any]:
    net = {"model": "mlp", "arm": "none", "seed": 0}
    units = [(net, {"accuracy": 95.0, "jsv": 2.0, "jsv_distance": 4.0})]
    for method, jsv, tuned in (("l1", 0.5, 80), ("tpp", 0.75, 84)):
        cut = {**net, "method": method, "ratio": 0.5}
        about = {"cut": 30.0, "jsv": jsv, "jsv_distance": 1.0}
        units.append((cut, about))  # what a schedule leaves, before any learning rate
        units += [
            ({**cut, "lr": lr}, {**about, "finetuned": tuned + 100 * lr}) for lr in (0.01, 0.001)
        ]
    return result("trainability", units, seeds=1)


def rows(*found: tuple[dict[str, Any], int, dict[str, Any]]) -> list[Row]:
    return [Row(keys, seed, values) for keys, seed, values in found]
