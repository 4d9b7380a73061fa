from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from experiments.config import Config
from experiments.lab import Lab
from experiments.questions import duplicates
from orthoreg_ext.experiment.models import vgg


def worn(widths: Any = (8, "pool", 12, 6)) -> nn.Sequential:
    """A network whose BatchNorms have seen images, and have scales and shifts of their own."""
    torch.manual_seed(0)
    net = vgg(10, 1, widths)
    for module in net:
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 0.1
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    net(torch.randn(32, 1, 8, 8))
    return net.eval()


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
def test_the_wider_network_computes_the_same(share: float) -> None:
    net, images = worn(), torch.randn(16, 1, 8, 8)
    expected, before = net(images), {k: v.clone() for k, v in net.state_dict().items()}
    wide, copies = duplicates.widened(net, share, 0.0, 3)
    torch.testing.assert_close(wide.eval()(images), expected, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    for name, width in (("conv1", 8), ("conv2", 12), ("conv3", 6)):
        number = round(share * width)
        weight = wide.get_submodule(name).get_parameter("weight")
        assert (len(weight), len(copies[name])) == (width + number, number)
        assert copies[name] == sorted(set(copies[name]))
        assert torch.equal(weight[width:], weight[copies[name]])
    layers = [module for module in wide if isinstance(module, nn.Conv2d)]
    assert [m.in_channels for m in layers[1:]] == [m.out_channels for m in layers[:-1]]
    assert all(m.weight.shape[:2] == (m.out_channels, m.in_channels) for m in layers)


def test_noise_is_on_the_copies_alone_and_as_large_as_it_says() -> None:
    net = worn((64, 64))
    wide, copies = duplicates.widened(net, 1.0, 0.1, 0)
    for name in ("conv1", "conv2"):
        weight = wide.get_submodule(name).get_parameter("weight").detach()
        originals, rest = weight[:64], weight[64:]
        assert copies[name] == list(range(64))
        spread = (rest - originals).std() / originals.std()
        assert float(spread) == pytest.approx(0.1, rel=0.1)
    first = wide.get_submodule("conv1").get_parameter("weight")[:64]
    assert torch.equal(first, net.get_submodule("conv1").get_parameter("weight"))


def test_the_copies_are_those_of_the_seed() -> None:
    found = [duplicates.widened(worn(), 0.5, 0.1, seed) for seed in (0, 0, 1)]
    assert found[0][1] == found[1][1]
    assert found[0][1] != found[2][1]
    one, other = (wide.state_dict() for wide, _ in found[:2])
    assert all(torch.equal(value, other[key]) for key, value in one.items())


COPIES = {"a": [0, 2], "b": [1]}  # a: 4 filters, 4 is that of 0 and 5 of 2; b: 2, 2 is that of 1
WIDTHS = {"a": 6, "b": 3}


@pytest.mark.parametrize(
    ("gone", "whole", "lost"),
    [
        ({}, 3, 0),
        ({"a": {0, 5}, "b": {2}}, 0, 0),  # one of each pair
        ({"a": {0, 4}}, 2, 1),  # both of one
        ({"a": {1, 3}, "b": {0}}, 3, 3),  # all that are there once
        ({"a": {1, 2}, "b": {1, 2}}, 1, 2),
    ],
)
def test_what_a_cut_found_and_lost(gone: dict[str, set[int]], whole: int, lost: int) -> None:
    assert duplicates.counted(COPIES, gone, WIDTHS) == (3, whole, pytest.approx(lost / 6))


def test_as_many_are_cut_as_were_planted(
    tiny: Callable[..., Config], lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    names, seen = ["variety(l1)", "l1"], []
    options = {"criterion": names, "share": 0.5, "noise": 0.05}
    document = {**tiny().document(), "question": "duplicates", "options": options}
    object.__setattr__(lab, "config", Config.of(document))
    nets, cuts = duplicates.stages(lab.config)
    assert [unit["criterion"] for unit in cuts] == names * 2
    assert duplicates.measure(lab, nets[0]).keys() == {"accuracy", "wide"}
    do = lab.prune

    def prune(*args: Any, **options: Any) -> Any:
        seen.append(do(*args, **options))
        return seen[-1]

    monkeypatch.setattr(lab, "prune", prune)
    values = duplicates.measure(lab, cuts[0])
    assert values.keys() == {"found", "lost", "cut", "finetuned"}
    assert (values["found"], values["lost"]) == (1.0, 0.0)
    rows = {row.name: (row.before, row.after) for row in seen[0].layers}
    assert (rows["conv1"], rows["conv2"]) == ((12, 8), (18, 12))


@pytest.mark.parametrize(
    "layer",
    [nn.Conv2d(2, 4, 1), nn.Conv2d(2, 4, 1, groups=2, bias=False), nn.BatchNorm1d(3), nn.GRU(2, 2)],
)
def test_a_network_that_cannot_be_widened_is_refused(layer: nn.Module) -> None:
    with pytest.raises(ValueError, match=rf"layer '0' is {type(layer).__name__}, .* such as vgg"):
        duplicates.widened(nn.Sequential(layer, nn.Linear(4, 2)), 0.5, 0.1, 0)
