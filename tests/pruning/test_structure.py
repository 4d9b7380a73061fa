from __future__ import annotations

import random
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as f

from orthoreg_ext.pruning.structure import trace
from orthoreg_ext.pruning.units import Group, Structure

from .nets import MLP, VGG, Concat, Gated, Grouped, ResNet, Separable, Tied, TwoInputs, randomised


def groups(structure: Structure) -> dict[tuple[str, ...], Group]:
    return {group.layers: group for group in structure.groups}


def units(structure: Structure, layer: str, side: str) -> list[int]:
    return next(
        s.units.tolist() for s in structure.slots if s.layer == layer and s.side in (side, "both")
    )


def test_a_residual_stream_is_one_group(x: Tensor) -> None:
    found = groups(trace(ResNet(), x))
    assert set(found) == {
        ("stem", "layer1.conv2"),
        ("layer1.conv1",),
        ("layer2.conv1",),
        ("layer2.conv2", "layer2.short.0", "layer3.conv2"),
        ("layer3.conv1",),
        ("fc",),
    }
    assert found["fc",].reason == "an output of the model"
    assert [found[k].original for k in sorted(found)] == [4, 10, 12, 12, 8, 8]


def test_a_flattened_convolution_owns_blocks_of_the_linear_inputs(x: Tensor) -> None:
    structure = trace(VGG(), x)
    conv, fc = units(structure, "conv3", "out"), units(structure, "fc1", "in")
    assert fc == [unit for unit in conv for _ in range(4)]


def test_a_depthwise_convolution_follows_its_input(x: Tensor) -> None:
    structure = trace(Separable(), x)
    found = groups(structure)
    assert found["stem", "depth"].original == 8
    # multiplier 2: input i goes with outputs 2i and 2i + 1
    assert found["point", "multiply"].original == 12
    point, multiply = units(structure, "point", "out"), units(structure, "multiply", "out")
    assert multiply == [unit for unit in point for _ in range(2)]


def test_a_grouped_convolution_loses_the_same_positions_in_every_group(x: Tensor) -> None:
    structure = trace(Grouped(), x)
    found = groups(structure)
    assert (found["conv1",].original, found["conv1",].channels) == (4, 4)
    assert (found["conv2",].original, found["conv2",].channels) == (6, 4)
    conv2 = units(structure, "conv2", "out")
    assert conv2 == conv2[:6] * 4


def test_concatenation_offsets_count_raw_inputs(x: Tensor) -> None:
    structure = trace(Concat(), x)
    a, b = units(structure, "a", "out"), units(structure, "b", "out")
    assert units(structure, "b", "in") == [-1, -1, -1, *a]
    assert units(structure, "bn", "out") == [*b, -1, -1, -1, *a]
    assert units(structure, "c", "in") == [*b, -1, -1, -1, *a]


def test_the_halves_of_a_gate_are_one_unit_a_channel(x: Tensor) -> None:
    structure = trace(Gated(), x)
    conv = units(structure, "conv", "out")
    assert conv[:6] == conv[6:]
    assert groups(structure)["conv", "excite"].original == 6
    assert units(structure, "prelu", "out") == conv[:6]


class GatedLinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(12, 8), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.a(x).chunk(2, 1)
        return self.b(a * b.sigmoid())


def test_couplings_inside_one_layer_are_found() -> None:
    structure = trace(GatedLinear(), torch.randn(2, 12))
    a = units(structure, "a", "out")
    assert a[:4] == a[4:] == units(structure, "b", "in")
    assert len(set(a)) == 4
    (group,) = (g for g in structure.groups if g.layers == ("a",))
    assert (group.original, group.channels) == (4, 1)


def test_layers_that_share_a_weight_lose_the_same_channels(x: Tensor) -> None:
    structure = trace(Tied(), x)
    assert units(structure, "a", "out") == units(structure, "b", "out")
    assert units(structure, "a", "in") == units(structure, "b", "in")
    assert units(structure, "twice", "out") == units(structure, "twice", "in")


@pytest.mark.parametrize("kind", ["tuple", "list", "dict"])
def test_inputs_may_be_a_tuple_or_a_dict(kind: str) -> None:
    image, vector = torch.randn(2, 3, 4, 4), torch.randn(2, 5)
    inputs: Any = {"image": image, "vector": vector} if kind == "dict" else (image, vector)
    structure = trace(TwoInputs(), list(inputs) if kind == "list" else inputs)
    a, b = units(structure, "image", "out"), units(structure, "vector", "out")
    assert units(structure, "join", "in") == a + b


