"""How large a model is: filters, parameters, multiply-accumulates, bytes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..layers import filter_layers
from .inputs import call_examples, device_of, to_device, undisturbed


@dataclass(frozen=True)
class Counts:
    """The size of a model."""

    filters: int  # outputs of all convolution and linear layers; shared ones once
    params: int  # numbers in all parameters; shared ones once
    macs: int  # multiply-accumulates of one forward pass on the example inputs
    memory: int  # bytes of parameters, buffers and feature maps of that forward pass


@dataclass(frozen=True)
class Work:
    """What one layer does in a forward pass, all its calls together."""

    macs: int  # outputs * fan-in
    output_bytes: int


def widths(model: nn.Module) -> dict[str, int]:
    """The filters of every convolution and linear layer by name; shared ones once."""
    with undisturbed(model):  # reading a parametrized weight in training mode may change it
        return {layer.name: layer.filters for layer in filter_layers(model)}


def count(model: nn.Module, example_inputs: Any) -> Counts:
    """Counts filters, parameters, multiply-accumulates (MACs) and bytes.

    MACs are those of convolution and linear layers for the example inputs as given (a batch of one
    gives the cost of one sample): outputs * fan-in, that is ``out.numel() * in / groups * kernel``
    for a convolution, ``in.numel() * out / groups * kernel`` for a transposed one, ``out.numel() *
    in`` for a linear layer. Biases, normalisation, attention products and other functions are not
    counted. Memory is the bytes of all parameters and buffers (shared ones once) and of the outputs
    of the same layers, every call of them: the feature maps that training has to keep, without
    those of normalisations and activations. The model is left exactly as it was.

    Args:
        model: any module.
        example_inputs: a tensor, a tuple of arguments or a dict of keyword arguments.

    Raises:
        TypeError: `model` is no module.
        ValueError: the model's forward fails on the example inputs; the cause is chained.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {type(model).__name__}, expected a torch.nn.Module")
    done = work(model, example_inputs).values()
    tensors = [*model.parameters(), *model.buffers()]
    return Counts(
        filters=sum(widths(model).values()),
        params=sum(p.numel() for p in model.parameters()),
        macs=sum(layer.macs for layer in done),
        memory=sum(t.numel() * t.element_size() for t in tensors)
        + sum(layer.output_bytes for layer in done),
    )


def work(model: nn.Module, example_inputs: Any) -> dict[str, Work]:
    """What every convolution and linear layer does for the example inputs, by name.

    Raises:
        ValueError: the model's forward fails on them; the cause is chained.
    """
    done: dict[str, Work] = {}

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def add(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            weight: Tensor = module.weight  # type: ignore[assignment]
            # every entry of a weight[i] meets each position once: [out, in / groups, ...] per
            # output, [in, out / groups, ...] per input of a transposed convolution
            transposed = getattr(module, "transposed", False)
            macs = (args[0] if transposed else output).numel() * weight[0].numel()
            before = done.get(name, Work(0, 0))
            size = output.numel() * output.element_size()
            done[name] = Work(before.macs + macs, before.output_bytes + size)

        return add

    kinds = (nn.Linear, nn.modules.conv._ConvNd)
    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, kinds)]
    hooks = [module.register_forward_hook(hook(name)) for name, module in layers]
    try:
        with undisturbed(model), torch.no_grad():
            call_examples(model, to_device(example_inputs, device_of(model)))
    finally:
        for handle in hooks:
            handle.remove()
    return done
