"""The compiled operators as PyTorch sees them: shapes for the compiler, gradients for autograd.

Both are registered for a namespace, so that the emulated CUDA operators of the tests
(`orthoreg_emu`) get exactly what the real ones get. Importing this module registers `orthoreg`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from . import build_info, reference
from .penalties import KERNELS


def gram_sizes(
    weights: Sequence[Tensor],  # each [groups * n, ...]
    biases: Sequence[Tensor],  # each [groups * n] or empty
    groups: Sequence[int],
    columns: Sequence[bool],
) -> list[tuple[int, int, int]]:
    """The shape [g, m, m] of each layer's Gram matrices."""
    sizes = []
    for weight, bias, group, column in zip(weights, biases, groups, columns, strict=True):
        n = weight.shape[0] // group
        k = math.prod(weight.shape[1:]) + (1 if bias.numel() else 0)
        m = k if column else n
        sizes.append((group, m, m))
    return sizes


def _flat_grams(
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    groups: Sequence[int],
    columns: Sequence[bool],
) -> Tensor:
    total = sum(g * m * m for g, m, _ in gram_sizes(weights, biases, groups, columns))
    return weights[0].new_empty(total, dtype=reference.compute_dtype(weights[0].dtype))


def _values(weights: Sequence[Tensor]) -> Tensor:
    return weights[0].new_empty(len(weights), dtype=reference.compute_dtype(weights[0].dtype))


# --- gram_penalty: (values [L], slopes [sum g m m]); slopes S = phi'(R) are kept for the gradient


def _gram_penalty_fake(
    weights: list[Tensor],
    biases: list[Tensor],
    pruned: list[Tensor],
    targets: list[Tensor],
    groups: list[int],
    columns: list[bool],
    offsets: list[float],
    penalty: str,
    precision: str,
) -> tuple[Tensor, Tensor]:
    return _values(weights), _flat_grams(weights, biases, groups, columns)


def _gram_penalty_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    weights, biases, pruned, targets, *rest = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*weights, *biases, *pruned, *targets, *output)
    ctx.shape = (len(pruned), *rest)


