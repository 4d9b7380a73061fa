"""What ``orthoreg sensitivity`` measures: a named model on named data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

from .. import pruning
from ..pruning import Sensitivity
from .data import Samples
from .named import Request, load
from .settings import why_no_gpu
from .train import accuracy


def table(
    name: str,
    source: str,
    *,
    image_size: int | None = None,
    channels: int | None = None,
    num_classes: int | None = None,
    weights: Path | None = None,
    criterion: str = "fisher",
    metric: str = "accuracy",
    ratios: str = "0.25,0.5,0.75",
    samples: int = 2048,
    device: str = "auto",
    progress: Callable[[int, int], object] | None = None,
) -> Sensitivity:
    """The sensitivity of every coupled group, scored on training and measured on held-out images.

    Args:
        name: the model, as for ``orthoreg prune``.
        source: the data.
        image_size: side in pixels to which images are resized.
        channels: 1 or 3, to which images are brought.
        num_classes: length of the output; that of the data by default.
        weights: a state dict (``.safetensors``, or written by ``torch.save``), or a folder that a
            PruneResult was saved in; None: what the factory returns.
        criterion: ranks the units within a group.
        metric: ``"accuracy"`` in per cent, or ``"loss"``.
        ratios: shares, separated by commas.
        samples: training images for the gradients, drawn at random, always the same.
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``.
        progress: called as progress(done, total).

    Raises:
        ValueError: an argument cannot be used; the text names it.
    """
    try:
        shares = [float(part) for part in ratios.split(",")]
    except ValueError as error:
        raise ValueError(f"--ratios is {ratios!r}; expected numbers such as 0.25,0.5") from error
    if samples < 1:
        raise ValueError(f"--samples is {samples}; expected a positive number")
    if device == "cuda" and (reason := why_no_gpu()):
        raise ValueError(f"--device cuda cannot be used ({reason}); use --device cpu")
    if device == "auto":
        device = "cpu" if why_no_gpu() else "cuda"
    subject = load(Request(name, source, weights, num_classes, None, image_size, channels))
    model, data, example = subject.model, subject.dataset, subject.example()
    assert data is not None
    where = torch.device(device)
    model, train, test = model.to(where), data.train.to(where), data.test.to(where)
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))[:samples]
    batches = [train.batch(part.to(where)) for part in order.split(256)]
    evaluate = accuracy if metric == "accuracy" else loss

    def measured(model: nn.Module) -> float:
        return evaluate(model, test)

    measured.__name__ = metric
    return pruning.sensitivity(
        model,
        example,
        batches,
        evaluate=measured,
        ratios=shares,
        criterion=criterion,
        progress=progress,
    )


def loss(model: nn.Module, samples: Samples) -> float:
    """The mean cross entropy."""
    parts = [functional.cross_entropy(model(x), y, reduction="sum") for x, y in samples.batches()]
    return sum(float(part) for part in parts) / len(samples)
