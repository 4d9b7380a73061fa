"""The singular values of d outputs / d input: how well gradients pass through a network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .. import functional as F
from ..pruning.inputs import call, device_of, tensors_in, to_device
from .samples import Batch

MAX_OUTPUTS = 1024
_BLUR = 1e-5  # below this share of the largest, squares in float64 have lost half of their digits
_BUDGET = 1 << 25  # entries of the Jacobians that are held at once, 256 MiB


@dataclass(frozen=True)
class Spectrum:
    """Singular values of the Jacobians d outputs / d input (before any softmax), in eval mode.

    As in smilelogging's ``get_jacobian_singular_values``, which Wang et al. use (TPP, ICLR 2023),
    but for two things: that code leaves the training mode as it is, and divides by a smallest
    value of 0. All 1 would be dynamical isometry: no direction vanishes or explodes.

    Attributes:
        values: [samples, m] float64, descending, with m the smaller of outputs and inputs.
        conditions: [samples], largest over smallest; inf where the smallest is 0 within the
            rounding of the model's precision, as it is for outputs of a constant sum.
    """

    values: NDArray[np.float64]
    conditions: NDArray[np.float64]

    @property
    def mean(self) -> float:
        """The mean over samples and values: mean-JSV."""
        return float(self.values.mean())

    @property
    def std(self) -> float:
        """The standard deviation over samples and values."""
        return float(self.values.std())

    @property
    def largest(self) -> float:
        """The largest of all values."""
        return float(self.values.max())

    @property
    def smallest(self) -> float:
        """The smallest of all values."""
        return float(self.values.min())

    @property
    def condition(self) -> float:
        """The mean condition number over the samples; inf if one is."""
        return float(self.conditions.mean())

    @property
    def deficient(self) -> int:
        """How many samples have an infinite condition number."""
        return int(np.isinf(self.conditions).sum())

    @property
    def distance(self) -> float:
        """The mean of (value - 1)^2: 0 for dynamical isometry."""
        return float(((self.values - 1) ** 2).mean())


def jacobian_spectrum(model: nn.Module, batches: list[Batch], *, apart: bool) -> Spectrum | str:
    """The spectrum over all samples, from the smaller of J J^T and J^T J, or why there is none.

    One backward pass an output; `model` is in eval mode, gradients are on.

    Args:
        model: the model; its output, or the first tensor [samples, ...] in it, counts.
        batches: the samples; every floating-point tensor of an input counts.
        apart: whether samples of a batch do not influence each other; else each runs alone.
    """
    device = device_of(model)
    spectra: list[Tensor] = []
    precision = torch.float64
    for batch in batches:
        start, size = 0, 1  # the first one tells how many fit into memory
        while start < batch.size:
            part = batch.part(start, min(start + size, batch.size))
            jacobians = _jacobians(model, part, device)
            if isinstance(jacobians, str):
                return jacobians
            jacobian, dtype = jacobians
            precision = dtype if torch.finfo(dtype).eps > torch.finfo(precision).eps else precision
            m = min(jacobian.shape[1:])
            grams = F.gram([jacobian.flatten(0, 1)], "small", groups=[part.size])[0]
            square = torch.linalg.eigvalsh(grams.view(part.size, m, m)).flip(1)
            found = square.clamp(min=0).sqrt()
            blurred = found[:, -1] < _BLUR * found[:, 0]
            found[blurred] = torch.linalg.svdvals(jacobian[blurred])
            spectra.append(found)
            start += part.size
            size = max(1, _BUDGET // jacobian[0].numel()) if apart else 1
    values = torch.cat(spectra).cpu().numpy()
    top, bottom = values[:, 0], values[:, -1]
    full = bottom > top * values.shape[1] * torch.finfo(precision).eps
    conditions = np.full(len(values), np.inf)
    conditions[full] = top[full] / bottom[full]
    return Spectrum(values, conditions)


def _jacobians(
    model: nn.Module, batch: Batch, device: torch.device
) -> tuple[Tensor, torch.dtype] | str:
    """[samples, outputs, inputs] in float64, and the precision they were computed in."""
    leaves: list[Tensor] = []
    inputs = _with_leaves(to_device(batch.inputs, device), leaves, batch.size)
    if not leaves:
        return "the inputs hold no floating-point tensor to differentiate by"
    found = [
        t
        for t in tensors_in(call(model, inputs))
        if t.dim() > 1 and len(t) == batch.size and t.is_floating_point() and t.requires_grad
    ]
    if not found:
        return "the model returns no tensor [samples, outputs] that depends on its inputs"
    output = found[0].flatten(1)
    count = output.shape[1]
    if count > MAX_OUTPUTS:
        return f"it has {count} outputs, and as many backward passes; at most {MAX_OUTPUTS} are run"
    width = sum(leaf[0].numel() for leaf in leaves)
    jacobian = torch.zeros(batch.size, count, width, dtype=torch.float64, device=device)
    for c in range(count):
        last = c + 1 == count
        grads = torch.autograd.grad(
            output[:, c].sum(), leaves, retain_graph=not last, allow_unused=True
        )
        start = 0
        for leaf, grad in zip(leaves, grads, strict=True):
            stop = start + leaf[0].numel()
            if grad is not None:
                jacobian[:, c, start:stop] = grad.flatten(1)
            start = stop
    return jacobian, output.dtype


def _with_leaves(value: Any, leaves: list[Tensor], size: int) -> Any:
    """The inputs with every floating-point tensor of samples as one to differentiate by."""
    if isinstance(value, Tensor):
        if not value.is_floating_point() or value.dim() < 1 or len(value) != size:
            return value
        leaves.append(value.detach().clone().requires_grad_())
        return leaves[-1].clone()  # a model may write to its input
    if isinstance(value, Mapping):
        return {key: _with_leaves(entry, leaves, size) for key, entry in value.items()}
    if isinstance(value, (tuple, list)):
        return tuple(_with_leaves(entry, leaves, size) for entry in value)
    return value
