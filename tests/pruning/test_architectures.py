"""Every way to connect layers: what goes, what stays and why."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as f
from torch.nn import utils
from torch.nn.utils import parametrizations

from orthoreg_ext.pruning import prune, replay
from orthoreg_ext.pruning.inputs import call, tensors_in
from orthoreg_ext.pruning.norms import without_channels
from orthoreg_ext.pruning.structure import trace

from .architectures import CASES, Auxiliary, SplitByHand
from .nets import VGG


@pytest.mark.parametrize("name", sorted(CASES))
def test_half_goes_where_it_can(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    model, inputs = case.make(), case.random_inputs()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    train(model, optimizer, inputs)
    fresh = copy.deepcopy(model)

    result = prune(model, inputs, criterion="l1", ratio=0.5, scope="local", optimizer=optimizer)

    reasons = {layer.name: layer.reason for layer in result.layers if layer.reason}
    assert {layer.name: layer.after for layer in result.layers} == {
        **case.left,
        **{name: fresh.get_submodule(name).weight.shape[0] for name in case.stay},
    }
    assert reasons.keys() == case.stay.keys()
    assert all(part in reasons[layer] for layer, part in case.stay.items()), reasons
    train(model, optimizer, inputs)
    result.save(tmp_path / "out")
    again = replay(fresh, inputs, tmp_path / "out")
    for a, b in zip(outputs(model.eval(), inputs), outputs(again.eval(), inputs), strict=True):
        assert torch.equal(a, b)


def outputs(model: nn.Module, inputs: Any) -> list[Tensor]:
    return tensors_in(call(model, inputs))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, inputs: Any) -> None:
    """One step, which must change every parameter."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()  # behind one in train mode a bias has no gradient
    optimizer.zero_grad()
    sum((t.float() ** 2).sum() for t in outputs(model, inputs)).backward()
    optimizer.step()
    assert not [name for name, p in model.named_parameters() if torch.equal(p, before[name])]


