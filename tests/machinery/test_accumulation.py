"""Gradients of several batches: the added term counts once a call, the attached one once a step."""

from __future__ import annotations

import pytest
import torch

import orthoreg_ext as ox
from tests.machinery import net as model

PARTS = 4


@pytest.mark.parametrize("route", ["added to each part", "added once", "attached"])
def test_accumulated_parts_are_one_batch(route: str) -> None:
    net = model.make()
    reg = ox.OrthoRegularizer(net, "so", 1.0)
    x = model.batch(2 * PARTS)
    (model.task(net, x) + reg()).backward()
    want = model.grads(net)
    net.zero_grad()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    if route == "attached":
        reg.attach(optimizer)
    for i, part in enumerate(x.chunk(PARTS)):
        loss = model.task(net, part)
        if route == "added to each part":
            loss = loss + reg()
        loss = loss / PARTS
        if route == "added once" and i == 0:
            loss = loss + reg()
        loss.backward()
    optimizer.step()
    torch.testing.assert_close(model.grads(net), want, rtol=1e-5, atol=1e-6)
    assert reg.step == {"added to each part": 1 + PARTS, "added once": 2, "attached": 1}[route]
