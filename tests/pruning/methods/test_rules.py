"""What every method shares with `prune`, whatever its schedule."""

from __future__ import annotations

import copy
import dataclasses
import inspect

import pytest
import torch
from torch import Tensor

from orthoreg_ext.pruning import (
    FPGM,
    TPP,
    Criterion,
    EarlyBird,
    GReg1,
    GReg2,
    IncReg,
    OrthoReg,
    OrthP,
    RePr,
    Slimming,
    SoftFilter,
    variety,
)
from orthoreg_ext.pruning.methods.method import Method
from orthoreg_ext.pruning.rules import Rules

from ..nets import ResNet
from .loops import Small, batch, check_optimizer, every_method, ordered, run, sgd

FINISHING = [TPP, GReg1, GReg2, IncReg, OrthP, Slimming, SoftFilter, EarlyBird, FPGM, RePr]


@pytest.mark.parametrize("cls", every_method())
def test_no_argument_of_a_method_hides_a_rule(cls: type[Method]) -> None:
    own = set(inspect.signature(cls.__init__).parameters) - set(cls.DEFAULTS)
    assert not own & {field.name for field in dataclasses.fields(Rules)}


@pytest.mark.parametrize("cls", FINISHING)
def test_the_rules_of_prune_hold(cls: type[Method], x: Tensor) -> None:
    model = ResNet()
    result = cls(model, x, ratio=0.4, round_to=4, ignored=["layer1.conv1"]).finish()
    widths = {layer.name: layer.after for layer in result.layers}
    assert widths["layer1.conv1"] == 10
    assert all(width % 4 == 0 for name, width in widths.items() if name != "layer1.conv1")
    assert result.settings["method"] == cls.__name__
    model = ResNet()
    result = cls(model, x, ratio=0.4, target="macs").finish()
    assert result.after.macs <= 0.6 * result.before.macs
    assert result.after.macs > 0.4 * result.before.macs


@pytest.mark.parametrize("cls", FINISHING)
def test_an_averaged_copy_is_cut_alike(cls: type[Method], x: Tensor) -> None:
    model = ResNet()
    copied = copy.deepcopy(model)
    assert cls(model, x, ema=copied).finish().history
    for ours, theirs in zip(model.parameters(), copied.parameters(), strict=True):
        assert ours.shape == theirs.shape


@pytest.mark.parametrize("cls", FINISHING)
def test_a_second_finish_says_the_same(cls: type[Method], x: Tensor) -> None:
    method = cls(ResNet(), x)
    result = method.finish()
    assert method.done
    assert method.finish() is result
    assert method.state_dict()["finished"]


@pytest.mark.parametrize("cls", [*FINISHING, OrthoReg])
def test_scoring_anew_after_every_unit_is_left_to_prune(cls: type[Method], x: Tensor) -> None:
    with pytest.raises(ValueError, match="scope='global', or prune"):
        cls(ResNet(), x, scope="one_at_a_time")


@pytest.mark.parametrize("cls", [EarlyBird, GReg2, Slimming, SoftFilter])
@pytest.mark.parametrize("criterion", ["fisher", "grasp", variety("taylor")])
def test_what_is_chosen_amid_the_training_is_chosen_by_weights(
    cls: type[Method], criterion: str | Criterion, x: Tensor
) -> None:
    model = ResNet()
    model.eval()(x).square().mean().backward()  # gradients that are there do not change it
    with pytest.raises(ValueError, match="needs gradients over data, which this method"):
        cls(model, x, criterion=criterion)


@pytest.mark.parametrize("cls", FINISHING)
def test_memory_format_and_frozen_parts_stay(cls: type[Method], x: Tensor) -> None:
    model = Small().to(memory_format=torch.channels_last)
    model.bn1.requires_grad_(False)
    frozen = [p.clone() for p in model.bn1.parameters()]
    optimizer = sgd(model)
    method = cls(model, x, optimizer=optimizer)
    run(model, optimizer, method, 0, 4)
    assert all(torch.equal(*pair) for pair in zip(frozen, model.bn1.parameters(), strict=True))
    removed = method.finish().history
    assert removed
    assert not any(p.requires_grad for p in model.bn1.parameters())
    for conv in (model.conv1, model.conv2):
        assert conv.weight.is_contiguous(memory_format=torch.channels_last)
    check_optimizer(model, optimizer)


@pytest.mark.parametrize("cls", [GReg1, GReg2, IncReg])
def test_lambda_has_the_precision_of_the_weights(cls: type[Method], x: Tensor) -> None:
    model = ordered(Small()).double()
    method = cls(model, x.double(), **({} if cls is IncReg else {"every": 1}))
    weight = model.conv1.weight.detach()[0]
    x, y = batch(0)
    model.zero_grad()
    torch.nn.functional.cross_entropy(model(x.double()), y).backward()
    model.conv1.weight.grad.zero_()
    method.before_step()
    strength = {GReg1: 1e-4, GReg2: 1e-5, IncReg: 2.5e-4}[cls]
    torch.testing.assert_close(model.conv1.weight.grad[0], strength * weight, rtol=1e-12, atol=0)
