"""Residual networks that run forward and backward: for training steps and dependency graphs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn


def _conv(i: int, o: int, size: int, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(i, o, size, stride, padding=size // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(o))


class Block(nn.Module):
    """Two 3 x 3 convolutions, or a 3 x 3 between two 1 x 1, beside a shortcut."""

    def __init__(self, before: int, width: int, after: int, stride: int) -> None:
        super().__init__()
        if after == width:
            self.parts = nn.ModuleList([_conv(before, width, 3, stride), _conv(width, after, 3)])
        else:
            wide = _conv(width, width, 3, stride)
            self.parts = nn.ModuleList([_conv(before, width, 1), wide, _conv(width, after, 1)])
        same = stride == 1 and before == after
        self.shortcut = nn.Identity() if same else _conv(before, after, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = x
        for number, part in enumerate(self.parts):
            out = part(torch.relu(out) if number else out)
        return torch.relu(out + self.shortcut(x))


def resnet(
    blocks: Sequence[int], widths: Sequence[int], *, classes: int, expand: int = 1, stem: int = 3
) -> nn.Sequential:
    """A ResNet; a stem of 7 is that of ImageNet, with stride and pooling."""
    pooled = [nn.MaxPool2d(3, 2, 1)] if stem == 7 else []
    layers: list[nn.Module] = [_conv(3, widths[0], stem, 2 if pooled else 1), nn.ReLU(), *pooled]
    before = widths[0]
    for stage, (count, width) in enumerate(zip(blocks, widths, strict=True)):
        for number in range(count):
            stride = 2 if stage and not number else 1
            layers.append(Block(before, width, expand * width, stride))
            before = expand * width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, classes))


WIDE = (64, 128, 256, 512)

NETS: dict[str, Callable[[], nn.Sequential]] = {
    "resnet56": lambda: resnet((9, 9, 9), (16, 32, 64), classes=100),
    "resnet18": lambda: resnet((2, 2, 2, 2), WIDE, classes=100),
    "resnet50": lambda: resnet((3, 4, 6, 3), WIDE, classes=1000, expand=4, stem=7),
}
