"""Logs penalty and correlation to TensorBoard: python examples/log_scalars.py [FOLDER]

The lines marked with <- are all that logging adds. Needs tensorboard and scikit-learn; some
seconds. For Weights & Biases: ScalarLogger(regularizer, log=wandb.log, every=20).
"""

from __future__ import annotations

import sys
import tempfile

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as f
from torch.utils.tensorboard import SummaryWriter

import orthoreg_ext as ox
from orthoreg_ext.integrations.scalars import ScalarLogger  # <- orthoreg_ext


def main(folder: str) -> None:
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
    labels = torch.tensor(digits.target)
    model = nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(128, 10)),
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    regularizer = ox.OrthoRegularizer(model, strength=1e-2)
    regularizer.attach(optimizer)
    writer = SummaryWriter(folder)
    log = ScalarLogger(regularizer, add_scalar=writer.add_scalar, every=20)  # <- orthoreg_ext
    for _ in range(101):
        chosen = torch.randint(0, 1297, (64,))
        optimizer.zero_grad()
        loss = f.cross_entropy(model(images[chosen]), labels[chosen])
        loss.backward()
        optimizer.step()
        log()  # <- orthoreg_ext
    writer.close()
    print(regularizer.report())


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        main(sys.argv[1] if len(sys.argv) > 1 else temporary)
