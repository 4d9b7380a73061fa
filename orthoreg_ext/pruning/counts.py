"""How large a model is: filters, parameters, multiply-accumulates."""

from __future__ import annotations

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


def widths(model: nn.Module) -> dict[str, int]:
    """The filters of every convolution and linear layer by name; shared ones once."""
    with undisturbed(model):  # reading a parametrized weight in training mode may change it
        return {layer.name: layer.filters for layer in filter_layers(model)}


def count(model: nn.Module, example_inputs: Any) -> Counts:
    """Counts filters, parameters and multiply-accumulates (MACs).

    MACs are those of convolution and linear layers for the example inputs as given (a batch of one
    gives the cost of one sample): outputs * fan-in, that is ``out.numel() * in / groups * kernel``
    for a convolution, ``in.numel() * out / groups * kernel`` for a transposed one, ``out.numel() *
    in`` for a linear layer. Biases, normalisation, attention products and other functions are not
    counted. The model is left exactly as it was.

    Args:
        model: any module.
        example_inputs: a tensor, a tuple of arguments or a dict of keyword arguments.

    Raises:
        TypeError: `model` is no module.
        ValueError: the model's forward fails on the example inputs; the cause is chained.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {type(model).__name__}, expected a torch.nn.Module")
    macs = 0

    def add(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal macs
        weight: Tensor = module.weight  # type: ignore[assignment]
        # every entry of a weight[i] meets each position once: [out, in / groups, ...] per output,
        # [in, out / groups, ...] per input of a transposed convolution
        transposed = getattr(module, "transposed", False)
        macs += (args[0] if transposed else output).numel() * weight[0].numel()

    kinds = (nn.Linear, nn.modules.conv._ConvNd)
    hooks = [m.register_forward_hook(add) for m in model.modules() if isinstance(m, kinds)]
    try:
        with undisturbed(model), torch.no_grad():
            call_examples(model, to_device(example_inputs, device_of(model)))
            filters = sum(widths(model).values())
    finally:
        for hook in hooks:
            hook.remove()
    return Counts(filters, sum(p.numel() for p in model.parameters()), macs)
