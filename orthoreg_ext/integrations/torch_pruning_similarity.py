"""How alike the channels of a Torch-Pruning group are, by the filters that make them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from ..layers import FilterLayer, layer_kind
from ..pruning.redundancy import cosines, is_zero
from ..pruning.variety_rules import Similar
from .torch_pruning_groups import Item


def filters_of(layer: nn.Module) -> FilterLayer:
    """A convolution or linear layer as a set of filters."""
    kind = layer_kind(layer)
    if kind is None:
        raise ValueError(f"{type(layer).__name__} has no filters: leave it out of target_types")
    return FilterLayer("", layer, kind, int(getattr(layer, "groups", 1)))


def similar(items: list[Item], size: int) -> Similar:
    """How alike the root channels are, by the filters that make them."""
    total = torch.zeros(size, size, dtype=torch.float64)
    count = torch.zeros(size, size, dtype=torch.float64)
    alive = torch.zeros(size, dtype=torch.bool)
    held = torch.zeros(size, dtype=torch.bool)
    all_of_them = torch.arange(size)
    for item in items:
        layer = filters_of(item.layer)
        place = torch.full((layer.filters,), -1)
        place[all_of_them if item.channels is None else item.channels] = (
            all_of_them if item.places is None else torch.tensor(item.places)
        )
        matrices = layer.weight.detach().flatten(1).chunk(layer.groups)
        for matrix, places in zip(matrices, place.chunk(layer.groups), strict=True):
            rows = (places >= 0).nonzero().flatten()
            at = places[rows]
            held[at] = True
            alive[at[~is_zero(matrix).cpu()[rows]]] = True
            pairs = (at.unsqueeze(1), at.unsqueeze(0))
            alike = cosines(matrix).cpu()[rows.unsqueeze(1), rows]
            total.index_put_(pairs, alike, accumulate=True)
            count.index_put_(pairs, torch.ones_like(alike), accumulate=True)
    mean = (total / count.clamp(min=1)).round(decimals=12).fill_diagonal_(0)
    return Similar(mean, held & ~alive)


def distinct(scores: Tensor) -> Tensor:  # [n] float64 -> [n] float32
    """Rounded so that the order stays, none equal."""
    order = torch.argsort(scores, stable=True)
    values = scores[order].float().numpy()
    for k in range(1, len(values)):
        values[k] = max(values[k], np.nextafter(values[k - 1], np.float32(np.inf)))
    found = torch.empty(len(values))
    found[order] = torch.from_numpy(values)
    return found
