from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from experiments.ablation import FILTERS, GROUP, Groups, group_errors
from orthoreg_ext.experiment.data import Samples


def samples(images: Tensor, labels: list[int]) -> Samples:  # uint8 [n, c, 1, 1]
    """The network reads the pixels as they are."""
    one = torch.full((1, 1, 1), 1 / 255)
    return Samples(images, torch.tensor(labels), 0 * one, one)


def network(width: int) -> nn.Sequential:
    """A channel a pixel, and logits (0, sum of the channels)."""
    norm = nn.BatchNorm2d(width, eps=0)
    head = nn.Linear(width, 2, bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.stack([torch.zeros(width), torch.ones(width)]))
    return nn.Sequential(norm, nn.Flatten(), head)


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def test_channels_of_different_images_add_up() -> None:
    """Image i has channel i only: without it, it loses what it loses without the group."""
    found = group_errors(network(4), samples(3 * torch.eye(4).byte()[:, :, None, None], [1] * 4), 0)
    (groups,) = found.values()
    lost = softplus(0) - softplus(-3)
    assert groups.together == pytest.approx([lost], rel=1e-5)  # the mean of 4 times that
    assert groups.summed == pytest.approx([lost], rel=1e-5)
    assert groups.error == pytest.approx(0, abs=1e-5)


def test_channels_of_one_image_do_not() -> None:
    """Logits (0, 4): each of four channels adds 1, and the loss is bent."""
    found = group_errors(network(4), samples(torch.ones(1, 4, 1, 1).byte(), [1]), 0)
    ((name, groups),) = found.items()
    together, summed = softplus(0) - softplus(-4), 4 * (softplus(-3) - softplus(-4))
    assert name == "0"
    assert groups.together == pytest.approx([together], rel=1e-4)
    assert groups.summed == pytest.approx([summed], rel=1e-4)
    assert groups.error == pytest.approx((together - summed) / (together + summed), rel=1e-4)


def test_an_error_is_weighted_by_what_is_lost() -> None:
    assert Groups([2.0, -1.0], [1.0, 1.0]).error == (1 + 2) / (3 + 2)
    assert Groups([0.0], [0.0]).error == 0
    assert Groups([], []).error == 0


@pytest.mark.parametrize(
    ("width", "sizes"), [(1, []), (4, [4]), (9, [8]), (10, [8, 2]), (40, [8, 8, 8, 8])]
)
def test_groups_do_not_overlap(width: int, sizes: list[int]) -> None:
    """Channel c alone moves image c, by an amount of its own: a sum tells which were in it."""
    assert (FILTERS, GROUP) == (32, 8)
    images = torch.diag(1 + torch.arange(width)).byte()[:, :, None, None]
    (groups,) = group_errors(network(width), samples(images, [1] * width), 1).values()
    assert len(groups.together) == len(sizes)
    losses = [(softplus(0) - softplus(-(1.0 + c))) / width for c in range(width)]
    largest = [sum(sorted(losses)[-size:]) for size in sizes]
    smallest = [sum(sorted(losses)[:size]) for size in sizes]
    for low, lost, high in zip(smallest, groups.together, largest, strict=True):
        assert low * 0.999 <= lost <= high * 1.001
    if width <= FILTERS and sizes and sum(sizes) == width:
        assert sum(groups.together) == pytest.approx(sum(losses), rel=1e-4)


def test_groups_are_those_of_the_seed() -> None:
    images = torch.diag(1 + torch.arange(20)).byte()[:, :, None, None]
    found = [
        group_errors(network(20), samples(images, [1] * 20), seed)["0"].together
        for seed in (0, 0, 1)
    ]
    assert found[0] == found[1]
    assert found[0] != found[2]


def test_nothing_of_the_network_is_changed() -> None:
    net = network(4).train()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    group_errors(net, samples(torch.ones(2, 4, 1, 1).byte(), [0, 1]), 0)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert not any(module._forward_hooks for module in net.modules())
