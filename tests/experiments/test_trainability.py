from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from experiments.config import Config
from experiments.lab import Lab
from experiments.nets import linear_mlp
from experiments.questions import trainability
from experiments.training import Fit
from orthoreg_ext.experiment.models import resnet, vgg
from orthoreg_ext.pruning.methods import TPP, GReg1

OPTIONS = {
    "methods": ["l1, short", "l1", "l1, orthp", "greg1", "tpp"],
    "ratio": [0.5],
    "lr": [1e-2, 1e-3],
    "epochs": 9,  # 36 steps, of which the last 3 are at the ceiling
    "method_lr": 1e-2,
}


@pytest.fixture
def asked(tiny: Callable[..., Config], lab: Lab) -> Lab:
    """A lab of the question."""
    document = tiny().document()
    object.__setattr__(
        lab, "config", Config.of({**document, "question": "trainability", "options": OPTIONS})
    )
    return lab


def through(method: Any, net: nn.Module, steps: int) -> None:
    """Takes a method through its schedule with gradients of 0 and no optimizer."""
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for _ in range(steps):
        method.before_step()
        method.after_step()


def zeros(net: nn.Module) -> dict[str, int]:
    """The filters of every convolution that are 0."""
    return {
        name: int((module.weight.flatten(1).abs().amax(1) == 0).sum())
        for name, module in net.named_modules()
        if isinstance(module, nn.Conv2d)
    }


@pytest.mark.parametrize("blocks", [1, 2])  # 9 and 15 convolutions
def test_tpp_ends_at_its_ceiling_with_all_its_filters_zero(blocks: int) -> None:
    net, steps = resnet(blocks=blocks), 11 * 20
    method = trainability.SCHEDULED["tpp"](net, torch.zeros(1, 1, 8, 8), ratio=0.5, steps=steps)
    assert isinstance(method, TPP)
    through(method, net, steps - 1)
    assert not method.done
    through(method, net, 1)
    assert (method.done, method.strength, method.held) == (True, 1.0, 20)
    widths = {n: m.out_channels for n, m in net.named_modules() if isinstance(m, nn.Conv2d)}
    assert zeros(net) == {name: width // 2 for name, width in widths.items()}


def test_layers_go_one_by_one_as_long_as_they_are_few() -> None:
    """Six convolutions, 26 steps: one after every second of them."""
    net = vgg()
    method = trainability.SCHEDULED["tpp"](net, torch.zeros(1, 1, 8, 8), ratio=0.5, steps=288)
    assert isinstance(method, TPP)
    assert (method.hold, method.zero_every, method.delta) == (26, 2, 1 / 262)


def test_greg_ends_at_its_ceiling() -> None:
    net, steps = vgg(), 33
    method = trainability.SCHEDULED["greg1"](net, torch.zeros(1, 1, 8, 8), ratio=0.5, steps=steps)
    assert isinstance(method, GReg1)
    through(method, net, 29)
    assert max(method.strengths.values()) < 1
    through(method, net, 4)
    assert set(method.strengths.values()) == {1.0}
    assert method.done


@pytest.mark.parametrize(("method", "steps", "says"), [("greg1", 5, "11"), ("tpp", 71, "77")])
def test_a_schedule_that_is_too_short_is_refused(method: str, steps: int, says: str) -> None:
    net = vgg()  # 7 layers with the classifier
    with pytest.raises(ValueError, match=rf"options.epochs makes {steps} steps.* {says} steps in"):
        trainability.SCHEDULED[method](net, torch.zeros(1, 1, 8, 8), ratio=0.5, steps=steps)


def test_every_method_has_the_same_budget(asked: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Fit] = []
    monkeypatch.setattr(asked, "trained", lambda model, arm, seed: asked.fresh(model, seed))
    for room in ("questions.trainability", "lab"):
        fit = f"experiments.{room}.fit"
        monkeypatch.setattr(fit, lambda net, images, how, **more: seen.append(how))
    budgets: dict[str, int] = {}
    _, scheduled, tuned = trainability.stages(asked.config)
    for unit in tuned[::2]:
        seen.clear()
        trainability.measure(asked, unit)
        budgets[unit["method"]] = sum(how.epochs for how in seen)
        assert (seen[-1].lr, seen[-1].constant) == (1e-2, False)
        assert all((how.lr, how.constant) == (1e-2, True) for how in seen[:-1])
        assert len({how.seed for how in seen} | {unit["seed"]}) == len(seen) + 1
    assert budgets == {"l1, short": 1, "l1": 10, "l1, orthp": 10, "greg1": 10, "tpp": 10}
    assert {unit["method"] for unit in scheduled} == {"greg1", "tpp"}


def test_the_cap_of_a_layer_is_that_of_the_recipe(asked: Lab) -> None:
    recipe = {**asked.config.document()["recipe"], "max_layer_ratio": 0.25}
    config = Config.of({**asked.config.document(), "recipe": recipe})
    object.__setattr__(asked, "config", config)
    _, scheduled, _ = trainability.stages(config)
    for unit in scheduled[:2]:
        with pytest.raises(ValueError, match="max_layer_ratio"):
            trainability.measure(asked, unit)


def test_a_schedule_is_run_once_for_all_learning_rates(
    asked: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, scheduled, tuned = trainability.stages(asked.config)
    unit = next(unit for unit in scheduled if unit["method"] == "tpp")
    cut = trainability.measure(asked, unit)
    trained: list[Any] = []
    do = trainability.fit

    def watched(*args: Any, **more: Any) -> Any:
        width = args[0].get_submodule("conv1").weight.shape[0]
        notes = do(*args, **more)
        trained.append((width, args[0].get_submodule("conv1").weight.shape[0]))
        return notes

    mine = [u for u in tuned if u["method"] == "tpp" and u["seed"] == unit["seed"]]
    monkeypatch.setattr(asked, "trained", lambda model, arm, seed: asked.fresh(model, seed))
    monkeypatch.setattr(trainability, "fit", watched)
    monkeypatch.setattr("experiments.lab.fit", watched)
    monkeypatch.setattr("experiments.training._epoch", lambda *args: None)
    found = [trainability.measure(asked, u) for u in mine]
    assert [values["cut"] for values in found] == [cut["cut"]] * 2
    assert trained == [(8, 4), (4, 4)] * 2  # read, though no epoch is trained; then fine-tuned


def test_singular_values_are_those_of_the_product_of_the_weights(
    asked: Lab,
) -> None:
    options = {**OPTIONS, "jacobian": 8}
    object.__setattr__(asked.config, "options", options)
    net = linear_mlp(width=12)
    product = torch.eye(64)
    for layer in net:
        if isinstance(layer, nn.Linear):
            with torch.no_grad():
                layer.weight.mul_(3)
            product = layer.weight.detach() @ product
    values: Tensor = torch.linalg.svdvals(product.double())
    found = trainability._jacobian(asked, net)
    assert found["jsv"] == pytest.approx(values.mean().item(), rel=1e-4)
    assert found["jsv_distance"] == pytest.approx((values - 1).square().mean().item(), rel=1e-4)
