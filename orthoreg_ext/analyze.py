"""``orthoreg analyze``: the diagnosis of a model named on the command line."""

from __future__ import annotations

from pathlib import Path

import torch

from .diagnosis import Diagnosis, diagnose


def analyze(
    name: str,
    *,
    data: str | None = None,
    weights: Path | None = None,
    samples: int = 1024,
    seed: int = 0,
    device: str = "cpu",
    num_classes: int | None = None,
    input_shape: tuple[int, ...] | None = None,
    image_size: int | None = None,
    channels: int | None = None,
) -> Diagnosis:
    """Builds a model and diagnoses it, on training images of `data` if that is given.

    Args:
        name: the model, ``"vgg"``, ``"resnet"``, ``"torchvision:NAME"``, ``"timm:NAME"``,
            ``"pkg.module:factory"`` or the folder of a finished ``orthoreg prune``; a factory is
            given what is known of num_classes, in_channels and image_size where it takes them.
        data: ``"digits"``, a folder of classes or an ``.npz`` file.
        weights: a state dict, ``.safetensors`` or written by ``torch.save``, or the folder of a
            pruned model.
        samples: the images that are used.
        seed: of the parameters, and of the choice of images.
        device: ``"cpu"`` or ``"cuda"``.
        num_classes: length of the output; that of the data by default.
        input_shape: [channels, height, width] of the input without `data`.
        image_size: side to which images are resized.
        channels: 1 or 3, to which images are brought.

    Raises:
        ValueError: the model cannot be built or read the data, the weights are not its own, or an
            argument is unknown or out of range.
        ImportError: an optional package is missing; the text names the extra that brings it.
    """
    from .experiment.named import Request, load
    from .experiment.settings import why_no_gpu

    if samples < 1:
        raise ValueError(f"--samples is {samples}; expected a positive number")
    if device == "cuda" and (reason := why_no_gpu()):
        raise ValueError(f"--device cuda cannot be used ({reason}); use --device cpu")
    given = (data, weights, num_classes, input_shape, image_size, channels, seed)
    subject = load(Request(name, *given))
    model, dataset = subject.model.to(device), subject.dataset
    if dataset is None:
        return diagnose(model)
    drawn = torch.randperm(len(dataset.train), generator=torch.Generator().manual_seed(seed))
    images = dataset.train
    batches = [images.batch(index) for index in drawn[:samples].split(128)]
    return diagnose(model, batches, samples=samples)
