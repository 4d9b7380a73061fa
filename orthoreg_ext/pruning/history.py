"""The filters that a history removes, checked entry by entry before anything is changed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .units import NEVER, Slot, Structure


def check_history(history: object) -> Sequence[Any]:
    """Refuses what is no sequence of entries.

    Raises:
        TypeError: it is something else; says what to pass.
    """
    if isinstance(history, Mapping):
        raise TypeError(
            "source is a dictionary, expected a directory or a list of entries; pass "
            'document["history"]'
        )
    if not isinstance(history, Sequence) or isinstance(history, (str, bytes)):
        raise TypeError(
            f"source is {type(history).__name__}, expected a directory that PruneResult.save "
            "wrote, or PruneResult.history"
        )
    return history


def units_of(structure: Structure, history: Sequence[Any]) -> Tensor:
    """The units that a history removes, [r] int64, checked against every layer it names.

    Raises:
        ValueError: an entry that is malformed, or that does not fit the model.
    """
    slots = {slot.layer: slot for slot in structure.slots if slot.has_filters}
    recorded: dict[str, set[int]] = defaultdict(set)
    for number, entry in enumerate(history):
        slot, indices = _entry(slots, number, entry)
        gone = recorded[slot.layer]
        where = f"the history (entry {number}) removes"
        if again := sorted(gone & indices):
            raise ValueError(
                f"{where} filters {again[:3]} of {slot.layer!r}, which an earlier entry removed; "
                "expected each filter once, indices count those of the unpruned layer"
            )
        gone |= indices
        left = len(slot.units) - len(gone)
        if left == 0:
            raise ValueError(
                f"{where} all {len(gone)} filters of {slot.layer!r}, expected at least one to stay"
            )
        if "filters" in entry and entry["filters"] != left:
            raise ValueError(
                f"{where} {len(indices)} filters of {slot.layer!r} and says that "
                f"{entry['filters']!r} are left, expected {left} of {len(slot.units)}; the history "
                "is of another model, or was edited"
            )
    units = [slots[layer].units[sorted(gone)] for layer, gone in recorded.items()]
    removed = torch.cat(units).unique() if units else torch.empty(0, dtype=torch.int64)
    _check_coupling(structure, slots, removed, recorded)
    return removed


def _entry(slots: dict[str, Slot], number: int, entry: Any) -> tuple[Slot, set[int]]:
    """The layer and the filters of one entry."""
    if not isinstance(entry, Mapping):
        raise ValueError(
            f"entry {number} of the history is {type(entry).__name__}, expected a dictionary "
            "with 'layer' and 'removed'"
        )
    for key in ("layer", "removed"):
        if key not in entry:
            raise ValueError(
                f"entry {number} of the history (layer {entry.get('layer')!r}) has no {key!r}; "
                f"got {sorted(map(str, entry))}, expected 'layer' and 'removed'"
            )
    layer, indices = entry["layer"], entry["removed"]
    if not isinstance(layer, str) or layer not in slots:
        raise ValueError(
            f"the history (entry {number}) names layer {layer!r}, which this model does not have"
        )
    whole = isinstance(indices, (list, tuple)) and all(type(i) is int for i in indices)
    if not whole or not indices:
        raise ValueError(
            f"the history (entry {number}, layer {layer!r}): removed is {indices!r}, expected a "
            "list of at least one integer, e.g. [0, 3]"
        )
    width = len(slots[layer].units)
    if outside := [i for i in indices if not 0 <= i < width]:
        raise ValueError(
            f"the history (entry {number}) removes filters {outside[:3]} of {layer!r}, which has "
            f"{width}; expected indices from 0 to {width - 1}"
        )
    if len(set(indices)) != len(indices):
        raise ValueError(
            f"the history (entry {number}, layer {layer!r}): removed is {indices!r}, expected "
            "each filter once"
        )
    return slots[layer], set(indices)


def _check_coupling(
    structure: Structure, slots: dict[str, Slot], removed: Tensor, recorded: dict[str, set[int]]
) -> None:
    for layer, slot in slots.items():
        gone = set(torch.isin(slot.units, removed).nonzero().flatten().tolist())
        if gone != recorded.get(layer, set()) or NEVER in removed:
            raise ValueError(
                f"the history does not fit this model: it would remove {len(gone)} filters of "
                f"{layer!r}, but records {len(recorded.get(layer, ()))}; the layers are coupled "
                "differently"
            )
    for group in structure.groups:
        if group.reason is not None and torch.isin(group.units, removed).any():
            raise ValueError(
                f"the history removes filters of {' + '.join(group.layers)}, expected none: "
                f"{group.reason}"
            )
