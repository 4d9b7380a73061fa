"""Real architectures with random weights and inputs that are as small as they allow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from orthoreg_ext.experiment.zoo import load_package

CLASSES = 10


def load(package: str) -> ModuleType:
    """Imports torchvision or timm, or skips the test saying why."""
    try:
        return load_package(package)
    except ImportError as error:
        pytest.skip(str(error))


@dataclass(frozen=True)
class Net:
    """One architecture, and what local pruning at half leaves of it."""

    package: str
    make: Callable[[Any], nn.Module]
    size: int = 32
    criterion: str = "l1"
    filters: float = 0.5  # the share that is left
    macs: float = 0.33  # at most
    kept: str = ""  # what the names of layers that stay have in common, besides the output layers
    outputs: tuple[str, ...] = ()  # output layers

    def fresh(self, seed: int = 0) -> nn.Module:
        torch.manual_seed(seed)
        return self.make(load(self.package))

    def inputs(self, batch: int = 2) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        return torch.randn(batch, 3, self.size, self.size, generator=generator)


def _torchvision(name: str, *outputs: str, size: int = 32, kwargs: Any = None, **rest: Any) -> Net:
    def make(package: Any) -> nn.Module:
        return package.models.get_model(name, num_classes=CLASSES, **(kwargs or {}))

    return Net("torchvision", make, size, outputs=outputs, **rest)


def _timm(name: str, *outputs: str, size: int = 32, kwargs: Any = None, **rest: Any) -> Net:
    def make(package: Any) -> nn.Module:
        return package.create_model(name, num_classes=CLASSES, **(kwargs or {}))

    return Net("timm", make, size, outputs=outputs, **rest)


def _vgg11_bn(package: Any) -> nn.Module:
    """With 256 neurons in the head instead of 4096."""
    model: nn.Module = package.models.vgg11_bn(num_classes=CLASSES, init_weights=False)
    head: Any = model.get_submodule("classifier")
    head[0], head[3], head[6] = (
        nn.Linear(512 * 49, 256),
        nn.Linear(256, 256),
        nn.Linear(256, CLASSES),
    )
    return model


_NO_INIT = {"init_weights": False}  # torchvision's truncated normal takes seconds
_GOOGLENET = ("fc", "aux1.fc2", "aux2.fc2")

NETS = {
    "resnet18": _torchvision("resnet18", "fc", criterion="fisher"),
    "resnet50": _torchvision("resnet50", "fc", criterion="bn_scale"),
    "resnext50": _torchvision("resnext50_32x4d", "fc"),
    "vgg11_bn": Net("torchvision", _vgg11_bn, outputs=("classifier.6",)),
    "mobilenet_v2": _torchvision("mobilenet_v2", "classifier.1", criterion="taylor"),
    "densenet121": _torchvision("densenet121", "classifier"),
    "convnext_tiny": _torchvision("convnext_tiny", "classifier.2"),
    "efficientnet_b0": _torchvision("efficientnet_b0", "classifier.1"),
    "regnet_y_400mf": _torchvision("regnet_y_400mf", "fc", criterion="taylor_abs"),
    "googlenet": _torchvision("googlenet", *_GOOGLENET, size=64, kwargs=_NO_INIT),
    "mnasnet": _torchvision("mnasnet1_0", "classifier.1"),
    # its auxiliary head needs images of 299
    "inception_v3": _torchvision(
        "inception_v3", "fc", size=75, kwargs={"aux_logits": False, **_NO_INIT}
    ),
    "timm mobilenetv3": _timm("mobilenetv3_small_050", "classifier", criterion="fisher"),
    "timm convnextv2": _timm("convnextv2_atto", "head.fc"),
    "timm vit": _timm(
        "vit_tiny_patch16_224",
        "head",
        kwargs={"img_size": 32, "depth": 3},
        filters=0.65,
        macs=0.36,
        kept=".attn.qkv",
    ),
    "timm mixer": _timm(
        "mixer_s32_224",
        "head",
        "stem.proj",  # mixing tokens transposes what it adds to
        kwargs={"img_size": 64},
        size=64,
        filters=0.6,
        macs=0.6,
        kept="blocks.",
    ),
}

# Torch-Pruning cannot do these: a static attribute, a division by zero, memory without end.
HARD = {
    "vit": Net(
        "torchvision",
        lambda package: package.models.VisionTransformer(
            image_size=32,
            patch_size=16,
            num_layers=2,
            num_heads=4,
            hidden_dim=64,
            mlp_dim=128,
            num_classes=CLASSES,
        ),
    ),
    "shufflenet_v2": _torchvision("shufflenet_v2_x0_5"),
    "swin_t": _torchvision("swin_t"),
}
