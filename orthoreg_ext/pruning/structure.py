"""Which channels hang together: Torch-Pruning's dependency graph behind small types of our own.

Torch-Pruning traces the model through autograd and knows how an operation carries channels from one
layer to the next. Here every channel of every layer gets a *unit*: the smallest set of channels
that can only leave together (residual additions, depthwise and grouped convolutions, tied weights).
Unlike a Torch-Pruning group, which maps each index to one root, units keep couplings inside one
layer too (the halves of a gate, the groups of a convolution).

Torch-Pruning 1.6 removes nothing here: it thaws frozen parameters, drops channels_last and orphans
the optimizer. The graph is traced once, on the unpruned model, and no state of it is kept.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..layers import layer_kind
from .fixed import keep_fixed
from .graph import RULE_FAILS, Graph, build, operation
from .inputs import device_of, to_device, undisturbed
from .layout import (
    Layout,
    Place,
    layout,
    one_input_per_group,
    tied_positions,
)
from .units import NEVER, Group, Slot, Structure

_ATTENTION = "inside a MultiheadAttention, which cannot be cut"


def trace(model: nn.Module, example_inputs: Any, ignored: Collection[str] = ()) -> Structure:
    """Finds the units of a model.

    The model runs on the example inputs in eval mode, and where that leaves layers out (auxiliary
    heads) once more through its training branches; training flags, `requires_grad`, gradients,
    buffers and the random state are as before afterwards.

    Args:
        model: the model, on any device.
        example_inputs: a tensor, a tuple of arguments or a dict of keyword arguments.
        ignored: names of layers that keep all their filters.

    Raises:
        ImportError: Torch-Pruning is missing.
        RuntimeError: the model's operations could not be followed.
        ValueError: the model fails on the example inputs, or its output has no tensor that depends
            on the parameters.
    """
    with undisturbed(model):
        graph = build(model, to_device(example_inputs, device_of(model)))
        structure = _Walk(graph, model).structure(set(ignored))
    keep_fixed(model, structure, example_inputs)
    return structure


class _Walk:
    """Spreads unit labels from the filters of every layer along the edges of the graph."""

    def __init__(self, found: Graph, model: nn.Module) -> None:
        self.tp, self.graph, self.found, self.model = found.tp, found.dependencies, found, model
        self.names = {module: name for name, module in model.named_modules()}
        self.parent: list[int] = []  # union-find over labels
        self.seeds: list[tuple[str, int]] = []  # label -> (layer, channel) it started from
        self.labels: dict[tuple[Any, Any], dict[int, int]] = defaultdict(dict)
        self.reasons: dict[int, str] = {}  # label -> why it stays

    def find(self, label: int) -> int:
        while self.parent[label] != label:
            self.parent[label] = self.parent[self.parent[label]]
            label = self.parent[label]
        return label

    def join(self, a: int, b: int) -> None:
        a, b = self.find(a), self.find(b)
        self.parent[max(a, b)] = min(a, b)

    def structure(self, ignored: set[str]) -> Structure:
        """Runs the walk; the steps in order."""
        layers = {
            module: node
            for module, node in self.graph.module2node.items()
            if isinstance(module, nn.Module) and layer_kind(module)
        }
        sides = [layout(module, side) for module in layers for side in ("in", "out")]
        # An operation that is misread (windows, recurrent cells) can multiply or shift the indices
        # without end; no tensor between two layers has more channels than the widest of them.
        widest = max([side.channels for side in sides if side] + [0])
        for module, node in layers.items():
            self._spread(node, module, widest)
        self._tie_pieces()
        slots = self._slots()
        self._tie_channels(slots)
        self._tie_parameters(slots)
        self._keep_outputs()
        self._keep_unsupported()
        groups = self._groups(slots, ignored)
        return Structure(slots, groups, self._unreached(slots), self.found.branches)

    def _unreached(self, slots: list[Slot]) -> dict[str, str]:
        """The layers with filters that are in no slot, and why."""
        reached = {slot.layer for slot in slots}
        reason = "not reached by the forward pass"
        if self.found.branch_error:
            reason += f", which fails in training mode ({self.found.branch_error})"
        found = {}
        for name, module in self.model.named_modules():
            if layer_kind(module) and name not in reached:
                parent = self.model.get_submodule(name.rpartition(".")[0])
                attention = isinstance(parent, nn.MultiheadAttention)
                found[name] = _ATTENTION if attention else reason
        return found

    def _spread(self, start: Any, module: nn.Module, widest: int) -> None:
        index_type = self.tp._helpers._HybridIndex
        handler = self.graph.get_pruner_of_module(module).prune_out_channels
        seen, fresh = self.labels[start, handler], []
        side = layout(module, "out")
        for channel in range(side.channels if side else 0):
            if channel not in seen:
                label = len(self.parent)
                self.parent.append(label)
                self.seeds.append((self.names[module], channel))
                seen[channel] = label
                fresh.append(index_type(idx=channel, root_idx=label))
        stack = [(start, handler, fresh)]
        while stack:
            node, handler, pairs = stack.pop()
            for edge in node.dependencies:
                if not pairs or not edge.is_triggered_by(handler):
                    continue
                mapped = self._mapped(edge, pairs, widest)
                if mapped is None:
                    place = f"{operation(edge.target)!r} behind {self.names[module]!r}"
                    self._keep(pairs, f"the operation {place} cannot be followed")
                    continue
                known, new = self.labels[edge.target, edge.handler], []
                for index in mapped:
                    if index.root_idx is None:  # grouped-query attention: the origin is lost
                        self._keep(pairs, "its channels are repeated by an expand operation")
                    elif index.idx in known:
                        self.join(known[index.idx], index.root_idx)
                    else:
                        known[index.idx] = index.root_idx
                        new.append(index)
                stack.append((edge.target, edge.handler, new))

    def _mapped(self, edge: Any, pairs: Any, widest: int) -> Any | None:
        """The indices at the other end of an edge; None where they cannot be known."""
        if edge.target in self.found.lost or edge.source in self.found.lost:
            return None
        for mapping in edge.index_mapping:
            if mapping is not None:
                spread = 1 if getattr(mapping, "reverse", True) else getattr(mapping, "_stride", 1)
                if len(pairs) * spread > widest:
                    return None
                try:
                    pairs = mapping(pairs)
                except RULE_FAILS:  # fewer pieces of a split than there are, a stride of zero
                    return None
                if any(not 0 <= pair.idx < widest for pair in pairs):
                    return None
        return pairs

    def _tie_pieces(self) -> None:
        """Couples the channels at the same position of equal pieces, which must stay equal."""
        for (node, _), labels in self.labels.items():
            if (period := self.found.periods.get(node)) is not None:
                for channel, label in labels.items():
                    if (first := labels.get(channel % period)) is not None:
                        self.join(first, label)

    def _keep(self, pairs: Any, reason: str) -> None:
        for pair in pairs:
            self.reasons.setdefault(pair.root_idx, reason)

    def _slots(self) -> list[Slot]:
        slots = []
        for (node, handler), labels in self.labels.items():
            placed = self._place(node, handler)
            if placed is None:
                continue
            layer, owner, side, kind, where = placed
            if any(not 0 <= channel < where.channels for channel in labels):
                reason = f"the channels of {layer!r} could not be followed"
                self.reasons.update(dict.fromkeys(labels.values(), reason))
            units = torch.full((where.channels,), NEVER, dtype=torch.int64)
            for channel, label in labels.items():
                if 0 <= channel < where.channels:
                    units[channel] = label
            channels = torch.arange(where.channels)
            slots.append(Slot(layer, owner, side, kind, where, units, channels))
        order = {name: i for i, name in enumerate(self.names.values())}
        return sorted(slots, key=lambda slot: (order[slot.owner], slot.layer, slot.side == "in"))

    def _place(self, node: Any, handler: Any) -> tuple[str, str, str, str, Layout] | None:
        module = node.module
        if isinstance(module, nn.Parameter):
            name = self.graph._param_to_name[module]
            owner, _, attribute = name.rpartition(".")
            shape = getattr(self.model.get_submodule(owner), "normalized_shape", None)
            rms = shape == tuple(module.shape)  # nn.RMSNorm, or one that is built like it
            kind, sizes = ("RMSNorm", ("normalized_shape",)) if rms else ("Parameter", ())
            place = Place(attribute, node.pruning_dim)
            return name, owner, "both", kind, Layout(module.shape[place.dim], (place,), sizes)
        if module not in self.names:
            return None
        pruner = self.graph.get_pruner_of_module(module)
        side = "out" if handler == pruner.prune_out_channels else "in"
        if pruner.prune_out_channels == pruner.prune_in_channels:
            side = "both"
        where = layout(module, side)
        kind = "filters" if layer_kind(module) else _base(module)
        name = self.names[module]
        return None if where is None else (name, name, side, kind, where)

    def _tie_channels(self, slots: list[Slot]) -> None:
        """Couples the channels that a grouped convolution or a GroupNorm can only lose together."""
        inputs = {slot.layer: slot for slot in slots if slot.side == "in"}
        for slot in slots:
            if slot.kind == "Parameter":
                continue
            module = self.model.get_submodule(slot.owner)
            period = tied_positions(module, slot.side)
            pairs: Iterator[tuple[int, int]] = iter(())
            if period:
                pairs = ((c, c % period) for c in range(len(slot.units)))
                self._join_positions(slot.units, slot.units, pairs)
            elif slot.side == "out" and one_input_per_group(module) and slot.layer in inputs:
                source = inputs[slot.layer].units
                multiplier = len(slot.units) // len(source)
                pairs = ((c, c // multiplier) for c in range(len(slot.units)))
                self._join_positions(slot.units, source, pairs)

    def _join_positions(self, a: Tensor, b: Tensor, pairs: Iterator[tuple[int, int]]) -> None:
        """Couples position i of a with position j of b; what is coupled with NEVER stays."""
        left, right = a.tolist(), b.tolist()
        for i, j in pairs:
            if NEVER in (left[i], right[j]):
                for label in {left[i], right[j]} - {NEVER}:
                    self.reasons.setdefault(label, "coupled with channels that cannot be removed")
            else:
                self.join(left[i], right[j])

    def _tie_parameters(self, slots: list[Slot]) -> None:
        """Couples the channels of layers that share a parameter, position by position."""
        sides: dict[tuple[int, int], dict[str, Slot]] = defaultdict(dict)
        owners: dict[int, set[str]] = defaultdict(set)
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            owners[id(parameter)].add(name)
        for slot in slots:
            for place in slot.layout.places:
                name = f"{slot.owner}.{place.tensor}" if slot.owner else place.tensor
                tensor = getattr(self.model.get_submodule(slot.owner), place.tensor)
                if tensor is not None and len(owners[id(tensor)]) > 1:
                    sides[id(tensor), place.dim][name] = slot
        for (tensor, _), by_name in sides.items():
            first, *others = by_name.values()
            for other in others:
                pairs = ((c, c) for c in range(len(first.units)))
                self._join_positions(first.units, other.units, pairs)
            if missing := owners[tensor] - set(by_name):
                reason = f"shares its parameter with {min(missing)!r}, which cannot be followed"
                self.reasons.update(
                    (label, reason) for label in first.units.tolist() if label != NEVER
                )

    def _keep_outputs(self) -> None:
        last = {tensor.grad_fn for tensor in self.found.outputs}
        for (node, handler), labels in self.labels.items():
            out = self.graph.get_pruner_of_module(node.module).prune_out_channels
            if handler == out and (
                node.type == self.tp.ops.OPTYPE.OUTPUT or not node.outputs or node.grad_fn in last
            ):
                self.reasons.update(dict.fromkeys(labels.values(), "an output of the model"))

    def _keep_unsupported(self) -> None:
        types = self.tp.ops.OPTYPE
        for (node, _), labels in self.labels.items():
            module = node.module
            depthwise = node.type == types.DEPTHWISE_CONV
            if node.type in (types.MHA, types.LSTM, types.CUSTOMIZED):
                reason = f"{type(module).__name__} {self.names.get(module, '')!r} cannot be cut"
            elif node.type == types.LN and layout(module, "both") is None:
                reason = f"LayerNorm {self.names[module]!r} normalises more than the channels"
            elif depthwise and module.in_channels != module.out_channels:
                reason = (
                    f"{self.names[module]!r} has as many groups as filters but more inputs "
                    f"(groups={module.groups}, in_channels={module.in_channels})"
                )
            else:
                continue
            self.reasons.update(dict.fromkeys(labels.values(), reason))

    def _groups(self, slots: list[Slot], ignored: set[str]) -> list[Group]:
        # 1. labels become units, numbered as they first occur
        reasons: dict[int, str] = {}
        for label, why in self.reasons.items():
            reasons.setdefault(self.find(label), why)
        for slot in slots:
            units = [u if u == NEVER else self.find(u) for u in slot.units.tolist()]
            slot.units = torch.tensor(units, dtype=torch.int64)
            stays = self._ignored(slot, ignored)
            if stays is not None:
                for unit in units:
                    if unit != NEVER:
                        reasons.setdefault(unit, stays)
        # 2. layers that share a unit are one group
        family: dict[str, str] = {}
        root_of: dict[int, str] = {}

        def head(layer: str) -> str:
            while family.setdefault(layer, layer) != layer:
                layer = family[layer]
            return layer

        for label, (layer, _) in enumerate(self.seeds):
            first = root_of.setdefault(self.find(label), layer)
            a, b = head(first), head(layer)
            if a != b:
                family[b] = a
        members: dict[str, list[int]] = defaultdict(list)
        for unit, layer in root_of.items():
            members[head(layer)].append(unit)
        # 3. what is known of each
        group_of = {unit: i for i, units in enumerate(members.values()) for unit in units}
        layers: list[list[str]] = [[] for _ in members]
        takes: list[set[int]] = [{0} for _ in members]
        for slot in slots:
            touched = set()
            for unit, times in Counter(slot.units.tolist()).items():
                if unit in group_of:
                    takes[group_of[unit]].add(times)
                    touched.add(group_of[unit])
            if slot.has_filters:
                for i in touched:
                    layers[i].append(slot.layer)
        suspects = self._suspects()
        return [
            Group(
                names[0],
                tuple(names),
                torch.tensor(units, dtype=torch.int64),
                len(units),
                math.gcd(*times),
                next((reasons[unit] for unit in units if unit in reasons), None),
                not suspects.isdisjoint(units),
            )
            for units, names, times in zip(members.values(), layers, takes, strict=True)
        ]

    def _ignored(self, slot: Slot, ignored: set[str]) -> str | None:
        """Why the channels of a slot stay, if its layer is to be left alone."""
        layer = slot.layer.partition(".parametrizations.")[0]
        if layer not in ignored:
            return None
        if slot.side != "in":
            return f"{layer!r} is ignored"
        module = self.model.get_submodule(slot.owner)
        computed = any(place.tensor not in module._parameters for place in slot.layout.places)
        return f"{layer!r} is ignored, and its inputs cannot be cut" if computed else None

    def _suspects(self) -> set[int]:
        """The units that meet an operation which may fix the number of its channels."""
        types = self.tp.ops.OPTYPE
        fixing = {types.RESHAPE, types.SPLIT, types.UNBIND, types.SLICE, types.EXPAND}
        fixing.add(types.PARAMETER)
        return {
            self.find(label)
            for (node, _), labels in self.labels.items()
            if node.type in fixing or operation(node) in ("copyslices", "select", "index")
            for label in labels.values()
        }


def _base(module: nn.Module) -> str:
    """The PyTorch class that a module is, or is derived from: "LayerNorm" of a LayerNorm2d."""
    kinds = (k for k in type(module).__mro__ if k.__module__.startswith("torch.nn.modules"))
    return next(kinds, type(module)).__name__
