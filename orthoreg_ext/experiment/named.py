"""A model as the command line names it: built, with its weights, for the inputs it is to read."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .data import Dataset, load_dataset
from .models import MODELS, build_model, check_forward
from .weights import load_weights

HISTORY = "history.json"


@dataclass(frozen=True)
class Request:
    """A model by name, and what it is to read.

    Attributes:
        model: ``vgg``, ``resnet``, ``torchvision:NAME``, ``timm:NAME``, ``pkg.module:factory`` or
            the folder of a finished ``orthoreg prune``.
        data: ``digits``, a folder of classes or an ``.npz`` file.
        weights: A state dict, or the folder of a pruned model.
        num_classes: Length of the output; that of the data or the factory's own by default.
        input_shape: [channels, height, width] of the input, without data.
        image_size: Side of the input; images are resized to it.
        channels: Channels of the input, 1 or 3; images are brought to them.
        seed: Of the parameters.
    """

    model: str
    data: str | None = None
    weights: Path | None = None
    num_classes: int | None = None
    input_shape: tuple[int, ...] | None = None
    image_size: int | None = None
    channels: int | None = None
    seed: int = 0


@dataclass
class Subject:
    """What a request led to.

    Attributes:
        name: Of the model.
        model: With its weights, on the CPU.
        original: The model before it was pruned, with random weights, where it is a pruned one.
        dataset: The data.
        shape: [channels, height, width] of the input, where it is known.
        folder: The folder of the pruned model.
        document: The ``history.json`` in it.
        no_data: Why the data of a pruned model's run is not there.
    """

    name: str
    model: nn.Module
    original: nn.Module | None = None
    dataset: Dataset | None = None
    shape: tuple[int, ...] | None = None
    folder: Path | None = None
    document: Mapping[str, Any] = field(default_factory=dict)
    no_data: str = ""

    def example(self, batch: int = 1, seed: int = 0) -> Tensor:
        """Random inputs, [batch, channels, height, width]."""
        assert self.shape is not None
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(batch, *self.shape, generator=generator)


def load(request: Request, *, runs: bool = False) -> Subject:
    """Builds the model of a request, and loads its data.

    Args:
        request: The model by name.
        runs: The shape of its input has to be known; and the data of a folder's run are loaded,
            too, if they are there.

    Raises:
        ValueError: The model, the data or the weights cannot be used; the text names the option.
        ImportError: An optional package is missing.
    """
    if not 0 <= request.seed < 2**63:
        raise ValueError(f"--seed is {request.seed}; expected a number from 0 to 2**63 - 1")
    if request.num_classes is not None and request.num_classes < 1:
        raise ValueError(f"--num-classes is {request.num_classes}; expected a number of at least 1")
    if request.model not in MODELS and request.model and Path(request.model).is_dir():
        request = _of_folder(request)
    run = _run_of(request.weights)
    no_data = ""
    if run:
        loads = runs and request.data is None and request.input_shape is None
        request = _as_in(run, request)
        if loads:
            try:
                load_dataset(run["settings"]["data"], request.image_size, request.channels)
                request = replace(request, data=run["settings"]["data"], input_shape=None)
            except (ValueError, OSError, ImportError) as error:
                no_data = str(error)
    dataset = None
    if request.data is not None:
        dataset = load_dataset(request.data, request.image_size, request.channels)
    shape, classes = _input_shape(request, dataset, run), request.num_classes
    if dataset is not None:
        classes = classes or len(dataset.classes)
        if classes < len(dataset.classes):
            raise ValueError(
                f"--num-classes is {classes}, but data {request.data!r} has "
                f"{len(dataset.classes)} classes; leave it out"
            )
    weights = request.weights
    pruned = weights is not None and weights.is_dir()

    model = build_model(request.model, num_classes=classes, image_shape=shape, seed=request.seed)
    if shape is None and (runs or pruned):
        shape = _default_shape(request.model, model)
        check_forward(request.model, model, shape, classes)
    subject = Subject(request.model, model, None, dataset, shape, no_data=no_data)
    if weights is None:
        return subject
    if not pruned:
        load_weights(model, weights)
        return subject
    from ..pruning import replay

    subject.original = copy.deepcopy(model)
    try:
        replay(model, subject.example(), weights)
    except FileNotFoundError as error:
        raise ValueError(f"--weights {str(weights)!r}: {error}") from error
    subject.folder, subject.document = weights, json.loads((weights / HISTORY).read_text())
    return subject


def _of_folder(request: Request) -> Request:
    """The request that the folder of a run stands for."""
    folder = Path(request.model)
    if request.weights is not None:
        raise ValueError(f"MODEL {str(folder)!r} is a folder with weights; leave --weights out")
    if not (folder / HISTORY).is_file():
        raise ValueError(
            f"MODEL {str(folder)!r} is a folder without {HISTORY}: no finished run of orthoreg "
            "prune; finish it with --resume, or name another one"
        )
    run = _run_of(folder)
    if not run:
        raise ValueError(
            f"{str(folder)!r} holds a pruned model but not the name of its factory; name the "
            f"model, too: MODEL --weights {folder}, or for replay {folder} --model MODEL"
        )
    return replace(request, model=run["settings"]["model"], weights=folder)


def _run_of(folder: Path | None) -> Mapping[str, Any]:
    """The record of the run whose folder it is; empty where it is none."""
    if folder is None or not (folder / HISTORY).is_file():
        return {}
    try:
        document = json.loads((folder / HISTORY).read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{str(folder / HISTORY)!r} is damaged ({error})") from error
    run = document.get("run") if isinstance(document, dict) else None
    return run if isinstance(run, dict) else {}


def _as_in(run: Mapping[str, Any], request: Request) -> Request:
    """What a run says about the input of its network, where the request leaves it open."""
    settings, data = run["settings"], run["data"]
    if request.data is None and request.image_size is None and request.channels is None:
        shape = request.input_shape or tuple(data["image_shape"])
        request = replace(request, input_shape=shape)
    return replace(
        request,
        num_classes=request.num_classes or len(data["classes"]),
        image_size=request.image_size or settings["image_size"],
        channels=request.channels or settings.get("channels"),
    )


def _input_shape(
    request: Request, dataset: Dataset | None, run: Mapping[str, Any]
) -> tuple[int, ...] | None:
    if dataset is not None:
        shape = dataset.image_shape
        if run and list(shape) != run["data"]["image_shape"]:
            raise ValueError(
                f"--data {request.data!r} has images of {list(shape)}, the network in the folder "
                f"reads {run['data']['image_shape']}; pass its --image-size and --channels"
            )
        if request.input_shape is not None:
            raise ValueError(
                f"--data {request.data!r} says what the input is; leave --input-shape out, or "
                "resize the images with --image-size"
            )
        return shape
    if request.input_shape is not None:
        if len(request.input_shape) != 3 or min(request.input_shape) < 1:
            raise ValueError(
                f"--input-shape is {request.input_shape}; expected channels, height and width, "
                "e.g. 3,224,224"
            )
        return request.input_shape
    if request.image_size is None and request.channels is None:
        return None
    side = 32 if request.image_size is None else request.image_size
    if side < 1:
        raise ValueError(f"--image-size is {side}; expected a number of at least 1")
    return (request.channels or (1 if request.model in MODELS else 3), side, side)


def _default_shape(name: str, model: nn.Module) -> tuple[int, ...]:
    shape = (1, 32, 32) if name in MODELS else getattr(model, "input_shape", None)
    if shape is None:
        raise ValueError(
            f"model {name!r} does not say what it reads; pass --input-shape, e.g. 3,224,224, or "
            "--data"
        )
    return tuple(shape)
