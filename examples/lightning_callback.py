"""Regularises a network that Lightning trains: python examples/lightning_callback.py

The two lines marked with <- are all that changes. Needs lightning and scikit-learn; some seconds.
"""

from __future__ import annotations

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as f
from torch.utils.data import DataLoader, TensorDataset

from orthoreg_ext.integrations.lightning import OrthoRegCallback  # <- orthoreg_ext


class Digits(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            *(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(128, 10)),
        )

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        images, labels = batch
        return f.cross_entropy(self.net(images), labels)

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        images, labels = batch
        self.log("accuracy", (self.net(images).argmax(1) == labels).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def main() -> None:
    L.seed_everything(0)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
    labels = torch.tensor(digits.target)
    train = DataLoader(TensorDataset(images[:1297], labels[:1297]), 64, shuffle=True)
    test = DataLoader(TensorDataset(images[1297:], labels[1297:]), 500)

    trainer = L.Trainer(
        max_epochs=3,
        gradient_clip_val=5.0,
        callbacks=[OrthoRegCallback(strength=1e-2)],  # <- orthoreg_ext
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Digits(), train, test)
    print(f"accuracy {float(trainer.callback_metrics['accuracy']):.4f}")


if __name__ == "__main__":
    main()
