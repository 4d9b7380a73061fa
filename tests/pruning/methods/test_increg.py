from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from orthoreg_ext.pruning import IncReg

from ..nets import IMAGE, ResNet, randomised
from .loops import (
    READS,
    Small,
    added,
    check_optimizer,
    check_resume,
    gone,
    operations,
    ordered,
    refused,
    run,
    sgd,
    step,
)

QUICK: dict[str, Any] = {"delta": 1.0, "ceiling": 2.0}
ROOT = math.sqrt(2.0)


def lambdas(method: IncReg) -> list[float]:
    """Of the six filters of conv2."""
    return method.strengths["conv2"].tolist()


def advance(model: Any, method: IncReg, number: int = 0) -> dict[str, Tensor]:
    found = added(model, method, number)
    method.after_step()
    return found


def test_the_schedule_is_the_published_one(x: Tensor) -> None:
    """With three filters to lose and u = 1/4: 1, 1/2, 1/4, 0, -1/2 ... by rank."""
    model = ordered(Small())
    method = IncReg(model, x, ignored=["conv1"], **QUICK)
    after = 1 / 8**0.5  # with two left to lose
    table = [  # lambda after the change, filters that are gone
        ([1.0, 0.5, 0.25, 0, 0, 0], []),
        ([2.0, 1.0, 0.5, 0, 0, 0], [0]),  # the first has come to the ceiling
        ([2.0, 2.0, 0.5 + after, 0, 0, 0], [0, 1]),
        ([2.0, 2.0, 1.5 + after, 0, 0, 0], [0, 1]),  # one left
        ([2.0, 2.0, 2.5 + after, 0, 0, 0], [0, 1, 2]),
        ([2.0, 2.0, 2.5 + after, 0, 0, 0], [0, 1, 2]),
    ]
    for number, (strengths, expected) in enumerate(table):
        weights = model.conv2.weight.detach().clone()
        found = advance(model, method, number)
        assert lambdas(method) == pytest.approx(strengths, abs=1e-9)
        units = method.engine.structure.prunable[0].units
        assert method.gone.tolist() == units[expected].tolist()
        zero = (model.conv2.weight.flatten(1) == 0).all(1).nonzero().flatten().tolist()
        assert zero == expected
        # a layer that has lost all is let alone, and a filter that is gone needs no decay
        ended = len(expected) == 3
        acting = [0.0 if ended or i in expected else s for i, s in enumerate(strengths)]
        decay = torch.tensor(acting).view(-1, 1, 1, 1) * weights
        torch.testing.assert_close(found.pop("conv2.weight"), decay, rtol=1e-4, atol=1e-5)
        assert not any(gradient.any() for gradient in found.values())
        assert method.done == ended
    assert gone(method.finish()) == {"conv2": [0, 1, 2]}


def test_the_change_falls_from_a_to_below_zero(x: Tensor) -> None:
    method = IncReg(Small(), x, delta=2.0)
    rank = torch.arange(7, dtype=torch.float64)
    change = method._change(rank, torch.full((7,), 3))
    expected = [2.0, 1.0, 0.5, 0.0, -1.0, -3.0, -7.0]  # 2 * (0.5 - 8^((r - 4) / 3)) beyond r* = 2
    assert change.tolist() == pytest.approx(expected, abs=1e-9)
    two = method._change(rank[:4], torch.full((4,), 2)).tolist()
    assert two == pytest.approx([2.0, 2 / 8**0.5, 0.0, 1 - 2 * ROOT], abs=1e-9)


def sized(layer: Any, sizes: list[float]) -> None:
    layer.weight.data = torch.tensor(sizes).view(-1, 1, 1, 1).expand_as(layer.weight).clone()


def test_ranks_are_averaged_and_a_filter_that_grows_is_let_go(x: Tensor) -> None:
    model = Small()
    method = IncReg(model, x, delta=1.0, ceiling=100.0, ignored=["conv1"])
    table = [  # sizes, averaged ranks, lambda
        ([1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 4, 5], [1, 0.5, 0.25, 0, 0, 0]),
        # filter 0 is the largest now: its average is 2.5, behind 1 and 2, before 3
        ([9, 2, 3, 4, 5, 6], [2.5, 0.5, 1.5, 2.5, 3.5, 4.5], [1.25, 1.5, 0.75, 0, 0, 0]),
        (
            [9, 2, 3, 4, 5, 6],
            [10 / 3, 1 / 3, 4 / 3, 7 / 3, 10 / 3, 13 / 3],
            [1.25, 2.5, 1.25, 0.25, 0, 0],  # rank 3, before filter 4 of the same average
        ),
        (
            [9, 2, 3, 4, 5, 6],
            [3.75, 0.25, 1.25, 2.25, 3.25, 4.25],
            [0.75, 3.5, 1.75, 0.5, 0, 0],  # rank 4: half of A less
        ),
        (
            [9, 2, 3, 4, 5, 6],
            [4.0, 0.2, 1.2, 2.2, 3.2, 4.2],
            [0.25, 4.5, 2.25, 0.75, 0, 0],
        ),
        (
            [9, 2, 3, 4, 5, 6],
            [25 / 6, 1 / 6, 7 / 6, 13 / 6, 19 / 6, 25 / 6],
            [0.0, 5.5, 2.75, 1.0, 0, 0],  # never below 0
        ),
    ]
    for number, (sizes, ranks, strengths) in enumerate(table):
        sized(model.conv2, [float(size) for size in sizes])
        advance(model, method, number)
        assert method.state_dict()["rank"] == pytest.approx(ranks)
        assert lambdas(method) == pytest.approx(strengths, abs=1e-9)


