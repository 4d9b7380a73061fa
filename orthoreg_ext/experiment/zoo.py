"""Models of torchvision and timm by name.

Torchvision's wheels on PyPI are compiled against a torch with CUDA. Next to a CPU-only one their
library does not load, and the import fails for want of operators that only detection models use.
They are declared here then, without an implementation.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

COLOURS = 3  # channels that torchvision's models read

_OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_declared: list[torch.library.Library] = []  # an operator is gone with its object


def load_package(name: str) -> ModuleType:
    """Imports a package that uses torchvision, beside any build of torch.

    Args:
        name: ``"torchvision"``, ``"timm"`` or another package that imports torchvision by itself.

    Raises:
        ImportError: the package or torchvision is not installed, or does not import.
    """
    for needed in dict.fromkeys(("torchvision", name)):
        if find_spec(needed) is None:
            raise ImportError(f"{needed} is not installed: pip install {needed}", name=needed)
    _declare_operators()
    try:
        return importlib.import_module(name)
    except (ImportError, RuntimeError) as error:
        raise ImportError(
            f"{name} does not import beside torch {torch.__version__} ({error}); install the "
            "releases of both that belong together",
            name=name,
        ) from error


def _declare_operators() -> None:
    spec = find_spec("torchvision")
    assert spec is not None
    for folder in spec.submodule_search_locations or ():
        for file in Path(folder).glob("_C*.so"):
            with suppress(OSError):
                torch.ops.load_library(str(file))
    if not hasattr(torch.ops.torchvision, "nms"):
        library = torch.library.Library("torchvision", "DEF")
        for operator in _OPERATORS:
            library.define(operator)
        _declared.append(library)


def package_factory(package: str, name: str) -> Callable[..., nn.Module]:
    """Returns what builds a model of torchvision or timm, with random weights.

    It takes num_classes, in_channels (timm alone heeds it) and image_size, which goes to models
    that are built for one size of image, such as vision transformers. The models that it returns
    have ``input_shape``, the [channels, height, width] they are meant for.

    Args:
        package: ``"torchvision"`` or ``"timm"``.
        name: the model's name there.

    Raises:
        ValueError: the package has no such model.
        ImportError: see :func:`load_package`.
    """
    module: Any = load_package(package)
    torchvision = package == "torchvision"
    names = module.models.list_models(module=module.models) if torchvision else module.list_models()
    if name.partition(".")[0] not in names:  # timm: model.weights
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "no name is like it."
        raise ValueError(
            f"{package} has no model {name!r} for images; {hint} All {len(names)}: "
            f"{'torchvision.models' if torchvision else 'timm'}.list_models()"
        )

    def factory(
        num_classes: int | None = None,
        in_channels: int | None = None,
        image_size: int | tuple[int, int] | None = None,
    ) -> nn.Module:
        options: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
        if torchvision:
            options |= _EXTRAS.get(name, {})
            model: Any = _sized(module.models.get_model, name, "image_size", image_size, options)
            side = image_size or (299 if name == "inception_v3" else 224)
            height, width = (side, side) if isinstance(side, int) else side
            model.input_shape = (COLOURS, height, width)
            return model  # type: ignore[no-any-return]
        if in_channels is not None:
            options["in_chans"] = in_channels
        model = _sized(module.create_model, name, "img_size", image_size, options)
        channels, height, width = model.default_cfg["input_size"]
        if image_size is not None:
            height, width = (image_size,) * 2 if isinstance(image_size, int) else image_size
        model.input_shape = (in_channels or channels, height, width)
        return model  # type: ignore[no-any-return]

    return factory


# without the heads that only training uses: the output is one tensor then
_HEADS: dict[str, Any] = {"aux_logits": False, "init_weights": True}
_EXTRAS = {"googlenet": _HEADS, "inception_v3": _HEADS}


def _sized(
    build: Callable[..., nn.Module],
    name: str,
    keyword: str,
    size: int | tuple[int, int] | None,
    options: dict[str, Any],
) -> nn.Module:
    """Builds a model, for a size of image where its constructor takes one."""
    if size is not None:
        try:
            return build(name, **{keyword: size}, **options)
        except TypeError as error:
            if keyword not in str(error):
                raise
    return build(name, **options)
