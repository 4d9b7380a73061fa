"""Clipping: the added term is inside of it, the attached one outside."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import orthoreg_ext as ox
from tests.machinery import net as model

MOST = 0.01


def norm(grads: dict[str, Tensor]) -> float:
    return float(torch.stack([g.norm() for g in grads.values()]).norm())


def clipped(grads: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: g * (MOST / norm(grads)) for name, g in grads.items()}


def test_which_route_is_inside() -> None:
    net = model.make()
    reg = ox.OrthoRegularizer(net, "so", 1.0)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    x = model.batch()
    reg().backward()
    term = model.grads(net)
    net.zero_grad()
    model.task(net, x).backward()
    task = model.grads(net)
    both = {name: g + term.get(name, 0) for name, g in task.items()}
    assert norm(task) > 2 * MOST
    assert norm(both) > 2 * MOST

    net.zero_grad()
    (model.task(net, x) + reg()).backward()
    nn.utils.clip_grad_norm_(net.parameters(), MOST)
    torch.testing.assert_close(model.grads(net), clipped(both), rtol=1e-4, atol=1e-7)

    net.zero_grad()
    reg.attach(optimizer)
    model.task(net, x).backward()
    nn.utils.clip_grad_norm_(net.parameters(), MOST)
    optimizer.step()
    want = {name: g + term.get(name, 0) for name, g in clipped(task).items()}
    torch.testing.assert_close(model.grads(net), want, rtol=1e-4, atol=1e-7)
