"""The networks of the experiments that the package's own list does not have."""

from __future__ import annotations

from collections import OrderedDict
from itertools import pairwise

from torch import nn

from orthoreg_ext.experiment.models import resnet, vgg


def thin_vgg(num_classes: int = 10, in_channels: int = 3) -> nn.Sequential:
    """The package's small VGG at half its widths: for colour images on a processor."""
    return vgg(num_classes, in_channels, (16, 16, "pool", 32, 32, "pool", 64, 64))


def linear_mlp(
    num_classes: int = 10, in_channels: int = 1, image_size: int = 8, width: int = 100
) -> nn.Sequential:
    """Seven linear layers with nothing between them, as MLP-7-Linear of Wang and Fu (TPP)."""
    layers: OrderedDict[str, nn.Module] = OrderedDict(flat=nn.Flatten())
    widths = [in_channels * image_size**2, *[width] * 6, num_classes]
    for number, (inputs, outputs) in enumerate(pairwise(widths), start=1):
        layers[f"linear{number}"] = nn.Linear(inputs, outputs)
    return nn.Sequential(layers)


def resnet56(num_classes: int = 10, in_channels: int = 3) -> nn.Sequential:
    """ResNet-56 for small images: nine blocks a stage; its shortcuts are convolutions."""
    return resnet(num_classes, in_channels, blocks=9)


def resnet20(num_classes: int = 10, in_channels: int = 3) -> nn.Sequential:
    """ResNet-20 for small images: three blocks a stage; its shortcuts are convolutions."""
    return resnet(num_classes, in_channels, blocks=3)


def vgg13(num_classes: int = 10, in_channels: int = 3) -> nn.Sequential:
    """The ten convolutions of VGG-13 with BatchNorm, and one linear layer; the first is 5 x 5."""
    widths: list[int | str] = [64, 64, "pool", 128, 128, "pool", 256, 256, "pool", 512, 512]
    return vgg(num_classes, in_channels, [*widths, "pool", 512, 512])
