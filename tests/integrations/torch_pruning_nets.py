"""Networks for the tests of the Torch-Pruning adapter, with gradients, and their groups."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as f

from tests.pruning import nets, zoo

tp = pytest.importorskip("torch_pruning", reason="pip install orthoreg_ext[pruning]")
from orthoreg_ext.integrations.torch_pruning import (  # noqa: E402
    FusedMagnitudeImportance,
    FusedTaylorImportance,
)


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


class Split(nn.Module):
    """Two layers read half of the channels each."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.left = nn.Conv2d(4, 5, 1)
        self.right = nn.Conv2d(4, 5, 3, padding=1)
        self.fc = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        left, right = torch.split(f.relu(self.stem(x)), 4, dim=1)
        return self.fc((self.left(left) + self.right(right)).mean((2, 3)))


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
    "split": Split,
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
