"""One small model with every kind of layer, and its data."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Net(nn.Module):
    """A convolution in channels_last, a grouped and a transposed one, a parametrized layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.grouped = nn.Conv2d(8, 12, 3, padding=1, groups=2, bias=False)
        self.up = nn.ConvTranspose2d(12, 6, 2, 2)
        self.fc = nn.utils.parametrizations.weight_norm(nn.Linear(6, 5))
        self.head = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:  # [b, 3, h, w] -> [b, 4]
        x = self.up(self.grouped(self.conv(x).relu()).relu())
        return self.head(self.fc(x.mean((2, 3))).relu())


def make(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net().to(memory_format=torch.channels_last)


def batch(size: int = 2, seed: int = 0) -> Tensor:  # [size, 3, 4, 4]
    return torch.randn(size, 3, 4, 4, generator=torch.Generator().manual_seed(seed))


def task(net: nn.Module, x: Tensor) -> Tensor:
    return net(x).square().mean()


def grads(net: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}


def parameters(net: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in net.named_parameters()}
