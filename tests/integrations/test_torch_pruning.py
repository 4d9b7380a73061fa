"""Torch-Pruning's own importances and pruners against ours, on small and on real networks."""

from __future__ import annotations

import copy
import difflib
import gc
import importlib
import itertools
import pickle
import runpy
import subprocess
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as f

import orthoreg_ext as ox
from tests.pruning import nets, zoo

tp = pytest.importorskip("torch_pruning", reason="pip install orthoreg_ext[pruning]")
from orthoreg_ext.integrations import torch_pruning as adapter  # noqa: E402
from orthoreg_ext.integrations.torch_pruning import (  # noqa: E402
    FusedMagnitudeImportance,
    FusedTaylorImportance,
    OrthoRegImportance,
    VarietyImportance,
    with_orthoreg,
)

pytestmark = pytest.mark.filterwarnings("ignore:Unwrapped parameters detected")

REDUCTIONS = ("mean", "sum", "max", "prod", "first", "gate")
NORMALIZERS = (None, "sum", "mean", "max", "standarization", "gaussian", "lamp", "sentinel_0.3")
EXAMPLE = Path(__file__).parents[2] / "examples" / "torch_pruning_user.py"


class Dense(nn.Module):
    """Two layers of a dense block: each sees all that was made before."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.bn1, self.conv1 = nn.BatchNorm2d(6), nn.Conv2d(6, 5, 3, padding=1)
        self.bn2, self.conv2 = nn.BatchNorm2d(11), nn.Conv2d(11, 4, 1)
        self.fc = nn.Linear(15, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.cat([x, self.conv1(f.relu(self.bn1(x)))], 1)
        x = torch.cat([x, self.conv2(f.relu(self.bn2(x)))], 1)
        return self.fc(x.mean((2, 3)))


class Depthwise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.depth = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.bn = nn.BatchNorm2d(8)
        self.point = nn.Conv2d(8, 12, 1)
        self.fc = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = f.relu(self.bn(self.depth(f.relu(self.stem(x)))))
        return self.fc(f.relu(self.point(x)).mean((2, 3)))


class Decoder(nn.Module):
    """A linear layer whose outputs become the pixels of channels, and a transposed convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(12, 24)
        self.up = nn.ConvTranspose2d(6, 5, 2, 2)
        self.bn = nn.BatchNorm2d(5)
        self.out = nn.Conv2d(5, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = f.relu(self.fc(x.flatten(1))).view(len(x), 6, 2, 2)
        return self.out(f.relu(self.bn(self.up(x))))


def torchvision(name: str, **arguments: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(zoo.load("torchvision").models, name)(**arguments)


SMALL: dict[str, Callable[[], nn.Module]] = {
    "vgg": nets.VGG,
    "vgg with biases": lambda: nets.VGG(norm=False, bias=True),
    "resnet": nets.ResNet,
    "grouped": nets.Grouped,
    "depthwise": Depthwise,
    "dense": Dense,
    "mlp": nets.MLP,
    "layer norm": nets.Normed,
    "squeeze and excite": nets.Gated,
    "decoder": Decoder,
}
REAL: dict[str, Callable[[], nn.Module]] = {
    "resnet18": torchvision("resnet18", num_classes=10),
    "mobilenet_v2": torchvision("mobilenet_v2", num_classes=10, width_mult=0.5),
    "densenet": torchvision("DenseNet", growth_rate=8, block_config=(2, 3), num_init_features=16),
}
INPUTS = {"mlp": (12,), "decoder": (12,)}
FLATTENED = ("vgg", "vgg with biases", "decoder", "squeeze and excite")
UNORDERED = ("decoder",)  # Torch-Pruning's Taylor goes wrong, and leaves the group so


def with_gradients(name: str, seed: int = 0, train: bool = False) -> tuple[nn.Module, Tensor]:
    """A network with random scales and shifts, and gradients of a random loss in eval mode."""
    torch.manual_seed(seed)
    model = {**SMALL, **REAL}[name]()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.BatchNorm2d, nn.LayerNorm)):
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_()
    x = torch.randn(3, *INPUTS.get(name, (3, 32, 32) if name in REAL else (3, 8, 8)))
    model.train(train)
    output = model(x)
    (output * torch.randn_like(output)).sum().backward()
    return model, x[:1]


def graph(model: nn.Module, x: Tensor) -> Any:
    return tp.DependencyGraph().build_dependency(model, x)


def groups(model: nn.Module, x: Tensor) -> list[Any]:
    return list(graph(model, x).get_all_groups())


