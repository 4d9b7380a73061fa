"""What the fuzzing found, one small case each, so that it is seen whatever is drawn."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import orthoreg_ext as ox
import orthoreg_ext.functional as F

SIDES = ("rows", "cols")


def test_filters_of_a_bias_alone() -> None:
    weight, bias = torch.empty(2, 9, 0, 1), torch.tensor([2.0, 1.0])
    # G = b b^T = [[4, 2], [2, 1]] and b^T b = [[5]]
    found = F.gram_penalty([weight], "so", side="rows", biases=[bias])
    assert found.tolist() == [3.0**2 + 2 * 2.0**2]
    assert F.gram_penalty([weight], "so", side="cols", biases=[bias]).tolist() == [4.0**2]


def test_no_filters_in_any_memory() -> None:
    weight = torch.empty(2, 3, 3, 4).permute(1, 2, 3, 0)[:0]
    assert F.gram_penalty([weight], "orthoreg", side="rows").tolist() == [0.0]


@pytest.mark.parametrize("side", SIDES)
def test_gram_of_no_filters(side: str) -> None:
    expected = torch.zeros(5, 5) if side == "cols" else torch.zeros(0, 0)
    assert torch.equal(F.gram([torch.empty(0, 5)], side)[0], expected)


def test_tensors_whose_memory_is_not_their_values() -> None:
    weight = torch.tensor([[1.0, 2.0], [3.0, -1.0]])
    odd = torch._neg_view(-weight)
    assert torch.equal(F.gram([odd])[0], weight @ weight.mT)
    none = torch._efficientzerotensor((2, 2))
    assert torch.equal(F.gram([none])[0], torch.zeros(2, 2))
    assert F.filter_scores([none], criteria=["l1"])["l1"][0].tolist() == [0.0, 0.0]
    sums = torch._neg_view(torch.zeros(2, 2))
    F.accumulate_fisher_([weight], [odd], [sums])
    assert torch.equal(sums + 0, weight.square())
    with pytest.raises(ValueError, match=r"fisher\[0\] is a zero tensor without memory"):
        F.accumulate_fisher_([weight], [odd], [none])


def test_scores_of_no_filters_in_any_memory() -> None:
    weight = torch.empty(2, 2, 2, 5, 3).permute(4, 3, 2, 1, 0)[:0]
    assert F.filter_scores([weight], dim=1)["l1"][0].tolist() == [0.0] * 5


def test_true_is_no_number_of_groups() -> None:
    with pytest.raises(ValueError, match=r"groups\[0\] is True"):
        F.gram([torch.ones(2, 2)], groups=[True])


def test_a_lazy_weight_is_named() -> None:
    with pytest.raises(ValueError, match=r"weights\[0\] is not initialised"):
        F.gram([nn.LazyLinear(3).weight])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"criteria": 3}, "criteria must be a sequence of names, got int"),
        ({"dim": [[0]]}, "dim is"),
        ({"dim": torch.ones(2).numpy()}, "dim is"),
        ({"criteria": ["taylor"], "grads": 3}, "grads must be a sequence"),
    ],
)
def test_what_is_no_sequence_is_named(options: dict[str, object], expected: str) -> None:
    with pytest.raises((TypeError, ValueError), match=expected):
        F.filter_scores([torch.ones(2, 2)], **options)


@pytest.mark.parametrize("members", [None, 3, [3], [[()]], [[("0", None)]]])
def test_members_that_are_none_are_named(members: object) -> None:
    with pytest.raises(TypeError, match="members"):
        F.group_scores([torch.ones(2)], members)


def test_a_model_without_values_is_not_pruned() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 2)).to("meta")
    with pytest.raises(ValueError, match=r"'0.weight' is on the meta device"):
        ox.pruning.prune(model, torch.ones(1, 3, 3, 3), criterion="l1")
    lazy = nn.Sequential(nn.LazyConv2d(4, 3), nn.Flatten(), nn.Linear(4, 2))
    with pytest.raises(ValueError, match=r"'0.weight' is not initialised"):
        ox.pruning.prune(lazy, torch.ones(1, 3, 3, 3), criterion="l1")


def test_a_tensor_is_no_bias_setting() -> None:
    for refuse in (ox.OrthoRegularizer, ox.diagnose):
        with pytest.raises(ValueError, match="bias is tensor"):
            refuse(nn.Conv2d(3, 4, 3), bias=torch.ones(2))