def test_lambda_moves_at_every_nth_step(x: Tensor) -> None:
    model = ordered(Small())
    method = IncReg(model, x, delta=1.0, ceiling=100.0, every=3)
    seen = []
    for number in range(7):
        found = advance(model, method, number)
        seen.append(lambdas(method)[0])
        assert found["conv2.weight"][0].any()
    assert seen == [1, 1, 1, 2, 2, 2, 3]


def test_the_defaults_are_the_published_ones(x: Tensor) -> None:
    settings = IncReg(Small(), x).state_dict()["settings"]
    assert [settings[name] for name in ("delta", "middle", "ceiling", "every")] == [
        2.5e-4,
        0.25,
        2.5,
        1,
    ]


def test_filters_that_are_gone_do_not_grow_back(x: Tensor) -> None:
    model = ordered(Small())
    optimizer = sgd(model, 0.1)
    method = IncReg(model, x, optimizer=optimizer, delta=0.5, ceiling=2.0)
    lost: set[int] = set()
    for number in range(40):
        step(model, optimizer, method, number)
        now = set(method.gone.tolist())
        assert lost <= now
        lost = now
        marks = method.holders.values(method.gone)
        for m in method.holders.matrices:
            rows = m.layer.weight.detach().flatten(1).abs().sum(1)
            assert ((rows == 0) == (m.of_units(marks) > 0)).all()
    assert method.done
    assert len(lost) == 5


@pytest.mark.parametrize("name", sorted(IMAGE))
def test_every_kind_of_layer_loses_its_share(name: str, x: Tensor) -> None:
    model = randomised(IMAGE[name]())
    optimizer = sgd(model, 1e-2)
    method = IncReg(model, x, optimizer=optimizer, ratio=0.4, delta=0.3, ceiling=2.0)
    groups = method.engine.structure.prunable
    left = [
        len(group.units) - n for group, n in zip(groups, method.state_dict()["quota"], strict=True)
    ]
    number = 0
    while not method.done and number < 200:
        step(model, optimizer, method, number)
        number += 1
    assert method.done
    lost = method.gone
    result = method.finish()
    assert [len(group.units) for group in method.engine.structure.prunable] == left
    for group in method.engine.structure.prunable:
        assert not torch.isin(group.units, lost).any()
        assert abs(len(group.units) / group.original - 0.6) < 0.5 / group.original + 0.1
    assert result.after.filters < result.before.filters
    check_optimizer(model, optimizer)
    step(model, optimizer, None)
    assert all(p.isfinite().all() for p in model.parameters())


def test_an_early_end_takes_the_largest_lambda_for_the_rest(x: Tensor) -> None:
    model = ordered(Small())
    method = IncReg(model, x, **QUICK)
    for number in range(2):
        advance(model, method, number)
    assert len(method.gone) == 2  # one of each layer
    model.conv2.weight.data = model.conv2.weight.data.flip(0)
    assert gone(method.finish()) == {"conv1": [0, 1], "conv2": [0, 1, 2]}


def test_extreme_ranks_stay_finite(x: Tensor) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 2000), torch.nn.ReLU(), torch.nn.Linear(2000, 2))
    method = IncReg(model, torch.randn(2, 4), ratio=0.001, **QUICK)
    for _ in range(4):
        model(torch.randn(2, 4)).square().mean().backward()
        method.before_step()
        method.after_step()
    assert method.strengths["0"].isfinite().all()
    assert len(method.gone) == 2
    assert all(p.isfinite().all() and p.grad.isfinite().all() for p in model.parameters())


def test_zero_filters_are_the_first_to_go(x: Tensor) -> None:
    model = ordered(Small())
    model.conv2.weight.data[[1, 4]] = 0
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    method = IncReg(model, x, optimizer=optimizer, **QUICK)
    run(model, optimizer, method, 0, 8)
    assert gone(method.finish())["conv2"] == [0, 1, 4]


def test_frozen_weights_stay(x: Tensor) -> None:
    model = ResNet()
    model.layer1.conv2.requires_grad_(False)
    before = model.layer1.conv2.weight.clone()
    optimizer = sgd(model)
    method = IncReg(model, x, optimizer=optimizer, **QUICK)
    run(model, optimizer, method, 0, 30)
    assert method.done
    assert torch.equal(model.layer1.conv2.weight, before)


@pytest.mark.parametrize("at", [1, 2, 5, 9])
def test_a_resumed_run_ends_bit_equal(at: int, x: Tensor) -> None:
    settings = {"delta": 0.4, "ceiling": 2.0, "every": 2}
    check_resume(ResNet, lambda m, o: IncReg(m, x, optimizer=o, **settings), total=11, at=at)


def test_a_step_reads_nothing(x: Tensor) -> None:
    model = Small()
    method = IncReg(model, x)
    run(model, sgd(model), method, 0, 3)
    assert not operations(method) & READS


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"delta": 0.0}, "delta is 0.0"),
        ({"middle": 1.0}, r"middle is 1.0, expected a number in \(0, 1\)"),
        ({"ceiling": -2.5}, "ceiling is -2.5"),
        ({"every": 0.5}, "every is 0.5"),
        ({"ratio": None}, "ratio is None"),
    ],
)
def test_wrong_arguments_change_nothing(arguments: dict[str, Any], match: str, x: Tensor) -> None:
    model = Small()
    with refused(match, model):
        IncReg(model, x, **arguments)


def test_weights_that_are_not_finite_are_not_cut(x: Tensor) -> None:
    model = Small()
    method = IncReg(model, x, **QUICK)
    model.conv2.weight.data[0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="conv2"):
        method.finish()
    assert model.conv1.out_channels == 4
