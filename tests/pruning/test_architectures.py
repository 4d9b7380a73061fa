"""One small net for each way to connect layers: what goes, what stays and why."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
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

from .nets import VGG


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.down = nn.Conv2d(8, 16, 3, 2, 1)
        self.norm = nn.InstanceNorm2d(16, affine=True)
        self.up = nn.ConvTranspose2d(16, 6, 2, 2)
        self.last = nn.Conv2d(14, 10, 3, padding=1)
        self.out = nn.Conv2d(10, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = f.relu(self.first(x))
        b = self.up(f.gelu(self.norm(self.down(a))))
        return self.out(f.relu(self.last(torch.cat([b, a], 1))))


class Signal(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Conv1d(4, 8, 5, padding=2),
            nn.BatchNorm1d(8),
            nn.PReLU(8),
            nn.Conv1d(8, 16, 3, stride=2, groups=8),
            nn.ReLU(inplace=True),
            nn.ConvTranspose1d(16, 6, 2, stride=2),
            nn.AdaptiveAvgPool1d(2),
            nn.Flatten(),
            nn.Linear(12, 4),
        )


class Volume(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Conv3d(2, 8, 3, padding=1),
            nn.GroupNorm(2, 8),
            nn.ReLU(),
            nn.ConvTranspose3d(8, 6, 2, 2),
            nn.BatchNorm3d(6),
            nn.Conv3d(6, 4, 1),
        )


class Dense(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Linear(12, 20),
            nn.BatchNorm1d(20),
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.Linear(20, 16),
            nn.LayerNorm(16, elementwise_affine=False),
            nn.Tanh(),
            nn.Linear(16, 4),
        )


class SplitByHand(nn.Module):
    """Splits channels at stored widths, as Res2Net does."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 12, 3, padding=1)
        self.b, self.c = nn.Conv2d(8, 10, 1), nn.Conv2d(4, 10, 1)
        self.d = nn.Conv2d(10, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        left, right = torch.split(f.relu(self.a(x)), [8, 4], 1)
        return self.d(f.relu(self.b(left) + self.c(right)))


class Swapped(nn.Module):
    """Uses the second half of its channels before the first."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 1)
        self.b, self.c = nn.Conv2d(4, 5, 1), nn.Conv2d(4, 5, 1)
        self.d = nn.Conv2d(10, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        left, right = f.relu(self.a(x)).chunk(2, 1)
        return self.d(f.relu(torch.cat([self.c(right), self.b(left)], 1)))


class Attention(nn.Module):
    """Heads by hand, of a stored width."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 8)
        self.position = nn.Parameter(torch.randn(1, 5, 8))
        self.norm1, self.norm2 = nn.LayerNorm(8), nn.LayerNorm(8)
        self.qkv = nn.Linear(8, 24)
        self.project = nn.Linear(8, 8)
        self.mlp1, self.mlp2 = nn.Linear(8, 16), nn.Linear(16, 8)
        self.scale = nn.Parameter(torch.rand(8) + 0.5)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x) + self.position
        b, n, _ = x.shape
        q, k, v = self.qkv(self.norm1(x)).reshape(b, n, 3, 2, 4).permute(2, 0, 3, 1, 4)
        y = f.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, -1)
        x = x + self.project(y)
        x = x + self.scale * self.mlp2(f.gelu(self.mlp1(self.norm2(x))))
        return self.head(x.mean(1))


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.before = nn.Linear(6, 8)
        self.memory = kind(8, 10, batch_first=True)
        self.after = nn.Linear(10, 12)
        self.out = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(f.relu(self.after(self.memory(self.before(x))[0][:, -1])))


class Words(nn.Module):
    """An embedding in a residual stream, whose table is also the output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 8)
        self.a, self.b = nn.Linear(8, 12), nn.Linear(12, 8)
        self.norm = nn.RMSNorm(8)
        self.out = nn.Linear(8, 11, bias=False)
        self.out.weight = self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens)
        return self.out(self.norm(x + self.b(f.relu(self.a(x)))))


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.c = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu_()
        y = self.b(x)
        y += x
        return self.c(y.mul_(2).clamp_(min=0.0))


class Auxiliary(nn.Module):
    """A head that runs only while training, as GoogLeNet's."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.b, self.out = nn.Conv2d(8, 6, 1), nn.Linear(6, 4)
        self.side, self.drop, self.aux = nn.Conv2d(8, 10, 1), nn.Dropout(), nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Any:
        x = f.relu(self.bn(self.a(x)))
        y = self.out(f.relu(self.b(x)).mean((2, 3)))
        if not self.training:
            return y
        return {"out": y, "aux": self.aux(self.drop(f.relu(self.side(x))).mean((2, 3)))}


