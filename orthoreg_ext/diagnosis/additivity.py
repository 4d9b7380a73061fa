"""Whether the importance of a group of filters is the sum of theirs: the additivity gap.

With c_i = <theta_i, g_i> of one sample (filter i and the gradient of that sample's loss), the
group's importance is E[(sum_i c_i)^2], the sum of the single ones is sum_i E[c_i^2]. They differ by
the off-diagonal entries of M = E[c c^T]. That scores of single filters add up is what OrthoReg
(Lubana et al., arXiv 2009.05014) rests on; its code forms no M, so the definitions are ours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as nnf

from .. import functional as F
from ..layers import FilterLayer
from ..pruning.calibration import Loss
from ..pruning.inputs import call, device_of, to_device
from .samples import Batch

_AGREE = 1e-3
"""Largest difference of the two routes to a contribution, relative to sum |theta g|."""


@dataclass(frozen=True)
class Additivity:
    """How far the filters of a layer are from contributing independently.

    Attributes:
        gap: sum_{i != j} |M_ij| / sum_ij |M_ij|, in [0, 1): 0 where importances add up, 1 - 1/n
            for n equal contributions; 0 too where nothing contributes.
        floor: The gap of the same contributions with random signs, which are uncorrelated: what
            so few samples show where there is nothing. A gap near it says no more than that.
        ratio: E[(sum_i c_i)^2] / sum_i E[c_i^2], signed: 1 where importances add up, n for n equal
            contributions, below 1 where they cancel; 1 too where nothing contributes.
        off: sum_{i != j} |M_ij|.
        mass: sum_ij |M_ij|.
        idle: The filters that contribute nothing to the loss of any sample (behind a dead ReLU or
            a normalisation with scale 0, say).
    """

    gap: float
    floor: float
    ratio: float
    off: float
    mass: float
    idle: tuple[int, ...]


@dataclass(frozen=True)
class Contributions:
    """What every sample says of every filter.

    Attributes:
        values: Each [samples, n] float64, one a layer.
        apart: Whether the samples of a batch could be told apart; else each one ran alone.
        reached: Whether the loss depends on the layer.
    """

    values: list[Tensor]
    apart: bool
    reached: list[bool]


def additivity(contributions: Tensor) -> Additivity:  # [samples, n]
    """The numbers of one layer from its contributions, with one wait for a GPU."""
    drawn = torch.randint(
        2, contributions.shape, generator=torch.Generator().manual_seed(0), dtype=torch.int8
    )
    signs = 2.0 * drawn.to(contributions.device) - 1
    parts = [*_masses(contributions), *_masses(contributions * signs)[:2]]
    idle = contributions.eq(0).all(0)
    off, mass, diagonal, group, random_off, random_mass = torch.stack(parts).tolist()
    return Additivity(
        gap=off / mass if mass else 0.0,
        floor=random_off / random_mass if random_mass else 0.0,
        ratio=group / diagonal if diagonal else 1.0,
        off=off,
        mass=mass,
        idle=tuple(idle.nonzero().flatten().tolist()),
    )


def _masses(contributions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of M: off-diagonal and whole absolute mass, trace, and the sum of all entries."""
    moment = F.gram([contributions], "cols")[0] / len(contributions)
    diagonal = moment.diagonal().sum()
    off = moment.abs().fill_diagonal_(0).sum()
    return off, off + diagonal, diagonal, contributions.sum(1).square().mean()


def contributions(
    model: nn.Module,
    layers: list[FilterLayer],
    with_bias: list[bool],
    batches: list[Batch],
    loss: Loss | None,
) -> Contributions:
    """c_i = <theta_i, g_i> of every sample and filter; `model` is in eval mode, gradients are on.

    A layer is linear in its weight, so that <theta_i, g_i> is sum_positions z_i dL/dz_i with z its
    output less the bias: one backward pass gives all samples of a batch. That is right only where
    the samples of a batch do not meet, every use of a weight is a call of its layer and the loss is
    a mean over the samples. So the first and the last sample of the first batch are run alone
    and differentiated by the weights; if that is not the same, all samples are.

    Raises:
        ValueError: the loss is no finite scalar.
    """
    device = device_of(model)
    first = batches[0]
    ends = sorted({0, first.size - 1})
    alone = [_alone(model, layers, with_bias, first.part(i, i + 1), loss, device) for i in ends]
    reached = [any(found.reached[i] for found in alone) for i in range(len(layers))]
    together = _together(model, layers, with_bias, first, loss, device)
    apart = together is not None and all(
        bool(((got[row] - c).abs() <= _AGREE * (size + 1e-3 * size.amax())).all())
        for row, found in zip(ends, alone, strict=True)
        for got, c, size in zip(together.values, found.values, found.sizes, strict=True)
    )
    rows: list[_Rows] = []
    for batch in batches:
        found = _together(model, layers, with_bias, batch, loss, device) if apart else None
        if found is None:
            apart = False
            parts = batch.parts(1)
            rows += [_alone(model, layers, with_bias, part, loss, device) for part in parts]
        else:
            rows.append(found)
    if not bool(torch.stack([row.loss for row in rows]).isfinite().all()):
        raise ValueError(
            "the loss of a sample is NaN or infinite, so no filter's contribution to it can be "
            "told; check data, loss= and the model's weights"
        )
    values = [torch.cat([row.values[i] for row in rows]) for i in range(len(layers))]
    reached = [a or any(row.reached[i] for row in rows) for i, a in enumerate(reached)]
    return Contributions(values, apart, reached)