def test_a_batch_of_one_is_not_unpacked() -> None:
    found = groups(trace(MLP(), torch.randn(1, 12)))
    assert set(found) == {("fc1",), ("fc2",), ("fc3",)}


def test_ignored_layers_keep_their_filters_but_not_their_inputs(x: Tensor) -> None:
    found = groups(trace(VGG(), x, ["conv2"]))
    assert found["conv2",].reason == "'conv2' is ignored"
    assert found["conv1",].reason is None


def test_frozen_layers_are_traced(x: Tensor) -> None:
    model = VGG().requires_grad_(False)
    assert set(groups(trace(model, x))) == set(groups(trace(VGG(), x)))
    assert not any(p.requires_grad for p in model.parameters())


class Unused(VGG):
    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Conv2d(3, 3, 1)


def test_unused_layers_are_listed(x: Tensor) -> None:
    assert trace(Unused(), x).unreached == {"spare": "not reached by the forward pass"}


class Outputs(nn.Module):
    """Returns a dict with features that are also used further on."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1)
        self.c = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> dict[str, Any]:
        features = self.b(f.relu(self.a(x)))
        return {"features": features, "none": None, "logits": self.c(features.mean((2, 3)))}


def test_every_output_of_the_model_stays_whole(x: Tensor) -> None:
    found = groups(trace(Outputs(), x))
    stay = {layers for layers, group in found.items() if group.reason == "an output of the model"}
    assert stay == {("b",), ("c",)}


class Detached(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x).detach()


def test_an_output_without_autograd_is_refused() -> None:
    with pytest.raises(ValueError, match="depends on its parameters through autograd"):
        trace(Detached(), torch.randn(2, 12))


class Noisy(VGG):
    """Draws random numbers and counts its calls, also in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("replaced", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.replaced = self.replaced + 1
        random.random()
        return super().forward(f.dropout(x, 0.1, training=True))


@pytest.mark.parametrize("mode", ["enabled", "no_grad", "inference"])
def test_tracing_leaves_no_trace(mode: str, x: Tensor) -> None:
    model = randomised(Noisy()).train()
    model.bn2.eval()
    model.conv2.weight.requires_grad_(False)
    model.conv1.weight.grad = grad = torch.randn_like(model.conv1.weight)
    modes = {m: m.training for m in model.modules()}
    wanted = {p: p.requires_grad for p in model.parameters()}
    state = {name: t.clone() for name, t in model.state_dict().items()}
    kept, python_state, torch_state = grad.clone(), random.getstate(), torch.get_rng_state()
    context = {
        "enabled": torch.enable_grad,
        "no_grad": torch.no_grad,
        "inference": torch.inference_mode,
    }
    with context[mode]():
        trace(model, x)
    assert {m: m.training for m in model.modules()} == modes
    assert {p: p.requires_grad for p in model.parameters()} == wanted
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    assert model.conv1.weight.grad is grad
    assert torch.equal(grad, kept)
    assert model.conv2.weight.grad is None
    assert random.getstate() == python_state
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert not any(m._forward_hooks for m in model.modules())


def test_no_state_leaks_between_two_models(x: Tensor) -> None:
    alone = groups(trace(ResNet(), x))
    trace(Grouped(), x)
    again = groups(trace(ResNet(), x))
    assert {k: g.units.tolist() for k, g in alone.items()} == {
        k: g.units.tolist() for k, g in again.items()
    }


def test_a_missing_torch_pruning_names_the_extra(monkeypatch: Any, x: Tensor) -> None:
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(ImportError, match=r"pip install orthoreg_ext\[pruning\]"):
        trace(VGG(), x)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(12, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.mlp = nn.Linear(8, 16)
        self.fc = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.fc(f.relu(self.mlp(x)))


def test_what_cannot_be_cut_stays_with_a_reason() -> None:
    found = groups(trace(Attention(), torch.randn(2, 5, 12)))
    reasons = {name: g.reason for layers, g in found.items() for name in layers}
    assert reasons["embed"] == "MultiheadAttention 'attention' cannot be cut"
    assert reasons["mlp"] is None
