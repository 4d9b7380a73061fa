"""Averaged copies of the weights (torch.optim.swa_utils) follow a regularised training."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import orthoreg_ext as ox
from tests.machinery import net as model


def test_the_average_is_that_of_the_weights_and_gets_no_term() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(32, 4))
    average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    reg = ox.OrthoRegularizer(net, "so", 1.0)
    reg.attach(optimizer)
    want = None
    for _ in range(3):
        optimizer.zero_grad()
        model.task(net, model.batch()).backward()
        optimizer.step()
        average.update_parameters(net)
        now = net[0].weight.detach().clone()
        want = now if want is None else (want + now) / 2
    torch.testing.assert_close(average.module[0].weight.detach(), want)
    assert average.module[0].weight.grad is None
    # it is a model like any other: measured, and not trained
    measured = ox.OrthoRegularizer(average, "so").report()
    assert [row.name for row in measured] == ["module.0"]
    assert measured[0].penalty < ox.OrthoRegularizer(nn.Conv2d(3, 8, 3), "so").report()[0].penalty