REPARAMETRIZE = {
    "weight norm": parametrizations.weight_norm,
    "spectral norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "old weight norm": utils.weight_norm,
    "old spectral norm": utils.spectral_norm,
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize("kind", sorted(REPARAMETRIZE))
def test_a_layer_with_a_computed_weight_can_be_left_alone(
    kind: str, x: Tensor, tmp_path: Path
) -> None:
    torch.manual_seed(1)
    model = VGG()
    REPARAMETRIZE[kind](model.conv2)
    fresh = copy.deepcopy(model) if "old" not in kind else None  # hooks' weights cannot be copied
    with pytest.raises(ValueError, match=r"layer 'conv2': 'weight' is .*list the layer in ignored"):
        prune(model, x, criterion="l1", ratio=0.5, scope="local")
    result = prune(model, x, criterion="l1", ratio=0.5, scope="local", ignored=["conv2"])
    found = {layer.name: (layer.after, layer.reason) for layer in result.layers}
    assert found["conv1"] == (8, "'conv2' is ignored, and its inputs cannot be cut")
    assert found["conv3"] == (8, "")
    assert model.eval()(x).shape == (2, 4)
    if fresh is not None:
        result.save(tmp_path / "out")
        assert torch.equal(replay(fresh, x, tmp_path / "out").eval()(x), model(x))


class ChannelNorm(nn.LayerNorm):
    """A LayerNorm over the channels of images, under a name of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def shuffled_by(norm: nn.Module) -> nn.Module:
    """The shuffle is misread, which only the values tell."""
    layers = [nn.Conv2d(3, 8, 1), norm, nn.ChannelShuffle(2), nn.Conv2d(8, 6, 1)]
    return nn.Sequential(*layers, nn.ReLU(), nn.Conv2d(6, 2, 1))


@pytest.mark.parametrize("norm", [ChannelNorm(8), nn.GroupNorm(2, 8), nn.GroupNorm(1, 8)])
def test_a_misread_operation_behind_a_norm_over_channels_is_found(
    norm: nn.Module, x: Tensor
) -> None:
    model = shuffled_by(norm)
    with pytest.raises(RuntimeError, match=r"misreads an operation at 0\. The model was"):
        prune(model, x, criterion="l1", ratio=0.5, scope="local")
    result = prune(model, x, criterion="l1", ratio=0.5, scope="local", ignored=["0"])
    assert model[3].out_channels == 3
    assert result.after.filters == 13


def test_a_norm_without_channels_is_the_norm_of_the_rest() -> None:
    model = nn.Sequential(nn.Linear(2, 4), nn.LayerNorm(4, eps=0.0), nn.Linear(4, 1))
    structure = trace(model, torch.zeros(1, 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 0], [7, 9], [0, 1], [1, 1]]))
        model[0].bias.zero_()
        model[1].bias.copy_(torch.tensor([0.0, 5, 0, 0]))
    gone = structure.slots[0].units[1:2]
    seen: list[Tensor] = []
    model[1].register_forward_hook(lambda *args: seen.append(args[2].detach()))
    with without_channels(model, structure, gone) as treated:
        model(torch.tensor([[1.0, 2]]))  # 1, -, 2, 3: mean 2, variance 2 / 3
    expected = torch.tensor([[-(1.5**0.5), 0, 0, 1.5**0.5]])
    torch.testing.assert_close(seen[0], expected)
    assert treated()
    model(torch.tensor([[1.0, 2]]))
    assert seen[1][0, 1] != 0  # as before


class ByHand(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        x = (x - x.mean(-1, keepdim=True)) / x.std(-1, keepdim=True)
        return x * self.weight + self.bias


def test_behind_statistics_by_hand_only_shapes_are_compared() -> None:
    model = nn.Sequential(nn.Linear(6, 8), ByHand(8), nn.Linear(8, 4))
    prune(model, torch.randn(2, 6), criterion="l1", ratio=0.5)
    assert model[1].normalized_shape == (4,)


class MisreadWhileTraining(Auxiliary):
    def forward(self, x: Tensor) -> Any:
        x = f.relu(self.bn(self.a(x)))
        y = self.out(f.relu(self.b(x)).mean((2, 3)))
        return (
            (y, self.aux(self.side(f.channel_shuffle(x, 2)).mean((2, 3)))) if self.training else y
        )


def test_branches_that_run_only_while_training_are_verified(x: Tensor) -> None:
    model = MisreadWhileTraining()
    with pytest.raises(RuntimeError, match=r"misreads an operation at a\. The model was"):
        prune(model, x, criterion="l1", ratio=0.5, scope="local")


class FailsWhileTraining(Auxiliary):
    def forward(self, x: Tensor) -> Any:
        return super().forward(f.avg_pool2d(x, 9) if self.training else x)


def test_branches_that_the_inputs_do_not_fit_are_named(x: Tensor) -> None:
    result = prune(FailsWhileTraining(), x, criterion="l1", ratio=0.5, scope="local")
    reasons = {layer.name: layer.reason for layer in result.layers if layer.reason}
    assert reasons.keys() == {"side", "aux", "out"}
    assert "fails in training mode (RuntimeError: Given input size" in reasons["side"]


@pytest.mark.parametrize("make", [SplitByHand, Auxiliary])
def test_trial_cuts_leave_no_trace(make: Any, x: Tensor) -> None:
    model = make()
    model.a.weight.requires_grad_(False)
    model.b.weight.grad = grad = torch.ones_like(model.b.weight)
    before = {name: (id(p), p.requires_grad) for name, p in model.named_parameters()}
    sizes, modes = repr(model), [module.training for module in model.modules()]
    trace(model, x)
    assert {name: (id(p), p.requires_grad) for name, p in model.named_parameters()} == before
    assert model.b.weight.grad is grad
    assert (repr(model), [module.training for module in model.modules()]) == (sizes, modes)
