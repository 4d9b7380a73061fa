from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from orthoreg_ext.pruning import GReg1, GReg2

from ..nets import IMAGE, Grouped, ResNet, Separable, randomised
from .loops import (
    LAYS_OUT,
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

BOTH = ("conv1", "conv2")
QUICK: dict[str, Any] = {"delta": 0.1, "every": 2, "ceiling": 0.3, "hold": 3}
PICK: dict[str, Any] = {
    "pick_delta": 0.1,
    "pick_ceiling": 0.2,
    "recover": 0.05,
    "delta": 0.3,
    "ceiling": 0.8,
    "every": 2,
    "hold": 2,
}


def fixed(model: torch.nn.Module) -> torch.optim.SGD:
    """An optimizer that changes nothing."""
    return torch.optim.SGD(model.parameters(), 0.0)


def decay(model: Any, method: GReg1, number: int) -> list[list[float]]:
    """The lambda of every filter of both convolutions, from the gradients that are added.

    Nothing else may be touched.
    """
    found = added(model, method, number)
    rows = []
    for layer in ("conv1", "conv2"):
        weight = model.get_submodule(layer).weight.detach()
        ratio = (found.pop(f"{layer}.weight") / weight).flatten(1)
        torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio), rtol=1e-3, atol=1e-3)
        rows.append([round(value, 3) + 0.0 for value in ratio.mean(1).tolist()])
    assert not any(gradient.any() for gradient in found.values())
    return rows


def test_greg1_follows_its_schedule(x: Tensor) -> None:
    model = ordered(Small())
    method = GReg1(model, x, **QUICK)
    table = [  # step, lambda of S, done before it
        (0, 0.1, False),
        (1, 0.1, False),
        (2, 0.2, False),
        (3, 0.2, False),
        (4, 0.3, False),  # at the ceiling: the last growth
        (5, 0.3, False),
        (6, 0.3, False),
        (7, 0.3, True),  # 3 steps later
        (8, 0.3, True),
    ]
    for number, strength, done in table:
        assert (method.steps, method.done) == (number, done)
        s = strength
        assert decay(model, method, number) == [[s, s, 0, 0], [s, s, s, 0, 0, 0]]
        assert method.strengths == pytest.approx({"conv1": s, "conv2": s})
        method.after_step()
    assert method.growths == {"conv1": 3, "conv2": 3}
    assert gone(method.finish()) == {"conv1": [0, 1], "conv2": [0, 1, 2]}


def test_greg1_has_the_published_defaults(x: Tensor) -> None:
    method = GReg1(Small(), x)
    settings = method.state_dict()["settings"]
    published = {"delta": 1e-4, "every": 10, "ceiling": 1.0, "ratio_limit": 1000.0, "hold": 10_000}
    assert {name: settings[name] for name in published} == published
    assert (settings["criterion"], settings["scope"]) == ("l1", "local")
    settings = GReg2(Small(), x).state_dict()["settings"]
    published |= {"pick_delta": 1e-5, "pick_ceiling": 1e-2, "recover": 1e-4}
    assert {name: settings[name] for name in published} == published


def set_ratios(model: Any, first: float, second: float) -> None:
    """Sets mean |w| of the kept filters, where that of filters 0 .. half - 1 is 1."""
    for layer, ratio in ((model.conv1, first), (model.conv2, second)):
        half = len(layer.weight) // 2
        layer.weight.data[:half] = 1.0
        layer.weight.data[half:] = -ratio


def test_greg1_stops_when_every_layer_has_the_ratio(x: Tensor) -> None:
    model = Small()
    set_ratios(model, 10.0, 100.0)
    method = GReg1(model, x, delta=0.1, every=1, ceiling=9.0, ratio_limit=50.0, hold=2)
    table = [  # ratios set, their averages, growths after it
        ((10.0, 100.0), (10.0, 100.0), 1),
        ((20.0, 0.5), (11.0, 90.05), 2),  # 0.9 * 10 + 0.1 * 20
        ((401.0, 90.05), (50.0, 90.05), 3),  # 0.9 * 11 + 40.1: both are there
        ((1.0, 1.0), (50.0, 90.05), 3),
        ((1.0, 1.0), (50.0, 90.05), 3),
    ]
    done = []
    for number, (ratios, averages, growths) in enumerate(table):
        set_ratios(model, *ratios)
        added(model, method, number)
        assert [method.ratios[n] for n in BOTH] == pytest.approx(averages, rel=1e-5)
        assert [method.growths[n] for n in BOTH] == [growths, growths]
        method.after_step()
        done.append(method.done)
    assert done == [False, False, False, True, True]


