"""Calls in a wrong order, models that change on the way, copies: told, or right all the same."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from orthoreg_ext.pruning import (
    FPGM,
    TPP,
    EarlyBird,
    GReg1,
    GReg2,
    GroupFisher,
    IncReg,
    OrthoReg,
    OrthP,
    RePr,
    Slimming,
    SoftFilter,
    orthogonalise,
    prune,
)
from orthoreg_ext.pruning.methods.method import Method

from .loops import batch, example, sgd, small_net, step


@pytest.mark.parametrize("cls", [GReg1, GReg2, IncReg])
def test_a_closure_that_runs_twice_in_a_step_counts_once(cls: type[Method]) -> None:
    strengths = []
    for calls in (1, 3):
        model = small_net()
        optimizer = sgd(model, lr=0.0)
        method = cls(model, example(), optimizer=optimizer, delta=0.1, every=2)
        for number in range(5):
            for _ in range(calls):
                x, y = batch(number)
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x), y).backward()
                method.before_step()
            optimizer.step()
            method.after_step()
        strengths.append(str(method.strengths))  # type: ignore[attr-defined]
    assert strengths[0] == strengths[1]


@pytest.mark.parametrize("cls", [TPP, GReg1, GReg2, IncReg, Slimming, EarlyBird])
def test_a_penalty_without_gradients_to_add_to_is_told(cls: type[Method]) -> None:
    model = small_net()
    method = cls(model, example())
    method.steps = 20  # where TPP's lambda is above 0
    with pytest.raises(ValueError, match=r"call before_step\(\) after loss.backward\(\)"):
        method.before_step()
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("cls", [GReg1, IncReg])
def test_lambda_is_exact_in_float64(cls: type[Method]) -> None:
    model = small_net().double()
    method = cls(model, example().double(), delta=0.1, every=1)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    method.before_step()
    weight = model[0].weight
    found = (weight.grad / weight).flatten(1)[:, 0].max()  # of the filter of the largest lambda
    assert float(found.detach()) == pytest.approx(0.1, rel=1e-14)


@pytest.mark.parametrize(
    "kind", [TPP, GReg1, GReg2, IncReg, Slimming, EarlyBird, GroupFisher, FPGM, RePr]
)
def test_a_loop_that_forgets_to_call_before_the_step_is_told(kind: type[Method]) -> None:
    model = small_net()
    method = kind(model, example(), optimizer=sgd(model))
    with pytest.raises(RuntimeError, match=rf"{kind.__name__}.after_step\(\) .* before_step"):
        method.after_step()
    assert method.steps == 0
    model(batch(1)[0]).sum().backward()
    method.before_step()
    method.after_step()
    assert method.steps == 1
    with pytest.raises(RuntimeError, match="without before_step"):
        method.after_step()
    assert method.steps == 1


@pytest.mark.parametrize("after", ["close", "finish", "step"])
def test_group_fisher_without_its_hooks_is_told(after: str) -> None:
    model = small_net()
    optimizer = sgd(model)
    method = GroupFisher(model, example(), optimizer=optimizer, every=1)
    if after == "close":
        method.close()
    elif after == "finish":
        with pytest.raises(ValueError, match="make the method anew"):
            method.finish()
    else:
        method.before_step()
        with pytest.raises(ValueError, match="no finite gradient"):
            method.after_step()
    with pytest.raises(RuntimeError, match=r"0.000 of the filters .* the hooks are gone"):
        step(model, optimizer, method)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_of_orthoreg_goes_on_regularising(copied: Callable[[Method], Method]) -> None:
    model = small_net()
    optimizer = sgd(model)
    data = [batch(1), batch(2)]
    method: Method = OrthoReg(model, example(), data=data, optimizer=optimizer, ortho_epochs=2)
    step(model, optimizer, method)
    other = copied(method)
    for entry in (method, other):
        step(entry.model, entry.engine.optimizers[0], entry)
    for mine, theirs in zip(model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    other.close()  # type: ignore[attr-defined]
    assert [group["weight_decay"] for group in other.engine.optimizers[0].param_groups] == [1e-3]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0]


@pytest.mark.parametrize("cls", [TPP, GReg1, FPGM, RePr, EarlyBird])
def test_a_model_that_became_nan_is_not_cut(cls: type[Method]) -> None:
    model = small_net()
    settings = {EarlyBird: {"window": 2}, RePr: {"whole_epochs": 1, "ratio": 0.5}}.get(cls, {})
    method = cls(model, example(), **settings)
    for _ in range(2):
        method.after_epoch()
    with torch.no_grad():
        model[3].bias[1] = torch.nan
    with pytest.raises(ValueError, match="layer '3': 'bias' holds NaN"):
        method.finish()
    assert model[3].out_channels == 8


def test_prune_refuses_nan_that_its_criterion_does_not_read() -> None:
    model = small_net()
    with torch.no_grad():
        model[3].weight[1, 0, 0, 0] = torch.inf
    with pytest.raises(ValueError, match="layer '3': 'weight' holds NaN or infinite"):
        prune(model, example(), criterion="bn_scale")
    assert model[3].out_channels == 8


def widen(model: nn.Sequential) -> None:
    model[3], model[4], model[8] = nn.Conv2d(6, 9, 3), nn.BatchNorm2d(9), nn.Linear(9, 4)


def replace(model: nn.Sequential) -> None:
    model[3] = nn.Identity()


def normalise(model: nn.Sequential) -> None:
    parametrizations.weight_norm(model[3])


@pytest.mark.parametrize("cls", [TPP, GReg2, IncReg, SoftFilter, Slimming, EarlyBird, OrthP])
@pytest.mark.parametrize(
    ("change", "match"),
    [
        (widen, "layer '3': 'weight' has 9 channels, expected 8"),
        (replace, "layer '3': it is a Identity without 'weight'"),
        (normalise, "layer '3': 'weight' is parametrized"),
    ],
)
def test_a_layer_that_was_replaced_is_named(
    cls: type[Method], change: Callable[[nn.Sequential], None], match: str
) -> None:
    model = small_net()
    method = cls(model, example())
    change(model)
    with pytest.raises((RuntimeError, ValueError), match=match):
        method.finish()


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"bias": "none"}, ValueError, "bias is 'none'"),
        ({"max_layer_ratio": True}, ValueError, "max_layer_ratio is True"),
        ({"ignored": None}, TypeError, "ignored is NoneType"),
        ({"example_inputs": torch.zeros(0, 3, 6, 6)}, ValueError, "example_inputs hold no sample"),
        ({"loss": lambda _, __: torch.tensor(1.0)}, ValueError, "no gradient reaches '0.weight'"),
    ],
)
def test_prune_names_the_wrong_argument(
    options: dict[str, object], error: type[Exception], match: str
) -> None:
    model = small_net()
    arguments = {"example_inputs": example(), "data": [batch(1)], **options}
    with pytest.raises(error, match=match):
        prune(model, **arguments)
    assert model[0].out_channels == 6


def test_orthogonalise_refuses_names_without_filters() -> None:
    with pytest.raises(ValueError, match="layers names '1', where no convolution"):
        orthogonalise(small_net(), layers=["1"])
    with pytest.raises(ValueError, match="unknown layer in layers 'x'"):
        orthogonalise(small_net(), layers=["x"])
    with pytest.raises(TypeError, match=r"expected a torch.nn.Module"):
        orthogonalise(torch.zeros(3))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        ({"fisher": None}, "state is damaged"),
        ({"steps": None}, "steps is None, expected an integer"),
        ({"epochs": -1}, "epochs is -1, expected an integer"),
        ({"history": "x"}, "state is damaged"),
    ],
)
def test_a_damaged_state_changes_nothing(damage: dict[str, object], match: str) -> None:
    model = small_net()
    method = GroupFisher(model, example(), optimizer=sgd(model), every=1)
    step(model, method.engine.optimizers[0], method)
    state = method.state_dict()
    assert state["history"]
    method.close()
    model = small_net()
    fresh = GroupFisher(model, example(), optimizer=sgd(model), every=1)
    before = list(model.parameters())
    with pytest.raises(ValueError, match=match):
        fresh.load_state_dict({**state, **damage})
    assert all(a is b for a, b in zip(model.parameters(), before, strict=True))
    assert fresh.steps == 0
    fresh.load_state_dict(state)  # the right one still fits
    assert [model[0].out_channels, model[3].out_channels] != [6, 8]


@pytest.mark.parametrize("cls", [TPP, OrthP])
def test_a_state_that_is_none_is_named(cls: type[Method]) -> None:
    with pytest.raises(TypeError, match=r"state is NoneType, expected what state_dict\(\)"):
        cls(small_net(), example()).load_state_dict(None)  # type: ignore[arg-type]


@pytest.mark.parametrize("cls", [TPP, IncReg, SoftFilter, OrthP, GroupFisher, RePr])
def test_rules_that_a_method_cannot_follow_are_refused(cls: type[Method]) -> None:
    with pytest.raises(ValueError, match="does not take rescore_every"):
        cls(small_net(), example(), rescore_every=2)
    with pytest.raises(TypeError, match=rf"argument of {cls.__name__} 'rond_to'.*'round_to'"):
        cls(small_net(), example(), rond_to=2)


def test_slimming_refuses_a_model_without_a_scale_to_shrink() -> None:
    with pytest.raises(ValueError, match="Slimming has no scale to shrink"):
        Slimming(small_net(norm=False), example(), criterion="l1")
    model = small_net()
    for layer in (model[1], model[4]):
        layer.requires_grad_(False)
    with pytest.raises(ValueError, match="Slimming has no scale to shrink"):
        Slimming(model, example())
