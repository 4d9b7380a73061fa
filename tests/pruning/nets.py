"""Small networks, one for each way in which channels hang together."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as f


class VGG(nn.Module):
    def __init__(self, norm: bool = True, bias: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=bias)
        self.bn1 = nn.BatchNorm2d(8) if norm else nn.Identity()
        self.conv2 = nn.Conv2d(8, 12, 3, padding=1, bias=bias)
        self.bn2 = nn.BatchNorm2d(12) if norm else nn.Identity()
        self.conv3 = nn.Conv2d(12, 16, 3, padding=1, bias=bias)
        self.bn3 = nn.BatchNorm2d(16) if norm else nn.Identity()
        self.fc1 = nn.Linear(16 * 4, 10)
        self.fc2 = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = f.relu(self.bn1(self.conv1(x)))
        x = f.max_pool2d(f.relu(self.bn2(self.conv2(x))), 2)
        x = f.max_pool2d(f.relu(self.bn3(self.conv3(x))), 2)
        return self.fc2(f.relu(self.fc1(x.flatten(1))))


class Block(nn.Module):
    def __init__(self, inputs: int, width: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.short: nn.Module = nn.Identity()
        if inputs != outputs or stride != 1:
            conv = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.short = nn.Sequential(conv, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(f.relu(self.bn1(self.conv1(x)))))
        return f.relu(y + self.short(x))


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.layer1 = Block(8, 10, 8)
        self.layer2 = Block(8, 12, 12, 2)
        self.layer3 = Block(12, 8, 12)
        self.fc = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(f.relu(self.bn(self.stem(x))))))
        return self.fc(x.mean((2, 3)))


class Separable(nn.Module):
    """Depthwise-separable, with a channel multiplier of 2 at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.bn0 = nn.BatchNorm2d(8)
        self.depth = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.bn1 = nn.BatchNorm2d(8)
        self.point = nn.Conv2d(8, 12, 1)
        self.bn2 = nn.BatchNorm2d(12)
        self.multiply = nn.Conv2d(12, 24, 3, padding=1, groups=12)
        self.fc = nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = f.relu(self.bn0(self.stem(x)))
        x = f.relu(self.bn1(self.depth(x)))
        x = f.relu(self.bn2(self.point(x)))
        return self.fc(f.relu(self.multiply(x)).mean((2, 3)))


class Grouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 1)
        self.bn1 = nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 24, 3, padding=1, groups=4)
        self.bn2 = nn.BatchNorm2d(24)
        self.conv3 = nn.Conv2d(24, 8, 1)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = f.relu(self.bn1(self.conv1(x)))
        x = f.relu(self.bn2(self.conv2(x)))
        return self.fc(f.relu(self.conv3(x)).mean((2, 3)))


class Concat(nn.Module):
    """Concatenations of convolutions and of the raw input, dense style."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 6, 3, padding=1)
        self.b = nn.Conv2d(9, 5, 3, padding=1)
        self.bn = nn.BatchNorm2d(14)
        self.c = nn.Conv2d(14, 8, 3, padding=1)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x1 = torch.cat([x, f.relu(self.a(x))], 1)
        x2 = torch.cat([f.relu(self.b(x1)), x1], dim=1)
        return self.fc(f.relu(self.c(self.bn(x2))).mean((2, 3)))


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(12, 20)
        self.fc2 = nn.Linear(20, 16)
        self.fc3 = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc3(f.relu(self.fc2(f.relu(self.fc1(x.flatten(1))))))


class Transposed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, 8, 3, 2, 1)
        self.up = nn.ConvTranspose2d(8, 12, 2, 2)
        self.bn = nn.BatchNorm2d(12)
        self.grouped = nn.ConvTranspose2d(12, 8, 3, padding=1, groups=2)
        self.out = nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = f.relu(self.bn(self.up(f.relu(self.down(x)))))
        return self.out(f.relu(self.grouped(x)))


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Conv2d(3, 8, 3, padding=1)
        self.vector = nn.Linear(5, 8)
        self.join = nn.Linear(16, 10)
        self.fc = nn.Linear(10, 4)

    def forward(self, image: Tensor, vector: Tensor) -> Tensor:
        a = f.relu(self.image(image)).mean((2, 3))
        b = f.relu(self.vector(vector))
        return self.fc(f.relu(self.join(torch.cat([a, b], 1))))


class Gated(nn.Module):
    """A gated unit, squeeze-excite and PReLU: couplings inside one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 12, 3, padding=1)
        self.prelu = nn.PReLU(6)
        self.squeeze = nn.Linear(6, 4)
        self.excite = nn.Linear(4, 6)
        self.mix = nn.Conv2d(6, 8, 1)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.conv(x).chunk(2, 1)
        x = self.prelu(a * b.sigmoid())
        gate = self.excite(f.relu(self.squeeze(x.mean((2, 3))))).sigmoid()
        return self.fc(f.relu(self.mix(x * gate[:, :, None, None])).mean((2, 3)))


class Normed(nn.Module):
    """GroupNorm, LayerNorm, RMSNorm and a bare scale parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 12, 3, padding=1)
        self.gn = nn.GroupNorm(3, 12)
        self.scale = nn.Parameter(torch.rand(10, 1, 1) + 0.5)
        self.conv2 = nn.Conv2d(12, 10, 3, padding=1)
        self.fc1 = nn.Linear(10, 8)
        self.ln = nn.LayerNorm(8)
        self.fc2 = nn.Linear(8, 6)
        self.rms = nn.RMSNorm(6)
        self.fc3 = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = f.relu(self.gn(self.conv(x)))
        x = f.relu(self.conv2(x) * self.scale).mean((2, 3))
        x = self.fc2(f.relu(self.ln(self.fc1(x))))
        return self.fc3(f.relu(self.rms(x)))


class Tied(nn.Module):
    """Two layers that share a weight and a third that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.a = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.b = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.b.weight = self.a.weight
        self.twice = nn.Conv2d(8, 8, 1)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = f.relu(self.b(f.relu(self.a(f.relu(self.stem(x))))))
        return self.fc(f.relu(self.twice(f.relu(self.twice(x)))).mean((2, 3)))


class Shuffled(nn.Module):
    """A channel shuffle, which the dependency graph cannot see."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = f.relu(self.conv1(x))
        n, c, h, w = x.shape
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return self.fc(f.relu(self.conv2(x)).mean((2, 3)))


IMAGE = {
    "vgg": VGG,
    "plain": lambda: VGG(norm=False, bias=True),
    "resnet": ResNet,
    "separable": Separable,
    "grouped": Grouped,
    "concat": Concat,
    "transposed": Transposed,
    "gated": Gated,
    "normed": Normed,
    "tied": Tied,
}


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """Gives BatchNorms statistics and scales that are not trivial."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm)):
            module.weight.data = torch.rand(module.weight.shape, generator=generator) + 0.5
            module.bias.data = torch.randn(module.bias.shape, generator=generator) * 0.1
        if isinstance(module, nn.BatchNorm2d):
            shape = module.running_mean.shape
            module.running_mean.copy_(torch.randn(shape, generator=generator) * 0.1)
            module.running_var.copy_(torch.rand(shape, generator=generator) + 0.5)
    return model


def batches(shape: tuple[int, ...] = (3, 8, 8), count: int = 2, seed: int = 0, outputs: int = 4):
    """Calibration batches of different sizes that hold every class."""
    g = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(6 + 2 * i, *shape, generator=g), torch.arange(6 + 2 * i) % outputs)
        for i in range(count)
    ]
