"""Units: the smallest sets of channels that can only leave together, and where they are."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .layout import Layout

NEVER = -1  # the unit of a channel that cannot go


@dataclass
class Slot:
    """One side of one layer, and the unit of each of its channels."""

    layer: str  # qualified name of the module, or of a bare parameter
    owner: str  # qualified name of the module that holds the tensors
    side: str  # "out", "in", or "both" (normalisation, depthwise: one channel is both)
    kind: str  # class name
    layout: Layout
    units: Tensor  # [channels] int64, CPU
    channels: Tensor  # [channels] int64, CPU: their numbers before anything was removed

    @property
    def has_filters(self) -> bool:
        """Whether its channels are filters of a convolution or linear layer."""
        return self.side != "in" and self.kind == "filters"


@dataclass
class Group:
    """The units of coupled layers, which are ranked, rounded and capped together."""

    name: str  # the first layer
    layers: tuple[str, ...]  # every layer whose filters it holds
    units: Tensor  # [u] int64, those still there, ascending
    original: int  # u before anything was removed
    channels: int  # channels that a unit takes from a layer (gcd over the layers)
    reason: str | None = None  # why it is not pruned
    suspect: bool = False  # it meets an operation that may fix the number of its channels


@dataclass
class Structure:
    """Every slot and group of a model; shrinks with the model."""

    slots: list[Slot]
    groups: list[Group]
    unreached: dict[str, str]  # filter layers that the forward pass did not call, and why
    branches: bool = False  # some layers run only while training, and were traced too

    @property
    def prunable(self) -> list[Group]:
        """The groups without a reason to stay."""
        return [group for group in self.groups if group.reason is None]

    def shrink(self, removed: Tensor) -> None:
        """Forgets units, [r] int64, after their channels were removed from the model."""
        for slot in self.slots:
            stays = ~torch.isin(slot.units, removed)
            slot.units, slot.channels = slot.units[stays], slot.channels[stays]
        for group in self.groups:
            group.units = group.units[~torch.isin(group.units, removed)]
