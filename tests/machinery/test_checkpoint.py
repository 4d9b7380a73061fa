"""Activation checkpointing runs functions twice; the term and its steps are as if it did not."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import orthoreg_ext as ox
from tests.machinery import net as model


def trained(where: str, name: str, reentrant: bool):
    """Three steps with a schedule and every second call left out."""
    net = model.make()
    reg = ox.OrthoRegularizer(net, name, 1.0, every=2, schedule=lambda step: 1.0 + step)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    losses = []
    for step in range(4):
        optimizer.zero_grad()
        x = model.batch(seed=step).requires_grad_()  # reentrant checkpoints ask for it
        if where == "inside":
            loss = checkpoint(lambda x: model.task(net, x) + reg(), x, use_reentrant=reentrant)
        elif where == "outside":
            loss = checkpoint(lambda x: model.task(net, x), x, use_reentrant=reentrant) + reg()
        else:
            loss = model.task(net, x) + reg()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses), model.parameters(net), reg.step


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("where", ["inside", "outside"])
@pytest.mark.parametrize("name", ["orthoreg", "mc"])
def test_checkpointed_training_is_plain_training(where: str, name: str, reentrant: bool) -> None:
    torch.testing.assert_close(trained(where, name, reentrant), trained("nowhere", name, reentrant))


@pytest.mark.parametrize("where", ["inside", "outside"])
def test_eigenvectors_of_a_checkpointed_term(where: str) -> None:
    """Recomputed, the vectors are one step nearer to the true ones than in the value."""
    got, want = trained(where, "srip", False), trained("nowhere", "srip", False)
    tolerance = 1e-3 if where == "inside" else 1e-6
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