@pytest.mark.parametrize("cls", [GReg1, GReg2])
def test_zero_filters_give_no_nan(cls: type[GReg1], x: Tensor) -> None:
    model = ordered(Small())
    model.conv1.weight.data[:2] = 0
    model.conv2.weight.data.zero_()
    settings = QUICK if cls is GReg1 else PICK
    method = cls(model, x, ratio_limit=1e20, **settings)
    optimizer = sgd(model, 1e-2)
    for number in range(12):
        step(model, optimizer, method, number)
        assert all(0 <= ratio < float("inf") for ratio in method.ratios.values())
    assert method.done
    method.finish()
    assert all(p.isfinite().all() for p in model.parameters())


def test_greg2_follows_its_schedule(x: Tensor) -> None:
    model = ordered(Small())
    method = GReg2(model, x, **PICK)
    model.conv1.weight.data = model.conv1.weight.data.flip(0)  # what is picked is the set of then
    first, last = [0.1] * 4, [0.1] * 6
    table = [  # step, lambda in conv1, in conv2, done before it
        (0, first, last, False),
        (1, first, last, False),
        (2, [0.2] * 4, [0.2] * 6, False),  # at the ceiling of the first part: S is picked
        (3, [0.2] * 4, [0.2] * 6, False),
        (4, [-0.05, -0.05, 0.5, 0.5], [0.5, 0.5, 0.5, -0.05, -0.05, -0.05], False),
        (5, [-0.05, -0.05, 0.5, 0.5], [0.5, 0.5, 0.5, -0.05, -0.05, -0.05], False),
        (6, [-0.05, -0.05, 0.8, 0.8], [0.8, 0.8, 0.8, -0.05, -0.05, -0.05], False),
        (7, [-0.05, -0.05, 0.8, 0.8], [0.8, 0.8, 0.8, -0.05, -0.05, -0.05], False),
        (8, [-0.05, -0.05, 0.8, 0.8], [0.8, 0.8, 0.8, -0.05, -0.05, -0.05], True),
    ]
    for number, one, two, done in table:
        assert (method.picked, method.done) == (number > 2, done)
        assert decay(model, method, number) == [one, two]
        method.after_step()
    assert gone(method.finish()) == {"conv1": [2, 3], "conv2": [0, 1, 2]}


def test_greg2_stops_each_layer_by_itself(x: Tensor) -> None:
    model = Small()
    set_ratios(model, 60.0, 2.0)
    method = GReg2(model, x, **{**PICK, "every": 1, "ratio_limit": 50.0, "ceiling": 1.1})
    table = [  # lambda of S in conv1, in conv2
        (0.1, 0.1),
        (0.2, 0.2),  # picked; conv1 has the ratio already, and its kept filters no recovery
        (0.2, 0.5),
        (0.2, 0.8),
        (0.2, 1.1),
        (0.2, 1.1),
    ]
    for number, strengths in enumerate(table):
        rows = decay(model, method, number)
        assert [method.strengths[n] for n in BOTH] == pytest.approx(strengths)
        kept = (strengths[0], strengths[1] if number < 2 else -0.05)
        assert [row[0] for row in rows] == pytest.approx(strengths)
        assert [row[-1] for row in rows] == pytest.approx(kept)
        method.after_step()
    assert method.done  # the last growth was at step 4


def test_greg2_picks_the_lowest_if_it_ends_before_it_could(x: Tensor) -> None:
    method = GReg2(ordered(Small()), x)
    assert gone(method.finish()) == {"conv1": [0, 1], "conv2": [0, 1, 2]}


@pytest.mark.parametrize("cls", [GReg1, GReg2])
@pytest.mark.parametrize("name", ["resnet", "grouped", "separable", "concat", "transposed", "tied"])
def test_filters_of_the_set_shrink_and_leave(name: str, cls: type[GReg1], x: Tensor) -> None:
    model = randomised(IMAGE[name]())
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.5)
    settings = {"delta": 0.5, "every": 1, "ceiling": 2.0, "hold": 10}
    if cls is GReg2:
        settings |= {"pick_delta": 0.1, "pick_ceiling": 0.2}
    method = cls(model, x, optimizer=optimizer, ratio=0.4, **settings)
    sizes = {}
    number = 0
    while not method.done:
        step(model, optimizer, method, number)
        if 1 in method.growths.values():
            sizes = sizes or {m.layer.name: norms(m) for m in method.holders.matrices}
        number += 1
    chosen = method.holders.values(method.chosen)
    for m in method.holders.matrices:
        pruned = m.of_units(chosen) > 0
        now = norms(m)
        before = sizes[m.layer.name]  # behind a BatchNorm the gradient of a small filter is large
        assert now[pruned].sum() < 0.5 * before[pruned].sum(), m.layer.name
        assert now[~pruned].sum() > 0.8 * before[~pruned].sum(), m.layer.name
    method.finish()
    check_optimizer(model, optimizer)
    step(model, optimizer, None)


