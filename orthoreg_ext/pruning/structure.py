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

import importlib
import math
from collections import defaultdict
from collections.abc import Collection, Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..layers import layer_kind
from .inputs import call_examples, device_of, tensors_in, to_device, undisturbed
from .layout import (
    Layout,
    Place,
    layout,
    one_input_per_group,
    tied_positions,
)
from .units import NEVER, Group, Slot, Structure


def trace(model: nn.Module, example_inputs: Any, ignored: Collection[str] = ()) -> Structure:
    """Finds the units of a model.

    The model runs once on the example inputs in eval mode; training flags, `requires_grad`,
    gradients, buffers and the random state are as before afterwards.

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
    tp = _torch_pruning()
    with undisturbed(model):
        graph, outputs, concats = _build(tp, model, to_device(example_inputs, device_of(model)))
        _place_concats(tp, graph, concats)
        return _Walk(tp, graph, model).structure(outputs, set(ignored))


def _torch_pruning() -> ModuleType:
    try:
        return importlib.import_module("torch_pruning")
    except ImportError as error:
        raise ImportError(
            "pruning needs Torch-Pruning for its dependency graph: "
            "pip install orthoreg_ext[pruning]  (torch-pruning>=1.6,<2)"
        ) from error


class _ConcatSizes(TorchFunctionMode):
    """Notes the sizes of concatenated tensors: Torch-Pruning guesses, and misses raw inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[Any, list[tuple[int, bool]]] = {}  # grad_fn -> (channels, has a grad_fn)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (torch.cat, torch.concat, torch.concatenate) and result.grad_fn is not None:
            tensors = args[0] if args else (kwargs or {}).get("tensors", ())
            dim = (kwargs or {}).get("dim", args[1] if len(args) > 1 else 0)
            if isinstance(dim, int) and result.dim() != 3 and dim % result.dim() == 1:
                self.found[result.grad_fn] = [(t.shape[1], t.grad_fn is not None) for t in tensors]
        return result


def _build(tp: Any, model: nn.Module, inputs: Any) -> tuple[Any, list[Tensor], dict[Any, Any]]:
    outputs: list[Tensor] = []
    sizes = _ConcatSizes()

    def forward(module: nn.Module, example: Any) -> list[Tensor]:
        with sizes:
            result = call_examples(module, example)
        outputs.extend(t for t in tensors_in(result) if t.grad_fn is not None)
        if not outputs:
            raise ValueError(
                "the model's output has no tensor that depends on its parameters through autograd, "
                "so its layers cannot be followed; return the tensors, and no detached ones"
            )
        return outputs

    graph = tp.DependencyGraph()
    try:
        graph.build_dependency(model, inputs, forward_fn=forward, verbose=False)
    except (ArithmeticError, LookupError, AttributeError, TypeError) as error:
        if not outputs:  # the model itself failed on its example inputs
            raise
        raise RuntimeError(
            f"Torch-Pruning could not follow the operations of this model "
            f"({type(error).__name__}: {error}); nothing was changed. Views that shuffle or split "
            "channels are the usual cause"
        ) from error
    return graph, outputs, sizes.found


def _place_concats(tp: Any, graph: Any, sizes: dict[Any, list[tuple[int, bool]]]) -> None:
    """Gives the edges of every channel concatenation its true offsets."""
    mapping = tp.dependency.index_mapping._ConcatIndexMapping
    for node in list(graph.module2node.values()):
        parts = sizes.get(node.grad_fn)
        if node.type != tp.ops.OPTYPE.CONCAT or parts is None:
            continue
        offsets, start = [], 0
        for channels, traced in parts:
            if traced:
                offsets.append([start, start + channels])
            start += channels
        if len(offsets) != len(node.inputs):
            continue
        used: set[int] = set()
        for offset, source in zip(offsets, node.inputs, strict=True):
            for edges, target, reverse in (
                (node.dependencies, source, True),
                (source.dependencies, node, False),
            ):
                edge = next((e for e in edges if e.target is target and id(e) not in used), None)
                if edge is not None:
                    edge.index_mapping[1] = mapping(offset=offset, reverse=reverse)
                    used.add(id(edge))


class _Walk:
    """Spreads unit labels from the filters of every layer along the edges of the graph."""

    def __init__(self, tp: Any, graph: Any, model: nn.Module) -> None:
        self.tp, self.graph, self.model = tp, graph, model
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

    def structure(self, outputs: list[Tensor], ignored: set[str]) -> Structure:
        """Runs the walk; the steps in order."""
        for module, node in list(self.graph.module2node.items()):
            if isinstance(module, nn.Module) and layer_kind(module):
                self._spread(node, module)
        slots = self._slots()
        self._tie_channels(slots)
        self._tie_parameters(slots)
        self._keep_outputs(outputs)
        self._keep_unsupported()
        groups = self._groups(slots, ignored)
        reached = {slot.layer for slot in slots}
        unreached = [
            name
            for name, module in self.model.named_modules()
            if layer_kind(module) and name not in reached
        ]
        return Structure(slots, groups, unreached)

    def _spread(self, start: Any, module: nn.Module) -> None:
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
                mapped = pairs
                for mapping in edge.index_mapping:
                    mapped = mapped if mapping is None else mapping(mapped)
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
            rms = isinstance(self.model.get_submodule(owner), nn.RMSNorm) and module.dim() == 1
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
        kind = "filters" if layer_kind(module) else type(module).__name__
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

    def _keep_outputs(self, outputs: list[Tensor]) -> None:
        last = {tensor.grad_fn for tensor in outputs}
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
            if slot.layer in ignored and slot.side != "in":
                for unit in units:
                    if unit != NEVER:
                        reasons.setdefault(unit, f"{slot.layer!r} is ignored")
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
        groups = []
        for units in members.values():
            ids = torch.tensor(units, dtype=torch.int64)
            layers, takes = [], [0]
            for slot in slots:
                held = slot.units[torch.isin(slot.units, ids)]
                if len(held):
                    takes += held.unique(return_counts=True)[1].tolist()
                    if slot.has_filters:
                        layers.append(slot.layer)
            stay = next((reasons[unit] for unit in units if unit in reasons), None)
            groups.append(Group(layers[0], tuple(layers), ids, len(units), math.gcd(*takes), stay))
        return groups
