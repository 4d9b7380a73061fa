"""One pass over the model serves all groups, and every change is seen."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import orthoreg_ext as ox

tp = pytest.importorskip("torch_pruning", reason="pip install orthoreg_ext[pruning]")
from orthoreg_ext.integrations.torch_pruning import (  # noqa: E402
    FusedMagnitudeImportance,
    FusedTaylorImportance,
)
from tests.integrations.torch_pruning_nets import (  # noqa: E402
    agree,
    graph,
    groups,
    with_gradients,
)

pytestmark = pytest.mark.filterwarnings("ignore:Unwrapped parameters detected")


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of tensors in each pass."""
    calls: list[int] = []
    scored = ox.functional.filter_scores

    def counted(weights: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(len(weights))
        return scored(weights, *args, **kwargs)

    monkeypatch.setattr(ox.functional, "filter_scores", counted)
    return calls


@pytest.mark.parametrize("make", [FusedMagnitudeImportance, FusedTaylorImportance])
def test_a_pruner_step_is_one_pass(make: Any, passes: list[int]) -> None:
    model, x = with_gradients("resnet")
    pruner = tp.pruner.BasePruner(
        *(model, x, make()), iterative_steps=2, global_pruning=True, ignored_layers=[model.fc]
    )
    pruner.step()
    assert len(passes) == 1
    pruner.step()
    assert len(passes) == 2


CHANGES: dict[str, Callable[[nn.Module], None]] = {
    "nothing": lambda _: None,
    "weights in place": lambda m: m.layer1.conv1.weight.detach().mul_(2),
    "gradients in place": lambda m: m.layer1.conv1.weight.grad.mul_(3),
    "new gradients": lambda m: [
        setattr(p, "grad", torch.randn_like(p)) for p in m.parameters()
    ] and None,
    "a gradient in the old one's memory": lambda m: [
        (p.grad.data.mul_(2), setattr(p, "grad", p.grad.data)) for p in m.parameters()
    ] and None,
    "another backward pass": lambda m: m(torch.ones(2, 3, 8, 8)).sum().backward(),
    "new storage": lambda m: [setattr(p, "data", p.data * 2) for p in m.parameters()] and None,
    "a new parameter": lambda m: setattr(
        m.layer1.conv1, "weight", nn.Parameter(m.layer1.conv1.weight.detach() + 1)
    ) or setattr(m.layer1.conv1.weight, "grad", torch.ones_like(m.layer1.conv1.weight)),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("make", [FusedMagnitudeImportance, FusedTaylorImportance])
def test_changes_between_groups_are_seen(make: Any, change: str) -> None:
    model, x = with_gradients("resnet")
    found, importance = groups(model, x), make(normalizer=None)
    for group in found[:2]:
        importance(group)
    CHANGES[change](model)
    for group in found[2:]:
        agree(importance(group), make(normalizer=None)(group))


def test_a_write_that_torch_does_not_see_is_seen_by_the_next_pass() -> None:
    model, x = with_gradients("resnet")
    found, importance = groups(model, x), FusedMagnitudeImportance()
    for group in found:
        importance(group)
    for parameter in model.parameters():
        parameter.data.uniform_(-1, 1)
    for group in found:
        agree(importance(group), FusedMagnitudeImportance()(group))
    model.stem.weight.data.uniform_(-1, 1)
    importance.clear()
    agree(importance(found[0]), FusedMagnitudeImportance()(found[0]))


def test_layers_that_were_cut_between_groups_are_scored_anew() -> None:
    model, x = with_gradients("resnet")
    dependencies, importance = graph(model, x), FusedTaylorImportance(normalizer=None)
    first, *_ = dependencies.get_all_groups(ignored_layers=[model.fc])
    importance(first)
    first.prune([1, 3])
    for group in dependencies.get_all_groups(ignored_layers=[model.fc]):
        agree(importance(group), FusedTaylorImportance(normalizer=None)(group))


def test_two_models_do_not_mix() -> None:
    importance = FusedMagnitudeImportance()
    found = [groups(*with_gradients("resnet", seed)) for seed in (0, 1)]
    for a, b in zip(*found, strict=True):
        agree(importance(a), FusedMagnitudeImportance()(a))
        agree(importance(b), FusedMagnitudeImportance()(b))


def test_another_graph_begins_another_pass() -> None:
    model, x = with_gradients("resnet")
    importance = FusedMagnitudeImportance()
    importance(groups(model, x)[0])
    for parameter in model.parameters():
        parameter.data.uniform_(-1, 1)
    last = groups(model, x)[-1]
    agree(importance(last), FusedMagnitudeImportance()(last))


def test_old_parameters_are_not_kept_alive() -> None:
    model, x = with_gradients("mlp")
    importance = FusedMagnitudeImportance()
    for group in groups(model, x):
        importance(group)
    old = weakref.ref(model.fc1.weight)
    model.fc1.weight = nn.Parameter(torch.ones(20, 12))
    del group
    gc.collect()
    assert old() is None


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda i: pickle.loads(pickle.dumps(i))])
def test_importances_can_be_copied(copied: Any) -> None:
    group = groups(*with_gradients("mlp"))[0]
    for importance in (FusedMagnitudeImportance(3, "max", "sum", True), FusedTaylorImportance()):
        scores = importance(group)
        agree(copied(importance)(group), scores)