def agree(got: Tensor, expected: Tensor, tolerance: float = 1e-6) -> None:
    assert got.shape == expected.shape
    scale = expected.abs().max().clamp(min=1e-30)
    assert bool(((got - expected).abs() <= tolerance * scale).all()), (got, expected)


def pairs(
    reduction: str | None, normalizer: Any, bias: bool, name: str = ""
) -> Iterator[tuple[Any, Any]]:
    """Torch-Pruning's importances and ours."""
    magnitude, taylor = tp.importance.GroupMagnitudeImportance, tp.importance.GroupTaylorImportance
    for p in (1, 2, 3):
        yield (
            magnitude(p, reduction, normalizer, bias),
            FusedMagnitudeImportance(p, reduction, normalizer, bias),
        )
    for signed in () if name in UNORDERED else (False, True):
        yield (
            taylor(reduction, normalizer, signed, bias),
            FusedTaylorImportance(reduction, normalizer, signed, bias),
        )


# ---- the lazy package


def test_importing_the_package_imports_no_framework() -> None:
    code = (
        "import sys, orthoreg_ext as ox; print(dir(ox.integrations));"
        "print({'torch_pruning', 'lightning', 'transformers', 'peft'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "'torch_pruning'" in done.stdout.splitlines()[0]
    assert done.stdout.splitlines()[1] == "set()"


def test_adapters_are_attributes_of_the_package() -> None:
    assert ox.integrations.torch_pruning is adapter
    with pytest.raises(AttributeError, match=r"no attribute 'keras'. Valid: .*torch_pruning"):
        _ = ox.integrations.keras


@pytest.mark.parametrize("way", ["attribute", "import"])
def test_a_missing_framework_is_named_with_its_remedy(
    way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    for name in [name for name in sys.modules if "integrations.torch_pruning" in name]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(ox.integrations, "torch_pruning", raising=False)
    ask = {
        "attribute": lambda: ox.integrations.torch_pruning,
        "import": lambda: importlib.import_module("orthoreg_ext.integrations.torch_pruning"),
    }
    with pytest.raises(ImportError, match=r"torch_pruning needs torch_pruning.*pip install"):
        ask[way]()


# ---- scores


@pytest.fixture
def chain() -> tuple[Any, Any]:
    """y = V relu(W x): the group of its three hidden channels, and the model."""
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 2], [3, -4], [0, 5]]))
        model[0].bias.copy_(torch.tensor([1.0, 0, 2]))
        model[2].weight.copy_(torch.tensor([[2.0, 1, -3]]))
    model[0].weight.grad = torch.tensor([[1.0, -1], [0, 2], [7, 1]])
    model[0].bias.grad = torch.tensor([3.0, 1, 1])
    model[2].weight.grad = torch.tensor([[1.0, -2, 1]])
    return groups(model, torch.ones(1, 2))[-1], model


@pytest.mark.parametrize(
    ("importance", "expected"),
    [
        (FusedMagnitudeImportance(1, "sum", None), [3 + 2, 7 + 1, 5 + 3]),
        (FusedMagnitudeImportance(2, "sum", None), [5 + 4, 25 + 1, 25 + 9]),
        (FusedMagnitudeImportance(2, "mean", None), [4.5, 13, 17]),
        (FusedMagnitudeImportance(2, "max", None), [5, 25, 25]),
        (FusedMagnitudeImportance(2, "prod", None), [20, 25, 225]),
        (FusedMagnitudeImportance(2, "first", None), [5, 25, 25]),
        (FusedMagnitudeImportance(2, "gate", None), [4, 1, 9]),
        (FusedMagnitudeImportance(2, "first", "sum"), [5 / 55, 25 / 55, 25 / 55]),
        (FusedMagnitudeImportance(2, "sum", None, True), [5 + 1 + 4, 25 + 0 + 1, 25 + 4 + 9]),
        (FusedTaylorImportance("sum", None), [3 + 2, 8 + 2, 5 + 3]),
        (FusedTaylorImportance("sum", None, True), [1 + 2, 8 + 2, 5 + 3]),
        (FusedTaylorImportance("sum", None, bias=True), [3 + 3 + 2, 8 + 0 + 2, 5 + 2 + 3]),
        (OrthoRegImportance(), [(-1 + 3) ** 2, 64, (5 + 2) ** 2]),
        (OrthoRegImportance(bias=False), [1, 64, 25]),
        (OrthoRegImportance(bias=False, normalizer="max"), [1 / 64, 1, 25 / 64]),
    ],
)
def test_scores_by_hand(importance: Any, expected: list[float], chain: Any) -> None:
    agree(importance(chain[0]), torch.tensor([float(e) for e in expected]))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", SMALL)
