"""The parameters that hold the channels of units: their filters, and the norms that follow them.

A method gives every unit a number (a strength of decay, a factor, a mask); here each number reaches
the channels of its unit, wherever the graph says they are. So the BatchNorm that is quieted with a
filter is the one that follows it, not the next one registered.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from .. import functional
from ..layers import FilterLayer, filter_layers
from .inputs import device_of
from .units import NEVER, Structure

_NORMS = (_BatchNorm, _InstanceNorm, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)


@dataclass(frozen=True)
class Held:
    """One parameter, and the unit of each index of one of its dimensions.

    The parameter is read from its module at every access, so that a replaced one is seen.
    """

    layer: str  # qualified name of its module
    module: nn.Module
    attribute: str  # "weight" or "bias"
    dim: int
    units: Tensor  # [channels] int64, on the parameter's device; NEVER where a channel cannot go

    @property
    def name(self) -> str:
        """The qualified name of the parameter."""
        return f"{self.layer}.{self.attribute}" if self.layer else self.attribute

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter as the module has it now."""
        parameter = self.module._parameters[self.attribute]
        assert parameter is not None
        return parameter

    def spread(self, values: Tensor) -> Tensor:  # [units + 1] -> [.., channels, 1, ..]
        """A number for each unit, as a tensor that broadcasts over the parameter."""
        parameter = self.parameter
        shape = [1] * parameter.dim()
        shape[self.dim] = -1
        of_channels = values.to(parameter.device)[self.units.to(parameter.device)]
        return of_channels.view(shape).to(parameter.dtype)


@dataclass(frozen=True)
class Matrix:
    """A layer whose filters belong to units: a filter matrix for the Gram operators."""

    layer: FilterLayer
    units: Tensor  # [n] int64, of its filters, on the weight's device

    def of_units(self, values: Tensor) -> Tensor:  # [units + 1] -> [n]
        """The number of each filter's unit."""
        return values.to(self.units.device)[self.units]


@dataclass(frozen=True)
class Spread:
    """A number for each unit, laid out along every parameter once and used for many steps.

    Frozen parameters stay as they are.
    """

    parts: list[tuple[Held, Tensor]]  # factors that broadcast over the parameter

    @torch.no_grad()
    def add_decay_(self, strength: float = 1.0) -> None:
        """Adds strength * number * parameter to each gradient, where there is one."""
        for held, factors in self.parts:
            parameter = held.parameter
            if parameter.grad is not None and parameter.requires_grad:
                factors = factors.to(parameter)
                parameter.grad.addcmul_(parameter, factors, value=strength)

    @torch.no_grad()
    def scale_(self) -> None:
        """Multiplies each parameter by its numbers."""
        for held, factors in self.parts:
            parameter = held.parameter
            if parameter.requires_grad:
                parameter.mul_(factors.to(parameter))

    @torch.no_grad()
    def scale_gradients_(self) -> None:
        """Multiplies each gradient, where there is one, by the numbers of its parameter."""
        for held, factors in self.parts:
            if held.parameter.grad is not None:
                held.parameter.grad.mul_(factors.to(held.parameter))


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
            if not slot.has_filters and not isinstance(module, _NORMS):
                continue  # a PReLU, an embedding, a bare parameter
            units = torch.where(torch.isin(slot.units, wanted), slot.units, NEVER)
            found = self.filters if slot.has_filters else self.norms
            if slot.has_filters and slot.layer in layers:
                layer = layers[slot.layer]
                self.matrices.append(Matrix(layer, units.to(layer.weight.device)))
            for place in slot.layout.places:
                parameter = module._parameters.get(place.tensor)
                if parameter is None:  # a buffer, or no bias
                    continue
                if (id(parameter), place.dim) in seen:
                    continue
                seen.add((id(parameter), place.dim))
                channels = units[: len(units) // place.groups].to(parameter.device)
                found.append(Held(slot.owner, module, place.tensor, place.dim, channels))

    def values(self, units: Tensor, value: float = 1.0, rest: float = 0.0) -> Tensor:  # [size]
        """The vector that is `value` for these units, [r] int64, and `rest` for all others."""
        vector = torch.full((self.size,), rest, dtype=torch.float64)
        vector[units] = value
        return vector.to(self.device)

    def spread(
        self,
        values: Tensor,  # [size]
        *,
        biases: bool = True,
        norms: bool = True,
    ) -> Spread:
        """Lays the numbers of all units out along the parameters that hold them, for many steps.

        Args:
            values: the number of each unit.
            biases: also along the filters' biases.
            norms: also along the scales and shifts of the norms.
        """
        filters = [held for held in self.filters if biases or held.attribute != "bias"]
        return Spread([(h, h.spread(values)) for h in (*filters, *(self.norms if norms else ()))])

    def add_decay_(self, strengths: Tensor, *, norms: bool = True) -> None:  # [size]
        """Adds strength * parameter to the gradient of every channel: L2 of strength / 2.

        Frozen parameters, and those without a gradient, stay as they are.
        """
        self.spread(strengths, norms=norms).add_decay_()

    def scale_(self, factors: Tensor, *, biases: bool = True, norms: bool = True) -> None:  # [size]
        """Multiplies every channel; the last factor is to be 1. Frozen parameters stay."""
        self.spread(factors, biases=biases, norms=norms).scale_()

    def scale_gradients_(self, factors: Tensor, *, norms: bool = True) -> None:  # [size]
        """Multiplies the gradient of every channel, where there is one; the last factor is 1."""
        self.spread(factors, norms=norms).scale_gradients_()

    @torch.no_grad()
    def magnitudes(self) -> Tensor:  # [size] float64
        """The mean |w| of every unit: over the entries of a filter, then over its filters."""
        weights = [m.layer.weight.detach() for m in self.matrices]
        norms = functional.filter_scores(weights, None, ("l1",))["l1"]
        means = [
            norm.double().to(self.device) / max(1, m.layer.fan_in)
            for norm, m in zip(norms, self.matrices, strict=True)
        ]
        units, counts = self._rows
        total = torch.zeros(self.size, dtype=torch.float64, device=self.device)
        return total.index_add_(0, units, torch.cat(means)) / counts

    @cached_property
    def _rows(self) -> tuple[Tensor, Tensor]:
        """The units of all rows of the matrices, [sum n], and the rows of each unit, [size]."""
        units = torch.cat([m.units.to(self.device) for m in self.matrices])
        units = torch.where(units == NEVER, self.size - 1, units)
        return units, torch.bincount(units, minlength=self.size).clamp_(min=1)
