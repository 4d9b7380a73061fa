"""What the functions of functional.py accept: checked once, then plain data for an operator."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from numbers import Real
from typing import TypeGuard

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from .errors import wrong_length
from .reference import WEIGHT_ONLY, compute_dtype

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Layers:
    """The checked arguments of one call, ready for an operator; one entry a layer."""

    weights: list[Tensor]  # each [groups * n, ...], filters dense in memory
    biases: list[Tensor]  # each [groups * n] or empty
    groups: list[int]

    @property
    def device(self) -> torch.device:
        """The device of all layers."""
        return self.weights[0].device

    def take(self, indices: Sequence[int]) -> Layers:
        """Some of the layers."""
        return Layers(
            [self.weights[i] for i in indices],
            [self.biases[i] for i in indices],
            [self.groups[i] for i in indices],
        )

    def fan_in(self, i: int) -> int:
        """k: the entries of one filter of layer i, its bias included."""
        return self.weights[i].shape[1:].numel() + (1 if self.biases[i].numel() else 0)

    def filters(self, i: int) -> int:
        """n: the filters in one group of layer i."""
        return self.weights[i].shape[0] // self.groups[i]


def by_precision(layers: Layers) -> list[list[int]]:
    """The indices of the layers computed in float32 and of those computed in float64."""
    double = [i for i, w in enumerate(layers.weights) if w.dtype == torch.float64]
    single = [i for i, w in enumerate(layers.weights) if w.dtype != torch.float64]
    return [indices for indices in (single, double) if indices]


def is_count(value: object) -> TypeGuard[int]:
    """Whether the value is a positive integer."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def is_factor(value: object) -> TypeGuard[float]:
    """Whether the value is a finite number of at least 0."""
    return isinstance(value, Real) and 0 <= float(value) < math.inf


def has_dense_filters(weight: Tensor) -> bool:
    """Whether every filter is one gapless block of memory, so that kernels read it in place."""
    if weight.is_contiguous():  # nearly all are: the rest is a hundred times slower
        return True
    expected = 1
    dims = [d for d in zip(weight.stride()[1:], weight.shape[1:], strict=True) if d[1] != 1]
    while dims:  # no sort: the compiler has none for the symbols of dynamic shapes
        inner = next((i for i, (stride, _) in enumerate(dims) if stride == expected), None)
        if inner is None:
            return False
        expected *= dims.pop(inner)[1]
    return weight.shape[0] <= 1 or weight.stride(0) >= expected


def check_sequence(argument: str, value: object) -> None:
    """Raises naming the argument where it has no entries for the layers to take."""
    if isinstance(value, (Tensor, str)) or not isinstance(value, Sequence):
        raise TypeError(
            f"{argument} must be a sequence with one entry for each of the weights, got "
            f"{type(value).__name__}"
        )