def test_scores_are_torch_prunings_for_every_reduction(name: str, bias: bool) -> None:
    model, x = with_gradients(name)
    for group in groups(model, x):
        for reduction in REDUCTIONS:
            if name in FLATTENED and reduction not in ("mean", "sum"):
                continue  # test_channels_behind_a_flatten_are_added_first
            for theirs, ours in pairs(reduction, None, bias, name):
                agree(ours(group), theirs(group))


@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("name", ["resnet", "grouped", "decoder"])
def test_scores_are_torch_prunings_for_every_normalizer(name: str, normalizer: Any) -> None:
    model, x = with_gradients(name)
    for group in groups(model, x):
        for theirs, ours in pairs("mean", normalizer, False, name):
            # these take differences of nearly equal numbers
            spread = normalizer in ("gaussian", "standarization", "lamp")
            agree(ours(group), theirs(group), 1e-5 if spread else 1e-6)


def test_a_function_normalises() -> None:
    group = groups(*with_gradients("mlp"))[0]
    for theirs, ours in pairs("mean", torch.log, False):
        agree(ours(group), theirs(group))


@pytest.mark.parametrize("name", REAL)
def test_scores_of_real_networks_are_torch_prunings(name: str) -> None:
    model, x = with_gradients(name)
    found = groups(model, x)
    for theirs, ours in pairs("mean", "mean", True):
        for group in found:
            agree(ours(group), theirs(group))


def test_without_reduction_every_layer_has_a_row() -> None:
    group = groups(*with_gradients("mlp"))[0]
    for theirs, ours in pairs(None, None, False):
        agree(ours(group), theirs(group))


def test_half_precision_is_added_in_float32() -> None:
    model, x = with_gradients("resnet")
    exact = [FusedMagnitudeImportance()(group) for group in groups(model, x)]
    model, x = model.bfloat16(), x.bfloat16()
    rounded = [FusedMagnitudeImportance()(group) for group in groups(model, x)]
    for a, b in zip(rounded, exact, strict=True):
        assert a.dtype == torch.float32
        agree(a, b, 2e-2)
    model, x = with_gradients("mlp")
    model, x = model.bfloat16(), x.bfloat16()
    inputs = model.fc3.weight.detach().float().square().sum(0)
    group = next(g for g in groups(model, x) if g[0].dep.target.module is model.fc2)
    agree(FusedMagnitudeImportance(2, "gate", None)(group), inputs)


def test_memory_format_does_not_matter() -> None:
    model, x = with_gradients("grouped")
    expected = [FusedTaylorImportance()(group) for group in groups(model, x)]
    model = model.to(memory_format=torch.channels_last)
    for group, scores in zip(groups(model, x), expected, strict=True):
        agree(FusedTaylorImportance()(group), scores)


# ---- where Torch-Pruning 1.6.1 is wrong


def test_channels_behind_a_flatten_are_added_first() -> None:
    model, x = with_gradients("vgg")
    group = next(g for g in groups(model, x) if g[0].dep.target.module is model.conv3)
    inputs = model.fc1.weight.detach().square().sum(0).view(16, 4).sum(1)
    filters = model.conv3.weight.detach().square().flatten(1).sum(1)
    gamma = model.bn3.weight.detach().square()
    by_hand = {
        "max": torch.stack([filters, gamma, inputs]).amax(0),
        "prod": filters * gamma * inputs,
        "gate": inputs,
        "first": filters,
    }
    for reduction, expected in by_hand.items():
        agree(FusedMagnitudeImportance(2, reduction, None)(group), expected)
    theirs = tp.importance.GroupMagnitudeImportance(2, "gate", None)(group)
    last = model.fc1.weight.detach().square().sum(0).view(16, 4)[:, 3]
    agree(theirs, last)  # one of the four


def test_some_channels_have_scores_in_the_order_asked_for() -> None:
    model, x = with_gradients("resnet")
    dependencies, asked = graph(model, x), [7, 2, 6]
    conv = model.layer1.conv1
    group = dependencies.get_pruning_group(conv, tp.prune_conv_out_channels, asked)
    every = dependencies.get_pruning_group(conv, tp.prune_conv_out_channels, list(range(10)))
    for _, ours in pairs("mean", None, False):
        agree(ours(group), ours(every)[asked])
    with pytest.raises((IndexError, RuntimeError)):
        tp.importance.GroupMagnitudeImportance()(group)


def test_taylor_keeps_unordered_channels_with_their_roots() -> None:
    model, x = with_gradients("decoder")
    group = next(g for g in groups(model, x) if g[0].dep.target.module is model.fc)
    slopes = model.up.weight * model.up.weight.grad
    expected = slopes.detach().abs().flatten(1).sum(1).repeat_interleave(4)
    agree(FusedTaylorImportance("gate", None)(group), expected)
    theirs = tp.importance.GroupTaylorImportance("gate", None)(group)
    assert not torch.allclose(theirs, expected)  # it sorts the channels, but not their roots


