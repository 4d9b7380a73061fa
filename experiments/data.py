"""The images of an experiment, through the package's ordinary loader."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from experiments.config import Data
from orthoreg_ext.experiment.data import Dataset, Samples, load_dataset
from orthoreg_ext.experiment.extras import require
from orthoreg_ext.experiment.files import write_atomic

# The folders in which torchvision.datasets.CIFAR10 and CIFAR100 keep their files.
TORCHVISION = {"cifar-10-batches-py": "CIFAR10", "cifar-100-python": "CIFAR100"}
SUBSET_SEED = 0  # the same images whatever seed the networks start from


def load(data: Data, folder: Path, cache: Path) -> Dataset:
    """The images, as many as the experiment takes.

    Args:
        data: which.
        folder: where files and folders of images are looked for.
        cache: where what torchvision holds is written as an ``.npz``, and read from then on.

    Raises:
        ValueError: there is no such source, or it is unreadable.
    """
    source = data.source
    if source != "digits":
        path = folder / source
        if not path.exists():
            raise ValueError(
                f"data {source!r} is not in {str(folder)!r}; pass the folder that holds it as "
                "--data DIR"
            )
        source = str(_as_npz(path, cache) if path.name in TORCHVISION else path)
    found = load_dataset(source, data.image_size)
    train = _some(found.train, data.train, "data.train")
    test = _some(found.test, data.test, "data.test")
    return replace(found, source=data.source, train=train, test=test)


def _some(samples: Samples, count: int | None, key: str) -> Samples:
    if count is None:
        return samples
    if not 0 < count <= len(samples):
        raise ValueError(f"{key} is {count}, expected at most the {len(samples)} images there are")
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(SUBSET_SEED))
    chosen = order[:count].sort().values
    return replace(samples, images=samples.images[chosen], labels=samples.labels[chosen])


def _as_npz(folder: Path, cache: Path) -> Path:
    """What torchvision keeps in a folder, as a file of the form that the loader reads."""
    import io

    import numpy as np

    path = cache / f"{folder.name}.npz"
    if path.exists():
        return path
    name = TORCHVISION[folder.name]
    try:
        kind: Any = getattr(require("torchvision.datasets"), name)
    except (ImportError, RuntimeError) as error:  # the latter: it is of another torch
        raise ValueError(
            f"data {folder.name!r} is read by torchvision, which cannot be imported ({error}); "
            "install the one that goes with your torch: pip install torchvision"
        ) from error
    try:
        train, test = (kind(str(folder.parent), train=part) for part in (True, False))
    except (RuntimeError, OSError, EOFError, ValueError, UnpicklingError) as error:
        raise ValueError(
            f"data {str(folder)!r} is damaged or incomplete ({error}); remove it and download it "
            f"again: torchvision.datasets.{name}({str(folder.parent)!r}, download=True)"
        ) from error
    content = io.BytesIO()
    np.savez(
        content,
        images=train.data,
        labels=np.array(train.targets),
        test_images=test.data,
        test_labels=np.array(test.targets),
        classes=np.array(train.classes),
    )
    cache.mkdir(parents=True, exist_ok=True)
    write_atomic(path, content.getvalue(), "make room, then run again")
    return path
