"""The package's own small networks, and networks by name: of a package, of one's own module."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import unknown_name
from .zoo import package_factory


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
PACKAGES = ("torchvision", "timm")
FORMS = ("torchvision:NAME", "timm:NAME", "pkg.module:factory")


def model_factory(name: str) -> Callable[..., nn.Module]:
    """Returns the function that builds ``name``.

    Args:
        name: one of ``MODELS``, ``torchvision:NAME``, ``timm:NAME`` or ``pkg.module:factory``.

    Raises:
        ValueError: The name is unknown, or the module or the function in it is not there.
        ImportError: torchvision or timm is missing.
    """
    if name in MODELS:
        return MODELS[name]
    module_name, colon, attribute = name.partition(":")
    if not colon:
        raise unknown_name("model", name, [*MODELS, *FORMS])
    if module_name in PACKAGES:
        return package_factory(module_name, attribute)
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except MemoryError:
        raise
    except (Exception, SystemExit) as error:  # whatever someone's module does
        raise ValueError(
            f"model {name!r}: cannot import {module_name!r} ({_reason(error)}); "
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
    num_classes: int | None = None,
    image_shape: Sequence[int] | None = None,  # [channels, height, width]
    seed: int,
) -> nn.Module:
    """Builds ``name`` with the parameters of ``seed``, on the CPU; checks that it fits the data.

    What is known of ``num_classes``, ``in_channels`` and ``image_size`` (one number for a square)
    is given to the factory where its signature takes it; the last where it names it.

    Raises:
        ValueError: The name is unknown, the factory fails or returns no module, the network does
            not read the images, or its output is not ``[batch, num_classes]``.
        ImportError: torchvision or timm is missing.
    """
    factory = model_factory(name)
    offered: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
    signature = _signature(factory)
    parameters = signature.parameters if signature else {}
    takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    if image_shape is not None:
        channels, height, width = image_shape
        offered["in_channels"] = channels
        if "image_size" in parameters:  # of late: functions of any keyword need not know it
            offered["image_size"] = height if height == width else (height, width)
    taken = {k: v for k, v in offered.items() if takes_all or k in parameters}
    torch.manual_seed(seed)
    try:
        if signature:
            signature.bind(**taken)
        model = factory(**taken)
    except TypeError as error:
        raise ValueError(
            f"model {name!r} cannot be built ({error}); its factory is called with "
            + (" and ".join(k for k in offered) or "no argument")
            + (" where it takes them, and with nothing else" if offered else ": name one so")
        ) from error
    except (MemoryError, torch.OutOfMemoryError, ImportError):
        raise
    except (Exception, SystemExit) as error:  # whatever someone's factory does
        raise ValueError(
            f"model {name!r} cannot be built ({_reason(error)}); its factory raised it when called "
            f"with {', '.join(f'{k}={v!r}' for k, v in taken.items()) or 'no argument'}"
        ) from error
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"model {name!r} returned {type(model).__name__}; expected a torch.nn.Module: name a "
            "function that returns one"
        )
    if image_shape is not None:
        check_forward(name, model, image_shape, num_classes)
    return model


def _reason(error: BaseException) -> str:
    """The error by its type, too, where its text alone says little."""
    if isinstance(error, (ModuleNotFoundError, SyntaxError)):
        return str(error)
    return f"{type(error).__name__}: {error}".rstrip(": ")


def _signature(factory: Callable[..., object]) -> inspect.Signature | None:
    try:
        return inspect.signature(factory)
    except ValueError:  # a builtin without one
        return None


def check_forward(
    name: str,
    model: nn.Module,
    image_shape: Sequence[int],  # [channels, height, width]
    num_classes: int | None = None,
) -> None:
    """Checks that the network reads images and answers ``[batch, num_classes]``; leaves it in eval.

    Raises:
        ValueError: It does not.
    """
    try:
        with torch.no_grad():
            output = model.eval()(torch.zeros(1, *image_shape))
    except (RuntimeError, TypeError, ValueError, IndexError, AssertionError) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        shape = " x ".join(map(str, image_shape))
        raise ValueError(
            f"model {name!r} cannot read images of {shape} ({reason}); pass "
            + ("--channels 3, " if "3 channels" in reason else "")
            + "a larger --image-size or another model"
        ) from error
    wrong = num_classes is not None and output_shape(output) != [1, num_classes]
    if not isinstance(output, Tensor) or output.dim() < 2 or wrong:
        raise ValueError(
            f"model {name!r} returned {output_shape(output) or type(output).__name__} for one "
            f"image; expected [1, {num_classes or 'classes'}], one value a class: let the factory "
            "take num_classes"
        )


def output_shape(output: object) -> list[int]:
    """The shape of a network's output; nothing where it is no tensor."""
    return list(output.shape) if isinstance(output, Tensor) else []
