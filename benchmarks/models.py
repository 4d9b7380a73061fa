"""The layers of well-known networks, as weight shapes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

Shape = tuple[int, ...]


def vgg13() -> list[Shape]:
    """The CIFAR VGG-13 of OrthoReg: ten 3 x 3 convolutions and a classifier."""
    widths = [3, 64, 64, 128, 128, 256, 256, 512, 512, 512, 512]
    convs: list[Shape] = [(o, i, 3, 3) for i, o in pairwise(widths)]
    return [*convs, (100, 512)]


def _basic_blocks(before: int, blocks: Sequence[int], widths: Sequence[int]) -> list[Shape]:
    """Two 3 x 3 convolutions a block, a 1 x 1 shortcut where the width changes."""
    shapes: list[Shape] = []
    for number, width in zip(blocks, widths, strict=True):
        for _ in range(number):
            shapes += [(width, before, 3, 3), (width, width, 3, 3)]
            if before != width:
                shapes.append((width, before, 1, 1))
            before = width
    return shapes


def resnet56() -> list[Shape]:
    """The CIFAR ResNet-56: 55 convolutions of at most 64 filters, two shortcuts, a classifier."""
    return [(16, 3, 3, 3), *_basic_blocks(16, (9, 9, 9), (16, 32, 64)), (100, 64)]


def resnet34() -> list[Shape]:
    """The ImageNet ResNet-34."""
    blocks = _basic_blocks(64, (3, 4, 6, 3), (64, 128, 256, 512))
    return [(64, 3, 7, 7), *blocks, (1000, 512)]


def wrn28_10() -> list[Shape]:
    """The CIFAR WRN-28-10: ResNet-28 with ten times the filters."""
    return [(16, 3, 3, 3), *_basic_blocks(16, (4, 4, 4), (160, 320, 640)), (100, 640)]


def resnet50() -> list[Shape]:
    """The ImageNet ResNet-50: 53 convolutions and a classifier."""
    shapes: list[Shape] = [(64, 3, 7, 7)]
    before = 64
    for blocks, width in zip((3, 4, 6, 3), (64, 128, 256, 512), strict=True):
        for block in range(blocks):
            shapes += [(width, before, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)]
            if block == 0:
                shapes.append((4 * width, before, 1, 1))
            before = 4 * width
    return [*shapes, (1000, 2048)]


def mobilenet_v1() -> list[Shape]:
    """MobileNet-V1: depthwise 3 x 3 convolutions, each as one matrix [n, 9], and 1 x 1 ones."""
    widths = [32, 64, 128, 128, 256, 256, 512, 512, 512, 512, 512, 512, 1024, 1024]
    shapes: list[Shape] = [(32, 3, 3, 3)]
    for i, o in pairwise(widths):
        shapes += [(i, 1, 3, 3), (o, i, 1, 1)]
    return [*shapes, (1000, 1024)]


def convnext_b() -> list[Shape]:
    """ConvNeXt-B: depthwise 7 x 7, wide linear layers, strided convolutions between stages."""
    widths = (128, 256, 512, 1024)
    shapes: list[Shape] = [(128, 3, 4, 4)]
    for stage, (width, blocks) in enumerate(zip(widths, (3, 3, 27, 3), strict=True)):
        if stage:
            shapes.append((width, widths[stage - 1], 2, 2))
        shapes += [(width, 1, 7, 7), (4 * width, width), (width, 4 * width)] * blocks
    return [*shapes, (1000, 1024)]


def vit_b16() -> list[Shape]:
    """ViT-B/16: patches, twelve blocks of four linear layers, a head."""
    block: list[Shape] = [(2304, 768), (768, 768), (3072, 768), (768, 3072)]
    return [(768, 3, 16, 16), *(block * 12), (1000, 768)]


def llama_1b() -> list[Shape]:
    """The linear layers of a Llama of 1 B parameters, without embedding and head."""
    block: list[Shape] = [(2048, 2048), (512, 2048), (512, 2048), (2048, 2048)]
    return [*block, (8192, 2048), (8192, 2048), (2048, 8192)] * 16


def adalora_7b() -> list[Shape]:
    """The factors of rank 12 that AdaLoRA puts beside 224 linear layers of a 7 B model."""
    return [(12, 4096)] * 448


def mobilenet_v2() -> list[Shape]:
    """MobileNet-V2: 1 x 1 convolutions to six times the width and back, depthwise ones between."""
    shapes: list[Shape] = [(32, 3, 3, 3), (32, 1, 3, 3), (16, 32, 1, 1)]
    before = 16
    for width, blocks in zip((24, 32, 64, 96, 160, 320), (2, 3, 4, 3, 3, 1), strict=True):
        for _ in range(blocks):
            wide = 6 * before
            shapes += [(wide, before, 1, 1), (wide, 1, 3, 3), (width, wide, 1, 1)]
            before = width
    return [*shapes, (1280, 320, 1, 1), (1000, 1280)]


def resnext50() -> list[Shape]:
    """ResNeXt-50 32x4d: the 3 x 3 convolutions are in 32 groups, see `groups_of`."""
    shapes: list[Shape] = [(64, 3, 7, 7)]
    before = 64
    for blocks, width in zip((3, 4, 6, 3), (128, 256, 512, 1024), strict=True):
        for block in range(blocks):
            shapes += [(width, before, 1, 1), (width, width // 32, 3, 3), (2 * width, width, 1, 1)]
            if block == 0:
                shapes.append((2 * width, before, 1, 1))
            before = 2 * width
    return [*shapes, (1000, 2048)]


def groups_of(model: str, shapes: Sequence[Shape]) -> list[int]:
    """The filter matrices in each weight."""
    narrow = (lambda s: s[2:] == (3, 3)) if model == "resnext50" else (lambda s: False)
    return [32 if narrow(shape) else 1 for shape in shapes]


MODELS: dict[str, Callable[[], list[Shape]]] = {
    f.__name__: f
    for f in (
        *(resnet56, vgg13, resnet50, mobilenet_v1, resnet34, wrn28_10, convnext_b, vit_b16),
        *(llama_1b, adalora_7b, mobilenet_v2, resnext50),
    )
}
NINE = (
    *("resnet56", "mobilenet_v1", "vgg13", "resnet34", "resnet50", "wrn28_10", "convnext_b"),
    *("vit_b16", "llama_1b"),
)


def square_sweep() -> dict[str, list[Shape]]:
    """One 3 x 3 convolution of n filters on n channels, for many n."""
    return {f"n={n}": [(n, n, 3, 3)] for n in (16, 32, 64, 128, 256, 512, 1024)}


def fan_in_sweep() -> dict[str, list[Shape]]:
    """128 filters of k entries, for many k."""
    return {f"n=128 k={k}": [(128, k)] for k in (32, 128, 512, 2048, 8192, 32768)}


def count_sweep() -> dict[str, list[Shape]]:
    """As many equal layers of 64 x 576 as there are."""
    return {f"{count} of 64 x 576": [(64, 64, 3, 3)] * count for count in (1, 4, 16, 64, 256)}


SWEEPS: dict[str, list[Shape]] = {**square_sweep(), **fan_in_sweep(), **count_sweep()}


def tiny() -> list[Shape]:
    """No network: both sides, ragged edges, more than one tile; for the emulator."""
    return [(8, 3, 3, 3), (70, 33), (5, 90), (1, 9)]


def shapes_of(model: str) -> list[Shape]:
    """The shapes of a model, of a step of a sweep, or of `tiny`."""
    if model in SWEEPS:
        return SWEEPS[model]
    return tiny() if model == "tiny" else MODELS[model]()


def random_weights(shapes: Sequence[Shape], device: str) -> list[Tensor]:
    """Leaves of these shapes, at the scale that networks are initialised with."""
    torch.manual_seed(0)
    return [
        (torch.randn(s, device=device) * (torch.Size(s[1:]).numel() ** -0.5)).requires_grad_()
        for s in shapes
    ]


def flops_needed(shapes: Sequence[Shape], groups: Sequence[int] = ()) -> int:
    """Of the smaller Gram matrix, which is symmetric, and of its product with the weight."""
    total = 0
    for (n, *rest), group in zip(shapes, groups or [1] * len(shapes), strict=True):
        small, large = sorted((n // group, torch.Size(rest).numel()))
        total += 3 * group * small * small * large
    return total


def weight_bytes(shapes: Sequence[Shape]) -> int:
    """Of all weights, in float32."""
    return 4 * sum(torch.Size(shape).numel() for shape in shapes)
