"""Torch-Pruning's dependency graph of a model, built so that one odd operation costs only itself.

Torch-Pruning maps channels through concatenations, views and splits by rules that look at the
neighbouring layers; on some models a rule divides by zero or finds no shape. Its steps are called
one by one here: an operation whose rule fails is noted as lost, and the channels that meet it stay.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..layers import layer_kind
from .inputs import FAILURES, call, call_examples, tensors_in, training_branches

RULE_FAILS = (ArithmeticError, LookupError, AttributeError, TypeError, AssertionError)


@dataclass
class Graph:
    """What tracing found.

    Attributes:
        tp: the module torch_pruning.
        dependencies: its DependencyGraph.
        outputs: the output tensors of the model that depend on its parameters.
        lost: the nodes whose operation cannot be followed.
        periods: for the nodes that cut the channels into equal pieces, the length of a piece.
        branches: whether layers run only while training, and were traced too (auxiliary heads).
        branch_error: why the forward of the training mode could not be traced, if it could not.
    """

    tp: ModuleType
    dependencies: Any
    outputs: list[Tensor] = field(default_factory=list)
    lost: set[Any] = field(default_factory=set)
    periods: dict[Any, int] = field(default_factory=dict)
    branches: bool = False
    branch_error: str = ""


def build(model: nn.Module, inputs: Any) -> Graph:
    """Runs a model and builds its graph; the caller restores the model.

    Raises:
        ImportError: Torch-Pruning is missing.
        RuntimeError: Torch-Pruning could not build a graph at all.
        ValueError: the model fails on the inputs, or no output depends on the parameters.
    """
    tp = _torch_pruning()
    found = Graph(tp, tp.DependencyGraph())
    sizes = _ConcatSizes()

    def forward(module: nn.Module, example: Any) -> list[Tensor]:
        with sizes:
            _run(found, module, example)
        return found.outputs

    graph = found.dependencies
    graph.verbose, graph.model, graph.ignored_params = False, model, []
    graph._module2name = {module: name for name, module in model.named_modules()}
    try:
        graph._param_to_name, graph.unwrapped_parameters = graph._detect_unwrapped_parameters(None)
        graph.module2node = graph._trace(model, inputs, forward, output_transform=None)
        graph._build_dependency(graph.module2node)
        tp.dependency.shape_infer.init_shape_information(graph)
    except RULE_FAILS as error:
        if not found.outputs:  # the model itself failed on its example inputs
            raise
        raise RuntimeError(
            f"Torch-Pruning could not follow the operations of this model "
            f"({type(error).__name__}: {error}); nothing was changed. Views that shuffle or split "
            "channels are the usual cause"
        ) from error
    _map_channels(found)
    _place_splits(found)
    _place_concats(found, sizes.found)
    _place_gates(found)
    return found


def _torch_pruning() -> ModuleType:
    try:
        return importlib.import_module("torch_pruning")
    except ImportError as error:
        raise ImportError(
            "pruning needs Torch-Pruning for its dependency graph: "
            "pip install orthoreg_ext[pruning]  (torch-pruning>=1.6,<2)"
        ) from error


def _run(found: Graph, model: nn.Module, inputs: Any) -> None:
    """Runs the model in eval mode and, where layers were left out, as it runs while training."""
    with _called(model) as reached:
        result = call_examples(model, inputs)
    found.outputs += [t for t in tensors_in(result) if t.grad_fn is not None]
    if not found.outputs:
        raise ValueError(
            "the model's output has no tensor that depends on its parameters through autograd, "
            "so its layers cannot be followed; return the tensors, and no detached ones"
        )
    if not unreached(model, reached):
        return
    try:
        with training_branches(model), _called(model) as again:
            result = call(model, inputs)
    except FAILURES as error:
        found.branch_error = f"{type(error).__name__}: {error}"
        return
    if again - reached:
        found.branches = True
        found.outputs += [t for t in tensors_in(result) if t.grad_fn is not None]


def unreached(model: nn.Module, reached: set[nn.Module]) -> list[str]:
    """The layers with filters that no forward pass called."""
    attention = {m.out_proj for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
    return [
        name
        for name, module in model.named_modules()
        if layer_kind(module) and module not in reached and module not in attention
    ]


@contextmanager
def _called(model: nn.Module) -> Iterator[set[nn.Module]]:
    """Collects the layers with filters whose forward is called."""
    called: set[nn.Module] = set()
    hooks = [
        module.register_forward_hook(lambda module, *_: called.add(module))
        for module in model.modules()
        if layer_kind(module)
    ]
    try:
        yield called
    finally:
        for hook in hooks:
            hook.remove()


def _map_channels(found: Graph) -> None:
    """Lets Torch-Pruning map the channels through every operation, each on its own."""
    rules = found.tp.dependency.index_mapping
    types = found.tp.ops.OPTYPE
    by_type = {
        types.CONCAT: rules.update_concat_index_mapping,
        types.SPLIT: rules.update_split_index_mapping,
        types.RESHAPE: rules.update_reshape_index_mapping,
        types.UNBIND: rules.update_unbind_index_mapping,
        types.EXPAND: rules.update_expand_index_mapping,
        types.SLICE: rules.update_slice_index_mapping,
    }
    for node in found.dependencies.module2node.values():
        if node.type in by_type:
            try:
                by_type[node.type](found.dependencies, node)
            except RULE_FAILS:
                found.lost.add(node)


def operation(node: Any) -> str:
    """The name of a node's operation: "view" of ViewBackward0."""
    name = type(node.grad_fn).__name__ if node.grad_fn is not None else "an operation"
    return name.rpartition(".")[2].partition("Backward")[0].lower()


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


