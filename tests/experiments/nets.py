from __future__ import annotations

from torch import nn

from orthoreg_ext.experiment.models import vgg


def tiny(num_classes: int, in_channels: int) -> nn.Sequential:
    return vgg(num_classes, in_channels, (8, "pool", 12))


def blind(num_classes: int) -> nn.Sequential:
    """Answers in two classes, whatever it is asked for."""
    return vgg(2, 1, (8,))


def coloured(num_classes: int) -> nn.Sequential:
    return vgg(num_classes, 3, (8,))
