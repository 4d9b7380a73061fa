"""Small nets, training loops that drive a method, and what must hold of every method."""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as f
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from orthoreg_ext.pruning import methods
from orthoreg_ext.pruning.methods.method import Method

Make = Callable[[nn.Module, Optimizer], Method]


def every_method() -> list[type[Method]]:
    """All methods that the package offers."""
    found = [getattr(methods, name) for name in methods.__all__]
    return [each for each in found if inspect.isclass(each) and issubclass(each, Method)]


class Small(nn.Module):
    """Two convolutions of 4 and 6 filters, each with a bias and a BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 6, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(6)
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = f.relu(self.bn1(self.conv1(x)))
        return self.fc(f.relu(self.bn2(self.conv2(x))).mean((2, 3)))


class PreActivation(nn.Module):
    """The BatchNorm registered behind each convolution is the one in front of it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.conv1 = nn.Conv2d(8, 8, 3, padding=1)
        self.before1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.before2 = nn.BatchNorm2d(8)
        self.last = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(f.relu(self.before1(self.stem(x))))
        x = self.conv2(f.relu(self.before2(x)))
        return self.fc(f.relu(self.last(x)).mean((2, 3)))


def small_net(norm: bool = True) -> nn.Sequential:
    """Two convolutions, 6 and 8 filters, that can be pruned, and a classifier."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
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
    return torch.linspace(-1, 1, 2 * 3 * 6 * 6).view(2, 3, 6, 6)


def ordered(model: nn.Module) -> nn.Module:
    """Gives filter i of every convolution entries of size i + 1, so that filter 0 is the lowest."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            signs = torch.where(torch.rand_like(module.weight) < 0.5, -1.0, 1.0)
            sizes = torch.arange(1.0, len(module.weight) + 1).view(-1, 1, 1, 1)
            module.weight.data = signs * sizes * 0.1
    return model


def batch(number: int, size: int = 8) -> tuple[Tensor, Tensor]:
    """The batch of a step, the same whenever it is asked for."""
    generator = torch.Generator().manual_seed(1000 + number)
    return torch.randn(size, 3, 8, 8, generator=generator), torch.arange(size) % 4


def sgd(model: nn.Module, lr: float = 0.05, weight_decay: float = 1e-3) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr, momentum=0.9, weight_decay=weight_decay)


def step(
    model: nn.Module, optimizer: Optimizer, method: Method | None, number: int | None = None
) -> None:
    """One step of training, on the batch of that number: by default, of the method's steps."""
    x, target = batch(method.steps if number is None and method is not None else number or 0)
    optimizer.zero_grad()
    output = model(x)
    loss = f.cross_entropy(output, target) if output.dim() == 2 else output.square().mean()
    loss.backward()
    if method is not None:
        method.before_step()
    optimizer.step()
    if method is not None:
        method.after_step()


def train_epoch(model: nn.Module, optimizer: Optimizer, method: Method, steps: int = 3) -> None:
    for _ in range(steps):
        step(model, optimizer, method)
    method.after_epoch()


def run(
    model: nn.Module, optimizer: Optimizer, method: Method, first: int, last: int, length: int = 4
) -> None:
    """The steps from `first` up to `last`; an epoch has `length`."""
    for number in range(first, last):
        step(model, optimizer, method, number)
        if (number + 1) % length == 0:
            method.after_epoch()


def added(model: nn.Module, method: Method, number: int = 0) -> dict[str, Tensor]:
    """What before_step adds to the gradients."""
    x, target = batch(number)
    model.zero_grad()
    f.cross_entropy(model(x), target).backward()
    before = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    method.before_step()
    return {
        name: p.grad - before[name] for name, p in model.named_parameters() if p.grad is not None
    }


def gone(result: Any) -> dict[str, list[int]]:
    """The filters that left each layer."""
    found: dict[str, list[int]] = {}
    for entry in result.history:
        found.setdefault(entry["layer"], []).extend(entry["removed"])
    return {layer: sorted(removed) for layer, removed in found.items()}


def check_optimizer(model: nn.Module, optimizer: Optimizer) -> None:
    """The optimizer holds the model's parameters, all finite, and state of their shapes."""
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in model.parameters()}
    assert all(bool(p.isfinite().all()) for p in held)
    for parameter, state in optimizer.state.items():
        assert any(parameter is p for p in held)
        for value in state.values():
            if isinstance(value, Tensor) and value.dim():
                assert value.shape == parameter.shape


@contextmanager
def refused(match: str, model: nn.Module, optimizer: Optimizer | None = None) -> Iterator[None]:
    """What is done inside is an error, and changes neither the model nor its optimizer."""
    before = copy.deepcopy(model.state_dict())
    settings = None if optimizer is None else settings_of(optimizer)
    with pytest.raises(ValueError, match=match):
        yield
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    if optimizer is not None:
        assert hooks_of(model, optimizer) == 0
        assert settings_of(optimizer) == settings


def hooks_of(model: nn.Module, optimizer: Optimizer) -> int:
    """How many hooks there are on the modules, the parameters and the optimizer."""
    tables = [
        t
        for m in model.modules()
        for t in (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks, m._backward_pre_hooks)
    ]
    tables += [p._backward_hooks or {} for p in model.parameters()]
    tables += [optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks]
    return sum(map(len, tables))


def settings_of(optimizer: Optimizer) -> list[dict[str, Any]]:
    """The parameter groups without their parameters."""
    return [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]


def check_resume(build: Callable[[], nn.Module], make: Make, total: int, at: int) -> None:
    """Saves after step `at`, goes on in a fresh model and method, and ends bit-equal."""

    def end(model: nn.Module, optimizer: Optimizer, method: Method, first: int) -> Any:
        run(model, optimizer, method, first, total)
        result = method.finish()
        for number in range(3):
            step(model, optimizer, None, 77 + number)
        return result

    torch.manual_seed(3)
    model = build()
    optimizer = sgd(model)
    method = make(model, optimizer)
    run(model, optimizer, method, 0, at)
    text = json.dumps(method.state_dict(), allow_nan=False)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    whole = end(model, optimizer, method, at)

    torch.manual_seed(4)  # other weights: what was chosen must come from the state
    other = build()
    other_optimizer = sgd(other)
    other_method = make(other, other_optimizer)
    other_method.load_state_dict(json.loads(text))
    other.load_state_dict(saved[0])
    other_optimizer.load_state_dict(saved[1])
    assert json.loads(json.dumps(other_method.state_dict())) == json.loads(text)
    resumed = end(other, other_optimizer, other_method, at)

    assert whole.history
    assert resumed.history == whole.history
    assert resumed.settings == whole.settings
    assert other_method.state_dict() == method.state_dict()
    assert settings_of(other_optimizer) == settings_of(optimizer)
    first, second = model.state_dict(), other.state_dict()
    assert first.keys() == second.keys()
    assert not [name for name in first if not torch.equal(first[name], second[name])]
    check_optimizer(other, other_optimizer)


class Operations(TorchDispatchMode):
    """Notes the names of the operations that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.__name__.partition(".")[0])
        return func(*args, **(kwargs or {}))


READS = {"_local_scalar_dense", "nonzero", "equal", "is_nonzero", "unique", "_unique2"}
LAYS_OUT = {"index", "isin", "where", "index_select"}


def operations(method: Method) -> set[str]:
    """What before_step and after_step run, between two steps of a training that is under way."""
    with Operations() as found:
        method.before_step()
        method.after_step()
    return set(found.names)
