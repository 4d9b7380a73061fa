"""Models of torchvision and timm by name.

Torchvision's wheels on PyPI are compiled against a torch with CUDA. Next to a CPU-only one their
library does not load, and the import fails for want of operators that only detection models use.
They are declared here then, without an implementation.
"""

from __future__ import annotations

import importlib
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import torch

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
        for library in Path(folder).glob("_C*.so"):
            with suppress(OSError):
                torch.ops.load_library(str(library))
    if not hasattr(torch.ops.torchvision, "nms"):
        library = torch.library.Library("torchvision", "DEF")
        for operator in _OPERATORS:
            library.define(operator)
        _declared.append(library)
