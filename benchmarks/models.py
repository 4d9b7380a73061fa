"""The layers of well-known networks, as weight shapes."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

Shape = tuple[int, ...]


def vgg13() -> list[Shape]:
    """The CIFAR VGG-13 of OrthoReg: ten 3 x 3 convolutions and a classifier."""
    widths = [3, 64, 64, 128, 128, 256, 256, 512, 512, 512, 512]
    convs: list[Shape] = [(o, i, 3, 3) for i, o in pairwise(widths)]
    return [*convs, (100, 512)]


def resnet56() -> list[Shape]:
    """The CIFAR ResNet-56: 55 convolutions of at most 64 filters, two shortcuts, a classifier."""
    shapes: list[Shape] = [(16, 3, 3, 3)]
    before = 16
    for width in (16, 32, 64):
        for _ in range(9):
            shapes += [(width, before, 3, 3), (width, width, 3, 3)]
            if before != width:
                shapes.append((width, before, 1, 1))
            before = width
    return [*shapes, (100, 64)]


def resnet50() -> list[Shape]:
    """The ImageNet ResNet-50: 53 convolutions and a classifier."""
    shapes: list[Shape] = [(64, 3, 7, 7)]
    before = 64
    for blocks, width in zip((3, 4, 6, 3), (64, 128, 256, 512), strict=True):
        for block in range(blocks):
            shapes += [(width, before, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)]
            if block == 0:
                shapes.append((4 * width, before, 1, 1))
            before = 4 * width
    return [*shapes, (1000, 2048)]


MODELS = {"resnet56": resnet56, "vgg13": vgg13, "resnet50": resnet50}


def weights(model: str, device: str) -> list[Tensor]:
    """The weights of a model, at the scale that networks are initialised with."""
    torch.manual_seed(0)
    return [
        (torch.randn(s, device=device) * (torch.Size(s[1:]).numel() ** -0.5)).requires_grad_()
        for s in MODELS[model]()
    ]
