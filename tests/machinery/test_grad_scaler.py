"""Loss scaling: the term has its own size in every kind of optimizer, and skipped steps skip it."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.amp import GradScaler

import orthoreg_ext as ox
from tests.machinery import net as model

KINDS = {
    "fused": {"fused": True},
    "foreach": {"foreach": True},
    "plain": {"fused": False, "foreach": False},
}


def trained(kind: str, optimizer_class, route: str, *, scaled: bool, clipped: bool):
    net = model.make()
    reg = ox.OrthoRegularizer(net, "so", 1.0)
    optimizer = optimizer_class(net.parameters(), lr=0.1, **KINDS[kind])
    if route == "attached":
        reg.attach(optimizer)
    scaler = GradScaler("cpu", init_scale=1024.0, growth_interval=1, enabled=scaled)
    for step in range(3):  # the scale doubles after each
        optimizer.zero_grad()
        loss = model.task(net, model.batch(seed=step))
        scaler.scale(loss + reg() if route == "added" else loss).backward()
        if clipped:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(net.parameters(), 0.5)
        scaler.step(optimizer)
        scaler.update()
    return model.parameters(net)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("optimizer_class", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("route", ["added", "attached"])
@pytest.mark.parametrize("clipped", [False, True])
def test_scaled_training_is_plain_training(kind, optimizer_class, route, clipped: bool) -> None:
    got = trained(kind, optimizer_class, route, scaled=True, clipped=clipped)
    want = trained(kind, optimizer_class, route, scaled=False, clipped=clipped)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_that_overflowed_changes_nothing(kind: str) -> None:
    net = model.make()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, **KINDS[kind])
    reg = ox.OrthoRegularizer(net, "so", 1.0)
    attached = reg.attach(optimizer)
    before = model.parameters(net)
    scaler = GradScaler("cpu", init_scale=1024.0)
    scaler.scale(model.task(net, model.batch()) * torch.inf).backward()
    scaler.step(optimizer)
    scaler.update()
    torch.testing.assert_close(model.parameters(net), before, rtol=0, atol=0)
    assert scaler.get_scale() == 512
    # a fused optimizer finds the overflow by itself, on the device, when the step has begun
    assert attached.step == (1 if kind == "fused" else 0)
