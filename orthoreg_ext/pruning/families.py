"""Which groups of layers are alike, so that isomorphic pruning may rank them together."""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import nn

from ..layers import layer_kind
from .units import Group, Structure


def kinds(model: nn.Module, structure: Structure) -> list[Hashable]:
    """What each prunable group is made of; equal for groups that are isomorphic.

    Isomorphic pruning (Fang et al., ECCV 2024, arXiv 2407.04616) ranks only sub-structures of the
    same computational topology together, since the scores of others differ in scale. Here a group
    is described by all layers that its units run through: for each its class, the kind of
    convolution, the side that is cut and how many of its channels a unit takes. Widths and kernel
    sizes do not count.

    Paper against code: the released code (Torch-Pruning, base_pruner.py) compares the edges by
    class and side in the order in which they were found, so that the same topology in another order
    is another kind, and a grouped convolution is alike a plain one. Here the order does not count:
    isomorphic groups always have the same description, and groups of the same layers in another
    wiring have it, too, and are taken as alike.
    """
    return [_kind(model, structure, group) for group in structure.prunable]


def _kind(model: nn.Module, structure: Structure, group: Group) -> Hashable:
    parts = []
    for slot in structure.slots:
        held = slot.units[torch.isin(slot.units, group.units)]
        if len(held):
            takes = held.unique(return_counts=True)[1].unique().tolist()
            if slot.kind == "Parameter":
                parts.append((slot.kind, "", slot.side, tuple(takes)))
            else:
                module = model.get_submodule(slot.owner)
                name = type(module).__name__
                parts.append((name, layer_kind(module) or "", slot.side, tuple(takes)))
    return tuple(sorted(parts))
