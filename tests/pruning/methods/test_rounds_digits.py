"""Each method on scikit-learn's digits, to the end: half of the filters go, the accuracy stays."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from orthoreg_ext.pruning.methods import (
    FPGM,
    EarlyBird,
    EPruner,
    GroupFisher,
    OrthoReg,
    RePr,
)
from orthoreg_ext.pruning.methods.method import Method

from .driving import assert_consistent, hooks_of

datasets = pytest.importorskip("sklearn.datasets")

SEED = 0
RATE = 0.05


@dataclass
class Digits:
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    model: nn.Module  # trained for a few epochs
    accuracy: float  # of a net that is trained to the end and not pruned


def build() -> nn.Sequential:
    layers: list[nn.Module] = []
    for i, (inputs, outputs) in enumerate([(1, 16), (16, 32), (32, 32)]):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs)]
        layers += [nn.ReLU()] + [nn.MaxPool2d(2)] * (i == 1)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), RATE, momentum=0.9, weight_decay=1e-4)


def run_epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: tuple[Tensor, Tensor],
    number: int,
    method: Method | None = None,
) -> None:
    model.train()
    order = torch.randperm(len(data[0]), generator=torch.Generator().manual_seed(number))
    for part in order.split(64):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(data[0][part]), data[1][part]).backward()
        if method is not None:
            method.before_step()
        optimizer.step()
        if method is not None:
            method.after_step()
    if method is not None:
        method.after_epoch()


def retrain(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: tuple[Tensor, Tensor],
    epochs: int,
) -> None:
    for group in optimizer.param_groups:
        group["lr"] = RATE
    for number in range(epochs):
        if number == epochs - 2:
            for group in optimizer.param_groups:
                group["lr"] = RATE / 10
        run_epoch(model, optimizer, data, 1000 + number)


@torch.no_grad()
def accuracy(model: nn.Module, data: tuple[Tensor, Tensor]) -> float:
    model.eval()
    return float((model(data[0]).argmax(1) == data[1]).float().mean())


@pytest.fixture(scope="module")
def digits() -> Digits:
    found = datasets.load_digits()
    order = torch.randperm(len(found.images), generator=torch.Generator().manual_seed(SEED))
    images = torch.tensor(found.images, dtype=torch.float32).unsqueeze(1)[order] / 16
    targets = torch.tensor(found.target)[order]
    train, test = (images[:1300], targets[:1300]), (images[1300:], targets[1300:])
    torch.manual_seed(SEED)
    model = build()
    optimizer = sgd(model)
    for number in range(6):
        run_epoch(model, optimizer, train, number)
    plain = copy.deepcopy(model)
    retrain(plain, sgd(plain), train, 4)
    return Digits(train, test, model, accuracy(plain, test))


Make = Callable[[nn.Module, torch.optim.Optimizer, Digits], Method]

METHODS: dict[str, tuple[Make, int]] = {  # and the epochs of retraining after its end
    "OrthoReg": (
        lambda m, o, d: OrthoReg(
            m,
            d.test[0][:1],
            optimizer=o,
            data=[d.train],
            rounds=2,
            ortho_epochs=1,
            retrain_epochs=1,
        ),
        3,
    ),
    "EarlyBird": (
        lambda m, o, d: EarlyBird(
            m, d.test[0][:1], optimizer=o, strength=1e-3, window=3, max_layer_ratio=0.6
        ),
        4,
    ),
    "EPruner": (
        lambda m, o, d: EPruner(m, d.test[0][:1], optimizer=o, beta=0.75),
        5,
    ),
    "GroupFisher": (lambda m, o, d: GroupFisher(m, d.test[0][:1], optimizer=o, every=2), 4),
    "FPGM": (lambda m, o, d: FPGM(m, d.test[0][:1], optimizer=o, duration=4), 3),
    "RePr": (
        lambda m, o, d: RePr(
            m,
            d.test[0][:1],
            optimizer=o,
            ratio=0.5,
            scope="local",
            whole_epochs=1,
            dropped_epochs=1,
            rounds=2,
            zero_inputs=True,
        ),
        6,
    ),
}


@pytest.mark.parametrize("name", METHODS)
def test_half_of_the_filters_go_and_the_accuracy_stays(name: str, digits: Digits) -> None:
    make, epochs = METHODS[name]
    model = copy.deepcopy(digits.model)
    optimizer = sgd(model)
    method = make(model, optimizer, digits)
    for number in range(12):
        if method.done:
            break
        run_epoch(model, optimizer, digits.train, 100 + number, method)
    assert method.done
    result = method.finish()
    assert result.settings["method"] == name
    gone = sum(len(entry["removed"]) for entry in result.history)
    assert gone == 40 if name != "EPruner" else 36 <= gone <= 48  # of 80
    assert hooks_of(model, optimizer) == 0
    retrain(model, optimizer, digits.train, epochs)
    assert_consistent(model, optimizer)
    dead = [m for m in model if isinstance(m, nn.Conv2d) and not m.weight.flatten(1).any(1).all()]
    assert not dead
    assert accuracy(model, digits.test) >= digits.accuracy - 0.02
