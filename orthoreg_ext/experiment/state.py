"""What an interrupted job continues from: one file of named tensors and JSON, never a pickle."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .extras import require
from .files import RESUME, write_atomic

STATE_NAME = "state.safetensors"
FORMAT = "orthoreg prune 1"


def save_state(
    path: Path, record: Mapping[str, Any], tensors: Mapping[str, Tensor], remedy: str = RESUME
) -> None:
    """Writes a JSON record and tensors as one safetensors file, atomically.

    Raises:
        OSError: The file cannot be written; an earlier one is intact.
    """
    plain = {key: t.detach().cpu().contiguous().clone() for key, t in tensors.items()}
    text = json.dumps(record)
    metadata = {"format": FORMAT, "record": text, "checksum": str(_checksum(text, plain))}
    write_atomic(path, require("safetensors.torch").save(plain, metadata), remedy)


def load_state(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Reads what :func:`save_state` wrote.

    Raises:
        ValueError: The file is damaged or of something else.
    """
    safetensors = require("safetensors")
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise ValueError(
            f"{str(path)!r} is damaged or no state of this command ({error}); start again with "
            "another --out"
        ) from error
    if metadata.get("format") != FORMAT:
        raise ValueError(
            f"{str(path)!r} is no state of this version of the command (format "
            f"{metadata.get('format')!r}, expected {FORMAT!r}); start again with another --out"
        )
    if metadata["checksum"] != str(_checksum(metadata["record"], tensors)):
        raise ValueError(
            f"{str(path)!r} is damaged (its checksum is wrong); start again with another --out"
        )
    return json.loads(metadata["record"]), tensors


def _checksum(text: str, tensors: Mapping[str, Tensor]) -> int:
    checksum = zlib.crc32(text.encode())
    for key in sorted(tensors):
        tensor = tensors[key].reshape(-1)  # a view of bytes needs a dimension
        content = key.encode() + tensor.view(torch.uint8).numpy().tobytes()
        checksum = zlib.crc32(content, checksum)
    return checksum


def training_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Names the tensors of a training: ``model.*`` and ``optimizer.<parameter>.*``."""
    tensors = {f"model.{key}": value for key, value in model.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        for key, value in state.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{index}.{key}"] = value
    return tensors


def restore_training(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]
) -> None:
    """Puts the tensors of :func:`training_tensors` back, bit for bit.

    Raises:
        ValueError: They belong to another architecture.
    """
    weights = under("model.", tensors)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"the state is of another architecture than --model: {reason}") from error
    saved = optimizer.state_dict()
    for key, value in under("optimizer.", tensors).items():
        index, _, name = key.partition(".")
        saved["state"].setdefault(int(index), {})[name] = value
    optimizer.load_state_dict(saved)


def under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors whose names begin with a prefix, without it."""
    return {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
