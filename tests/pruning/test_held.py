from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from orthoreg_ext.pruning import SoftFilter
from orthoreg_ext.pruning.held import Holders
from orthoreg_ext.pruning.structure import trace

from .nets import IMAGE, Concat, ResNet, randomised


def holders_of(model: nn.Module, x: Tensor, **arguments: object) -> Holders:
    return Holders(model, trace(model, x, **arguments))


def names(held: list) -> set[str]:
    return {entry.name for entry in held}


def test_filters_and_the_norms_that_follow_are_held_once(x: Tensor) -> None:
    holders = holders_of(ResNet(), x)
    assert "fc.weight" not in names(holders.filters)  # its filters are the output
    assert {"stem.weight", "layer2.short.0.weight", "layer3.conv2.weight"} <= names(holders.filters)
    assert {"bn.weight", "bn.bias", "layer2.short.1.bias"} <= names(holders.norms)
    tied = holders_of(IMAGE["tied"](), x)
    assert names(tied.filters) & {"a.weight", "b.weight"} == {"a.weight"}


def test_layers_that_are_no_norms_are_not_held(x: Tensor) -> None:
    holders = holders_of(IMAGE["gated"](), x)
    assert not holders.norms  # a PReLU
    normed = holders_of(IMAGE["normed"](), x)
    assert names(normed.norms) == {
        "gn.weight",
        "gn.bias",
        "ln.weight",
        "ln.bias",
        "rms.weight",
    }  # not the bare parameter


def test_a_number_reaches_the_channels_of_its_unit_and_no_other(x: Tensor) -> None:
    model = Concat()  # the BatchNorm is behind 5 channels of b, 3 of the input and 6 of a
    holders = holders_of(model, x)
    vector = torch.full((holders.size,), 2.0)
    vector[-1] = 7.0
    spread = {held.name: values for held, values in holders.spread(vector).parts}
    assert spread["bn.weight"].tolist() == [2.0] * 5 + [7.0] * 3 + [2.0] * 6
    assert spread["a.weight"].shape == (6, 1, 1, 1)
    transposed = holders_of(IMAGE["transposed"](), x)
    spread = {h.name: v for h, v in transposed.spread(torch.ones(transposed.size)).parts}
    assert spread["up.weight"].shape == (1, 12, 1, 1)
    assert spread["grouped.weight"].shape == (1, 4, 1, 1)  # the positions of each group


@pytest.mark.parametrize("what", ["weights", "biases", "norms"])
def test_decay_and_scale_touch_what_was_asked_for(what: str, x: Tensor) -> None:
    model = randomised(IMAGE["separable"]())
    holders = holders_of(model, x)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    wanted = {"biases": what != "weights", "norms": what == "norms"}
    kinds = {"weights": 1, "biases": 2, "norms": 3}[what]
    expected = {n for n in names(holders.filters) if n.endswith("weight") or kinds > 1}
    expected |= names(holders.norms) if kinds > 2 else set()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    holders.spread(torch.ones(holders.size), **wanted).add_decay_(0.5)
    for name, parameter in model.named_parameters():
        factor = 0.5 if name in expected else 0.0
        torch.testing.assert_close(parameter.grad, factor * before[name])
    holders.scale_(torch.full((holders.size,), 3.0), **wanted)
    holders.scale_gradients_(torch.full((holders.size,), 2.0), norms=False)
    for name, parameter in model.named_parameters():
        factor = 3.0 if name in expected else 1.0
        torch.testing.assert_close(parameter.detach(), factor * before[name])
        doubled = 2.0 if name in names(holders.filters) else 1.0
        decayed = 0.5 if name in expected else 0.0
        torch.testing.assert_close(parameter.grad, doubled * decayed * before[name])


def test_magnitudes_are_means_over_entries_and_then_over_filters(x: Tensor) -> None:
    model = ResNet()
    structure = trace(model, x)
    for name, value in (("stem", 1.0), ("layer1.conv2", 4.0)):  # 27 and 90 entries, coupled
        model.get_submodule(name).weight.data.fill_(-value)
    model.layer1.conv1.weight.data = torch.arange(1.0, 11).view(10, 1, 1, 1).expand(10, 8, 3, 3)
    found = Holders(model, structure).magnitudes()
    units = {group.name: group.units for group in structure.prunable}
    assert found[units["stem"]].tolist() == [2.5] * 8
    torch.testing.assert_close(found[units["layer1.conv1"]], torch.arange(1.0, 11).double())
    # the filters of the output are no unit's
    only = trace(model, x, {"stem"})
    unit = next(group.units for group in only.prunable if group.name == "layer1.conv1")
    torch.testing.assert_close(
        Holders(model, only).magnitudes()[unit], torch.arange(1, 11.0).double()
    )


def test_they_are_made_anew_after_a_cut(x: Tensor) -> None:
    model = ResNet()
    method = SoftFilter(model, x)
    method.after_epoch()
    before = method.holders
    method.finish()
    assert method.holders is not before
    held = {entry.name: entry for entry in method.holders.filters}
    assert held["stem.weight"].parameter is model.stem.weight
    assert len(held["stem.weight"].units) == 4
