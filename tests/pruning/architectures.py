"""One small net for each way to connect layers, with what half of it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as f


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


class Glu(nn.Sequential):
    """Gated linear units behind a convolution and a linear layer."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 16, 3, padding=1),
            nn.GLU(1),
            nn.BatchNorm2d(8),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, 12),
            nn.GLU(),
            nn.Linear(6, 4),
        )


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


class Siamese(nn.Module):
    """One encoder, with its norms, for two images."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn, self.b = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 6, 1)
        self.join, self.out = nn.Linear(12, 8), nn.Linear(8, 2)

    def encode(self, x: Tensor) -> Tensor:
        return self.b(f.relu(self.bn(self.a(x)))).mean((2, 3))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.out(f.relu(self.join(torch.cat([self.encode(x), self.encode(y)], 1))))


class Pyramid(nn.Module):
    """One head for the maps of all sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 12, 3, 2, 1)
        self.near, self.far = nn.Conv2d(8, 6, 1), nn.Conv2d(12, 6, 1)
        self.head, self.out = nn.Conv2d(6, 10, 3, padding=1), nn.Conv2d(10, 3, 1)

    def forward(self, x: Tensor) -> list[Tensor]:
        x = f.relu(self.a(x))
        far = self.far(f.relu(self.b(x)))
        near = self.near(x) + f.interpolate(far, scale_factor=2)
        return [self.out(f.relu(self.head(level))) for level in (near, far)]


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

        if isinstance(self.inputs, tuple):
            return tuple(draw(like) for like in self.inputs)
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
    "glu": Case(Glu, IMAGE, {"0": 8, "5": 6}, {"7": OUTPUT}),
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
    "encoder": Case(
        lambda: nn.Sequential(
            nn.Linear(6, 8), nn.TransformerEncoderLayer(8, 2, 16, 0.0), nn.Linear(8, 3)
        ),
        SEQUENCE,
        {"1.linear1": 8},
        {
            "0": "MultiheadAttention '1.self_attn' cannot be cut",
            "1.self_attn.out_proj": "inside a MultiheadAttention, which cannot be cut",
            "1.linear2": "MultiheadAttention '1.self_attn' cannot be cut",
            "2": OUTPUT,
        },
    ),
    "siamese": Case(Siamese, (IMAGE, IMAGE), {"a": 4, "b": 3, "join": 4}, {"out": OUTPUT}),
    "pyramid": Case(
        Pyramid, IMAGE, {"a": 4, "b": 6, "near": 3, "far": 3, "head": 5}, {"out": OUTPUT}
    ),
    "named": Case(
        Named,
        {"left": torch.zeros(2, 6), "right": torch.zeros(2, 5)},
        {"a": 4, "b": 4},
        {"c": OUTPUT, "d": OUTPUT},
    ),
}
