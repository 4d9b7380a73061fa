"""Optional packages, imported when they are needed."""

from __future__ import annotations

import importlib
from typing import Any


def require(module: str) -> Any:
    """Imports ``module`` of an optional package.

    Raises:
        ImportError: It is not installed; the text names the extra that brings it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package != module.partition(".")[0]:
            raise
        raise ImportError(
            f"{package} is not installed; install it with: pip install orthoreg_ext[cli]"
        ) from error
