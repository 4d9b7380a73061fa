"""The parameters that hold the channels of units: their filters, and the norms that follow them.

A method gives every unit a number (a strength of decay, a factor, a mask); here each number reaches
the channels of its unit, wherever the graph says they are. So the BatchNorm that is quieted with a
filter is the one that follows it, not the next one registered.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..layers import FilterLayer, filter_layers
from .inputs import device_of
from .units import NEVER, Structure


@dataclass(frozen=True)
class Held:
    """One parameter, and the unit of each index of one of its dimensions."""

    layer: str  # qualified name of its module
    name: str  # qualified name of the parameter
    parameter: nn.Parameter
    dim: int
    units: Tensor  # [channels] int64, on the parameter's device; NEVER where a channel cannot go

    def spread(self, values: Tensor) -> Tensor:  # [units + 1] -> [.., channels, 1, ..]
        """A number for each unit, as a tensor that broadcasts over the parameter."""
        shape = [1] * self.parameter.dim()
        shape[self.dim] = -1
        return values[self.units].view(shape)


@dataclass(frozen=True)
class Matrix:
    """A layer whose filters belong to units: a filter matrix for the Gram operators."""

    layer: FilterLayer
    units: Tensor  # [n] int64, of its filters, on the weight's device

    def of_units(self, values: Tensor) -> Tensor:  # [units + 1] -> [n]
        """The number of each filter's unit."""
        return values.to(self.units.device)[self.units]


class Holders:
    """All that holds the channels of the prunable units of a structure; made anew after a cut.

    Attributes:
        filters: weights and biases of the layers whose filters the units are; shared ones once.
        norms: scales and shifts of the normalisation layers behind them.
        matrices: the same layers as filter matrices.
        device: of the model's first parameter, where those vectors are made.
        size: length of the vectors of numbers for all units: unit u has entry u, and the last one
            is for the channels that cannot go.
    """

    def __init__(self, model: nn.Module, structure: Structure) -> None:
        wanted = torch.cat([group.units for group in structure.prunable])
        layers = {layer.name: layer for layer in filter_layers(model)}
        self.size = int(wanted.max()) + 2
        self.device = device_of(model)
        self.filters: list[Held] = []
        self.norms: list[Held] = []
        self.matrices: list[Matrix] = []
        seen: set[tuple[int, int]] = set()
        for slot in structure.slots:
            if slot.side == "in" or not torch.isin(slot.units, wanted).any():
                continue
            module = model.get_submodule(slot.owner)
            units = torch.where(torch.isin(slot.units, wanted), slot.units, NEVER)
            found = self.filters if slot.has_filters else self.norms
            if slot.has_filters and slot.layer in layers:
                layer = layers[slot.layer]
                self.matrices.append(Matrix(layer, units.to(layer.weight.device)))
            for place in slot.layout.places:
                parameter = getattr(module, place.tensor)
                if not isinstance(parameter, nn.Parameter):  # a buffer, or no bias
                    continue
                if (id(parameter), place.dim) in seen:
                    continue
                seen.add((id(parameter), place.dim))
                channels = units[: len(units) // place.groups].to(parameter.device)
                name = f"{slot.owner}.{place.tensor}" if slot.owner else place.tensor
                found.append(Held(slot.owner, name, parameter, place.dim, channels))

    def values(self, units: Tensor, value: float = 1.0, rest: float = 0.0) -> Tensor:  # [size]
        """The vector that is `value` for these units, [r] int64, and `rest` for all others."""
        vector = torch.full((self.size,), rest, dtype=torch.float32)
        vector[units] = value
        return vector.to(self.device)

    @torch.no_grad()
    def add_decay_(self, strengths: Tensor, *, norms: bool = True) -> None:  # [size]
        """Adds strength * parameter to the gradient of every channel: L2 of strength / 2.

        Frozen parameters, and those without a gradient, stay as they are.
        """
        for held in self._held(norms):
            grad = held.parameter.grad
            if grad is not None and held.parameter.requires_grad:
                factors = held.spread(_like(strengths, held.parameter))
                grad.addcmul_(held.parameter, factors)

    @torch.no_grad()
    def scale_(self, factors: Tensor, *, norms: bool = True) -> None:  # [size]
        """Multiplies every channel; the last factor is to be 1. Frozen parameters stay."""
        for held in self._held(norms):
            if held.parameter.requires_grad:
                held.parameter.mul_(held.spread(_like(factors, held.parameter)))

    def _held(self, norms: bool) -> list[Held]:
        return [*self.filters, *self.norms] if norms else self.filters


def _like(values: Tensor, parameter: Tensor) -> Tensor:
    return values.to(parameter.device, parameter.dtype)
