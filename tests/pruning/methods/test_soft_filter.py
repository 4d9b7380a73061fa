from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from orthoreg_ext.pruning import SoftFilter

from ..nets import IMAGE, ResNet, randomised
from .loops import (
    Small,
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


def sizes(layer: Any) -> list[float]:
    """The size of each filter's entries, which are all alike."""
    return [round(v, 6) for v in layer.weight.detach().abs().flatten(1).mean(1).tolist()]


def test_sfp_sets_the_lowest_to_zero_after_every_epoch(x: Tensor) -> None:
    model = ordered(Small())  # filter i has entries of 0.1 (i + 1)
    method = SoftFilter(model, x, duration=3)
    bias, gamma = model.conv1.bias.clone(), model.bn1.weight.clone()
    method.after_epoch()
    assert sizes(model.conv1) == [0, 0, 0.3, 0.4]
    assert sizes(model.conv2) == [0, 0, 0, 0.4, 0.5, 0.6]
    model.conv1.weight.data += 0.35 * (model.conv1.weight == 0)  # those two grow back
    method.after_epoch()
    assert sizes(model.conv1) == [0, 0.35, 0, 0.4]  # of two alike the first goes
    assert not method.done
    model.conv1.weight.data[1:3] = 0.5
    method.after_epoch()
    assert sizes(model.conv1) == [0, 0.5, 0.5, 0]
    assert method.done
    assert torch.equal(model.conv1.bias, bias)
    assert torch.equal(model.bn1.weight, gamma)
    assert gone(method.finish()) == {"conv1": [0, 3], "conv2": [0, 1, 2]}


@pytest.mark.parametrize(
    ("every", "duration", "cuts"),
    [(1, 3, [1, 2, 3]), (2, 5, [2, 4, 5]), (3, 6, [3, 6]), (4, 3, [3])],
)
def test_cuts_come_after_every_nth_epoch_and_the_last(
    every: int, duration: int, cuts: list[int], x: Tensor
) -> None:
    model = ordered(Small())
    method = SoftFilter(model, x, every=every, duration=duration)
    found = []
    for epoch in range(1, duration + 1):
        model.conv1.weight.data.abs_().clamp_(min=0.05)
        method.after_epoch()
        if (model.conv1.weight == 0).any():
            found.append(epoch)
    assert found == cuts


def test_the_growing_share_goes_through_its_three_points(x: Tensor) -> None:
    method = SoftFilter(Small(), x, kind="asfp", duration=80, ratio=0.4)
    shares = {}
    for method.epochs in (0, 10, 20, 40, 80, 90):
        shares[method.epochs] = method.share
    rate = 11.090355  # k T of a exp(-k t) + b
    assert shares[0] == 0
    assert shares[10] == pytest.approx(0.3, rel=1e-4)  # three quarters after an eighth
    assert shares[20] == pytest.approx(0.4 * (1 - math.exp(-rate / 4)), rel=1e-4)
    assert shares[40] == pytest.approx(0.4 * (1 - math.exp(-rate / 2)), rel=1e-4)
    assert shares[80] == shares[90] == pytest.approx(0.4, rel=1e-12)
    plain = SoftFilter(Small(), x, kind="srfp", duration=80, ratio=0.4)
    assert plain.share == 0.4


def test_asfp_takes_more_and_more(x: Tensor) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 100), torch.nn.ReLU(), torch.nn.Linear(100, 2))
    method = SoftFilter(model, torch.randn(1, 3), kind="asfp", duration=16, ratio=0.8)
    taken = []
    for _ in range(16):
        model[0].weight.data = torch.rand_like(model[0].weight) + 0.1
        method.after_epoch()
        taken.append(int((model[0].weight == 0).all(1).sum()))
    # 80 (1 - 4^(-t / 2)): 40, 60, 70, 75 ...
    assert taken == [40, 60, 70, 75, 77, 78, 79, 79, 79, 79, 79, 79, 79, 79, 79, 80]


