"""Prunes a small network while it trains, by a method: python examples/prune_while_training.py

Needs scikit-learn for its digits (pip install "orthoreg_ext[cli]"); takes some seconds.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as f

import orthoreg_ext as ox

EPOCH = 20  # steps
# The published schedules take thousands of steps; these are the same with larger ones.
METHODS: dict[str, Callable[..., ox.pruning.methods.method.Method]] = {
    "tpp": lambda *a, **k: ox.pruning.TPP(*a, delta=0.02, every=2, hold=40, zero_every=10, **k),
    "greg1": lambda *a, **k: ox.pruning.GReg1(*a, delta=0.02, every=2, hold=20, **k),
    "greg2": lambda *a, **k: ox.pruning.GReg2(
        *a, pick_delta=1e-3, delta=0.02, every=2, hold=20, **k
    ),
    "increg": lambda *a, **k: ox.pruning.IncReg(*a, delta=0.02, ceiling=1.0, **k),
    "softfilter": lambda *a, **k: ox.pruning.SoftFilter(*a, kind="asrfp", duration=5, **k),
    "slimming": lambda *a, **k: ox.pruning.Slimming(
        *a, strength=1e-2, duration=5, max_layer_ratio=0.75, **k
    ),
    "earlybird": lambda *a, **k: ox.pruning.EarlyBird(
        *a, strength=1e-2, window=3, duration=10, max_layer_ratio=0.75, **k
    ),
    "groupfisher": lambda *a, **k: ox.pruning.GroupFisher(*a, every=4, **k),
    "fpgm": lambda *a, **k: ox.pruning.FPGM(*a, duration=5, **k),
    "repr": lambda *a, **k: ox.pruning.RePr(
        *a, whole_epochs=2, dropped_epochs=2, rounds=2, scope="local", **k
    ),
    "orthp": lambda *a, **k: ox.pruning.OrthP(*a, **k),
}


def batches(images: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        order = torch.randperm(len(images))
        for indices in order.split(64):
            yield images[indices], labels[indices]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--method", choices=sorted(METHODS), default="tpp")
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--epochs", type=int, default=8, help="before the method and after it")
    arguments = parser.parse_args()
    torch.manual_seed(0)

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
    labels = torch.tensor(digits.target)
    data = batches(images[:1297], labels[:1297])
    model = nn.Sequential(
        nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
        nn.MaxPool2d(2),
        nn.Sequential(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(128, 10),
    )
    optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9, weight_decay=5e-4)

    def backward() -> None:
        inputs, targets = next(data)
        optimizer.zero_grad()
        f.cross_entropy(model(inputs), targets).backward()

    def accuracy() -> float:
        with torch.no_grad():
            right = model.eval()(images[1297:]).argmax(1) == labels[1297:]
        model.train()
        return 100 * float(right.float().mean())

    for _ in range(arguments.epochs * EPOCH):
        backward()
        optimizer.step()
    print(f"trained: {accuracy():.1f} %")

    method = METHODS[arguments.method](
        model, images[:1], ratio=arguments.ratio, optimizer=optimizer
    )
    for step in itertools.count(1):  # the loop that a method asks for
        if method.done:
            break
        backward()
        method.before_step()
        optimizer.step()
        method.after_step()
        if step % EPOCH == 0:
            method.after_epoch()
    result = method.finish()
    print(result.table())
    print(f"pruned after {method.steps} more steps: {accuracy():.1f} %")

    for _ in range(arguments.epochs * EPOCH):
        backward()
        optimizer.step()
    print(f"fine-tuned: {accuracy():.1f} %")


if __name__ == "__main__":
    main()
