"""Each method on real digits: half of the filters leave, and two points at most with them."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as f

from orthoreg_ext.pruning import (
    FPGM,
    TPP,
    EarlyBird,
    EPruner,
    GReg1,
    GReg2,
    GroupFisher,
    IncReg,
    OrthoReg,
    OrthP,
    RePr,
    Slimming,
    SoftFilter,
)
from orthoreg_ext.pruning.methods.method import Method

from .loops import check_optimizer, every_method, hooks_of

datasets = pytest.importorskip("sklearn.datasets", reason="the digits come with scikit-learn")

EPOCH = 20  # steps
METHODS: dict[str, Callable[..., Method]] = {  # made with (model, inputs, ratio=, optimizer=)
    "tpp": lambda *a, **k: TPP(
        *a, delta=0.02, every=2, hold=2 * EPOCH, zero_every=10, weight=100.0, **k
    ),
    "greg1": lambda *a, **k: GReg1(*a, delta=0.02, every=2, hold=EPOCH, **k),
    "greg2": lambda *a, **k: GReg2(
        *a, pick_delta=1e-3, pick_ceiling=2e-2, delta=0.02, every=2, hold=EPOCH, **k
    ),
    "increg": lambda *a, **k: IncReg(*a, delta=0.02, ceiling=1.0, **k),
    "sfp": lambda *a, **k: SoftFilter(*a, duration=5, **k),
    "asfp": lambda *a, **k: SoftFilter(*a, kind="asfp", duration=5, **k),
    "srfp": lambda *a, **k: SoftFilter(*a, kind="srfp", duration=5, **k),
    "asrfp": lambda *a, **k: SoftFilter(*a, kind="asrfp", decay="cosine", duration=5, **k),
    "slimming": lambda *a, **k: Slimming(*a, strength=1e-2, duration=5, max_layer_ratio=0.7, **k),
    "orthp": lambda *a, **k: OrthP(*a, **k),
    "orthoreg": lambda *a, **k: OrthoReg(
        *a, data=[Digits.load().batch(0)], rounds=2, ortho_epochs=1, retrain_epochs=1, **k
    ),
    "earlybird": lambda *a, **k: EarlyBird(*a, strength=1e-3, window=3, max_layer_ratio=0.6, **k),
    "epruner": lambda *a, ratio, **k: EPruner(*a, beta=0.75, **k),
    "groupfisher": lambda *a, **k: GroupFisher(*a, every=2, **k),
    "fpgm": lambda *a, **k: FPGM(*a, duration=4, **k),
    "repr": lambda *a, **k: RePr(
        *a, scope="local", whole_epochs=1, dropped_epochs=1, rounds=2, zero_inputs=True, **k
    ),
}
# Behind a BatchNorm in train mode the gradient of a zero filter is 1 / sqrt(eps) times as large.
RATES = {"sfp": 1e-3, "asfp": 1e-3}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(32)
        self.fc = nn.Linear(32 * 4, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = f.max_pool2d(f.relu(self.bn1(self.conv1(x))), 2)
        return self.fc(f.max_pool2d(f.relu(self.bn2(self.conv2(x))), 2).flatten(1))


@dataclass
class Digits:
    images: Tensor  # [n, 1, 8, 8]
    labels: Tensor  # [n]
    held_out: tuple[Tensor, Tensor]

    @staticmethod
    @functools.cache
    def load() -> Digits:
        data = datasets.load_digits()
        images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
        labels = torch.tensor(data.target)
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        images, labels = images[order], labels[order]
        return Digits(images[:1297], labels[:1297], (images[1297:], labels[1297:]))

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(step)
        indices = torch.randint(len(self.images), (64,), generator=generator)
        return self.images[indices], self.labels[indices]

    def accuracy(self, model: nn.Module) -> float:
        """In percent, on digits that were not trained on."""
        model.eval()
        with torch.no_grad():
            right = model(self.held_out[0]).argmax(1) == self.held_out[1]
        model.train()
        return 100 * float(right.float().mean())


def make_optimizer(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=5e-4)


def train(
    digits: Digits, model: nn.Module, optimizer: Any, method: Method | None, first: int, limit: int
) -> int:
    """Trains until the method is done, or up to `limit` steps; returns how many."""
    for step in range(limit):
        if method is not None and method.done:
            return step
        images, labels = digits.batch(first + step)
        optimizer.zero_grad()
        f.cross_entropy(model(images), labels).backward()
        if method is not None:
            method.before_step()
        optimizer.step()
        if method is not None:
            method.after_step()
            if (step + 1) % EPOCH == 0:
                method.after_epoch()
    return limit


def fine_tune(digits: Digits, model: nn.Module, optimizer: Any, epochs: int) -> None:
    """Trains with a learning rate that falls to nothing."""
    for epoch in range(epochs):
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * (1 - epoch / epochs)
        train(digits, model, optimizer, None, 2000 + epoch * EPOCH, EPOCH)


@pytest.fixture(scope="module")
def digits() -> Digits:
    return Digits.load()


@pytest.fixture(scope="module")
def trained(digits: Digits) -> tuple[Net, dict[str, Any], float]:
    """A trained net, its optimizer's state and its accuracy."""
    torch.manual_seed(0)
    model = Net()
    optimizer = make_optimizer(model)
    fine_tune(digits, model, optimizer, 10)
    return model, optimizer.state_dict(), digits.accuracy(model)


def test_every_method_is_here(digits: Digits) -> None:
    made = set()
    for make in METHODS.values():
        model = Net()
        made.add(type(make(model, digits.images[:1], ratio=0.5, optimizer=make_optimizer(model))))
    assert made == set(every_method())


@pytest.mark.parametrize("name", sorted(METHODS))
def test_half_of_the_filters_leave_and_the_accuracy_stays(
    name: str, digits: Digits, trained: tuple[Net, dict[str, Any], float]
) -> None:
    original, state, before = trained
    assert before > 95
    model = copy.deepcopy(original)
    optimizer = make_optimizer(model)
    optimizer.load_state_dict(state)
    method = METHODS[name](model, digits.images[:1], ratio=0.5, optimizer=optimizer)
    for group in optimizer.param_groups:
        group["lr"] = RATES.get(name, 0.02)
    steps = train(digits, model, optimizer, method, 1000, 300)
    assert method.done, steps
    result = method.finish()
    assert result.settings["method"] == type(method).__name__
    left = result.after.filters
    assert left == 34 if name != "epruner" else 31 <= left <= 37  # of 58: 24 of 48, and the classes
    assert hooks_of(model, optimizer) == 0
    check_optimizer(model, optimizer)
    replaced = {"conv1.weight", "conv2.weight", "fc.weight"} if name == "orthp" else set()
    assert {n for n, p in model.named_parameters() if p not in optimizer.state} == replaced
    pruned = {n: p.detach().clone() for n, p in model.named_parameters()}
    fine_tune(digits, model, optimizer, 6)
    check_optimizer(model, optimizer)
    for parameter_name, parameter in model.named_parameters():  # no orphan: every filter trains on
        moved = (parameter != pruned[parameter_name]).view(len(parameter), -1).any(1)
        assert moved.all(), parameter_name
    after = digits.accuracy(model)
    print(f"{name}: {before:.1f} -> {after:.1f} after {steps} steps")
    assert after >= before - 2