class Excited(nn.Module):
    """Squeeze and excite behind a depthwise convolution with two filters an input."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 6, 1)
        self.deep = nn.Conv2d(6, 12, 3, padding=1, groups=6)
        self.squeeze, self.excite = nn.Conv2d(12, 4, 1), nn.Conv2d(4, 12, 1)
        self.out = nn.Conv2d(12, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = f.relu(self.deep(f.relu(self.a(x))))
        gate = self.excite(f.relu(self.squeeze(x.mean((2, 3), keepdim=True)))).sigmoid()
        return self.out(x * gate)


class Named(nn.Module):
    """Takes keywords, returns nested outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(5, 8), nn.Linear(8, 4)
        self.d = nn.Linear(8, 3)

    def forward(self, *, left: Tensor, right: Tensor) -> Any:
        x = f.relu(self.a(left) + self.b(right))
        return {"c": self.c(x), "more": (self.d(x), [None, 3])}


IMAGE = torch.zeros(2, 3, 8, 8)
SEQUENCE = torch.zeros(2, 5, 6)
OUTPUT = "an output of the model"


@dataclass(frozen=True)
class Case:
    make: Callable[[], nn.Module]
    inputs: Any
    left: dict[str, int]  # filters of the pruned layers
    stay: dict[str, str] = field(default_factory=dict)  # layer -> in the reason

    def random_inputs(self) -> Any:
        def draw(like: Tensor) -> Tensor:
            return torch.randn_like(like) if like.is_floating_point() else like

        if isinstance(self.inputs, dict):
            return {name: draw(like) for name, like in self.inputs.items()}
        return draw(self.inputs)


CASES = {
    "unet": Case(UNet, IMAGE, {"first": 4, "down": 8, "up": 3, "last": 5}, {"out": OUTPUT}),
    "signal": Case(Signal, torch.zeros(2, 4, 9), {"0": 4, "3": 8, "5": 3}, {"8": OUTPUT}),
    "volume": Case(Volume, torch.zeros(2, 2, 3, 4, 4), {"0": 4, "3": 3}, {"5": OUTPUT}),
    "dense": Case(Dense, torch.zeros(3, 12), {"0": 10, "4": 8}, {"7": OUTPUT}),
    "split": Case(
        SplitByHand, IMAGE, {"b": 5, "c": 5}, {"a": "the forward pass fails without", "d": OUTPUT}
    ),
    "attention": Case(
        Attention,
        SEQUENCE,
        {"embed": 4, "project": 4, "mlp1": 8, "mlp2": 4},
        {"qkv": "the forward pass fails without", "head": OUTPUT},
    ),
    "lstm": Case(
        lambda: Recurrent(nn.LSTM),
        SEQUENCE,
        {"after": 6},
        {"before": "LSTM 'memory' cannot be cut", "out": OUTPUT},
    ),
    "gru": Case(
        lambda: Recurrent(nn.GRU),
        SEQUENCE,
        {"after": 6},
        {"before": "'memory.weight_ih_l0' could not be followed", "out": OUTPUT},
    ),
    "swapped": Case(Swapped, IMAGE, {"a": 4, "b": 3, "c": 3}, {"d": OUTPUT}),
    "words": Case(Words, torch.arange(10).reshape(2, 5), {"a": 6, "b": 4}, {"out": OUTPUT}),
    "in place": Case(InPlace, IMAGE, {"a": 4, "b": 4}, {"c": OUTPUT}),
    "auxiliary": Case(
        Auxiliary, IMAGE, {"a": 4, "b": 3, "side": 5}, {"out": OUTPUT, "aux": OUTPUT}
    ),
    "excited": Case(
        Excited, IMAGE, {"a": 3, "deep": 6, "squeeze": 2, "excite": 6}, {"out": OUTPUT}
    ),
    "named": Case(
        Named,
        {"left": torch.zeros(2, 6), "right": torch.zeros(2, 5)},
        {"a": 4, "b": 4},
        {"c": OUTPUT, "d": OUTPUT},
    ),
}


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
