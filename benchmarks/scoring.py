"""The ways to score filters: five statistics of each, or the importance of coupled groups.

`SCORE` takes weights whose ``.grad`` is set. `IMPORTANCE` is about a whole network: what
Torch-Pruning's importances compute for every group, and the package for the same layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import orthoreg_ext.functional as F
from benchmarks.baselines import Call, Prepare, Way, needs
from benchmarks.nets import NETS
from orthoreg_ext.bench import CRITERIA, formula_scores


def _leaves(weights: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    grads = [w.grad for w in weights]
    assert all(g is not None for g in grads)
    return [w.detach() for w in weights], grads  # type: ignore[return-value]


def _fused(dims: Sequence[int]) -> Prepare:
    dim: Any = dims[0] if len(dims) == 1 else tuple(dims)

    def prepare(weights: list[Tensor]) -> Call:
        flat, grads = _leaves(weights)
        return lambda: F.filter_scores(flat, grads, CRITERIA, dim=dim)

    return prepare


def _by_layer(returned: Any) -> list[Tensor]:
    """Scores of filter_scores in the order of `formula_scores`."""
    tables = returned if isinstance(returned, tuple) else (returned,)
    layers = range(len(tables[0][CRITERIA[0]]))
    return [table[name][i] for i in layers for table in tables for name in CRITERIA]


def _eager(dims: Sequence[int], *, compile: bool = False) -> Prepare:
    def prepare(weights: list[Tensor]) -> Call:
        flat, grads = _leaves(weights)
        function = formula_scores
        if compile:
            function = torch.compile(formula_scores, mode="reduce-overhead", dynamic=False)
        return lambda: function(flat, grads, dims)

    return prepare


SCORE = {
    "orthoreg_ext": Way("filter_scores", _fused((0,)), "dim 0", tidy=_by_layer),
    "orthoreg_ext-both": Way(
        "filter_scores, dim=(0, 1)", _fused((0, 1)), "both dims", tidy=_by_layer
    ),
    "eager": Way("each criterion by its formula", _eager((0,)), "dim 0"),
    "eager-both": Way("each criterion by its formula", _eager((0, 1)), "both dims"),
    "compile": Way(
        "torch.compile(eager, mode='reduce-overhead')", _eager((0,), compile=True), "dim 0"
    ),
    "compile-both": Way(
        "torch.compile(eager-both, mode='reduce-overhead')",
        _eager((0, 1), compile=True),
        "both dims",
    ),
}


def exact_scores(weights: list[Tensor], computes: str) -> list[Tensor]:
    """In float64, in the order of `formula_scores`."""
    flat, grads = _leaves(weights)
    dims = (0,) if computes == "dim 0" else (0, 1)
    return formula_scores([w.double() for w in flat], [g.double() for g in grads], dims)


# ---- whole networks: weights are looked up in the one that `network` makes


def network(model: str, device: str) -> tuple[nn.Module, Tensor]:
    """One of NETS, or a small ResNet for any other name, with gradients; and an input for it."""
    torch.manual_seed(0)
    if model in NETS:
        net, inputs = NETS[model](), torch.randn(1, 3, 64, 64)
    else:
        from orthoreg_ext.experiment.models import resnet

        net, inputs = resnet(), torch.randn(1, 1, 8, 8)
    net, inputs = net.to(device), inputs.to(device)
    for parameter in net.parameters():
        parameter.grad = torch.randn_like(parameter)
    return net, inputs


Subject = tuple[nn.Module, Tensor]


def _torch_pruning(kind: str) -> Any:
    """An importance of every group; the dependency graph is built outside of what is timed."""

    def prepare(subject: Subject) -> Call:
        import torch_pruning as tp

        model, inputs = subject
        graph = tp.DependencyGraph().build_dependency(model, example_inputs=inputs)
        groups = list(graph.get_all_groups(root_module_types=[nn.Conv2d, nn.Linear]))
        importance = getattr(tp.importance, kind)()

        def call() -> None:
            for group in groups:
                importance(group)

        return call

    return prepare


def _one_criterion(name: str) -> Any:
    """Both dimensions of all convolutions and linear layers."""

    def prepare(subject: Subject) -> Call:
        layers = [m for m in subject[0].modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
        flat, grads = _leaves([layer.weight for layer in layers])
        return lambda: F.filter_scores(flat, grads, (name,), dim=(0, 1))

    return prepare


IMPORTANCE = {
    "orthoreg_ext-taylor": Way("filter_scores, dim=(0, 1)", _one_criterion("taylor"), "taylor"),
    "orthoreg_ext-l2": Way("filter_scores, dim=(0, 1)", _one_criterion("l2"), "magnitude"),
    "torch-pruning": Way(
        "GroupTaylorImportance of every group",
        _torch_pruning("GroupTaylorImportance"),
        "taylor",
        needs("torch_pruning"),
    ),
    "torch-pruning-magnitude": Way(
        "GroupMagnitudeImportance of every group",
        _torch_pruning("GroupMagnitudeImportance"),
        "magnitude",
        needs("torch_pruning"),
    ),
}
