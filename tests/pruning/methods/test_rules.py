"""What every method shares with `prune`, whatever its schedule."""

from __future__ import annotations

import copy
import dataclasses
import inspect

import pytest
from torch import Tensor

from orthoreg_ext.pruning import (
    FPGM,
    TPP,
    EarlyBird,
    GReg1,
    GReg2,
    IncReg,
    OrthP,
    RePr,
    Slimming,
    SoftFilter,
    methods,
)
from orthoreg_ext.pruning.engine import Rules
from orthoreg_ext.pruning.methods.method import Method

from ..nets import ResNet

FINISHING = [TPP, GReg1, GReg2, IncReg, OrthP, Slimming, SoftFilter, EarlyBird, FPGM, RePr]
ALL = [
    cls
    for name in methods.__all__
    if inspect.isclass(cls := getattr(methods, name)) and issubclass(cls, Method)
]


@pytest.mark.parametrize("cls", ALL)
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
