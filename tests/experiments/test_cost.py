from __future__ import annotations

from typing import Any

import pytest
import torch

from experiments.config import Config
from experiments.lab import Lab
from experiments.questions import cost
from orthoreg_ext.experiment.models import build_model


def stepped(way: str) -> dict[str, torch.Tensor]:
    """The weights after two steps in one of the ways, at a strength that can be seen."""
    net = build_model("tests.experiments.nets:tiny", num_classes=10, image_shape=(1, 8, 8), seed=0)
    torch.manual_seed(0)
    images, labels = torch.randn(8, 1, 8, 8), torch.arange(8)
    step = cost._step(net.train(), images, labels, cost.WAYS[way])
    step()
    step()
    return net.state_dict()


def test_all_ways_take_the_same_step_but_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "STRENGTH", 1.0)
    monkeypatch.setattr(cost, "RATE", 1e-2)
    found = {way: stepped(way) for way in cost.WAYS}
    plain, ours = found.pop(cost.WITHOUT), found["loss + reg()"]
    assert len(found) == 3
    for weights in found.values():
        for key, value in weights.items():
            torch.testing.assert_close(value, ours[key], rtol=1e-4, atol=1e-6)
    moved = {key for key, value in plain.items() if not torch.allclose(value, ours[key], atol=1e-4)}
    assert {"conv1.weight", "conv2.weight"} <= moved


def test_alone_they_compute_the_same_gradient() -> None:
    found = []
    for make in cost.ALONE.values():
        shape = {"num_classes": 10, "image_shape": (1, 8, 8), "seed": 0}
        net = build_model("tests.experiments.nets:tiny", **shape)  # type: ignore[arg-type]
        make(net)()
        found.append({name: p.grad for name, p in net.named_parameters()})
    ours, eager = found
    assert ours["conv1.weight"] is not None
    assert ours["conv1.weight"].abs().max() > 0
    for name, grad in eager.items():
        if grad is not None:
            torch.testing.assert_close(grad, ours[name], rtol=1e-4, atol=1e-9)


def test_a_network_is_measured_in_all_ways(tiny: Any, lab: Lab) -> None:
    options = {"batch_size": 4, "budget": 0.05}
    document = {**tiny().document(), "question": "cost", "options": options}
    object.__setattr__(lab, "config", Config.of(document))
    ((unit, *_),) = cost.stages(lab.config)
    found = cost.measure(lab, unit)
    assert found["ms"].keys() == found["ratio"].keys() == {*cost.WAYS, *cost.ALONE}
    assert found["ratio"][cost.WITHOUT]["median"] == 1
    assert all(entry["median"] > 0 for entry in found["ms"].values())
