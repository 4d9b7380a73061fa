"""What a run needs besides its settings, checked before it begins."""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout

import torch
from torch import Tensor, nn

from ..backend import ENVIRONMENT, namespace_for
from ..build_info import build_info
from .extras import require
from .outputs import exported, max_difference

PACKAGES = ("safetensors.torch", "torch_pruning")


def check_packages() -> None:
    """Checks that every optional package is there that a run needs up to its last file.

    Raises:
        ImportError: One is missing; the text names the extra that brings it.
    """
    for package in PACKAGES:
        require(package)


def check_backend(device: str) -> None:
    """Checks that the implementation that was forced, if any, runs on ``device``.

    Raises:
        ValueError: It does not; the text names what forced it.
    """
    info = build_info()
    if reason := info["cpu"]["reason"] or info["backend_reason"]:
        raise ValueError(reason)
    try:
        namespace_for(torch.device(device))
    except RuntimeError as error:
        chosen = (
            f"{ENVIRONMENT} is {os.environ[ENVIRONMENT]!r}: " if ENVIRONMENT in os.environ else ""
        )
        raise ValueError(f"{chosen}{error}, or another --device") from error


def check_export(model: nn.Module, images: Tensor) -> None:
    """Exports a network without what torch prints and logs where that fails, and compares them.

    Raises:
        RuntimeError: It cannot be exported, or does not answer the same twice.
    """
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            max_difference(exported(model, images), model, images)
    finally:
        logging.disable(level)


@contextmanager
def refusing(what: str) -> Iterator[None]:
    """Makes what the network cannot do, a RuntimeError, bad input; ``what`` begins the text."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"{what} ({reason}); choose another --model, or do the steps from Python, where "
            "orthoreg_ext.pruning.prune takes more arguments"
        ) from error