@dataclass(frozen=True)
class _Rows:
    values: list[Tensor]  # each [samples, n]
    sizes: list[Tensor]  # each [n], sum |theta g|; of one sample only
    reached: list[bool]
    loss: Tensor


def _loss(model: nn.Module, batch: Batch, loss: Loss | None, device: torch.device) -> Tensor:
    output = call(model, to_device(batch.inputs, device))
    target = to_device(batch.target, device)
    value: Any = nnf.cross_entropy(output, target) if loss is None else loss(output, target)
    if not isinstance(value, Tensor) or value.numel() != 1:
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"loss returned {got}, expected a scalar tensor (a mean over the batch)")
    return value.reshape(())


def _alone(
    model: nn.Module,
    layers: list[FilterLayer],
    with_bias: list[bool],
    sample: Batch,
    loss: Loss | None,
    device: torch.device,
) -> _Rows:
    """One sample, by the definition."""
    with nn.utils.parametrize.cached():  # module.weight is then what the forward takes
        tensors: list[Tensor] = [layer.module.weight for layer in layers]  # type: ignore[misc]
        owners = [i for i, bias in enumerate(with_bias) if bias]
        biases = [layers[i].bias for i in owners]
        value = _loss(model, sample, loss, device)
        grads = torch.autograd.grad(
            value, [*tensors, *(b for b in biases if b is not None)], allow_unused=True
        )
    values, sizes, reached = [], [], []
    for layer, weight, grad in zip(layers, tensors, grads, strict=False):
        reached.append(grad is not None)
        grad = torch.zeros_like(weight) if grad is None else grad
        product = layer.rows(weight.detach().double() * grad.double()).flatten(1)
        values.append(product.sum(1))
        sizes.append(product.abs().sum(1))
    for i, bias, grad in zip(owners, biases, grads[len(layers) :], strict=True):
        if bias is not None and grad is not None:
            product = bias.detach().double() * grad.double()
            values[i] = values[i] + product
            sizes[i] = sizes[i] + product.abs()
    return _Rows([v.unsqueeze(0) for v in values], sizes, reached, value.detach())


def _together(
    model: nn.Module,
    layers: list[FilterLayer],
    with_bias: list[bool],
    batch: Batch,
    loss: Loss | None,
    device: torch.device,
) -> _Rows | None:
    """All samples of a batch from the layers' outputs; None where they have no dim for samples."""
    outputs: list[tuple[int, Tensor]] = []

    def keep(i: int) -> Callable[[nn.Module, object, object], Tensor | None]:
        def hook(module: nn.Module, args: object, output: object) -> Tensor | None:
            if not isinstance(output, Tensor) or not output.requires_grad:
                return None
            outputs.append((i, output))
            return output.clone()  # what follows in place leaves ours as it is

        return hook

    handles = [
        layer.module.register_forward_hook(keep(i), prepend=True) for i, layer in enumerate(layers)
    ]
    try:
        value = _loss(model, batch, loss, device)
    finally:
        for handle in handles:
            handle.remove()
    tensors = [output for _, output in outputs]
    # the loss is a mean
    grads = torch.autograd.grad(value * batch.size, tensors, allow_unused=True) if tensors else ()
    values = [
        torch.zeros(batch.size, layer.filters, dtype=torch.float64, device=layer.weight.device)
        for layer in layers
    ]
    reached = [False] * len(layers)
    for (i, output), grad in zip(outputs, grads, strict=True):
        layer = layers[i]
        if grad is None:
            continue
        reached[i] = True
        channel = -1 if layer.kind == "linear" else 1
        if output.dim() < 2 or len(output) != batch.size or output.shape[channel] != layer.filters:
            return None
        moved = output.detach().double().movedim(channel, 1)
        if layer.bias is not None and not with_bias[i]:
            bias = layer.bias.detach().double()
            moved = moved - bias.view(-1, *[1] * (moved.dim() - 2))
        product = moved * grad.double().movedim(channel, 1)
        values[i] += product.flatten(2).sum(2) if product.dim() > 2 else product
    return _Rows(values, [], reached, value.detach())
