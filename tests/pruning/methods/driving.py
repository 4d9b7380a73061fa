"""A small net, a training loop that drives a method, and what must hold of every method."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from orthoreg_ext.pruning.methods.method import Method

Make = Callable[[nn.Module, torch.optim.Optimizer], Method]


def small_net(norm: bool = True) -> nn.Sequential:
    """Two convolutions, 6 and 8 filters, that can be pruned, and a classifier."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1),
        nn.BatchNorm2d(6) if norm else nn.Identity(),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3, padding=1),
        nn.BatchNorm2d(8) if norm else nn.Identity(),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )


def example() -> Tensor:
    return torch.linspace(-1, 1, 2 * 2 * 6 * 6).view(2, 2, 6, 6)


def batch(number: int, channels: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(number)
    x = torch.randn(8, channels, 6, 6, generator=generator)
    return x, torch.arange(8) % 4


def sgd(model: nn.Module, **settings: Any) -> torch.optim.SGD:
    return torch.optim.SGD(
        model.parameters(), **{"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3, **settings}
    )


def train_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, method: Method, channels: int = 2
) -> None:
    model.train()
    x, y = batch(method.steps, channels)
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x), y).backward()
    method.before_step()
    optimizer.step()
    method.after_step()


def train_epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    method: Method,
    steps: int = 3,
    channels: int = 2,
) -> None:
    for _ in range(steps):
        train_step(model, optimizer, method, channels)
    method.after_epoch()


def assert_consistent(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """The optimizer holds the parameters of the model, and its momentum has their shapes."""
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in model.parameters()}
    assert {id(p) for p in optimizer.state} <= {id(p) for p in held}
    for parameter in held:
        assert torch.isfinite(parameter).all()
        for value in optimizer.state.get(parameter, {}).values():
            if isinstance(value, Tensor) and value.dim():
                assert value.shape == parameter.shape


def hooks_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """How many hooks there are on the modules, the parameters and the optimizer."""
    tables = [
        t
        for m in model.modules()
        for t in (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks, m._backward_pre_hooks)
    ]
    tables += [p._backward_hooks or {} for p in model.parameters()]
    tables += [optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks]
    return sum(map(len, tables))


def assert_resumes(
    make: Make, epochs: int, stop: int, build: Callable[[], nn.Module] = small_net
) -> None:
    """A run that is saved after `stop` epochs and one more step ends as one that is not."""
    ends = []
    for resumed in (False, True):
        model = build()
        optimizer = sgd(model)
        method = make(model, optimizer)
        for _ in range(stop):
            train_epoch(model, optimizer, method)
        train_step(model, optimizer, method)
        if resumed:
            state = json.loads(json.dumps(method.state_dict()))
            weights, moments = model.state_dict(), optimizer.state_dict()
            weights = {name: tensor.clone() for name, tensor in weights.items()}
            model = build()
            optimizer = sgd(model)
            method = make(model, optimizer)
            method.load_state_dict(state)
            model.load_state_dict(weights)
            optimizer.load_state_dict(moments)
            assert method.state_dict() == state
        for _ in range(2):
            train_step(model, optimizer, method)
        method.after_epoch()
        for _ in range(epochs - stop - 1):
            train_epoch(model, optimizer, method)
        result = method.finish()
        assert_consistent(model, optimizer)
        groups = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
        ends.append((result.history, model.state_dict(), groups, result.settings))
    (history, weights, groups, settings), (history2, weights2, groups2, settings2) = ends
    assert history == history2
    assert history
    assert groups == groups2
    assert settings == settings2
    for name, tensor in weights.items():
        assert torch.equal(tensor, weights2[name]), name
