"""What a model would cost without some of its units, from its shapes alone."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .counts import Counts, widths, work
from .units import Slot, Structure


@dataclass(frozen=True)
class _Tensor:
    """A parameter or buffer: the product of the sizes that no unit is in, and those of the rest."""

    rest: int
    sides: tuple[tuple[Slot, int], ...]  # (slot, convolution groups) of each dimension with units
    entry_bytes: int
    is_parameter: bool

    def entries(self, gone: Tensor) -> int:  # [units + 1] bool
        return self.rest * math.prod(_left(slot, gone, groups) for slot, groups in self.sides)


@dataclass(frozen=True)
class _Layer:
    """A layer that was called: its work for one entry of the weight and one output channel."""

    macs: int
    weight: _Tensor | None  # None: nothing of it is cut, `macs` are all
    output_bytes: int
    outputs: Slot | None


class Ledger:
    """Predicts what :func:`count` gives after a cut, without cutting.

    A tensor holds the product of its sizes, and each of them is a number of channels; a layer
    multiplies every entry of its weight with each position of its feature map. The prediction is
    exact as long as the positions (height, width, tokens, batch) do not depend on the channels, as
    they do where a linear layer runs over the pixels of every channel.

    Args:
        model: the traced model.
        structure: its units; may shrink later.
        example_inputs: as for :func:`count`.
    """

    def __init__(self, model: nn.Module, structure: Structure, example_inputs: Any) -> None:
        self._structure = structure
        sides: dict[int, dict[int, tuple[Slot, int]]] = defaultdict(dict)
        outputs: dict[str, Slot] = {}
        for slot in structure.slots:
            if slot.has_filters:
                outputs[slot.layer] = slot
            for place in slot.layout.places:
                tensor = _stored(model.get_submodule(slot.owner), place.tensor)
                if tensor is not None:
                    sides[id(tensor)].setdefault(place.dim, (slot, place.groups))
        none = self._gone(torch.empty(0, dtype=torch.int64))

        def entry(tensor: Tensor) -> _Tensor:
            cut = sides.get(id(tensor), {})
            rest = math.prod(size for dim, size in enumerate(tensor.shape) if dim not in cut)
            parameter = isinstance(tensor, nn.Parameter)
            return _Tensor(rest, tuple(cut.values()), tensor.element_size(), parameter)

        tensors = {id(t): entry(t) for t in (*model.parameters(), *model.buffers())}
        self._tensors = list(tensors.values())
        self._filters = [(outputs.get(name), width) for name, width in widths(model).items()]
        self._layers = []
        for name, done in work(model, example_inputs).items():
            weight = tensors.get(id(_stored(model.get_submodule(name), "weight")))
            out = outputs.get(name)
            entries = weight.entries(none) if weight else 1
            channels = _left(out, none) if out else 1
            self._layers.append(
                _Layer(done.macs // entries, weight, done.output_bytes // channels, out)
            )

    def after(self, removed: Tensor) -> Counts:  # [r] int64
        """The size of the model without these units and those that are gone already."""
        gone = self._gone(removed)
        entries = [(tensor, tensor.entries(gone)) for tensor in self._tensors]
        return Counts(
            filters=sum(_left(slot, gone) if slot else width for slot, width in self._filters),
            params=sum(count for tensor, count in entries if tensor.is_parameter),
            macs=sum(
                layer.macs * (layer.weight.entries(gone) if layer.weight else 1)
                for layer in self._layers
            ),
            memory=sum(tensor.entry_bytes * count for tensor, count in entries)
            + sum(
                layer.output_bytes * (_left(layer.outputs, gone) if layer.outputs else 1)
                for layer in self._layers
            ),
        )

    def _gone(self, removed: Tensor) -> Tensor:
        # the last entry, which NEVER = -1 reads, stays false
        last = max((int(slot.units.max()) for slot in self._structure.slots), default=-1)
        gone = torch.zeros(max(last, int(removed.max()) if len(removed) else -1) + 2).bool()
        gone[removed] = True
        return gone


def _stored(module: nn.Module, name: str) -> Tensor | None:
    """A parameter or buffer; None for what is computed (a parametrized weight), so not cut."""
    return module._parameters.get(name, module._buffers.get(name))


def _left(slot: Slot, gone: Tensor, groups: int = 1) -> int:
    """The channels of a slot that stay; those of one group of a grouped convolution."""
    units = slot.units[: len(slot.units) // groups]
    return len(units) - int(gone[units].sum())
