"""OrthoReg's and variety's importances on Torch-Pruning's groups."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

import orthoreg_ext as ox

tp = pytest.importorskip("torch_pruning", reason="pip install orthoreg_ext[pruning]")
from orthoreg_ext.integrations import torch_pruning as adapter  # noqa: E402
from orthoreg_ext.integrations.torch_pruning import (  # noqa: E402
    FusedMagnitudeImportance,
    OrthoRegImportance,
    VarietyImportance,
)
from tests.integrations.torch_pruning_nets import (  # noqa: E402
    agree,
    groups,
    with_gradients,
)

pytestmark = pytest.mark.filterwarnings("ignore:Unwrapped parameters detected")


@pytest.mark.parametrize("name", ["vgg", "resnet", "grouped", "depthwise", "dense"])
def test_orthoreg_is_the_square_of_each_filters_product(name: str) -> None:
    model, x = with_gradients(name)
    importance = OrthoRegImportance("sum", None)
    for group in groups(model, x):
        expected = torch.zeros(len(group[0].idxs), dtype=torch.float64)
        for item in group.items:
            layer, handler = item.dep.target.module, item.dep.handler
            if not isinstance(layer, (nn.Conv2d, nn.Linear)) or "in_" in handler.__name__:
                continue
            if item is not group[0] and handler.__name__ != "prune_out_channels":
                continue
            product = (layer.weight * layer.weight.grad).detach().double().flatten(1).sum(1)
            if layer.bias is not None:
                product += (layer.bias * layer.bias.grad).detach().double()
            for channel, root in zip(item.idxs, item.root_idxs, strict=True):
                expected[root] += product[channel] ** 2
        agree(importance(group), expected.float(), 1e-5)


def test_orthoreg_agrees_with_our_own_pruning() -> None:
    model, x = with_gradients("resnet")
    widths = {}
    for way in ("theirs", "ours"):
        pruned = copy.deepcopy(model)
        for parameter, source in zip(pruned.parameters(), model.parameters(), strict=True):
            parameter.grad = source.grad.clone()
        if way == "ours":
            ox.pruning.prune(pruned, x, criterion="fisher", ratio=0.5, scope="local", bias=True)
        else:
            importance = OrthoRegImportance()
            tp.pruner.BasePruner(pruned, x, importance, ignored_layers=[pruned.fc]).step()
        widths[way] = {name: p.detach() for name, p in pruned.named_parameters()}
    for name, parameter in widths["ours"].items():
        assert torch.equal(parameter, widths["theirs"][name]), name


def test_gradients_of_train_mode_are_told() -> None:
    model, x = with_gradients("resnet", train=True)
    with pytest.warns(UserWarning, match="taken in eval mode"):
        OrthoRegImportance()(groups(model, x)[0])
    model, x = with_gradients("resnet")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = groups(model, x)[0]
        OrthoRegImportance()(found)


def test_transposed_filters_count_by_output() -> None:
    model, x = with_gradients("decoder")
    group = next(g for g in groups(model, x) if g[0].dep.target.module is model.up)
    product = (model.up.weight * model.up.weight.grad).detach().sum((0, 2, 3))
    product += (model.up.bias * model.up.bias.grad).detach()
    agree(OrthoRegImportance("first")(group), product**2, 1e-5)


@pytest.mark.parametrize("mode", ["pairwise", "reweight", "gate"])
@pytest.mark.parametrize("host", ["l1", "orthoreg"])
def test_variety_cuts_what_our_own_pruning_cuts(host: str, mode: str) -> None:
    criterion = {"l1": "l1", "orthoreg": "fisher"}[host]
    cuts = []
    for ours in (True, False):
        model, x = with_gradients("resnet")
        if ours:
            variety = ox.pruning.variety(criterion, mode)
            ox.pruning.prune(model, x, criterion=variety, ratio=0.5, scope="local")
        else:
            importance = VarietyImportance(host, mode)
            if host == "l1":  # that of outputs alone, as ours is
                importance.host.HANDLERS = adapter.OUT
                importance.host.target_types = [nn.Conv2d, nn.Linear]
            tp.pruner.BasePruner(model, x, importance, ignored_layers=[model.fc]).step()
        cuts.append([p.detach().clone() for p in model.parameters()])
    for a, b in zip(*cuts, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("mode", ["pairwise", "gate"])
def test_variety_drops_the_weaker_copy_first(mode: str) -> None:
    model, x = with_gradients("vgg")
    with torch.no_grad():
        model.conv1.weight[5] = -3 * model.conv1.weight[2]
    group = next(g for g in groups(model, x) if g[0].dep.target.module is model.conv1)
    scores = VarietyImportance("l1", mode, 0.99)(group)
    plain = FusedMagnitudeImportance(1)(group)
    assert int(scores.argmin()) == (2 if plain[2] < plain[5] else 5)
    assert len(scores.unique()) == 8


def test_variety_takes_any_importance_as_host() -> None:
    group = groups(*with_gradients("vgg"))[0]
    host = tp.importance.GroupMagnitudeImportance(1, normalizer=None)
    agree(VarietyImportance(host)(group), VarietyImportance("l1")(group))
    alike = VarietyImportance(lambda g: torch.ones(len(g[0].idxs)), normalizer=None)(group)
    assert len(alike.unique()) == len(alike)
    assert VarietyImportance(lambda _: None)(group) is None
    with pytest.raises(ValueError, match="expected one score each"):
        VarietyImportance(lambda _: torch.ones(2))(group)
