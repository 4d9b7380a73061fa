"""Training that can be interrupted, with whatever a method adds to it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as nnf

from orthoreg_ext import OrthoRegularizer
from orthoreg_ext.experiment.data import Samples
from orthoreg_ext.experiment.state import (
    load_state,
    restore_training,
    save_state,
    training_tensors,
    under,
)
from orthoreg_ext.experiment.train import DivergedError, cosine, shift
from orthoreg_ext.pruning.methods.method import Method

MOMENTUM = 0.9
PAUSE = 20.0  # seconds of work that a kill may cost
VECTORS = "regularizer."  # the names of what it remembers: srip's eigenvectors
REMEDY = "make room or mend the folder, then run the same command again"


@dataclass(frozen=True)
class Fit:
    """One training.

    Attributes:
        epochs: how many.
        lr: at the start.
        seed: of the order of the images and of what is done to them.
        batch_size: images a step.
        weight_decay: of all parameters.
        flip: mirror every other image.
        constant: keep the learning rate as it is, instead of half a cosine down to 0.
    """

    epochs: int
    lr: float
    seed: int
    batch_size: int = 64
    weight_decay: float = 0.0
    flip: bool = False
    constant: bool = False


@dataclass
class Progress:
    """How far a training is, and what it noted."""

    epoch: int
    notes: list[Any]


def sgd(net: nn.Module, weight_decay: float) -> torch.optim.SGD:
    """The optimizer of all trainings; its learning rate is set at every step."""
    return torch.optim.SGD(
        net.parameters(), lr=0, momentum=MOMENTUM, nesterov=True, weight_decay=weight_decay
    )


def steps_an_epoch(samples: Samples, batch_size: int) -> int:
    """A last batch that is not full is left out, unless there is no other."""
    return max(1, len(samples) // batch_size)


def fit(
    net: nn.Module,
    samples: Samples,
    how: Fit,
    *,
    regularizer: OrthoRegularizer | None = None,
    method: Callable[[torch.optim.Optimizer], Method] | None = None,
    note: Callable[[int], Any] | None = None,
    store: Path | None = None,
) -> list[Any]:
    """Trains a network in place, or finishes a training that was interrupted.

    Args:
        net: the network.
        samples: the images.
        how: the training.
        regularizer: a term of the loss.
        method: makes of the optimizer a method that is told of every step and epoch, and that is
            finished at the end: the network is smaller then.
        note: called after every epoch with its number, from 1; what it returns is kept.
        store: a file to keep the state in, now and then and at the end; from which to continue.

    Returns:
        what `note` returned, one entry an epoch.

    Raises:
        DivergedError: the loss is no finite number.
    """
    optimizer = sgd(net, how.weight_decay)
    driven = None if method is None else method(optimizer)
    progress = _restored(net, optimizer, driven, regularizer, store)
    last = time.monotonic()
    while progress.epoch < how.epochs:
        _epoch(net, optimizer, samples, how, progress.epoch, regularizer, driven)
        progress.epoch += 1
        if note is not None:
            progress.notes.append(note(progress.epoch))
        over = progress.epoch == how.epochs
        if over and driven is not None:
            driven.finish()
        if store is not None and (over or time.monotonic() - last > PAUSE):
            _save(net, optimizer, driven, regularizer, progress, store)
            last = time.monotonic()
    return progress.notes


def _epoch(
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    samples: Samples,
    how: Fit,
    epoch: int,  # from 0
    regularizer: OrthoRegularizer | None,
    method: Method | None,
) -> None:
    seed = 1_000_003 * how.seed + epoch
    torch.manual_seed(seed)  # for layers that draw, such as dropout
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(samples), generator=generator).to(samples.labels.device)
    count = steps_an_epoch(samples, how.batch_size)
    net.train()
    total = torch.zeros((), device=samples.labels.device)
    for step, batch in enumerate(order.split(how.batch_size)[:count]):
        done = (epoch + step / count) / how.epochs
        for group in optimizer.param_groups:
            group["lr"] = how.lr if how.constant else cosine(how.lr, done)
        images, labels = samples.batch(batch)
        images = shift(images, generator)
        if how.flip:
            images = _flipped(images, generator)
        loss = nnf.cross_entropy(net(images), labels)
        if regularizer is not None:
            loss = loss + regularizer()
        optimizer.zero_grad()
        loss.backward()
        if method is not None:
            method.before_step()
        optimizer.step()
        if method is not None:
            method.after_step()
        total += loss.detach()
    if not math.isfinite(float(total)):
        raise DivergedError(f"the loss is {float(total) / count} in epoch {epoch + 1}")
    if not all(bool(value.isfinite().all()) for value in net.state_dict().values()):
        raise DivergedError(f"a weight is not finite after epoch {epoch + 1}")
    if method is not None:
        method.after_epoch()


def _flipped(images: Tensor, generator: torch.Generator) -> Tensor:  # [batch, channels, h, w]
    mirrored = torch.rand(len(images), generator=generator).to(images.device) < 0.5
    return torch.where(mirrored[:, None, None, None], images.flip(3), images)


def _restored(
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    method: Method | None,
    regularizer: OrthoRegularizer | None,
    store: Path | None,
) -> Progress:
    if store is None or not store.exists():
        return Progress(0, [])
    try:
        record, tensors = load_state(store)
    except ValueError as error:
        reason = str(error).partition(";")[0]
        raise ValueError(f"{reason}; remove it, then run the same command again") from error
    if method is not None:
        method.load_state_dict(record["method"])  # first: it removes what had been removed
    try:
        restore_training(net, optimizer, tensors)
    except ValueError as error:
        reason = str(error).partition(": ")[2]
        raise ValueError(
            f"{str(store)!r} is the state of another network than is built now: {reason}; if its "
            f"code was changed, remove {str(store.parent)!r}: what it holds is of the old one"
        ) from error
    if regularizer is not None and record.get("regularizer") is not None:
        vectors = under(VECTORS, tensors)
        regularizer.load_state_dict({**record["regularizer"], "vectors": vectors})
    return Progress(record["epoch"], record["notes"])


def _save(
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    method: Method | None,
    regularizer: OrthoRegularizer | None,
    progress: Progress,
    store: Path,
) -> None:
    term = {} if regularizer is None else regularizer.state_dict()
    vectors = {VECTORS + name: vector for name, vector in term.pop("vectors", {}).items()}
    record: Mapping[str, Any] = {
        "epoch": progress.epoch,
        "notes": progress.notes,
        "method": None if method is None else method.state_dict(),
        "regularizer": term or None,
    }
    store.parent.mkdir(parents=True, exist_ok=True)
    save_state(store, record, {**training_tensors(net, optimizer), **vectors}, REMEDY)
