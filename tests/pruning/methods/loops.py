"""Small training loops and nets for the methods that prune while a model trains."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as f
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from orthoreg_ext.pruning.methods.method import Method

Make = Callable[[nn.Module, Optimizer], Method]


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


def sgd(model: nn.Module, lr: float = 0.05) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr, momentum=0.9, weight_decay=1e-3)


def step(model: nn.Module, optimizer: Optimizer, method: Method | None, number: int = 0) -> None:
    x, target = batch(number)
    optimizer.zero_grad()
    output = model(x)
    loss = f.cross_entropy(output, target) if output.dim() == 2 else output.square().mean()
    loss.backward()
    if method is not None:
        method.before_step()
    optimizer.step()
    if method is not None:
        method.after_step()


def run(
    model: nn.Module, optimizer: Optimizer, method: Method, first: int, last: int, epoch: int = 4
) -> None:
    """The steps from `first` up to `last`; an epoch has so many."""
    for number in range(first, last):
        step(model, optimizer, method, number)
        if (number + 1) % epoch == 0:
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
    """The optimizer holds the model's parameters, and state of their shapes."""
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in model.parameters()}
    for parameter, state in optimizer.state.items():
        assert any(parameter is p for p in held)
        for value in state.values():
            if isinstance(value, Tensor) and value.dim():
                assert value.shape == parameter.shape


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

    assert resumed.history == whole.history
    assert other_method.state_dict() == method.state_dict()
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
