from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from orthoreg_ext.pruning import Slimming

from ..nets import IMAGE, Concat, ResNet, randomised
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
    refused,
    run,
    sgd,
    step,
)


def test_the_added_gradient_is_that_of_the_l1_norm_of_the_scales(x: Tensor) -> None:
    model = Small()
    model.bn1.weight.data = torch.tensor([0.5, -2.0, 0.0, 1e-9])
    model.bn1.bias.data.fill_(0.3)
    method = Slimming(model, x, strength=0.25)
    scales = [model.bn1.weight, model.bn2.weight]
    formula = torch.autograd.grad(0.25 * sum(s.abs().sum() for s in scales), scales)
    found = added(model, method)
    torch.testing.assert_close(found.pop("bn1.weight"), torch.tensor([0.25, -0.25, 0.0, 0.25]))
    torch.testing.assert_close(found.pop("bn2.weight"), formula[1])
    assert not any(gradient.any() for gradient in found.values())


def test_scales_of_channels_that_cannot_go_are_let_alone(x: Tensor) -> None:
    class Headless(nn.Module):
        """Its first BatchNorm is on the input, its last one on the output."""

        def __init__(self) -> None:
            super().__init__()
            self.first = nn.BatchNorm2d(3)
            self.a = nn.Conv2d(3, 6, 3)
            self.bn = nn.BatchNorm2d(6)
            self.b = nn.Conv2d(6, 4, 3)
            self.last = nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.b(self.bn(self.a(self.first(x)))).relu()).mean((2, 3))

    model = Headless()
    found = added(model, Slimming(model, x, strength=0.5))
    torch.testing.assert_close(found["bn.weight"], torch.full((6,), 0.5))
    assert not found["first.weight"].any()
    assert not found["last.weight"].any()


def test_in_one_batchnorm_only_the_channels_that_can_go_are_shrunk(x: Tensor) -> None:
    model = Concat()  # behind 5 channels of b, 3 of the input and 6 of a
    found = added(model, Slimming(model, x, strength=0.5, ignored=["c"]))
    expected = torch.tensor([0.5] * 5 + [0.0] * 3 + [0.5] * 6)
    torch.testing.assert_close(found["bn.weight"], expected)


def test_the_channels_of_the_whole_model_are_ranked_together(x: Tensor) -> None:
    model = Small()
    model.bn1.weight.data = torch.tensor([0.1, -0.9, 0.02, 0.8])
    model.bn2.weight.data = torch.tensor([0.3, -0.01, 0.7, 0.6, 0.05, 0.5])
    result = Slimming(model, x).finish()
    assert gone(result) == {"conv1": [0, 2], "conv2": [0, 1, 4]}


def test_no_layer_is_emptied(x: Tensor) -> None:
    model = Small()
    model.bn2.weight.data *= 1e-3  # all six are below the others
    result = Slimming(model, x, ratio=0.6).finish()
    assert gone(result)["conv2"] == [0, 1, 2, 3, 4]
    assert len(gone(result)["conv1"]) == 1


def test_the_ranked_batchnorm_is_the_one_that_follows(x: Tensor) -> None:
    model = PreActivation()
    for norm, low in (("before1", 0), ("before2", 3), ("last", 6)):
        scale = model.get_submodule(norm).weight
        scale.data = torch.linspace(1.0, 2.0, 8)
        scale.data[low : low + 2] = 0.1
    result = Slimming(model, x, ratio=0.25).finish()
    assert gone(result) == {"stem": [0, 1], "conv1": [3, 4], "conv2": [6, 7]}


def test_the_schedule_is_a_number_of_epochs(x: Tensor) -> None:
    model = Small()
    method = Slimming(model, x, duration=2, strength=0.125)
    table = []
    for _ in range(3):
        found = added(model, method)["bn1.weight"]
        table.append((method.epochs, [round(value, 6) for value in found.tolist()]))
        method.after_step()
        method.after_epoch()
        table.append(method.done)
    four = [0.125] * 4
    assert table == [(0, four), False, (1, four), True, (2, four), True]
    method.finish()
    assert not added(model, method)["bn1.weight"].any()
    settings = Slimming(Small(), x).state_dict()["settings"]
    assert (settings["strength"], settings["duration"], settings["scope"]) == (1e-4, 160, "global")


@pytest.mark.parametrize("name", ["vgg", "resnet"])
def test_small_scales_shrink_and_their_channels_leave(name: str, x: Tensor) -> None:
    model = randomised(IMAGE[name]())
    ignored = ["fc1"] if name == "vgg" else []
    optimizer = sgd(model, 0.02)
    method = Slimming(model, x, optimizer=optimizer, strength=0.2, duration=4, ignored=ignored)
    before = sum(float(held.parameter.detach().abs().sum()) for held, _ in method._scales)
    run(model, optimizer, method, 0, 16)
    assert method.done
    after = sum(float(held.parameter.detach().abs().sum()) for held, _ in method._scales)
    assert after < 0.8 * before
    result = method.finish()
    total, left = result.before.filters, result.after.filters
    assert left < 0.7 * total
    check_optimizer(model, optimizer)
    step(model, optimizer, None)


def test_frozen_scales_stay(x: Tensor) -> None:
    model = ResNet()
    model.bn.requires_grad_(False)
    before = model.bn.weight.clone()
    optimizer = sgd(model)
    run(model, optimizer, Slimming(model, x, optimizer=optimizer), 0, 3)
    assert torch.equal(model.bn.weight, before)


@pytest.mark.parametrize("at", [1, 6])
def test_a_resumed_run_ends_bit_equal(at: int, x: Tensor) -> None:
    settings = {"strength": 0.05, "duration": 2}
    check_resume(ResNet, lambda m, o: Slimming(m, x, optimizer=o, **settings), total=8, at=at)


def test_a_step_reads_nothing_and_lays_nothing_out(x: Tensor) -> None:
    model = Small()
    method = Slimming(model, x)
    run(model, sgd(model), method, 0, 2)
    assert not operations(method) & (READS | LAYS_OUT)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"strength": 0}, "strength is 0"),
        ({"duration": -1}, "duration is -1"),
        ({"ratio": None}, "ratio is None"),
        ({"ratio": 0.99}, "would empty a layer"),
    ],
)
def test_wrong_arguments_change_nothing(arguments: dict[str, Any], match: str, x: Tensor) -> None:
    model = Small()
    with refused(match, model):
        Slimming(model, x, **arguments)


def test_a_layer_without_a_batchnorm_is_named_before_the_training(x: Tensor) -> None:
    with pytest.raises(ValueError, match="BatchNorm with a scale behind layer 'fc1'"):
        Slimming(IMAGE["vgg"](), x)
    Slimming(IMAGE["vgg"](), x, ignored=["fc1"])
