"""`reg.attach(optimizer)` under the tools of timm and in a loop of torchvision's shape."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import orthoreg_ext as ox
from tests.integrations.examples import check_adoption, framework, run_example

STEPS = 4
STRENGTH = 0.3  # not to be overlooked


@pytest.fixture(scope="module")
def timm() -> ModuleType:
    framework("timm")
    return importlib.import_module("timm")


@pytest.fixture(scope="module")
def resnet() -> ModuleType:
    framework("torchvision")
    return importlib.import_module("torchvision.models.resnet")


def make_batches(channels: int, size: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(4, channels, size, size, generator=generator), torch.arange(4))
        for _ in range(STEPS)
    ]


def assert_same(ours: nn.Module, plain: nn.Module, rtol: float = 1e-6) -> None:
    expected = dict(plain.named_parameters())
    for name, p in ours.named_parameters():
        scale = max(expected[name].abs().max().item(), 1.0)
        assert (p - expected[name]).abs().max().item() <= rtol * scale, name


def clip(parameters: Any, mode: str, timm: ModuleType | None) -> None:
    if mode and timm is not None:
        timm.utils.dispatch_clip_grad(parameters, 0.1, mode)
    elif mode == "norm":
        assert nn.utils.clip_grad_norm_(parameters, 0.1) > 0.1


def plain_loop(
    model: nn.Module,
    batches: list[tuple[Tensor, Tensor]],
    *,
    mode: str = "",
    timm: ModuleType | None = None,
    autocast: bool = False,
) -> list[Tensor]:
    """What the hook promises: the term after clipping. Gives the last gradients."""
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    reg = ox.OrthoRegularizer(model, strength=STRENGTH)
    for images, labels in batches:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        clip(list(model.parameters()), mode, timm)
        reg().backward()
        optimizer.step()
    return [p.grad for p in model.parameters()]


def timm_model(timm: ModuleType) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("test_vit2", img_size=32, patch_size=16, num_classes=4)


@pytest.mark.parametrize("mode", ["", "norm", "value", "agc"])
def test_timm_loop_equals_the_plain_one(timm: ModuleType, mode: str) -> None:
    utils = importlib.import_module("timm.utils")
    make_optimizer = importlib.import_module("timm.optim").create_optimizer_v2
    batches = make_batches(3, 32)
    plain, model = timm_model(timm), timm_model(timm)
    expected = plain_loop(plain, batches, mode=mode, timm=timm)
    optimizer = make_optimizer(model, opt="momentum", lr=0.05, momentum=0.9, weight_decay=0.0)
    reg = ox.OrthoRegularizer(model, strength=STRENGTH)
    start = reg().item()
    reg.attach(optimizer)
    ema, scaler = utils.ModelEmaV3(model, decay=0.5), utils.NativeScaler(device="cpu")
    averages = [p.detach().clone() for p in model.parameters()]
    for images, labels in batches:
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        settings = {"clip_grad": 0.1, "clip_mode": mode} if mode else {}
        scaler(loss, optimizer, parameters=model.parameters(), **settings)
        ema.update(model)
        for average, p in zip(averages, model.parameters(), strict=True):
            average.lerp_(p.detach(), 0.5)
    assert_same(model, plain)
    for p, grad in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=1e-5, atol=1e-6)
    for average, p in zip(averages, ema.module.parameters(), strict=True):
        torch.testing.assert_close(p, average, rtol=1e-5, atol=1e-6)
    assert reg().item() < 0.99 * start, "the term did nothing"


def test_term_is_not_lost_on_timms_lookahead(timm: ModuleType) -> None:
    """Its step runs no hooks; the optimizer inside does, and the result is the same."""
    optim = importlib.import_module("timm.optim")
    batches = make_batches(3, 32)
    found = []
    for hooked in (True, False):
        model = timm_model(timm)
        optimizer = optim.create_optimizer_v2(model, opt="lookahead_momentum", lr=0.05)
        reg = ox.OrthoRegularizer(model, strength=STRENGTH)
        if hooked:
            with pytest.raises(ValueError, match=r"Lookahead runs no hooks.*_base_optimizer"):
                reg.attach(optimizer)
            reg.attach(optimizer._base_optimizer)
        for images, labels in batches:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(images), labels)
            (loss if hooked else loss + reg()).backward()
            optimizer.step()
        found.append(model)
    assert_same(*found)


@pytest.mark.parametrize("autocast", [False, True])
def test_loop_of_torchvisions_shape_equals_the_plain_one(
    resnet: ModuleType, autocast: bool
) -> None:
    """With a loss scale, clipping, warm-up, schedule and averaged weights."""

    def make() -> nn.Module:
        torch.manual_seed(0)
        return resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1], num_classes=4)

    batches = make_batches(3, 32)
    plain, model = make(), make()
    plain_loop(plain, batches, mode="norm", autocast=autocast)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    reg = ox.OrthoRegularizer(model, strength=STRENGTH)
    reg.attach(optimizer)
    warm_up = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, total_iters=2)
    rest = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [warm_up, rest], [2])
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    for images, labels in batches:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        scaler.step(optimizer)
        scaler.update()
        average.update_parameters(model)
        schedule.step()
    # in half precision a last bit of a weight can become a whole step of the rounding
    assert_same(model, plain, 1e-3 if autocast else 1e-6)
    start = ox.OrthoRegularizer(make(), strength=STRENGTH)
    assert reg().item() < 0.99 * start().item(), "the term did nothing"
    assert ox.OrthoRegularizer(average.module, strength=STRENGTH)().item() < start().item()


def test_examples_run_and_change_two_lines(
    timm: ModuleType, resnet: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    short = ["--epochs", "1"]
    for name, arguments, accuracy in (
        ("timm_loop.py", [], 0.8),
        ("torchvision_loop.py", short, 0.2),
    ):
        check_adoption(name)
        assert float(run_example(name, capsys, *arguments).split()[-1]) > accuracy