def test_taylor_scores_batchnorm_only_if_asked() -> None:
    model, x = with_gradients("vgg")
    group = next(g for g in groups(model, x) if g[0].dep.target.module is model.conv1)
    theirs, default = tp.importance.GroupTaylorImportance(), FusedTaylorImportance()
    asked = FusedTaylorImportance("sum", None, batchnorm=True)
    without = FusedTaylorImportance("sum", None)
    gamma = model.bn1
    agree(asked(group) - without(group), (gamma.weight * gamma.weight.grad).detach().abs(), 1e-5)
    before = theirs(group)
    with torch.no_grad():
        gamma.weight *= 100
    agree(theirs(group), before)
    agree(default(group), before)


def test_grouped_transposed_convolutions_have_their_own_filters() -> None:
    torch.manual_seed(0)
    model, x = nets.Transposed(), torch.randn(1, 3, 8, 8)
    group = next(g for g in groups(model, x) if g[0].dep.target.module is model.grouped)
    filters = model.grouped.weight.detach().unflatten(0, (2, 6)).transpose(1, 2).flatten(0, 1)
    expected = filters.square().flatten(1).sum(1)  # [2 * 4]
    agree(FusedMagnitudeImportance(2, "first", None)(group), expected)
    with pytest.raises(IndexError):
        tp.importance.GroupMagnitudeImportance()(group)


def test_a_channel_multiplier_is_no_index_error() -> None:
    torch.manual_seed(0)
    model, x = nets.Separable(), torch.randn(1, 3, 8, 8)
    group = next(g for g in groups(model, x) if g[0].dep.target.module is model.point)
    assert torch.isfinite(FusedMagnitudeImportance()(group)).all()
    with pytest.raises(IndexError):
        tp.importance.GroupMagnitudeImportance()(group)


@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_a_group_of_zeros_has_zero_scores(normalizer: Any) -> None:
    model, x = with_gradients("mlp")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    scores = FusedMagnitudeImportance(normalizer=normalizer)(groups(model, x)[0])
    assert scores.tolist() == [0.0] * len(scores)


def test_a_group_whose_origin_is_lost_is_left_alone() -> None:
    group = groups(*with_gradients("mlp"))[0]
    for item in group.items:
        item.root_idxs = [None] * len(item.idxs) if item is not group[0] else item.root_idxs
    agree(
        FusedMagnitudeImportance(2, "sum", None)(group),
        FusedMagnitudeImportance(2, "first", None)(group),
    )


def test_a_wrong_graph_is_an_error_that_names_the_layer() -> None:
    torch.manual_seed(0)
    found, importance = groups(nets.Concat(), torch.randn(1, 3, 8, 8)), FusedMagnitudeImportance()
    with pytest.raises(ValueError, match=r"graph is wrong about layer '.*ignored_layers"):
        list(map(importance, found))


