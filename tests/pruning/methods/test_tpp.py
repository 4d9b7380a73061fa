from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from orthoreg_ext.pruning import TPP

from ..nets import IMAGE, ResNet, randomised
from .loops import (
    LAYS_OUT,
    READS,
    PreActivation,
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

QUICK: dict[str, Any] = {"delta": 0.25, "every": 2, "ceiling": 0.5, "hold": 4, "zero_every": 2}


def zero_filters(layer: Any) -> list[int]:
    return (layer.weight.flatten(1) == 0).all(1).nonzero().flatten().tolist()


def test_the_schedule_is_the_published_one(x: Tensor) -> None:
    model = ordered(Small())
    optimizer = sgd(model, 1e-3)
    method = TPP(model, x, optimizer=optimizer, **QUICK)
    table = [  # steps done, lambda of the next, S that is zero in conv1 and conv2, done
        (0, 0.00, [], [], False),
        (1, 0.00, [], [], False),
        (2, 0.25, [], [], False),
        (3, 0.25, [], [], False),
        (4, 0.50, [], [], False),  # lambda is at its ceiling: the hold begins
        (5, 0.50, [], [], False),
        (6, 0.50, [0, 1], [], False),  # 2 steps of it: the first layer
        (7, 0.50, [0, 1], [], False),
        (8, 0.50, [0, 1], [0, 1, 2], True),
        (9, 0.50, [0, 1], [0, 1, 2], True),
    ]
    for steps, strength, first, second, done in table:
        assert (method.steps, method.strength, method.done) == (steps, strength, done)
        assert zero_filters(model.conv1) == first
        assert zero_filters(model.conv2) == second
        for norm, silent in ((model.bn1, first), (model.bn2, second)):
            assert (norm.weight == 0).nonzero().flatten().tolist() == silent
        step(model, optimizer, method, steps)
    assert gone(method.finish()) == {"conv1": [0, 1], "conv2": [0, 1, 2]}


def test_the_defaults_take_ten_thousand_growths(x: Tensor) -> None:
    method = TPP(Small(), x)
    seen = []
    for method.steps in (9, 10, 99_990, 99_999, 100_000, 109_999, 110_000):
        seen.append((method.strength, method.held, method.done))
    assert seen == [
        (0.0, 0, False),
        (1e-4, 0, False),
        (pytest.approx(0.9999), 0, False),
        (pytest.approx(0.9999), 0, False),
        (1.0, 0, False),
        (1.0, 9_999, False),
        (1.0, 10_000, True),
    ]


def test_the_set_is_that_of_the_start(x: Tensor) -> None:
    model = ordered(Small())
    method = TPP(model, x, **QUICK)
    model.conv1.weight.data = model.conv1.weight.data.flip(0)  # now the others are the lowest
    assert gone(method.finish())["conv1"] == [0, 1]


def formula(model: Any, chosen: dict[str, list[int]], weight: float, strength: float) -> Tensor:
    """The two terms as they are in the docstring, written with loops."""
    total = torch.zeros(())
    for name, norm in (("conv1", model.bn1), ("conv2", model.bn2)):
        layer, pruned = model.get_submodule(name), chosen[name]
        filters = [w.flatten() for w in layer.weight]
        n = len(filters)
        for i, j in itertools.product(range(n), range(n)):
            if i in pruned or j in pruned:
                total = total + weight * strength / n**2 * (filters[i] @ filters[j]) ** 2
        for i in pruned:
            squares = filters[i] @ filters[i] + layer.bias[i] ** 2
            squares = squares + norm.weight[i] ** 2 + norm.bias[i] ** 2
            total = total + strength / 2 * squares
    return total


def test_the_added_gradients_are_those_of_the_formula(x: Tensor) -> None:
    model = randomised(Small())
    method = TPP(model, x, delta=0.3, every=1, weight=7.0)
    method.steps = 2
    chosen = {
        name: method_scores.argsort()[:half].tolist()
        for name, half in (("conv1", 2), ("conv2", 3))
        for method_scores in [model.get_submodule(name).weight.detach().abs().sum((1, 2, 3))]
    }
    found = added(model, method)
    names = [name for name, _ in model.named_parameters() if not name.startswith("fc")]
    parameters = [model.get_parameter(name) for name in names]
    expected = torch.autograd.grad(formula(model, chosen, 7.0, 0.6), parameters)
    for name, gradient in zip(names, expected, strict=True):
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
        assert gradient.abs().sum() > 0
    assert not found["fc.weight"].any()


def test_each_group_of_a_convolution_has_its_own_gram_matrix(x: Tensor) -> None:
    model = randomised(IMAGE["grouped"]())
    method = TPP(model, x, delta=1.0, every=1, ratio=0.25, weight=2.0)
    method.steps = 1
    conv = model.conv2  # 24 filters in 4 groups of 6
    found = added(model, method)["conv2.weight"]
    chosen = method.holders.values(method.chosen)
    row = next(m for m in method.holders.matrices if m.layer.name == "conv2")
    pruned = row.of_units(chosen) > 0
    assert 0 < int(pruned.sum()) < 24
    weight = conv.weight.detach().clone().requires_grad_()
    total = torch.zeros(())
    for filters, marks in zip(weight.flatten(1).split(6), pruned.split(6), strict=True):
        counted = marks[:, None] | marks[None, :]
        total = total + 2.0 / 36 * ((filters @ filters.T).square() * counted).sum()
    total = total + 0.5 * (weight.flatten(1)[pruned]).square().sum()
    (expected,) = torch.autograd.grad(total, weight)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_the_quieted_batchnorm_is_the_one_that_follows(x: Tensor) -> None:
    model = randomised(PreActivation())
    ordered(model)
    model.conv1.weight.data = model.conv1.weight.data.flip(0)  # its lowest are 4 .. 7
    method = TPP(model, x, delta=0.5, every=1, weight=0.0)
    method.steps = 1
    found = added(model, method)
    low, high = [0, 1, 2, 3], [4, 5, 6, 7]
    for norm, silent in (("before1", low), ("before2", high), ("last", low)):
        for name in ("weight", "bias"):
            expected = torch.zeros(8)
            expected[silent] = 0.5 * model.get_parameter(f"{norm}.{name}").detach()[silent]
            torch.testing.assert_close(found[f"{norm}.{name}"], expected)


@pytest.mark.parametrize("name", sorted(IMAGE))
def test_the_zeroed_model_computes_what_the_pruned_one_does(name: str, x: Tensor) -> None:
    model = randomised(IMAGE[name]())
    optimizer = sgd(model, 1e-2)
    settings = {**QUICK, "hold": 20, "zero_every": 1, "delta": 0.5, "weight": 1.0}
    method = TPP(model, x, optimizer=optimizer, ratio=0.4, **settings)
    number = 0
    while not method.done:
        step(model, optimizer, method, number)
        number += 1
    before = model.eval()(x)
    result = method.finish()
    assert result.after.filters < result.before.filters
    if name != "normed":  # its norms run over channels
        torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)
    check_optimizer(model, optimizer)
    step(model.train(), optimizer, None)
    assert all(p.isfinite().all() for p in model.parameters())


