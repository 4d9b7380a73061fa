"""no_grad and inference_mode: evaluation leaves no trace, steps lose no gradient."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import orthoreg_ext as ox
import orthoreg_ext.functional as F
from orthoreg_ext.penalties import PENALTIES
from tests.machinery import net as model

MODES = [torch.no_grad, torch.inference_mode]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["orthoreg", "srip"])
def test_an_evaluation_counts_no_step_and_moves_no_eigenvector(mode, name: str) -> None:
    net = model.make()
    reg = ox.OrthoRegularizer(net, name, 1.0, every=2, schedule=lambda step: 1.0 + step)
    reg(), reg()  # steps 0 and 1
    before = reg.state_dict()
    with mode():
        value = reg()
    assert reg.step == before["step"] == 2
    for layer, vector in before.get("vectors", {}).items():
        assert torch.equal(reg.state_dict()["vectors"][layer], vector)
    assert value > 0
    torch.testing.assert_close(value, reg().detach())  # that of step 2
    assert reg.step == 3


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["so", "mc"])
def test_a_step_in_such_a_mode_adds_the_term_to_every_layer(mode, name: str) -> None:
    found = []
    for inside in (False, True):
        net = model.make()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
        ox.OrthoRegularizer(net, name, 1.0).attach(optimizer)
        with mode() if inside else torch.enable_grad():
            optimizer.step()
        found.append(model.grads(net))
        model.task(net, model.batch()).backward()  # gradients can be added to
    assert found[0].keys() == found[1].keys()
    assert len(found[0]) >= 6
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", PENALTIES)
@pytest.mark.parametrize("shared", [False, True])
def test_gradients_in_place_in_such_a_mode(mode, name: str, shared: bool) -> None:
    found = []
    for inside in (False, True):
        weight = nn.Parameter(torch.arange(20.0).view(4, 5).cos())
        weights = [weight, weight] if shared else [weight]
        marked = {}
        if PENALTIES[name].counts is not None:
            marked["pruned"] = [torch.tensor([1])] * len(weights)
        with mode() if inside else torch.enable_grad():
            F.add_gram_penalty_grad_(weights, name, strength=2.0, **marked)
        found.append(weight.grad.clone())
        F.gram_penalty([weight], "so").sum().backward()
    assert found[0].any()
    assert torch.equal(*found)


@pytest.mark.parametrize("name", ["orthoreg", "srip"])
def test_what_is_planned_in_inference_mode_can_be_trained(name: str) -> None:
    net = model.make()
    with torch.inference_mode():
        reg = ox.OrthoRegularizer(net, name, 1.0)
        reg()
    reg().backward()
    net.zero_grad()
    net.conv = nn.Conv2d(3, 7, 3, padding=1)  # pruned, then first seen by an evaluation
    with torch.inference_mode():
        reg()
    reg().backward()
    assert net.conv.weight.grad.any()