def norms(matrix: Any) -> Tensor:
    return matrix.layer.weight.detach().abs().flatten(1).sum(1)


def test_coupled_layers_have_one_lambda(x: Tensor) -> None:
    model = randomised(ResNet())
    method = GReg1(model, x, **QUICK)
    found = added(model, method)
    marks = {
        name: (found[f"{name}.weight"].flatten(1) != 0).all(1).tolist()
        for name in ("stem", "layer1.conv2")
    }
    assert marks["stem"] == marks["layer1.conv2"]
    assert sum(marks["stem"]) == 4
    depthwise = Separable()
    found = added(depthwise, GReg1(depthwise, x, **QUICK))
    assert (found["depth.weight"].flatten(1) != 0).all(1).tolist() == (
        found["stem.weight"].flatten(1) != 0
    ).all(1).tolist()
    grouped = Grouped()
    found = added(grouped, GReg1(grouped, x, **QUICK))
    rows = (found["conv2.weight"].flatten(1) != 0).all(1).view(4, 6)
    assert (rows == rows[:1]).all()  # the same filters of each group


def test_frozen_weights_stay(x: Tensor) -> None:
    model = ResNet()
    model.layer1.conv2.requires_grad_(False)
    before = model.layer1.conv2.weight.clone()
    optimizer = sgd(model)
    method = GReg2(model, x, optimizer=optimizer, **PICK)
    run(model, optimizer, method, 0, 8)
    assert torch.equal(model.layer1.conv2.weight, before)


@pytest.mark.parametrize("at", [1, 3, 6, 9])
@pytest.mark.parametrize("cls", [GReg1, GReg2])
def test_a_resumed_run_ends_bit_equal(cls: type[GReg1], at: int, x: Tensor) -> None:
    settings = {**QUICK, "ceiling": 0.4} if cls is GReg1 else PICK
    check_resume(ResNet, lambda m, o: cls(m, x, optimizer=o, **settings), total=10, at=at)


@pytest.mark.parametrize("cls", [GReg1, GReg2])
def test_a_step_between_growths_reads_nothing_and_lays_nothing_out(
    cls: type[GReg1], x: Tensor
) -> None:
    model = Small()
    method = cls(model, x, every=5)
    run(model, sgd(model), method, 0, 7)
    assert not operations(method) & (READS | LAYS_OUT)


@pytest.mark.parametrize(
    ("cls", "arguments", "match"),
    [
        (GReg1, {"delta": -1e-4}, "delta is -0.0001"),
        (GReg1, {"every": 0}, "every is 0"),
        (GReg1, {"ceiling": "1"}, "ceiling is '1'"),
        (GReg1, {"ratio_limit": 0}, "ratio_limit is 0"),
        (GReg1, {"hold": -1}, "hold is -1"),
        (GReg1, {"ratio": 0.99}, "max_layer_ratio"),
        (GReg2, {"pick_delta": 0.0}, "pick_delta is 0.0"),
        (GReg2, {"pick_ceiling": None}, "pick_ceiling is None"),
        (GReg2, {"recover": -1e-4}, "recover is -0.0001"),
        (GReg2, {"pick_ceiling": 2.0}, "expected at least pick_ceiling=2.0"),
        (GReg2, {"ratio": None}, "ratio is None"),
    ],
)
def test_wrong_arguments_change_nothing(
    cls: type[GReg1], arguments: dict[str, Any], match: str, x: Tensor
) -> None:
    model = Small()
    with refused(match, model):
        cls(model, x, **arguments)


def test_the_state_of_one_is_not_taken_by_the_other(x: Tensor) -> None:
    state = GReg2(Small(), x).state_dict()
    with pytest.raises(ValueError, match="method"):
        GReg1(Small(), x).load_state_dict(state)