def test_zeroed_filters_do_not_grow_back(x: Tensor) -> None:
    model = ordered(Small())
    optimizer = sgd(model, 0.1)
    method = TPP(
        model, x, optimizer=optimizer, **{**QUICK, "hold": 30, "zero_every": 1, "weight": 1.0}
    )
    for number in range(30):
        step(model, optimizer, method, number)
        if method.held >= 2:
            assert zero_filters(model.conv1) == [0, 1]
            assert zero_filters(model.conv2) == [0, 1, 2]
            assert optimizer.state[model.conv1.weight]["momentum_buffer"][2:].abs().min() > 0


def test_frozen_parameters_stay(x: Tensor) -> None:
    model = randomised(ResNet())
    model.layer1.conv2.requires_grad_(False)
    model.bn.requires_grad_(False)
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    optimizer = sgd(model)
    method = TPP(model, x, optimizer=optimizer, **{**QUICK, "zero_every": 1})
    run(model, optimizer, method, 0, 8)
    assert method.done
    for name, before in frozen.items():
        assert torch.equal(model.get_parameter(name), before)
        assert model.get_parameter(name).grad is None
    method.finish()
    assert not model.layer1.conv2.weight.requires_grad


@pytest.mark.parametrize("at", [1, 5, 7])
def test_a_resumed_run_ends_bit_equal(at: int, x: Tensor) -> None:
    check_resume(ResNet, lambda m, o: TPP(m, x, optimizer=o, **QUICK), total=9, at=at)


