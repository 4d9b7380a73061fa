"""Gradients that the compiled operator writes straight into ``.grad``: once, or step after step."""

from __future__ import annotations

import weakref
from collections import Counter
from itertools import repeat
from operator import is_

import torch
from torch import Tensor

from .arguments import Layers
from .penalties import Penalty, WholeMatrix
from .reference import compute_dtype
from .sides import Sides


def is_capturing(device: torch.device) -> bool:
    """Whether what is launched there now goes into a CUDA graph; does not initialise CUDA."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def written_in_place(original: list[Tensor], layers: Layers) -> list[bool]:
    """Whether the operator writes the layer's gradients itself.

    The others go through autograd: views and copies, frozen tensors, and tensors that several
    layers share, which the operator's threads would update at the same time.
    """
    uses = Counter(map(id, (*original, *layers.biases)))

    def fits(tensor: Tensor) -> bool:
        return not tensor.numel() or (uses[id(tensor)] == 1 and _takes_grad(tensor))

    return [
        weight is read and fits(weight) and fits(bias)
        for weight, read, bias in zip(original, layers.weights, layers.biases, strict=True)
    ]


def _takes_grad(tensor: Tensor) -> bool:
    """Whether a gradient can be written into tensor.grad in the memory order of the tensor."""
    if not (tensor.requires_grad and tensor.is_leaf):
        return False
    grad = tensor.grad
    return grad is None or (
        grad.dtype == tensor.dtype
        and grad.layout is torch.strided
        and grad.stride() == tensor.stride()
        # a graph of torch.compile is of neither kind, and cannot ask
        and (torch.compiler.is_compiling() or not (grad.is_neg() or grad._is_zerotensor()))
    )


def add_in_place(
    namespace: str,
    layers: Layers,
    masks: list[Tensor],  # each bool [n] or empty, or none at all
    targets: list[Tensor],  # each [n] or empty, or none at all
    penalty: Penalty | WholeMatrix,
    sides: Sides,
    scale: Tensor,  # [L]
    precision: str,
) -> Tensor:  # [L]
    """Adds the gradients of layers that are written in place; returns their values.

    Those are without the penalty's factor, the gradients are with it.
    """
    assert isinstance(penalty, Penalty)  # the others have no operator
    tensors = [*layers.weights, *layers.biases]
    grads = [_grad_of(tensor) if tensor.numel() else tensor for tensor in tensors]
    count = len(layers.weights)
    with torch.no_grad():
        values: Tensor = getattr(torch.ops, namespace).add_gram_penalty_grad_(
            layers.weights,
            layers.biases,
            masks,
            targets,
            grads[:count],
            grads[count:],
            times(scale, penalty.factor).to(compute_dtype(layers.weights[0].dtype)),
            layers.groups,
            sides.columns,
            sides.offsets,
            penalty.functor,
            precision,
        )
    if not torch.compiler.is_compiling():  # the compiler sees it in the schema
        torch.autograd.graph.increment_version([*filter(Tensor.numel, grads)])
    return values


def _grad_of(tensor: Tensor) -> Tensor:
    """tensor.grad, made where it is None."""
    if tensor.grad is None:
        tensor.grad = zero_grad(tensor)
    assert tensor.grad is not None
    return tensor.grad


def zero_grad(tensor: Tensor) -> Tensor:
    """Zeros for tensor.grad, to which backward passes can add even if inference mode is on now."""
    with torch.inference_mode(False):
        return torch.zeros_like(tensor)


def times(scale: Tensor, factor: float) -> Tensor:
    """The product; no operation for a factor of 1."""
    return scale if factor == 1 else scale * factor


class PreparedPenalty:
    """:func:`add_in_place` for every step: all that depends on shapes is checked and planned once.

    The parameters may get new memory (through ``.data``) and new gradients between two steps.

    Args:
        namespace: the operators' in torch.ops.
        layers: layers of one computing precision that are written in place, none of them empty.
        penalty: a compiled penalty.
        sides: the Gram matrix of each layer.
        precision: a name of :data:`orthoreg_ext.precision.PRECISIONS`.
    """

    def __init__(
        self, namespace: str, layers: Layers, penalty: Penalty, sides: Sides, precision: str
    ) -> None:
        operators = getattr(torch.ops, namespace)
        self.dtype = compute_dtype(layers.weights[0].dtype)
        self._parameters = [*layers.weights, *(b for b in layers.biases if b.numel())]
        self._factor = penalty.factor
        self._number = operators.prepare_gram_penalty(
            layers.weights,
            layers.biases,
            [],
            [],
            layers.groups,
            sides.columns,
            sides.offsets,
            penalty.functor,
            precision,
        )
        self._operator = operators.add_prepared_gram_penalty_grad_
        weakref.finalize(self, operators.release_prepared, self._number)

    def add(self, scale: Tensor) -> bool:
        """Adds the gradients of sum(scale * penalty), scale [L] in the computing precision.

        Returns:
            Whether it did. If not, no gradient has changed: a parameter has another form (shape,
            memory order, type, device) than when it was prepared, or its ``.grad`` has another one
            than the parameter.
        """
        grads = [parameter.grad for parameter in self._parameters]
        if any(map(is_, grads, repeat(None))):
            for parameter in self._parameters:
                if parameter.grad is None:
                    parameter.grad = zero_grad(parameter)
            grads = [parameter.grad for parameter in self._parameters]
        with torch.no_grad():
            return bool(self._operator(self._number, grads, times(scale, self._factor)).numel())
