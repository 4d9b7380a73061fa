"""Training, plainly: one function an epoch, and every epoch a function of its seed alone."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as nnf

from ..regularizer import OrthoRegularizer
from .data import Samples


class DivergedError(ArithmeticError):
    """The loss is no longer a finite number."""


_CUBLAS = "CUBLAS_WORKSPACE_CONFIG"


@contextmanager
def deterministic(device: str) -> Iterator[None]:
    """Makes work on a GPU repeatable where that is cheap; everything is as before afterwards.

    Promised on ``cuda``: torch's and cuDNN's kernels are the deterministic ones where they exist,
    cuDNN does not choose by timing, and an operation that has none (a custom ``--model`` may use
    one) warns and still runs. Networks of such operations only give the same numbers again on the
    same GPU model, driver and versions, interrupted or not; nothing is promised between machines.
    cuBLAS takes part only if this process did not use it before. On ``cpu`` nothing changes: there
    the numbers are the same for the same processor, versions and ``--threads``.
    """
    if device != "cuda":
        yield
        return
    cudnn = torch.backends.cudnn
    memory: Any = torch.utils.deterministic  # a module whose attributes are properties
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    before = cudnn.benchmark, memory.fill_uninitialized_memory, os.environ.get(_CUBLAS)
    try:
        os.environ.setdefault(_CUBLAS, ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        cudnn.benchmark = False
        memory.fill_uninitialized_memory = False  # it is never read, and filling it takes time
        yield
    finally:
        cudnn.benchmark, memory.fill_uninitialized_memory, workspace = before
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        if workspace is None:
            os.environ.pop(_CUBLAS, None)


def shift(
    images: Tensor,  # [batch, channels, height, width]
    generator: torch.Generator,
) -> Tensor:
    """Moves every image by up to an eighth of its side each way; the border is repeated."""
    rows, columns = (_moved_indices(images, dim, generator) for dim in (2, 3))
    image = torch.arange(len(images), device=images.device)[:, None, None]
    return images[image, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


def _moved_indices(images: Tensor, dim: int, generator: torch.Generator) -> Tensor:
    """Indices along ``dim``, [batch, size], each image moved by a number of pixels of its own."""
    size = images.shape[dim]
    moves = torch.randint(-(size // 8), size // 8 + 1, (len(images), 1), generator=generator)
    return (torch.arange(size) + moves).clamp(0, size - 1).to(images.device)


def cosine(lr: float, progress: float) -> float:
    """Learning rate after ``progress`` in [0, 1] of the training: half a cosine from lr to 0."""
    return 0.5 * lr * (1 + math.cos(math.pi * progress))


def train_epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    samples: Samples,
    regularizer: OrthoRegularizer | None = None,
    *,
    seed: int,
    epoch: int,  # from 0
    epochs: int,
    lr: float,
    batch_size: int,
) -> tuple[float, float]:
    """Trains for one epoch; returns the mean loss and the mean penalty (0 without a regulariser).

    Order and augmentation come from ``seed`` and nothing else, so that an interrupted epoch can be
    done again with the same result.

    Raises:
        DivergedError: Loss or penalty is not finite.
    """
    torch.manual_seed(seed)  # for layers that draw, such as dropout
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(samples), generator=generator)
    batches = order.to(samples.labels.device).split(batch_size)
    if len(batches) > 1 and len(batches[-1]) < batch_size:
        batches = batches[:-1]  # BatchNorm cannot train on a last batch of one image

    model.train()
    totals = torch.zeros(2, device=samples.labels.device)
    for step, batch in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = cosine(lr, (epoch + step / len(batches)) / epochs)
        images, labels = samples.batch(batch)
        loss = nnf.cross_entropy(model(shift(images, generator)), labels)
        penalty = regularizer() if regularizer is not None else torch.zeros_like(loss)
        optimizer.zero_grad()
        (loss + penalty).backward()
        optimizer.step()
        totals += torch.stack([loss.detach(), penalty.detach()])

    mean_loss, mean_penalty = (totals / len(batches)).tolist()
    if not math.isfinite(mean_loss + mean_penalty):
        raise DivergedError(f"loss {mean_loss}, penalty {mean_penalty}")
    return mean_loss, mean_penalty


@torch.no_grad()
def accuracy(model: nn.Module, samples: Samples) -> float:
    """Returns the share of right answers in percent, in eval mode."""
    model.eval()
    right = sum(int((model(x).argmax(1) == y).sum()) for x, y in samples.batches())
    return 100 * right / len(samples)