def test_a_finished_run_resumes(x: Tensor) -> None:
    model = Small()
    method = TPP(model, x, **QUICK)
    result = method.finish()
    other = Small()
    again = TPP(other, x, **QUICK)
    again.load_state_dict(method.state_dict())
    assert again.done
    assert again.finish().history == result.history
    assert other.conv1.weight.shape == model.conv1.weight.shape


def test_a_step_reads_nothing_and_lays_nothing_out(x: Tensor) -> None:
    model = Small()
    method = TPP(model, x, delta=0.1, every=1, hold=1000, zero_every=3)
    optimizer = sgd(model)
    run(model, optimizer, method, 0, 20)  # lambda at its ceiling, both layers zero
    assert method.held == 10
    assert not operations(method) & (READS | LAYS_OUT)


def test_parameters_that_were_replaced_are_the_ones_that_are_decayed(x: Tensor) -> None:
    model = ordered(Small())
    method = TPP(model, x, delta=1.0, every=1, weight=0.0)
    method.steps = 1
    added(model, method)  # everything is laid out
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    for parameter in model.parameters():
        parameter.requires_grad_()
    found = added(model, method)["conv1.weight"]
    torch.testing.assert_close(found[:2], model.conv1.weight.detach()[:2])
    assert not found[2:].any()


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"delta": 0}, "delta is 0"),
        ({"delta": float("nan")}, "delta is nan"),
        ({"every": 0}, "every is 0"),
        ({"ceiling": -1.0}, "ceiling is -1.0"),
        ({"hold": 1.5}, "hold is 1.5"),
        ({"zero_every": True}, "zero_every is True"),
        ({"weight": float("inf")}, "weight is inf"),
        ({"ratio": 1.0}, "ratio is 1.0"),
        ({"ratio": None}, "ratio is None"),
        ({"criterion": "fisher"}, "has no gradient"),
        ({"scope": "glocal"}, "did you mean"),
    ],
)
def test_wrong_arguments_change_nothing(arguments: dict[str, Any], match: str, x: Tensor) -> None:
    model = Small()
    with refused(match, model):
        TPP(model, x, **arguments)


def test_a_state_of_other_settings_is_refused(x: Tensor) -> None:
    state = TPP(Small(), x, **QUICK).state_dict()
    for other in ({**QUICK, "every": 3}, {**QUICK, "ratio": 0.25}, {**QUICK, "ignored": ["conv1"]}):
        with pytest.raises(ValueError, match="settings"):
            TPP(Small(), x, **other).load_state_dict(state)
    begun = TPP(Small(), x, **QUICK)
    begun.before_step()
    begun.after_step()
    with pytest.raises(ValueError, match="begun"):
        begun.load_state_dict(state)
    with pytest.raises(ValueError, match="chosen"):
        TPP(Small(), x, **QUICK).load_state_dict({k: v for k, v in state.items() if k != "chosen"})


def test_without_the_decorrelation_the_gradients_are_the_decay(x: Tensor) -> None:
    model = ordered(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)))
    method = TPP(model, x, delta=0.25, every=1, weight=0.0)
    method.steps = 2
    model(x).square().mean().backward()
    before = model[0].weight.grad.clone()
    method.before_step()
    expected = torch.cat([0.5 * model[0].weight.detach()[:2], torch.zeros(2, 3, 1, 1)])
    torch.testing.assert_close(model[0].weight.grad - before, expected)