def _split(
    tensors: Sequence[Tensor], count: int, masks: int = 0
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    """Weights, biases, masks and targets, saved one after the other.

    There is one a layer of each; of masks and of targets there may be none at all.
    """
    ends = [0, count, 2 * count, 2 * count + masks, len(tensors)]
    weights, biases, pruned, targets = (list(tensors[a:b]) for a, b in pairwise(ends))
    return weights, biases, pruned, targets


def _gram_penalty_backward(namespace: str) -> Any:
    grad_op = getattr(torch.ops, namespace).gram_penalty_grad

    def backward(ctx: Any, grad_values: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
        masks, groups, columns, _, penalty, precision = ctx.shape
        *layers, values, slopes = ctx.saved_tensors
        tensors = _split(layers, len(groups), masks)
        none = tuple([None] * len(of) for of in tensors)
        if grad_values is None:
            return *none, None, None, None, None, None
        factors = grad_values.contiguous()
        if KERNELS[penalty].root:  # dP = d(P^2) / (2 P), and 0 where P is
            zero = values == 0
            factors = factors / (2 * values.masked_fill(zero, 1)) + (values - values)  # NaN of inf
            factors = factors.masked_fill(zero, 0)
        grads = grad_op(*tensors, slopes, factors, groups, columns, penalty, precision)
        return *_split(grads, len(groups))[:2], *none[2:], None, None, None, None, None

    return backward


# --- gram_penalty_grad: the gradients of sum_l c_l P_l, weights first, then biases


def _gram_penalty_grad_fake(
    weights: list[Tensor],
    biases: list[Tensor],
    pruned: list[Tensor],
    targets: list[Tensor],
    slopes: Tensor,
    coefficients: Tensor,
    groups: list[int],
    columns: list[bool],
    penalty: str,
    precision: str,
) -> list[Tensor]:
    return [torch.empty_like(t) for t in (*weights, *biases)]


def _gram_penalty_grad_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    weights, biases, pruned, targets, _, coefficients, groups, columns, penalty, _ = inputs
    ctx.save_for_backward(*weights, *biases, *pruned, *targets, coefficients)
    ctx.shape = (len(pruned), groups, columns, penalty)


def _gram_penalty_grad_backward(ctx: Any, directions: list[Tensor]) -> tuple[Any, ...]:
    """Second derivatives: rare, so in plain PyTorch, which keeps them differentiable in turn."""
    masks, groups, columns, penalty = ctx.shape
    *layers, coefficients = ctx.saved_tensors
    count = len(groups)
    weights, biases, pruned, targets = _split(layers, count, masks)
    weight_grads, bias_grads, coefficient_grads = [], [], []
    for i, (weight, bias, group) in enumerate(zip(weights, biases, groups, strict=True)):
        along, coefficient = reference.gram_penalty_grad_grad(
            weight,
            bias,
            (directions[i], directions[count + i]),
            coefficients[i],
            group,
            columns[i],
            KERNELS[penalty],
            pruned[i] if pruned else None,
            targets[i] if targets else None,
        )
        weight_grad, bias_grad = _like_layer(along, weight, bias)
        weight_grads.append(weight_grad)
        bias_grads.append(bias_grad)
        coefficient_grads.append(coefficient)
    factors, none = torch.stack(coefficient_grads), ([None] * len(pruned), [None] * len(targets))
    return weight_grads, bias_grads, *none, None, factors, None, None, None, None


# --- gram: the Gram matrices [g, m, m] of all layers, flat, one after the other


def _gram_fake(
    weights: list[Tensor],
    biases: list[Tensor],
    groups: list[int],
    columns: list[bool],
    precision: str,
) -> Tensor:
    return _flat_grams(weights, biases, groups, columns)


def _gram_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    weights, biases, groups, columns, _ = inputs
    ctx.save_for_backward(*weights, *biases)
    ctx.shape = (groups, columns)


def _gram_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    groups, columns = ctx.shape
    weights, biases = ctx.saved_tensors[: len(groups)], ctx.saved_tensors[len(groups) :]
    sizes = gram_sizes(weights, biases, groups, columns)
    pieces = grad.split([g * m * m for g, m, _ in sizes])
    weight_grads, bias_grads = [], []
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        matrices = reference.filter_matrices(weight, bias, groups[i])
        piece = pieces[i].view(sizes[i])
        along = reference.turn(piece + piece.mT, matrices, columns[i])
        weight_grad, bias_grad = _like_layer(along, weight, bias)
        weight_grads.append(weight_grad)
        bias_grads.append(bias_grad)
    return weight_grads, bias_grads, None, None, None


def _like_layer(
    matrices: Tensor,  # [g, n, k]
    weight: Tensor,
    bias: Tensor,
) -> tuple[Tensor, Tensor | None]:
    """Takes filter matrices apart again: the inverse of reference.filter_matrices."""
    rows = matrices.flatten(0, 1)
    if not bias.numel():
        return rows.reshape(weight.shape).to(weight.dtype), None
    return rows[:, :-1].reshape(weight.shape).to(weight.dtype), rows[:, -1].to(bias.dtype)


# --- the operators without a gradient


def _add_gram_penalty_grad_fake(
    weights: list[Tensor],
    biases: list[Tensor],
    pruned: list[Tensor],
    targets: list[Tensor],
    grads: list[Tensor],
    bias_grads: list[Tensor],
    coefficients: Tensor,
    groups: list[int],
    columns: list[bool],
    offsets: list[float],
    penalty: str,
    precision: str,
) -> Tensor:
    return _values(weights)


def _add_prepared_fake(prepared: int, grads: list[Tensor], coefficients: Tensor) -> Tensor:
    return torch.empty_like(coefficients)


def _filter_scores_fake(
    weights: list[Tensor],
    grads: list[Tensor],
    biases: list[Tensor],
    bias_grads: list[Tensor],
    groups: list[int],
    dim: int,
    criteria: list[str],
) -> Tensor:
    filters = sum(w.shape[0] for w in weights)
    inputs = sum(
        g * (w.shape[1] if w.dim() > 1 else 1) for w, g in zip(weights, groups, strict=True)
    )
    dtype = reference.compute_dtype(weights[0].dtype)
    total = (filters if dim != 1 else 0) + (inputs if dim != 0 else 0)
    return weights[0].new_empty((len(criteria), total), dtype=dtype)


def _accumulate_fisher_fake(
    weights: list[Tensor],
    grads: list[Tensor],
    fisher: list[Tensor],
    groups: list[int],
    dim: int,
    criteria: list[str],
) -> Tensor:
    return _filter_scores_fake(weights, grads, [], [], groups, dim, criteria)


def _group_scores_fake(
    scores: list[Tensor], entries: Tensor, starts: Tensor, reduction: str
) -> Tensor:
    return scores[0].new_empty(starts.shape[0] - 1)


def register(namespace: str) -> None:
    """Registers the fake kernels and the gradients for the operators of a namespace."""
    library = torch.library
    library.register_fake(f"{namespace}::gram")(_gram_fake)
    library.register_fake(f"{namespace}::gram_penalty")(_gram_penalty_fake)
    library.register_fake(f"{namespace}::gram_penalty_grad")(_gram_penalty_grad_fake)
    library.register_fake(f"{namespace}::add_gram_penalty_grad_")(_add_gram_penalty_grad_fake)
    library.register_fake(f"{namespace}::add_prepared_gram_penalty_grad_")(_add_prepared_fake)
    library.register_fake(f"{namespace}::filter_scores")(_filter_scores_fake)
    library.register_fake(f"{namespace}::accumulate_fisher_")(_accumulate_fisher_fake)
    library.register_fake(f"{namespace}::group_scores")(_group_scores_fake)
    library.register_autograd(f"{namespace}::gram", _gram_backward, setup_context=_gram_context)
    library.register_autograd(
        f"{namespace}::gram_penalty",
        _gram_penalty_backward(namespace),
        setup_context=_gram_penalty_context,
    )
    library.register_autograd(
        f"{namespace}::gram_penalty_grad",
        _gram_penalty_grad_backward,
        setup_context=_gram_penalty_grad_context,
    )


if build_info.compiled:
    register("orthoreg")
