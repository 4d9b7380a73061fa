"""layers.py: every kind of layer as filter matrices, shared and foreign parameters."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import orthoreg_ext.functional as F
from orthoreg_ext.layers import filter_layers, inspect_layers

LAYERS = [  # layer, kind, groups, filters, fan-in
    (nn.Conv2d(3, 8, 3), "conv", 1, 8, 27),
    (nn.Conv1d(3, 8, 5), "conv", 1, 8, 15),
    (nn.Conv3d(2, 4, 2), "conv", 1, 4, 16),
    (nn.Conv2d(4, 8, 3, groups=2), "grouped", 2, 8, 18),
    (nn.Conv2d(6, 6, 3, groups=6), "depthwise", 6, 6, 9),
    (nn.Conv2d(3, 6, 3, groups=3), "grouped", 3, 6, 9),
    (nn.ConvTranspose2d(5, 7, 3), "transposed", 1, 7, 45),
    (nn.ConvTranspose2d(4, 6, 3, groups=2), "transposed", 2, 6, 18),
    (nn.Linear(5, 3), "linear", 1, 3, 5),
]


@pytest.mark.parametrize(("module", "kind", "groups", "filters", "fan_in"), LAYERS)
def test_kinds_and_sizes(
    module: nn.Module, kind: str, groups: int, filters: int, fan_in: int
) -> None:
    (layer,) = filter_layers(module)
    assert (layer.kind, layer.groups, layer.filters, layer.fan_in) == (
        kind,
        groups,
        filters,
        fan_in,
    )
    assert layer.weight.shape[0] == filters
    assert layer.weight.flatten(1).shape[1] == fan_in
    assert layer.bias.shape == (filters,)


@pytest.mark.parametrize("groups", [1, 2])
def test_transposed_filters_are_what_makes_one_output(groups: int) -> None:
    module = nn.ConvTranspose2d(4, 6, 2, groups=groups, bias=False)
    (layer,) = filter_layers(module)
    with torch.no_grad():
        layer.module.weight.copy_(torch.randn_like(layer.module.weight))
    x = torch.randn(1, 4, 1, 1)
    out = module(x)[0]  # [6, 2, 2]
    per_group = 4 // groups
    for filter_index in range(6):
        group = filter_index // (6 // groups)
        inputs = x[0, group * per_group : (group + 1) * per_group]  # [i, 1, 1]
        want = (layer.weight[filter_index] * inputs).sum(0)
        torch.testing.assert_close(out[filter_index], want)


def test_shared_modules_and_parameters_are_listed_once() -> None:
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    found, skipped = inspect_layers(nn.Sequential(first, nn.ReLU(), first, second))
    assert [layer.name for layer in found] == ["0"]
    assert [(s.name, s.reason) for s in skipped] == [("3", "shares its weight with '0'")]


def test_other_matrices_are_listed_with_the_reason() -> None:
    model = nn.ModuleDict(
        {"emb": nn.Embedding(5, 4), "att": nn.MultiheadAttention(4, 2), "bn": nn.BatchNorm1d(4)}
    )
    found, skipped = inspect_layers(model)
    assert [layer.name for layer in found] == ["att.out_proj"]
    assert [s.name for s in skipped] == ["emb.weight", "att.in_proj_weight"]
    assert skipped[0].reason == "Embedding is not a convolution or linear layer"


def test_lazy_layers_ask_for_a_forward_pass() -> None:
    with pytest.raises(ValueError, match="layer '0' is lazy: run one forward pass"):
        filter_layers(nn.Sequential(nn.LazyLinear(3)))


def test_parametrized_layers_are_read_through_their_parametrization() -> None:
    module = nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))
    (layer,) = filter_layers(module)
    value = F.gram_penalty([layer.weight], "so").sum()
    value.backward()
    assert module.parametrizations.weight.original1.grad is not None