def _place_concats(found: Graph, sizes: dict[Any, list[tuple[int, bool]]]) -> None:
    """Gives the edges of every channel concatenation its true offsets."""
    mapping = found.tp.dependency.index_mapping._ConcatIndexMapping
    for node in list(found.dependencies.module2node.values()):
        parts = sizes.get(node.grad_fn)
        if node.type != found.tp.ops.OPTYPE.CONCAT or parts is None:
            continue
        offsets, start = [], 0
        for channels, traced in parts:
            if traced:
                offsets.append([start, start + channels])
            start += channels
        if len(offsets) != len(node.inputs):
            continue
        found.lost.discard(node)
        ends = [
            (source, mapping(offset=offset, reverse=True), mapping(offset=offset, reverse=False))
            for offset, source in zip(offsets, node.inputs, strict=True)
        ]
        _set_mappings(node, ends, 1)


def _place_splits(found: Graph) -> None:
    """Tells the pieces of every split apart, which Torch-Pruning takes in the order it met them."""
    mapping = found.tp.dependency.index_mapping._SplitIndexMapping
    for node in found.dependencies.module2node.values():
        followed = any(edge.index_mapping[0] is not None for edge in node.dependencies)
        if node.type != found.tp.ops.OPTYPE.SPLIT or not (followed or node in found.lost):
            continue
        pieces = _pieces(node.grad_fn)
        ends = [
            (target, mapping(offset=pieces[number]), mapping(offset=pieces[number], reverse=True))
            for target in dict.fromkeys(node.outputs)
            for source, number in target.grad_fn.next_functions
            if source is node.grad_fn
        ]
        if len(ends) == len(node.outputs):
            found.lost.discard(node)
            _set_mappings(node, ends, 0)
            if len({end - start for start, end in pieces}) == 1:
                found.periods[node] = pieces[0][1]


def _place_gates(found: Graph) -> None:
    """Halves the channels behind every `glu`, which Torch-Pruning takes to be entrywise."""
    index = found.tp._helpers._HybridIndex
    for node in found.dependencies.module2node.values():
        if operation(node) != "glu":
            continue
        shape, dim = node.grad_fn._saved_self.shape, node.grad_fn._saved_dim
        half = shape[dim if dim < len(shape) else dim - 2**64] // 2

        def there(pairs: Any, half: int = half) -> Any:
            return [index(idx=pair.idx % half, root_idx=pair.root_idx) for pair in pairs]

        def back(pairs: Any, half: int = half) -> Any:
            return [
                index(idx=pair.idx + start, root_idx=pair.root_idx)
                for start in (0, half)
                for pair in pairs
            ]

        _set_mappings(node, [(target, there, back) for target in node.outputs], 0)


def _pieces(split: Any) -> list[list[int]]:
    """Where the pieces of a split begin and end."""
    shape, dim = split._saved_self_sym_sizes, split._saved_dim
    total = shape[dim] if dim < len(shape) else shape[dim - 2**64]  # negative ones wrap around
    if hasattr(split, "_saved_split_sizes"):
        sizes = list(split._saved_split_sizes)
    else:
        size = split._saved_split_size
        sizes = [min(size, total - start) for start in range(0, total, size)]
    ends = list(accumulate(sizes))
    return [[end - size, end] for size, end in zip(sizes, ends, strict=True)]


def _set_mappings(node: Any, ends: list[tuple[Any, Any, Any]], place: int) -> None:
    """Gives the edges between a node and its neighbours their mappings there and back."""
    used: set[int] = set()
    for neighbour, there, back in ends:
        for edges, target, mapping in (
            (node.dependencies, neighbour, there),
            (neighbour.dependencies, node, back),
        ):
            edge = next((e for e in edges if e.target is target and id(e) not in used), None)
            if edge is not None:
                edge.index_mapping[place] = mapping
                used.add(id(edge))
