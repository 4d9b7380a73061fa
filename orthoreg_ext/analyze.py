"""``orthoreg analyze``: the diagnosis of a model named on the command line."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .bench import build
from .diagnosis import Diagnosis, diagnose

SUFFIXES = (".safetensors", ".pt", ".pth")


def analyze(
    name: str,
    *,
    data: str | None = None,
    weights: Path | None = None,
    samples: int = 1024,
    seed: int = 0,
    device: str = "cpu",
) -> Diagnosis:
    """Builds a model and diagnoses it, on training images of `data` if that is given.

    Args:
        name: the model, ``"vgg"``, ``"resnet"`` or ``"pkg.module:factory"``; with `data` the
            factory is given num_classes and in_channels where it takes them.
        data: ``"digits"``, a folder of classes or an ``.npz`` file.
        weights: a state dict, ``.safetensors`` or written by ``torch.save``.
        samples: the images that are used.
        seed: of the parameters, and of the choice of images.
        device: ``"cpu"`` or ``"cuda"``.

    Raises:
        ValueError: the model cannot be built or read the data, the weights are not its own, or an
            argument is unknown or out of range.
        ImportError: an optional package is missing; the text names the extra that brings it.
    """
    from .experiment.data import load_dataset
    from .experiment.models import build_model
    from .experiment.settings import why_no_gpu

    if samples < 1:
        raise ValueError(f"--samples is {samples}; expected a positive number")
    if device == "cuda" and (reason := why_no_gpu()):
        raise ValueError(f"--device cuda cannot be used ({reason}); use --device cpu")
    if data is None:
        model = build(name, seed)
    else:
        dataset = load_dataset(data)
        shape = dataset.image_shape
        model = build_model(name, num_classes=len(dataset.classes), image_shape=shape, seed=seed)
    if weights is not None:
        load_weights(model, weights)
    model.to(device)
    if data is None:
        return diagnose(model)
    drawn = torch.randperm(len(dataset.train), generator=torch.Generator().manual_seed(seed))
    images = dataset.train
    batches = [images.batch(index) for index in drawn[:samples].split(128)]
    return diagnose(model, batches, samples=samples)


def load_weights(model: nn.Module, path: Path) -> None:
    """Loads a state dict, ``.safetensors`` or written by ``torch.save``.

    Raises:
        ValueError: there is none, or it is that of another model.
    """
    if path.suffix not in SUFFIXES:
        raise ValueError(
            f"--weights is {str(path)!r}; expected a state dict in a file *{', *'.join(SUFFIXES)}"
        )
    if not path.is_file():
        raise ValueError(f"--weights: there is no file {str(path)!r}")
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


def _read(path: Path) -> Any:
    if path.suffix != ".safetensors":
        return torch.load(path, map_location="cpu", weights_only=True)
    from .experiment.extras import require

    safetensors = require("safetensors.torch")
    try:
        return safetensors.load_file(path)
    except Exception as error:
        if type(error).__name__ != "SafetensorError":
            raise
        raise RuntimeError(str(error)) from error