# ---- one pass for all groups


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of tensors in each pass."""
    calls: list[int] = []
    scored = ox.functional.filter_scores

    def counted(weights: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(len(weights))
        return scored(weights, *args, **kwargs)

    monkeypatch.setattr(ox.functional, "filter_scores", counted)
    return calls


@pytest.mark.parametrize("make", [FusedMagnitudeImportance, FusedTaylorImportance])
def test_a_pruner_step_is_one_pass(make: Any, passes: list[int]) -> None:
    model, x = with_gradients("resnet")
    pruner = tp.pruner.BasePruner(
        *(model, x, make()), iterative_steps=2, global_pruning=True, ignored_layers=[model.fc]
    )
    pruner.step()
    assert len(passes) == 1
    pruner.step()
    assert len(passes) == 2


CHANGES: dict[str, Callable[[nn.Module], None]] = {
    "nothing": lambda _: None,
    "weights in place": lambda m: m.layer1.conv1.weight.detach().mul_(2),
    "gradients in place": lambda m: m.layer1.conv1.weight.grad.mul_(3),
    "new gradients": lambda m: [
        setattr(p, "grad", torch.randn_like(p)) for p in m.parameters()
    ] and None,
    "another backward pass": lambda m: m(torch.ones(2, 3, 8, 8)).sum().backward(),
    "new storage": lambda m: [setattr(p, "data", p.data * 2) for p in m.parameters()] and None,
    "a new parameter": lambda m: setattr(
        m.layer1.conv1, "weight", nn.Parameter(m.layer1.conv1.weight.detach() + 1)
    ) or setattr(m.layer1.conv1.weight, "grad", torch.ones_like(m.layer1.conv1.weight)),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("make", [FusedMagnitudeImportance, FusedTaylorImportance])
def test_changes_between_groups_are_seen(make: Any, change: str) -> None:
    model, x = with_gradients("resnet")
    found, importance = groups(model, x), make(normalizer=None)
    for group in found[:2]:
        importance(group)
    CHANGES[change](model)
    for group in found[2:]:
        agree(importance(group), make(normalizer=None)(group))


def test_a_write_that_torch_does_not_see_is_seen_by_the_next_pass() -> None:
    model, x = with_gradients("resnet")
    found, importance = groups(model, x), FusedMagnitudeImportance()
    for group in found:
        importance(group)
    for parameter in model.parameters():
        parameter.data.uniform_(-1, 1)
    for group in found:
        agree(importance(group), FusedMagnitudeImportance()(group))
    model.stem.weight.data.uniform_(-1, 1)
    importance.clear()
    agree(importance(found[0]), FusedMagnitudeImportance()(found[0]))


def test_layers_that_were_cut_between_groups_are_scored_anew() -> None:
    model, x = with_gradients("resnet")
    dependencies, importance = graph(model, x), FusedTaylorImportance(normalizer=None)
    first, *_ = dependencies.get_all_groups(ignored_layers=[model.fc])
    importance(first)
    first.prune([1, 3])
    for group in dependencies.get_all_groups(ignored_layers=[model.fc]):
        agree(importance(group), FusedTaylorImportance(normalizer=None)(group))


def test_two_models_do_not_mix() -> None:
    importance = FusedMagnitudeImportance()
    found = [groups(*with_gradients("resnet", seed)) for seed in (0, 1)]
    for a, b in zip(*found, strict=True):
        agree(importance(a), FusedMagnitudeImportance()(a))
        agree(importance(b), FusedMagnitudeImportance()(b))


def test_old_parameters_are_not_kept_alive() -> None:
    model, x = with_gradients("mlp")
    importance = FusedMagnitudeImportance()
    for group in groups(model, x):
        importance(group)
    old = weakref.ref(model.fc1.weight)
    model.fc1.weight = nn.Parameter(torch.ones(20, 12))
    del group
    gc.collect()
    assert old() is None


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda i: pickle.loads(pickle.dumps(i))])
def test_importances_can_be_copied(copied: Any) -> None:
    group = groups(*with_gradients("mlp"))[0]
    for importance in (FusedMagnitudeImportance(3, "max", "sum", True), FusedTaylorImportance()):
        scores = importance(group)
        agree(copied(importance)(group), scores)


# ---- arguments


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FusedMagnitudeImportance(group_reduction="average"), "unknown group_reduction"),
        (lambda: FusedTaylorImportance(normalizer="norm"), "unknown normalizer 'norm'"),
        (lambda: OrthoRegImportance(normalizer="sentinel_2"), "expected a share"),
        (lambda: OrthoRegImportance(normalizer="sentinel"), "expected a share"),
        (lambda: FusedMagnitudeImportance(p=0), "p is 0"),
        (lambda: VarietyImportance("l3"), "unknown host 'l3'"),
        (lambda: VarietyImportance(mode="pair"), "did you mean 'pairwise'"),
        (lambda: VarietyImportance(threshold=2), "threshold is 2"),
        (lambda: VarietyImportance(group_reduction=None), "group_reduction is None"),
    ],
)
def test_wrong_arguments_are_told_at_once(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("make", [FusedTaylorImportance, OrthoRegImportance])
def test_a_missing_gradient_names_the_layer(make: Any) -> None:
    model, x = with_gradients("resnet")
    model.layer2.conv1.weight.grad = None
    pruner = tp.pruner.BasePruner(model, x, make())
    with pytest.raises(ValueError, match=r"weight of layer 'layer2.conv1' has none: call loss"):
        pruner.step()
    assert model.layer2.conv1.out_channels == 12
    assert model.stem.out_channels == 8  # nothing was cut


def test_layers_that_no_group_counts_need_no_gradient() -> None:
    model, x = with_gradients("resnet")
    model.layer2.conv1.weight.grad = None
    conv = model.layer1.conv1
    group = next(g for g in groups(model, x) if g[0].dep.target.module is conv)
    agree(FusedTaylorImportance()(group), tp.importance.GroupTaylorImportance()(group))


@pytest.mark.parametrize("make", [FusedMagnitudeImportance, FusedTaylorImportance])
def test_a_score_that_is_not_finite_names_the_layer(make: Any) -> None:
    model, x = with_gradients("resnet")
    with torch.no_grad():
        model.layer1.conv2.weight[3, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"not finite for layer 'layer1.conv2'"):
        make()(groups(model, x)[0])


# ---- OrthoReg and variety


@pytest.mark.parametrize("name", ["vgg", "resnet", "grouped", "depthwise", "dense"])
def test_orthoreg_is_the_square_of_each_filters_product(name: str) -> None:
    model, x = with_gradients(name)
    importance = OrthoRegImportance("sum", None)
    for group in groups(model, x):
        expected = torch.zeros(len(group[0].idxs), dtype=torch.float64)
        for item in group.items:
            layer, handler = item.dep.target.module, item.dep.handler
            if not isinstance(layer, (nn.Conv2d, nn.Linear)) or "in_" in handler.__name__:
                continue
            if item is not group[0] and handler.__name__ != "prune_out_channels":
                continue
            product = (layer.weight * layer.weight.grad).detach().double().flatten(1).sum(1)
            if layer.bias is not None:
                product += (layer.bias * layer.bias.grad).detach().double()
            for channel, root in zip(item.idxs, item.root_idxs, strict=True):
                expected[root] += product[channel] ** 2
        agree(importance(group), expected.float(), 1e-5)


def test_orthoreg_agrees_with_our_own_pruning() -> None:
    model, x = with_gradients("resnet")
    widths = {}
    for way in ("theirs", "ours"):
        pruned = copy.deepcopy(model)
        for parameter, source in zip(pruned.parameters(), model.parameters(), strict=True):
            parameter.grad = source.grad.clone()
        if way == "ours":
            ox.pruning.prune(pruned, x, criterion="fisher", ratio=0.5, scope="local", bias=True)
        else:
            importance = OrthoRegImportance()
            tp.pruner.BasePruner(pruned, x, importance, ignored_layers=[pruned.fc]).step()
        widths[way] = {name: p.detach() for name, p in pruned.named_parameters()}
    for name, parameter in widths["ours"].items():
        assert torch.equal(parameter, widths["theirs"][name]), name


def test_gradients_of_train_mode_are_told() -> None:
    model, x = with_gradients("resnet", train=True)
    with pytest.warns(UserWarning, match="taken in eval mode"):
        OrthoRegImportance()(groups(model, x)[0])
    model, x = with_gradients("resnet")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = groups(model, x)[0]
        OrthoRegImportance()(found)


def test_transposed_filters_count_by_output() -> None:
    model, x = with_gradients("decoder")
    group = next(g for g in groups(model, x) if g[0].dep.target.module is model.up)
    product = (model.up.weight * model.up.weight.grad).detach().sum((0, 2, 3))
    product += (model.up.bias * model.up.bias.grad).detach()
    agree(OrthoRegImportance("first")(group), product**2, 1e-5)


@pytest.mark.parametrize("mode", ["pairwise", "reweight", "gate"])
@pytest.mark.parametrize("host", ["l1", "orthoreg"])
def test_variety_cuts_what_our_own_pruning_cuts(host: str, mode: str) -> None:
    criterion = {"l1": "l1", "orthoreg": "fisher"}[host]
    cuts = []
    for ours in (True, False):
        model, x = with_gradients("resnet")
        if ours:
            variety = ox.pruning.variety(criterion, mode)
            ox.pruning.prune(model, x, criterion=variety, ratio=0.5, scope="local")
        else:
            importance = VarietyImportance(host, mode)
            if host == "l1":  # that of outputs alone, as ours is
                importance.host.HANDLERS = adapter.OUT
                importance.host.target_types = [nn.Conv2d, nn.Linear]
            tp.pruner.BasePruner(model, x, importance, ignored_layers=[model.fc]).step()
        cuts.append([p.detach().clone() for p in model.parameters()])
    for a, b in zip(*cuts, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("mode", ["pairwise", "gate"])
def test_variety_drops_the_weaker_copy_first(mode: str) -> None:
    model, x = with_gradients("vgg")
    with torch.no_grad():
        model.conv1.weight[5] = -3 * model.conv1.weight[2]
    group = next(g for g in groups(model, x) if g[0].dep.target.module is model.conv1)
    scores = VarietyImportance("l1", mode, 0.99)(group)
    plain = FusedMagnitudeImportance(1)(group)
    assert int(scores.argmin()) == (2 if plain[2] < plain[5] else 5)
    assert len(scores.unique()) == 8


def test_variety_takes_any_importance_as_host() -> None:
    group = groups(*with_gradients("vgg"))[0]
    host = tp.importance.GroupMagnitudeImportance(1, normalizer=None)
    agree(VarietyImportance(host)(group), VarietyImportance("l1")(group))
    assert VarietyImportance(lambda _: None)(group) is None
    with pytest.raises(ValueError, match="expected one score each"):
        VarietyImportance(lambda _: torch.ones(2))(group)


# ---- in every pruner


@pytest.mark.parametrize("pruner", ["BasePruner", "GroupNormPruner", "GrowingRegPruner"])
@pytest.mark.parametrize("name", ["resnet", "grouped", "dense", "resnet18"])
def test_every_pruner_cuts_what_it_cuts_with_its_own(name: str, pruner: str) -> None:
    taylor = tp.importance.GroupTaylorImportance(), FusedTaylorImportance()
    magnitude = tp.importance.GroupMagnitudeImportance(), FusedMagnitudeImportance()
    for importances in (taylor, magnitude):
        cuts = []
        for importance in importances:
            model, x = with_gradients(name)
            made = getattr(tp.pruner, pruner)(
                *(model, x, importance), global_pruning=True, pruning_ratio=0.3, iterative_steps=2,
                ignored_layers=[model.fc], out_channel_groups={}, in_channel_groups={},
            )  # fmt: skip
            made.step()
            made.step()
            cuts.append([p.detach() for p in model.parameters()])
        for a, b in zip(*cuts, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize(
    "importance", [OrthoRegImportance(), VarietyImportance(), FusedTaylorImportance(batchnorm=True)]
)
@pytest.mark.parametrize("pruner", ["BasePruner", "BNScalePruner", "GroupNormPruner"])
def test_the_others_work_in_every_pruner(importance: Any, pruner: str) -> None:
    model, x = with_gradients("resnet")
    made = getattr(tp.pruner, pruner)(model, x, importance, ignored_layers=[model.fc])
    made.step()
    assert model.layer1.conv1.out_channels == 5
    assert model(x).shape == (1, 4)


# ---- with_orthoreg


def penalty(model: nn.Module, strength: float) -> Tensor:
    """strength * sum_l sqrt(m_l) / sum sqrt(m) * sum |G_l - I|, of all but the classifier."""
    layers = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))][:-1]
    terms, sizes = [], []
    for layer in layers:
        w = layer.weight.flatten(1)
        if layer.bias is not None:
            w = torch.cat([w, layer.bias[:, None]], 1)
        smaller = w @ w.T if len(w) <= w.shape[1] else w.T @ w
        terms.append((smaller - torch.eye(len(smaller))).abs().sum())
        sizes.append(len(smaller) ** 0.5)
    return strength * sum(t * s for t, s in zip(terms, sizes, strict=True)) / sum(sizes)


def digits() -> Iterator[tuple[Tensor, Tensor]]:
    data = pytest.importorskip("sklearn.datasets").load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    yield from itertools.cycle(
        (images[i], torch.tensor(data.target)[i]) for i in order[:1280].split(64)
    )


def small_net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        *(nn.Conv2d(1, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(12, 20, 3, padding=1, bias=False), nn.BatchNorm2d(20), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(20, 10)),
    )


def check_epoch(plain: nn.Module, model: nn.Module, pruner: Any, data: Any, hooked: Any) -> None:
    """Trains both nets side by side, and compares each penalty, gradient and new weight."""
    optimizer = torch.optim.SGD(plain.parameters(), 0.05, momentum=0.9)
    seen: list[Tensor] = []
    hooked.register_step_pre_hook(
        lambda *_: seen.extend(p.grad.clone() for p in model.parameters())
    )
    for images, labels in itertools.islice(data, 20):
        for net in (plain, model):
            net.train().zero_grad()
        term = penalty(plain, 3e-2)
        agree(pruner.regularizer().detach(), term.detach())
        (f.cross_entropy(plain(images), labels) + term).backward()
        for m in plain.modules():
            if isinstance(m, nn.BatchNorm2d):  # the pruner's own
                m.weight.grad += 1e-3 * m.weight.detach().sign()
        optimizer.step()

        f.cross_entropy(model(images), labels).backward()
        pruner.regularize(model)
        seen.clear()
        hooked.step()
        for p, q, slope in zip(plain.parameters(), model.parameters(), seen, strict=True):
            agree(slope, p.grad)
            agree(q.detach(), p.detach())
            q.data.copy_(p.data)  # each step is compared, not what becomes of rounding


@pytest.mark.parametrize("route", ["regularize", "attach"])
def test_training_is_that_of_a_plain_loop(route: str) -> None:
    model, data = small_net(), digits()
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    hooked = optimizer if route == "attach" else None
    wrapped = with_orthoreg(tp.pruner.BNScalePruner, hooked, strength=3e-2)
    pruner = wrapped(
        *(model, torch.ones(1, 1, 8, 8), OrthoRegImportance()),
        reg=1e-3,
        ignored_layers=[model[-1]],
    )
    check_epoch(copy.deepcopy(model), model, pruner, data, optimizer)
    images, labels = next(data)
    model.eval().zero_grad()
    f.cross_entropy(model(images), labels).backward()
    pruner.step()
    assert model[4].out_channels == 10
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    if route == "attach":
        pruner.attach(optimizer)
    check_epoch(copy.deepcopy(model), model, pruner, data, optimizer)


@pytest.mark.parametrize("pruner", ["GroupNormPruner", "GrowingRegPruner", "BNScalePruner"])
def test_the_pruners_own_regularisation_stays(pruner: str) -> None:
    slopes = []
    for wrapped in (False, True):
        model, x = with_gradients("resnet")
        base = getattr(tp.pruner, pruner)
        made = (with_orthoreg(base, penalty="so", strength=0.5) if wrapped else base)(
            model, x, FusedMagnitudeImportance()
        )
        made.regularize(model)
        if not wrapped:
            (ox.OrthoRegularizer(model, "so", 0.5)()).backward()
        slopes.append([p.grad for p in model.parameters()])
    for a, b in zip(*slopes, strict=True):
        agree(a, b)


def test_base_pruners_take_the_loss() -> None:
    model, x = with_gradients("mlp")
    before = model.fc1.weight.grad.clone()
    made = with_orthoreg(tp.pruner.BasePruner)(model, x, FusedMagnitudeImportance())
    made.regularize(model, torch.tensor(0.0))
    assert not torch.equal(model.fc1.weight.grad, before)
    assert type(made).__name__ == "OrthoRegBasePruner"
    assert isinstance(made, tp.pruner.BasePruner)


def test_frozen_layers_stay_without_gradient() -> None:
    model, x = with_gradients("mlp")
    made = with_orthoreg(tp.pruner.BasePruner)(model, x, FusedMagnitudeImportance())
    model.fc1.weight.requires_grad_(False).grad = None
    model.fc2.weight.grad = None
    made.regularize(model, None)
    assert model.fc1.weight.grad is None
    assert model.fc2.weight.grad is not None


def test_pruners_share_no_dicts() -> None:
    wrapped = with_orthoreg(tp.pruner.BasePruner)
    grouped = wrapped(*with_gradients("grouped"), FusedMagnitudeImportance())
    plain = wrapped(*with_gradients("mlp"), FusedMagnitudeImportance())
    assert grouped.in_channel_groups
    assert plain.in_channel_groups == {}
    given: dict[Any, int] = {}
    model, x = with_gradients("grouped")
    kept = wrapped(model, x, FusedMagnitudeImportance(), in_channel_groups=given)
    assert kept.in_channel_groups is given


def test_what_is_no_pruner_class_is_refused() -> None:
    model, x = with_gradients("mlp")
    made = tp.pruner.BasePruner(model, x, FusedMagnitudeImportance())
    for wrong in (made, nn.Linear, "BasePruner"):
        with pytest.raises(TypeError, match=r"with_orthoreg\(tp.pruner.BasePruner\)\(model"):
            with_orthoreg(wrong)
    with pytest.raises(ValueError, match="unknown penalty"):
        with_orthoreg(tp.pruner.BasePruner, penalty="orto")(model, x, FusedMagnitudeImportance())


# ---- the example


def plain_script(lines: list[str]) -> list[str]:
    """The example with its marked lines taken back."""
    found: list[str] = []
    for line in lines:
        if line.startswith("# was: "):
            found[-1] = line.removeprefix("# was: ")
        elif not line.endswith("# added"):
            found.append(line)
    return found


def test_the_example_is_a_plain_script_but_for_two_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("sklearn", reason="pip install orthoreg_ext[cli]")
    lines = EXAMPLE.read_text().splitlines()
    plain = plain_script(lines)
    assert "orthoreg_ext.integrations" not in "\n".join(plain)
    code = [line for line in lines if not line.startswith("# was: ")]
    changes = [d for d in difflib.ndiff(plain, code) if d[0] in "+-"]
    assert [d[0] for d in changes].count("+") <= 2
    assert [d[0] for d in changes].count("-") == 1
    (tmp_path / "plain.py").write_text("\n".join(plain))
    for script in (EXAMPLE, tmp_path / "plain.py"):
        runpy.run_path(str(script), run_name="__main__")
        printed = capsys.readouterr().out.splitlines()
        assert [line.split(":")[0] for line in printed] == ["trained", "pruned", "fine-tuned"]
        right = [float(line.split()[1]) for line in printed]
        assert right[0] > 90
        assert right[2] > 85
