"""Copies and pickles of a regulariser, alone and together with its model and optimizer."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

import orthoreg_ext as ox
from orthoreg_ext.schedules import Cosine
from tests.machinery import net as model


def by_pickle(objects):
    return pickle.loads(pickle.dumps(objects))


WAYS = [copy.deepcopy, by_pickle]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["orthoreg", "srip"])
def test_a_copy_has_a_model_steps_and_vectors_of_its_own(way, name: str) -> None:
    net = model.make()
    net.fc = torch.nn.Linear(6, 5)  # torch pickles no parametrized module
    reg = ox.OrthoRegularizer(net, name, 1.0, schedule=Cosine(10, 0.5, 1.0))
    reg(), reg()
    other = way(reg)
    assert other.model is not net
    assert other.step == 2
    torch.testing.assert_close(other(), reg())
    with torch.no_grad():
        net.conv.weight.zero_()
    assert not torch.equal(other(), reg())
    other().backward()
    assert net.conv.weight.grad is None
    assert other.model.conv.weight.grad is not None


@pytest.mark.parametrize("way", WAYS)
def test_copied_together_they_belong_together_and_are_attached_anew(way) -> None:
    net = model.make()
    net.fc = torch.nn.Linear(6, 5)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    reg = ox.OrthoRegularizer(net, "so", 1.0)
    reg.attach(optimizer)
    optimizer.step()
    want = model.grads(net)
    net.zero_grad()
    net, optimizer, reg = way((net, optimizer, reg))
    assert reg.model is net
    reg.attach(optimizer)  # a copy is attached to nothing
    optimizer.step()
    torch.testing.assert_close(model.grads(net), want)


def test_a_schedule_that_cannot_be_pickled_is_named_by_python() -> None:
    reg = ox.OrthoRegularizer(torch.nn.Linear(3, 3), schedule=lambda step: 1.0)
    with pytest.raises((pickle.PicklingError, AttributeError), match="lambda"):
        pickle.dumps(reg)
    torch.testing.assert_close(copy.deepcopy(reg)(), reg())
