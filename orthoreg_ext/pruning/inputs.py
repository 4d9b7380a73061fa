"""Calling a model with whatever example inputs or batch the user has, without leaving a trace."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

# What a forward raises on inputs it was not made for
FAILURES = (
    RuntimeError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    AssertionError,
    ArithmeticError,
)


def call(model: nn.Module, inputs: Any) -> Any:
    """Runs a model: a tuple or list is its arguments, a mapping its keyword arguments."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, (tuple, list)):
        return model(*inputs)
    return model(inputs)


def call_examples(model: nn.Module, inputs: Any) -> Any:
    """Runs a model on its example inputs.

    Raises:
        ValueError: its forward failed; the cause is chained.
    """
    try:
        return call(model, inputs)
    except torch.cuda.OutOfMemoryError:
        raise  # no fault of the inputs
    except FAILURES as error:
        raise ValueError(
            f"example_inputs: the model's forward failed on them: {type(error).__name__}: {error}. "
            "Pass a tensor, a tuple of arguments or a dict of keyword arguments that it accepts"
        ) from error


def to_device(value: Any, device: torch.device) -> Any:
    """Moves every tensor in nested tuples, lists and mappings to a device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: to_device(entry, device) for key, entry in value.items()}
    if isinstance(value, (tuple, list)):
        return tuple(to_device(entry, device) for entry in value)
    return value


def device_of(model: nn.Module) -> torch.device:
    """The device of the first parameter (CPU for a model without parameters)."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def tensors_in(value: Any) -> list[Tensor]:
    """Every tensor in a nested output, in order; also in dataclass-like objects."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [t for entry in value.values() for t in tensors_in(entry)]
    if isinstance(value, (tuple, list)):
        return [t for entry in value for t in tensors_in(entry)]
    if hasattr(value, "__dict__") and not isinstance(value, type):
        return [t for entry in vars(value).values() for t in tensors_in(entry)]
    return []


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Puts a model in eval mode with gradients on for every parameter, and restores everything.

    Restored: the training flag of every module, `requires_grad`, `.grad` objects, every buffer's
    contents (BatchNorm statistics among them) and the random state of Python, the CPU and the GPUs.
    """
    training = {module: module.training for module in model.modules()}
    wanted = {p: p.requires_grad for p in model.parameters()}
    grads = {p: p.grad for p in model.parameters()}
    buffers = {b: b.detach().clone() for b in model.buffers()}
    tables = [(m._buffers, dict(m._buffers)) for m in model.modules()]
    python_state = random.getstate()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices), torch.inference_mode(False), torch.enable_grad():
        try:
            model.eval()
            for parameter in wanted:
                if parameter.is_floating_point():
                    parameter.requires_grad_(True)
            yield
        finally:
            random.setstate(python_state)
            for module, flag in training.items():
                module.training = flag
            for parameter, flag in wanted.items():
                parameter.requires_grad_(flag)
                parameter.grad = grads[parameter]
            for table, entries in tables:
                table.update(entries)  # a forward may also replace the object
            with torch.no_grad():
                for buffer, saved in buffers.items():
                    # an eval-mode forward rarely writes; equal contents keep their version counter
                    if not torch.equal(buffer, saved):
                        buffer.copy_(saved)


@contextmanager
def training_branches(model: nn.Module) -> Iterator[None]:
    """Lets a model in eval mode take the branches it takes while training, such as auxiliary heads.

    Modules made of others are set to training mode; layers stay as they are, so that BatchNorms use
    their statistics and dropout does nothing.
    """
    layers = (_BatchNorm, _DropoutNd, nn.MultiheadAttention)
    made = [m for m in model.modules() if any(m.children()) and not isinstance(m, layers)]
    before = [module.training for module in made]
    try:
        for module in made:
            module.training = True
        yield
    finally:
        for module, flag in zip(made, before, strict=True):
            module.training = flag
