"""Regularises a torchvision model in a loop like that of torchvision's references.

python examples/torchvision_loop.py: the two lines marked with <- are all that changes. Needs
torchvision and scikit-learn; some seconds.
"""

from __future__ import annotations

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models.resnet import BasicBlock, ResNet

import orthoreg_ext as ox  # <- orthoreg_ext


def train_epoch(
    model: nn.Module,
    criterion: nn.Module,
    optimizer: torch.optim.Optimizer,
    loader: DataLoader,
    arguments: argparse.Namespace,
    average: AveragedModel,
    scaler: torch.amp.GradScaler | None,
) -> None:
    model.train()
    for images, labels in loader:
        with torch.autocast("cpu", torch.bfloat16, enabled=arguments.amp):
            loss = criterion(model(images), labels)
        optimizer.zero_grad()
        if scaler is not None:
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)  # clipping is of the true gradients
            nn.utils.clip_grad_norm_(model.parameters(), arguments.clip_grad_norm)
            scaler.step(optimizer)
            scaler.update()
        else:
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), arguments.clip_grad_norm)
            optimizer.step()
        average.update_parameters(model)


def evaluate(model: nn.Module, loader: DataLoader) -> float:
    model.eval()
    with torch.inference_mode():
        right = [(model(images).argmax(1) == labels).float() for images, labels in loader]
    return float(torch.cat(right).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--amp", action="store_true", help="bfloat16 and a loss scale")
    parser.add_argument("--clip-grad-norm", type=float, default=1.0)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
    images = nn.functional.interpolate(images, size=32).expand(-1, 3, -1, -1)
    labels = torch.tensor(digits.target)
    train = TensorDataset(images[:512], labels[:512])
    loader = DataLoader(train, 64, shuffle=True, drop_last=True)
    test = DataLoader(TensorDataset(images[1297:], labels[1297:]), 100)

    model = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=10)
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    ox.OrthoRegularizer(model, strength=1e-3).attach(optimizer)  # <- orthoreg_ext
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=arguments.epochs)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    scaler = torch.amp.GradScaler("cpu") if arguments.amp else None
    for epoch in range(arguments.epochs):
        train_epoch(model, criterion, optimizer, loader, arguments, average, scaler)
        schedule.step()
        print(f"epoch {epoch + 1}: accuracy {evaluate(model, test):.4f}")


if __name__ == "__main__":
    main()