def check_tensor(argument: str, tensor: object, minimum_dim: int) -> Tensor:
    """Returns a tensor that the operators can read, or raises naming the argument."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{argument} must be a Tensor, got {type(tensor).__name__}")
    traced = torch.compiler.is_compiling()  # it knows neither of these
    if not traced and is_lazy(tensor):
        raise ValueError(f"{argument} is not initialised; run the model once before")
    if tensor.dtype not in DTYPES:
        raise TypeError(
            f"{argument} has dtype {tensor.dtype}, expected float64, float32, bfloat16 or float16; "
            "convert it first"
        )
    if type(tensor).__name__ == "DTensor":
        raise TypeError(f"{argument} is a DTensor; pass its local or full tensor instead")
    if not traced and tensor.is_nested:
        raise TypeError(f"{argument} is a nested tensor; pass those that it holds one by one")
    if tensor.layout is not torch.strided:
        raise TypeError(f"{argument} has layout {tensor.layout}; call .to_dense() first")
    if tensor.dim() < minimum_dim:
        raise ValueError(
            f"{argument} has shape {tuple(tensor.shape)}, expected [filters, ...] with at least "
            f"{minimum_dim} dimensions; use .unsqueeze(0) for a single filter"
        )
    if not traced:
        if tensor._is_zerotensor():  # it has no memory
            return tensor.clone()
        if tensor.is_neg():  # its memory holds the negated values
            return tensor.resolve_neg()
    return tensor


def check_layers(
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None,
    groups: Sequence[int] | None,
    minimum_dim: int = 2,
) -> Layers:
    """Checks the layers of a call; filters that are not dense in memory are copied."""
    if isinstance(weights, Tensor):
        raise TypeError("weights must be a sequence of tensors; put the tensor in a list: [weight]")
    if not isinstance(weights, Iterable):
        raise TypeError(f"weights must be a sequence of tensors, got {type(weights).__name__}")
    weights = [check_tensor(f"weights[{i}]", w, minimum_dim) for i, w in enumerate(weights)]
    count = len(weights)
    for argument, values in (("biases", biases), ("groups", groups)):
        if values is not None:
            check_sequence(argument, values)
    if biases is not None and len(biases) != count:
        raise wrong_length("biases", len(biases), count, "weights")
    if groups is not None and len(groups) != count:
        raise wrong_length("groups", len(groups), count, "weights")
    checked_biases, checked_groups = [], []
    # one for all layers without a bias: nobody looks at the type of an empty one
    none = weights[0].new_empty(0) if weights else torch.empty(0)
    for i, weight in enumerate(weights):
        if weight.device != weights[0].device:
            raise ValueError(
                f"weights[{i}] is on {weight.device}, but weights[0] is on {weights[0].device}; "
                "make one call for each device"
            )
        bias = biases[i] if biases is not None else None
        if bias is None:
            bias = none
        elif (bias := check_tensor(f"biases[{i}]", bias, 1)).shape != weight.shape[:1]:
            raise ValueError(
                f"biases[{i}] has shape {tuple(bias.shape)}, expected [{weight.shape[0]}]: "
                "one entry for each filter"
            )
        elif bias.device != weight.device or bias.dtype != weight.dtype:
            raise ValueError(
                f"biases[{i}] is {bias.dtype} on {bias.device}, but its weight is "
                f"{weight.dtype} on {weight.device}; they must agree"
            )
        group = groups[i] if groups is not None else 1
        if not is_count(group) or weight.shape[0] % group:
            raise ValueError(
                f"groups[{i}] is {group!r}, expected a positive divisor of the {weight.shape[0]} "
                "filters of that weight"
            )
        checked_biases.append(bias if bias.is_contiguous() else bias.contiguous())
        checked_groups.append(group)
    dense = [w if has_dense_filters(w) else w.contiguous() for w in weights]
    return Layers(dense, checked_biases, checked_groups)


def check_coefficients(
    coefficients: Sequence[float] | Tensor | None, count: int, device: torch.device
) -> Tensor | None:
    """Returns the factors [L] as a tensor; a sequence of numbers is copied to the device."""
    if coefficients is None:
        return None
    if not isinstance(coefficients, Tensor):
        if not isinstance(coefficients, Iterable) or not all(
            isinstance(c, Real) for c in coefficients
        ):
            raise TypeError(
                "coefficients must be numbers, one for each of the weights, or a tensor"
            )
        coefficients = torch.tensor(list(coefficients), dtype=torch.float64).to(device)
    if coefficients.shape != (count,):
        raise ValueError(
            f"coefficients has shape {tuple(coefficients.shape)}, expected [{count}]: one for each "
            "of the weights"
        )
    if coefficients.device != device:
        raise ValueError(
            f"coefficients is on {coefficients.device}, but the weights are on {device}; move it"
        )
    return coefficients


def scale_of(layers: Layers, strength: float | Tensor, factors: Tensor | None) -> Tensor:  # [L]
    """Strength * factors in the widest precision of the layers, on their device."""
    double = any(w.dtype == torch.float64 for w in layers.weights)
    precision = torch.float64 if double else torch.float32
    if isinstance(strength, Tensor):
        if strength.numel() != 1:
            raise ValueError(
                f"strength has shape {tuple(strength.shape)}, expected a number or a tensor of one "
                "element; give the layers factors of their own by coefficients="
            )
        strength = strength.detach().reshape(())
    scale = torch.ones(len(layers.weights), dtype=precision, device=layers.device) * strength
    return scale if factors is None else scale * factors


def check_grads(
    layers: Layers,
    grads: Sequence[Tensor] | None,
    bias_grads: Sequence[Tensor | None] | None,
    names: Sequence[str],
) -> tuple[Layers, Layers]:
    """Returns weights and gradients as layers of one precision and memory order each.

    Gradients of another precision than their weight (float32 for a bfloat16 weight) are not
    rounded to it: the weight is widened.
    """
    needing = next(name for name in names if name not in WEIGHT_ONLY)
    count = len(layers.weights)
    if grads is None:
        raise ValueError(f"criterion {needing!r} needs gradients: pass grads, one for each weight")
    check_sequence("grads", grads)
    if bias_grads is not None:
        check_sequence("bias_grads", bias_grads)
    if len(grads) != count:
        raise wrong_length("grads", len(grads), count, "weights")
    if bias_grads is not None and len(bias_grads) != count:
        raise wrong_length("bias_grads", len(bias_grads), count, "weights")
    if not count:
        return layers, layers
    found: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    for i, (weight, bias) in enumerate(zip(layers.weights, layers.biases, strict=True)):
        bias_grad = bias_grads[i] if bias_grads is not None else None
        grad = _check_grad(f"grads[{i}]", grads[i], weight, needing)
        if bias.numel():
            bias_grad = _check_grad(f"bias_grads[{i}]", bias_grad, bias, needing)
        else:
            bias_grad = bias
        if grad.dtype != weight.dtype or bias_grad.dtype != bias.dtype:
            wide = compute_dtype(weight.dtype)
            weight, bias, bias_grad = weight.to(wide), bias.to(wide), bias_grad.to(wide)
            grad = grad.to(wide)
        if grad.stride()[1:] != weight.stride()[1:]:
            grad = torch.empty_like(weight).copy_(grad)
        found.append((weight, bias, grad, bias_grad.contiguous()))
    weights, biases, slopes, bias_slopes = (list(column) for column in zip(*found, strict=True))
    return Layers(weights, biases, layers.groups), Layers(slopes, bias_slopes, layers.groups)


def _check_grad(argument: str, grad: object, tensor: Tensor, needing: str) -> Tensor:
    if grad is None:
        raise ValueError(
            f"{argument} is None, but criterion {needing!r} needs gradients: call backward() first"
        )
    grad = check_tensor(argument, grad, 1)
    if grad.shape != tensor.shape or grad.device != tensor.device:
        raise ValueError(
            f"{argument} has shape {tuple(grad.shape)} on {grad.device}, expected "
            f"{tuple(tensor.shape)} on {tensor.device}"
        )
    return grad


def keep_taps_together(layers: Layers) -> Layers:
    """Copies the weights whose kernel dimensions [2, ...) are not one evenly spaced run."""

    def is_run(weight: Tensor) -> bool:
        dims = [d for d in range(2, weight.dim()) if weight.shape[d] > 1]
        return all(
            weight.stride(outer) == weight.stride(inner) * weight.shape[inner]
            for outer, inner in pairwise(dims)
        )

    # an empty one counts as contiguous, whatever its strides are
    weights = [
        w if is_run(w) else w.contiguous() if w.numel() else w.new_empty(w.shape)
        for w in layers.weights
    ]
    return Layers(weights, layers.biases, layers.groups)


def check_fisher(layers: Layers, fisher: Sequence[Tensor]) -> list[Tensor]:
    """Returns the accumulators in the memory order of their weights: themselves, or copies."""
    check_sequence("fisher", fisher)
    if len(fisher) != len(layers.weights):
        raise wrong_length("fisher", len(fisher), len(layers.weights), "weights")
    ordered = []
    first: dict[int, int] = {}
    for i, (tensor, weight) in enumerate(zip(fisher, layers.weights, strict=True)):
        held = check_tensor(f"fisher[{i}]", tensor, 1)
        if not torch.compiler.is_compiling() and tensor._is_zerotensor():
            raise ValueError(f"fisher[{i}] is a zero tensor without memory: clone it")
        wide = compute_dtype(weight.dtype)
        if tensor.dtype != wide:
            raise TypeError(
                f"fisher[{i}] has dtype {tensor.dtype}, expected {wide}: use "
                f"torch.zeros_like(weight, dtype={wide})"
            )
        if tensor.shape != weight.shape or tensor.device != weight.device:
            raise ValueError(
                f"fisher[{i}] has shape {tuple(tensor.shape)} on {tensor.device}, expected "
                f"{tuple(weight.shape)} on {weight.device}"
            )
        shared = any(s == 0 and n > 1 for s, n in zip(tensor.stride(), tensor.shape, strict=True))
        if shared and tensor.numel():
            raise ValueError(
                f"fisher[{i}] has entries that share memory (expand); use "
                f"torch.zeros_like(weight, dtype={wide})"
            )
        if first.setdefault(id(tensor), i) != i:
            raise ValueError(
                f"fisher[{i}] is the tensor of fisher[{first[id(tensor)]}]; every weight needs its "
                "own accumulator"
            )
        same = (
            held is tensor
            and tensor.stride()[1:] == weight.stride()[1:]
            and has_dense_filters(tensor)
        )
        ordered.append(tensor if same else torch.empty_like(weight, dtype=wide).copy_(tensor))
    return ordered
