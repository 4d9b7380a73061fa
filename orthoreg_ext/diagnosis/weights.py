"""The numbers of a layer that come from its weights alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import functional as F
from ..layers import FilterLayer
from ..reference import cosines_of, filter_matrices

_ILL = 1e-8
"""Below this ratio of its eigenvalues a Gram matrix has lost too many digits of the smallest."""


@dataclass(frozen=True)
class WeightNumbers:
    """Numbers of a layer's filter matrices W, one a group, and their Gram matrices G.

    Attributes:
        side: The smaller side, ``"rows"`` (G = W W^T) or ``"cols"`` (W^T W), which `degree` is of.
        degree: ||diag G||_1 / ||G||_1: 1 for orthogonal rows (columns), 0 for a layer of zeros.
        mean_cosine: Mean |cosine| over the pairs of filters of a group; 0 without a pair.
        max_cosine: The largest.
        pairs: How many pairs there are.
        condition: Largest over smallest singular value of W, of the worst group; inf where W has
            no full rank (a zero filter, equal filters).
        dead: The filters all of whose weights are 0, whatever their bias.
    """

    side: str
    degree: float
    mean_cosine: float
    max_cosine: float
    pairs: int
    condition: float
    dead: tuple[int, ...]


def measure_weights(layers: list[FilterLayer], biases: list[Tensor | None]) -> list[WeightNumbers]:
    """Measures every layer in float64, one after the other; the host waits once for all of them.

    Args:
        layers: the layers.
        biases: each [n]: one more column of the filter matrices, or None.

    Raises:
        ValueError: a weight is NaN or infinite.
    """
    pieces = [_measure(layer, bias) for layer, bias in zip(layers, biases, strict=True)]
    numbers = _to_host([piece for piece, _ in pieces])
    dead = _to_host([mask for _, mask in pieces])
    found = []
    for layer, bias, values, mask in zip(layers, biases, numbers, dead, strict=True):
        degree, mean, largest, ratio, finite = values
        if not finite:
            raise ValueError(
                f"layer {layer.name!r} holds NaN or infinite weights, of which no number can be "
                "told; load weights that are finite, or name the layer in exclude="
            )
        n = layer.filters // layer.groups
        columns = n > layer.fan_in + (bias is not None)
        found.append(
            WeightNumbers(
                side="cols" if columns else "rows",
                degree=degree,
                mean_cosine=mean,
                max_cosine=largest,
                pairs=layer.groups * n * (n - 1) // 2,
                condition=ratio**-0.5 if ratio > _ILL else _condition(layer, bias),
                dead=tuple(i for i, gone in enumerate(mask) if gone),
            )
        )
    return found


def _measure(layer: FilterLayer, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """[5]: degree, mean and largest |cosine|, the worst ratio of eigenvalues, finite; dead [n]."""
    weight = layer.weight.detach().double()
    dead = weight.flatten(1).eq(0).all(1)
    column = None if bias is None else bias.detach().double()
    finite = weight.isfinite().all() if column is None else _finite(weight, column)
    weight = weight.where(finite, 0)  # refused when the host knows
    largest = weight.abs().amax()
    if column is not None:
        column = column.where(finite, 0)
        largest = torch.maximum(largest, column.abs().amax())
    scale = largest.where(largest > 0, 1)  # squares of any weights are then in range
    filters, groups = [weight / scale], [layer.groups]
    columns = [None if column is None else column / scale]
    n, k = len(dead) // layer.groups, layer.fan_in + (column is not None)
    rows = F.gram(filters, biases=columns, groups=groups)[0].view(layer.groups, n, n)
    small = rows
    if n > k:
        small = F.gram(filters, "cols", biases=columns, groups=groups)[0].view(layer.groups, k, k)
    total = small.abs().sum()
    degree = small.diagonal(dim1=1, dim2=2).sum() / total.where(total > 0, 1)
    cosines = cosines_of(rows)[0].abs().clamp(max=1)
    mean = cosines.sum() / max(layer.groups * n * (n - 1), 1)
    spectrum = torch.linalg.eigvalsh(small).clamp(min=0)  # [g, m], ascending
    top = spectrum[:, -1]
    ratio = (spectrum[:, 0] / top.where(top > 0, 1)).amin()
    return torch.stack([degree, mean, cosines.amax(), ratio, finite.double()]), dead


def _finite(weight: Tensor, column: Tensor) -> Tensor:
    return weight.isfinite().all() & column.isfinite().all()


def _condition(layer: FilterLayer, bias: Tensor | None) -> float:
    """The condition number from W itself: its square, in G, is beyond float64."""
    weight = layer.weight.detach().double()
    column = weight.new_empty(0) if bias is None else bias.detach().double()
    matrices = filter_matrices(weight, column, layer.groups)
    values = torch.linalg.svdvals(matrices)  # [g, m], descending
    top, bottom = values[:, 0], values[:, -1]
    noise = max(matrices.shape[1:]) * torch.finfo(torch.float64).eps
    ratio = float((bottom / top.where(top > 0, 1)).amin())
    return math.inf if ratio <= noise else 1 / ratio


def _to_host(tensors: list[Tensor]) -> list[list[float]]:
    """The numbers of each tensor, by one copy a device."""
    found: list[list[float]] = [[] for _ in tensors]
    for device in {tensor.device for tensor in tensors}:
        mine = [i for i, tensor in enumerate(tensors) if tensor.device == device]
        numbers = torch.cat([tensors[i] for i in mine]).tolist()
        start = 0
        for i in mine:
            found[i] = numbers[start : start + len(tensors[i])]
            start += len(tensors[i])
    return found


def silent_channels(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The channels of each normalisation layer whose scale and shift are both 0.

    They put out zeros whatever comes in. Which filters are before them only a graph could tell.
    """
    found = {}
    for name, module in model.named_modules():
        if not isinstance(module, (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)):
            continue
        scale, shift = module.weight, module.bias
        if scale is None or scale.dim() != 1:
            continue
        silent = scale.detach().eq(0)
        if shift is not None:
            silent = silent & shift.detach().eq(0)
        if channels := tuple(silent.nonzero().flatten().tolist()):
            found[name] = channels
    return found
