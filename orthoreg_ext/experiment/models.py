"""The job's own small networks, and networks named ``pkg.module:factory``."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..errors import unknown_name


def vgg(
    num_classes: int = 10,
    in_channels: int = 1,
    widths: Sequence[int | str] = (16, 32, "pool", 64, 64, "pool", 128, 128),
) -> nn.Sequential:
    """A plain BatchNorm VGG: 3 x 3 convolutions, max pooling, global average, one linear layer.

    The first convolution is 5 x 5: at one input channel a 3 x 3 filter has 9 entries, and no more
    than 9 filters of 9 entries can be orthogonal.

    Args:
        num_classes: Length of the output, ``[batch, num_classes]``.
        in_channels: Channels of the images, ``[batch, in_channels, height, width]``.
        widths: Filters of each convolution; ``"pool"`` halves height and width.
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    channels, kernel, number = in_channels, 5, 1
    for width in widths:
        if isinstance(width, str):
            layers[f"pool{number - 1}"] = nn.MaxPool2d(2)
            continue
        padding = kernel // 2
        layers[f"conv{number}"] = nn.Conv2d(channels, width, kernel, padding=padding, bias=False)
        layers[f"norm{number}"] = nn.BatchNorm2d(width)
        layers[f"relu{number}"] = nn.ReLU()
        channels, kernel, number = width, 3, number + 1
    layers["mean"] = nn.AdaptiveAvgPool2d(1)
    layers["flat"] = nn.Flatten()
    layers["classifier"] = nn.Linear(channels, num_classes)
    return nn.Sequential(layers)


class Residual(nn.Module):
    """Two 3 x 3 convolutions beside a shortcut, 1 x 1 where the shape changes."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        """Maps ``[batch, in_channels, h, w]`` to ``[batch, channels, h / stride, w / stride]``."""
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Returns relu(shortcut(x) + branch(x))."""
        out = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


def resnet(
    num_classes: int = 10,
    in_channels: int = 1,
    widths: Sequence[int] = (16, 32, 64),
    blocks: int = 1,
) -> nn.Sequential:
    """A small ResNet: a stem, ``blocks`` residual blocks a stage, global average, one linear layer.

    Every stage but the first halves height and width.
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    layers["stem"] = nn.Conv2d(in_channels, widths[0], 5, padding=2, bias=False)
    layers["norm"] = nn.BatchNorm2d(widths[0])
    layers["relu"] = nn.ReLU()
    channels = widths[0]
    for stage, width in enumerate(widths):
        for block in range(blocks):
            stride = 2 if stage > 0 and block == 0 else 1
            layers[f"block{stage + 1}_{block + 1}"] = Residual(channels, width, stride)
            channels = width
    layers["mean"] = nn.AdaptiveAvgPool2d(1)
    layers["flat"] = nn.Flatten()
    layers["classifier"] = nn.Linear(channels, num_classes)
    return nn.Sequential(layers)


MODELS: dict[str, Callable[..., nn.Module]] = {"vgg": vgg, "resnet": resnet}


def model_factory(name: str) -> Callable[..., nn.Module]:
    """Returns the function that builds ``name``: one of ``MODELS`` or ``pkg.module:factory``.

    Raises:
        ValueError: The name is unknown, or the module or the function in it is not there.
    """
    if name in MODELS:
        return MODELS[name]
    module_name, colon, attribute = name.partition(":")
    if not colon:
        raise unknown_name("model", name, [*MODELS, "pkg.module:factory"])
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except (ModuleNotFoundError, SyntaxError) as error:
        raise ValueError(
            f"model {name!r}: cannot import {module_name!r} ({error}); "
            "give a module that Python finds from here, as pkg.module:factory"
        ) from error
    factory = getattr(module, attribute, None)
    if not callable(factory):
        functions = [key for key, value in vars(module).items() if callable(value)]
        raise unknown_name(f"factory in {module_name}", attribute, functions)
    return factory  # type: ignore[no-any-return]


def build_model(
    name: str,
    *,
    num_classes: int,
    image_shape: Sequence[int],  # [channels, height, width]
    seed: int,
) -> nn.Module:
    """Builds ``name`` with the parameters of ``seed``, on the CPU; checks that it fits the data.

    ``num_classes`` and ``in_channels`` are given to the factory where its signature takes them.

    Raises:
        ValueError: The name is unknown, the factory fails or returns no module, the network does
            not read the images, or its output is not ``[batch, num_classes]``.
    """
    factory = model_factory(name)
    offered = {"num_classes": num_classes, "in_channels": image_shape[0]}
    signature = inspect.signature(factory)
    parameters = signature.parameters
    takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    taken = {k: v for k, v in offered.items() if takes_all or k in parameters}
    torch.manual_seed(seed)
    try:
        signature.bind(**taken)
        model = factory(**taken)
    except TypeError as error:
        raise ValueError(
            f"model {name!r} cannot be built ({error}); its factory is called with num_classes and "
            "in_channels where it takes them, and with nothing else"
        ) from error
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"model {name!r} returned {type(model).__name__}; expected a torch.nn.Module"
        )
    shape = " x ".join(map(str, image_shape))
    try:
        with torch.no_grad():
            output = model.eval()(torch.zeros(1, *image_shape))
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"model {name!r} cannot read images of {shape} ({reason}); "
            "pass a larger --image-size or another --model"
        ) from error
    if not isinstance(output, Tensor) or output.shape != (1, num_classes):
        got = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(
            f"model {name!r} returned {got} for one image; expected [1, {num_classes}], one value "
            "a class: let the factory take num_classes"
        )
    return model