@pytest.mark.parametrize(
    ("decay", "factors"),
    [
        ("linear", [0.75, 0.5, 0.25, 0.0]),
        ("cosine", [0.853553, 0.5, 0.146447, 0.0]),
        ("exponential", [0.281665, 0.075858, 0.016894, 0.0]),
    ],
)
@pytest.mark.parametrize("kind", ["srfp", "asrfp"])
def test_the_factors_fall_from_one_to_zero(
    kind: str, decay: str, factors: list[float], x: Tensor
) -> None:
    model = ordered(Small())
    method = SoftFilter(model, x, kind=kind, decay=decay, duration=4, ratio=0.25)
    assert method.factor == 1
    for factor in factors:
        model.conv1.weight.data.sign_()[0].mul_(0.5)
        method.after_epoch()
        assert method.factor == pytest.approx(factor, abs=1e-5)
        expected = 0.5 * factor if method.share * 4 >= 1 else 0.5
        assert sizes(model.conv1) == pytest.approx([expected, 1, 1, 1], abs=1e-5)


def test_the_kinds_differ_in_share_and_factor(x: Tensor) -> None:
    seen = {}
    for kind in ("sfp", "asfp", "srfp", "asrfp"):
        method = SoftFilter(Small(), x, kind=kind, duration=8)
        method.epochs = 1
        seen[kind] = (round(method.share, 3), method.factor)
    assert seen == {
        "sfp": (0.5, 0),
        "asfp": (0.375, 0),
        "srfp": (0.5, 0.875),
        "asrfp": (0.375, 0.875),
    }


def test_soft_filters_train_on_and_may_grow_back(x: Tensor) -> None:
    model = ordered(Small())
    optimizer = sgd(model)
    method = SoftFilter(model, x, optimizer=optimizer, duration=5)
    run(model, optimizer, method, 0, 4)
    momentum = optimizer.state[model.conv1.weight]["momentum_buffer"].clone()
    assert (model.conv1.weight.flatten(1) == 0).all(1).sum() == 2
    assert momentum.flatten(1).abs().sum(1).min() > 0  # not cleared, as in the released code
    step(model, optimizer, method, 9)
    assert not (model.conv1.weight == 0).flatten(1).all(1).any()


@pytest.mark.parametrize("kind", ["sfp", "asrfp"])
@pytest.mark.parametrize("name", sorted(IMAGE))
def test_every_kind_of_layer_is_cut(name: str, kind: str, x: Tensor) -> None:
    model = randomised(IMAGE[name]())
    optimizer = sgd(model, 1e-2)
    method = SoftFilter(model, x, kind=kind, optimizer=optimizer, ratio=0.4, duration=2)
    run(model, optimizer, method, 0, 4, length=2)
    assert method.done
    last = method.chosen
    zero = method.holders.values(last)
    for m in method.holders.matrices:
        rows = m.layer.weight.detach().flatten(1)
        assert torch.equal((rows == 0).all(1), m.of_units(zero) > 0), m.layer.name
    method.finish()
    units = torch.cat([group.units for group in method.engine.structure.prunable])
    assert not torch.isin(last, units).any()  # the last set is the one that left
    check_optimizer(model, optimizer)
    step(model, optimizer, None)
    assert all(p.isfinite().all() for p in model.parameters())


def test_frozen_weights_stay(x: Tensor) -> None:
    model = ResNet()
    model.layer1.conv2.requires_grad_(False)
    before = model.layer1.conv2.weight.clone()
    SoftFilter(model, x).after_epoch()
    assert torch.equal(model.layer1.conv2.weight, before)


@pytest.mark.parametrize("kind", ["sfp", "asrfp"])
@pytest.mark.parametrize("at", [3, 4, 9])
def test_a_resumed_run_ends_bit_equal(kind: str, at: int, x: Tensor) -> None:
    settings = {"kind": kind, "duration": 3, "decay": "cosine"}
    check_resume(ResNet, lambda m, o: SoftFilter(m, x, optimizer=o, **settings), total=12, at=at)


def test_steps_cost_nothing(x: Tensor) -> None:
    assert not operations(SoftFilter(Small(), x))


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"kind": "sfpp"}, "unknown kind 'sfpp'; did you mean 'sfp'"),
        ({"decay": "linar"}, "did you mean 'linear'"),
        ({"duration": 0}, "duration is 0"),
        ({"every": 1.0}, "every is 1.0"),
        ({"ratio": None}, "ratio is None"),
        ({"ratio": 0}, "ratio is 0"),
    ],
)
def test_wrong_arguments_change_nothing(arguments: dict[str, Any], match: str, x: Tensor) -> None:
    model = Small()
    with refused(match, model):
        SoftFilter(model, x, **arguments)
