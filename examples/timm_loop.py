"""Regularises a timm model in a loop with timm's own tools: python examples/timm_loop.py

The two lines marked with <- are all that changes; in timm's train.py they follow the line that
creates the optimizer. Needs timm and scikit-learn; some seconds.
"""

from __future__ import annotations

import timm
import torch
from sklearn.datasets import load_digits
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3, NativeScaler
from torch.nn import functional as f

import orthoreg_ext as ox  # <- orthoreg_ext

EPOCHS = 3


def main() -> None:
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
    images = f.interpolate(images, size=32)
    labels = torch.tensor(digits.target)

    model = timm.create_model("test_resnet", in_chans=1, num_classes=10)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=5e-3, weight_decay=0.05)
    ox.OrthoRegularizer(model, strength=1e-2).attach(optimizer)  # <- orthoreg_ext
    scheduler = CosineLRScheduler(optimizer, t_initial=EPOCHS)
    ema = ModelEmaV3(model, decay=0.8)
    scaler = NativeScaler(device="cpu")

    for epoch in range(EPOCHS):
        model.train()
        for indices in torch.randperm(1280).split(64):
            with torch.autocast("cpu", torch.bfloat16):
                loss = f.cross_entropy(model(images[indices]), labels[indices])
            optimizer.zero_grad()
            scaler(loss, optimizer, clip_grad=1.0, clip_mode="norm", parameters=model.parameters())
            ema.update(model)
        scheduler.step(epoch + 1)
        ema.module.eval()
        with torch.no_grad():
            right = ema.module(images[1297:]).argmax(1) == labels[1297:]
        print(
            f"epoch {epoch + 1}: accuracy of the averaged model {float(right.float().mean()):.4f}"
        )


if __name__ == "__main__":
    main()
