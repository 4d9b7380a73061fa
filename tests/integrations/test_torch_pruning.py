"""The importances for Torch-Pruning against its own, on small and on real networks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from tests.pruning import nets

tp = pytest.importorskip("torch_pruning", reason="pip install orthoreg_ext[pruning]")
from orthoreg_ext.integrations.torch_pruning import (  # noqa: E402
    FusedMagnitudeImportance,
    FusedTaylorImportance,
    OrthoRegImportance,
    VarietyImportance,
)
from tests.integrations.torch_pruning_nets import (  # noqa: E402
    FLATTENED,
    REAL,
    SMALL,
    agree,
    graph,
    groups,
    pairs,
    with_gradients,
)

pytestmark = pytest.mark.filterwarnings("ignore:Unwrapped parameters detected")

REDUCTIONS = ("mean", "sum", "max", "prod", "first", "gate")
NORMALIZERS = (None, "sum", "mean", "max", "standarization", "gaussian", "lamp", "sentinel_0.3")


@pytest.fixture
def chain() -> tuple[Any, Any]:
    """y = V relu(W x): the group of its three hidden channels, and the model."""
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 2], [3, -4], [0, 5]]))
        model[0].bias.copy_(torch.tensor([1.0, 0, 2]))
        model[2].weight.copy_(torch.tensor([[2.0, 1, -3]]))
    model[0].weight.grad = torch.tensor([[1.0, -1], [0, 2], [7, 1]])
    model[0].bias.grad = torch.tensor([3.0, 1, 1])
    model[2].weight.grad = torch.tensor([[1.0, -2, 1]])
    return groups(model, torch.ones(1, 2))[-1], model


@pytest.mark.parametrize(
    ("importance", "expected"),
    [
        (FusedMagnitudeImportance(1, "sum", None), [3 + 2, 7 + 1, 5 + 3]),
        (FusedMagnitudeImportance(2, "sum", None), [5 + 4, 25 + 1, 25 + 9]),
        (FusedMagnitudeImportance(2, "mean", None), [4.5, 13, 17]),
        (FusedMagnitudeImportance(2, "max", None), [5, 25, 25]),
        (FusedMagnitudeImportance(2, "prod", None), [20, 25, 225]),
        (FusedMagnitudeImportance(2, "first", None), [5, 25, 25]),
        (FusedMagnitudeImportance(2, "gate", None), [4, 1, 9]),
        (FusedMagnitudeImportance(2, "first", "sum"), [5 / 55, 25 / 55, 25 / 55]),
        (FusedMagnitudeImportance(2, "sum", None, True), [5 + 1 + 4, 25 + 0 + 1, 25 + 4 + 9]),
        (FusedTaylorImportance("sum", None), [3 + 2, 8 + 2, 5 + 3]),
        (FusedTaylorImportance("sum", None, True), [1 + 2, 8 + 2, 5 + 3]),
        (FusedTaylorImportance("sum", None, bias=True), [3 + 3 + 2, 8 + 0 + 2, 5 + 2 + 3]),
        (OrthoRegImportance(), [(-1 + 3) ** 2, 64, (5 + 2) ** 2]),
        (OrthoRegImportance(bias=False), [1, 64, 25]),
        (OrthoRegImportance(bias=False, normalizer="max"), [1 / 64, 1, 25 / 64]),
    ],
)
def test_scores_by_hand(importance: Any, expected: list[float], chain: Any) -> None:
    agree(importance(chain[0]), torch.tensor([float(e) for e in expected]))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", SMALL)
def test_scores_are_torch_prunings_for_every_reduction(name: str, bias: bool) -> None:
    model, x = with_gradients(name)
    for group in groups(model, x):
        for reduction in REDUCTIONS:
            if name in FLATTENED and reduction not in ("mean", "sum"):
                continue  # test_channels_behind_a_flatten_are_added_first
            for theirs, ours in pairs(reduction, None, bias, name):
                agree(ours(group), theirs(group))


@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("name", ["resnet", "grouped", "decoder"])
def test_scores_are_torch_prunings_for_every_normalizer(name: str, normalizer: Any) -> None:
    model, x = with_gradients(name)
    for group in groups(model, x):
        for theirs, ours in pairs("mean", normalizer, False, name):
            # these take differences of nearly equal numbers
            spread = normalizer in ("gaussian", "standarization", "lamp")
            agree(ours(group), theirs(group), 1e-5 if spread else 1e-6)


def test_a_function_normalises() -> None:
    group = groups(*with_gradients("mlp"))[0]
    for theirs, ours in pairs("mean", torch.log, False):
        agree(ours(group), theirs(group))


@pytest.mark.parametrize("name", REAL)
def test_scores_of_real_networks_are_torch_prunings(name: str) -> None:
    model, x = with_gradients(name)
    found = groups(model, x)
    for theirs, ours in pairs("mean", "mean", True):
        for group in found:
            agree(ours(group), theirs(group))


def test_without_reduction_every_layer_has_a_row() -> None:
    group = groups(*with_gradients("mlp"))[0]
    for theirs, ours in pairs(None, None, False):
        agree(ours(group), theirs(group))


def test_half_precision_is_added_in_float32() -> None:
    model, x = with_gradients("resnet")
    exact = [FusedMagnitudeImportance()(group) for group in groups(model, x)]
    model, x = model.bfloat16(), x.bfloat16()
    rounded = [FusedMagnitudeImportance()(group) for group in groups(model, x)]
    for a, b in zip(rounded, exact, strict=True):
        assert a.dtype == torch.float32
        agree(a, b, 2e-2)
    model, x = with_gradients("mlp")
    model, x = model.bfloat16(), x.bfloat16()
    inputs = model.fc3.weight.detach().float().square().sum(0)
    group = next(g for g in groups(model, x) if g[0].dep.target.module is model.fc2)
    agree(FusedMagnitudeImportance(2, "gate", None)(group), inputs)


def test_memory_format_does_not_matter() -> None:
    model, x = with_gradients("grouped")
    expected = [FusedTaylorImportance()(group) for group in groups(model, x)]
    model = model.to(memory_format=torch.channels_last)
    for group, scores in zip(groups(model, x), expected, strict=True):
        agree(FusedTaylorImportance()(group), scores)


# ---- where Torch-Pruning 1.6.1 is wrong


def test_channels_behind_a_flatten_are_added_first() -> None:
    model, x = with_gradients("vgg")
    group = next(g for g in groups(model, x) if g[0].dep.target.module is model.conv3)
    inputs = model.fc1.weight.detach().square().sum(0).view(16, 4).sum(1)
    filters = model.conv3.weight.detach().square().flatten(1).sum(1)
    gamma = model.bn3.weight.detach().square()
    by_hand = {
        "max": torch.stack([filters, gamma, inputs]).amax(0),
        "prod": filters * gamma * inputs,
        "gate": inputs,
        "first": filters,
    }
    for reduction, expected in by_hand.items():
        agree(FusedMagnitudeImportance(2, reduction, None)(group), expected)
    theirs = tp.importance.GroupMagnitudeImportance(2, "gate", None)(group)
    last = model.fc1.weight.detach().square().sum(0).view(16, 4)[:, 3]
    agree(theirs, last)  # one of the four


def test_some_channels_have_scores_in_the_order_asked_for() -> None:
    model, x = with_gradients("resnet")
    dependencies, asked = graph(model, x), [7, 2, 6]
    conv = model.layer1.conv1
    group = dependencies.get_pruning_group(conv, tp.prune_conv_out_channels, asked)
    every = dependencies.get_pruning_group(conv, tp.prune_conv_out_channels, list(range(10)))
    for _, ours in pairs("mean", None, False):
        agree(ours(group), ours(every)[asked])
    with pytest.raises((IndexError, RuntimeError)):
        tp.importance.GroupMagnitudeImportance()(group)


def test_taylor_keeps_unordered_channels_with_their_roots() -> None:
    model, x = with_gradients("decoder")
    group = next(g for g in groups(model, x) if g[0].dep.target.module is model.fc)
    slopes = model.up.weight * model.up.weight.grad
    expected = slopes.detach().abs().flatten(1).sum(1).repeat_interleave(4)
    agree(FusedTaylorImportance("gate", None)(group), expected)
    theirs = tp.importance.GroupTaylorImportance("gate", None)(group)
    assert not torch.allclose(theirs, expected)  # it sorts the channels, but not their roots


def test_taylor_scores_batchnorm_only_if_asked() -> None:
    model, x = with_gradients("vgg")
    group = next(g for g in groups(model, x) if g[0].dep.target.module is model.conv1)
    theirs, default = tp.importance.GroupTaylorImportance(), FusedTaylorImportance()
    asked = FusedTaylorImportance("sum", None, batchnorm=True)
    without = FusedTaylorImportance("sum", None)
    gamma = model.bn1
    agree(asked(group) - without(group), (gamma.weight * gamma.weight.grad).detach().abs(), 1e-5)
    before = theirs(group)
    with torch.no_grad():
        gamma.weight *= 100
    agree(theirs(group), before)
    agree(default(group), before)


def test_grouped_transposed_convolutions_have_their_own_filters() -> None:
    torch.manual_seed(0)
    model, x = nets.Transposed(), torch.randn(1, 3, 8, 8)
    group = next(g for g in groups(model, x) if g[0].dep.target.module is model.grouped)
    filters = model.grouped.weight.detach().unflatten(0, (2, 6)).transpose(1, 2).flatten(0, 1)
    expected = filters.square().flatten(1).sum(1)  # [2 * 4]
    agree(FusedMagnitudeImportance(2, "first", None)(group), expected)
    with pytest.raises(IndexError):
        tp.importance.GroupMagnitudeImportance()(group)


def test_a_channel_multiplier_is_no_index_error() -> None:
    torch.manual_seed(0)
    model, x = nets.Separable(), torch.randn(1, 3, 8, 8)
    group = next(g for g in groups(model, x) if g[0].dep.target.module is model.point)
    assert torch.isfinite(FusedMagnitudeImportance()(group)).all()
    with pytest.raises(IndexError):
        tp.importance.GroupMagnitudeImportance()(group)


@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_a_group_of_zeros_has_zero_scores(normalizer: Any) -> None:
    model, x = with_gradients("mlp")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    scores = FusedMagnitudeImportance(normalizer=normalizer)(groups(model, x)[0])
    assert scores.tolist() == [0.0] * len(scores)


def test_a_layer_whose_origin_is_lost_does_not_count() -> None:
    model, x = with_gradients("mlp")
    group = next(g for g in groups(model, x) if g[0].dep.target.module is model.fc1)
    for item in group.items[1:]:
        item.root_idxs = [None] * len(item.idxs)
    own = model.fc1.weight.detach().square().sum(1)
    agree(FusedMagnitudeImportance(2, "sum", None)(group), own)


def test_a_wrong_graph_is_an_error_that_names_the_layer() -> None:
    torch.manual_seed(0)
    found, importance = groups(nets.Concat(), torch.randn(1, 3, 8, 8)), FusedMagnitudeImportance()
    with pytest.raises(ValueError, match=r"graph is wrong about layer '.*ignored_layers"):
        list(map(importance, found))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FusedMagnitudeImportance(group_reduction="average"), "unknown group_reduction"),
        (lambda: FusedTaylorImportance(normalizer="norm"), "unknown normalizer 'norm'"),
        (lambda: OrthoRegImportance(normalizer="sentinel_2"), "expected a share"),
        (lambda: OrthoRegImportance(normalizer="sentinel"), "expected a share"),
        (lambda: FusedMagnitudeImportance(p=0), "p is 0"),
        (lambda: VarietyImportance("l3"), "unknown host 'l3'"),
        (lambda: VarietyImportance(mode="pair"), "did you mean 'pairwise'"),
        (lambda: VarietyImportance(threshold=2), "threshold is 2"),
        (lambda: VarietyImportance(group_reduction=None), "group_reduction is None"),
    ],
)
def test_wrong_arguments_are_told_at_once(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("make", [FusedTaylorImportance, OrthoRegImportance])
def test_a_missing_gradient_names_the_layer(make: Any) -> None:
    model, x = with_gradients("resnet")
    model.layer2.conv1.weight.grad = None
    pruner = tp.pruner.BasePruner(model, x, make())
    with pytest.raises(ValueError, match=r"weight of layer 'layer2.conv1' has none: call loss"):
        pruner.step()
    assert model.layer2.conv1.out_channels == 12
    assert model.stem.out_channels == 8  # nothing was cut


def test_layers_that_no_group_counts_need_no_gradient() -> None:
    model, x = with_gradients("resnet")
    model.layer2.conv1.weight.grad = None
    conv = model.layer1.conv1
    group = next(g for g in groups(model, x) if g[0].dep.target.module is conv)
    agree(FusedTaylorImportance()(group), tp.importance.GroupTaylorImportance()(group))


@pytest.mark.parametrize("make", [FusedMagnitudeImportance, FusedTaylorImportance])
def test_a_score_that_is_not_finite_names_the_layer(make: Any) -> None:
    model, x = with_gradients("resnet")
    with torch.no_grad():
        model.layer1.conv2.weight[3, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"not finite for layer 'layer1.conv2'"):
        make()(groups(model, x)[0])
