"""Parameters from a file that somebody else may have written."""

from __future__ import annotations

import pickle
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .extras import require

SUFFIXES = (".safetensors", ".pt", ".pth")


def weights_checksum(path: Path) -> int:
    """CRC-32 of a file of weights.

    Raises:
        ValueError: there is none.
    """
    _check_file(path)
    return zlib.crc32(path.read_bytes())


def load_weights(model: nn.Module, path: Path) -> None:
    """Loads a state dict, ``.safetensors`` or written by ``torch.save``.

    Raises:
        ValueError: there is none, or it is that of another model.
    """
    _check_file(path)
    try:
        state = _read(path)
        model.load_state_dict(state)
    except (RuntimeError, pickle.UnpicklingError, AttributeError, TypeError, EOFError) as error:
        reason = " ".join(str(error).split())[:200]
        if isinstance(error, pickle.UnpicklingError):
            reason = "torch.load reads nothing but tensors from it, and refuses"
        raise ValueError(
            f"--weights {str(path)!r} is no state dict of this MODEL ({reason}); save its "
            "state_dict(), or name the MODEL whose it is"
        ) from error


def _check_file(path: Path) -> None:
    if path.suffix not in SUFFIXES:
        raise ValueError(
            f"--weights is {str(path)!r}; expected a state dict in a file *{', *'.join(SUFFIXES)}"
        )
    if not path.is_file():
        raise ValueError(f"--weights: there is no file {str(path)!r}")


def _read(path: Path) -> Any:
    if path.suffix != ".safetensors":
        return torch.load(path, map_location="cpu", weights_only=True)
    safetensors = require("safetensors.torch")
    try:
        return safetensors.load_file(path)
    except Exception as error:
        if type(error).__name__ != "SafetensorError":
            raise
        raise RuntimeError(str(error)) from error
