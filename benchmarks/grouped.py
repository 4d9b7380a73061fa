"""The ways for grouped convolutions: each group is a filter matrix of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

import orthoreg_ext.functional as F
from benchmarks.baselines import Call, Way


def _matrices(weight: Tensor, groups: int) -> Tensor:  # [g, n / g, k]
    return weight.flatten(1).unflatten(0, (groups, -1))


def penalty(weights: Sequence[Tensor], groups: Sequence[int], *, small: bool = False) -> Tensor:
    """`so` as a script writes it, one batched product a layer."""
    total = torch.zeros((), device=weights[0].device, dtype=weights[0].dtype)
    for weight, count in zip(weights, groups, strict=True):
        matrix = _matrices(weight, count)
        if small and matrix.shape[1] > matrix.shape[2]:
            matrix = matrix.mT
        eye = torch.eye(matrix.shape[1], device=matrix.device, dtype=matrix.dtype)
        total = total + (matrix @ matrix.mT - eye).square().sum()
    return total


def ways(groups: Sequence[int]) -> Mapping[str, Way]:
    """The ways for layers with these groups."""

    def own(weights: list[Tensor]) -> Call:
        def call() -> None:
            F.add_gram_penalty_grad_(weights, "so", strength=1.0, groups=groups)

        return call

    def eager(weights: list[Tensor]) -> Call:
        return lambda: penalty(weights, groups).backward()

    def closed_small(weights: list[Tensor]) -> Call:
        @torch.no_grad()
        def call() -> None:
            total = torch.zeros((), device=weights[0].device)
            for weight, count in zip(weights, groups, strict=True):
                matrix, grad = _matrices(weight, count), weight.grad
                assert grad is not None
                rows = matrix.shape[1] <= matrix.shape[2]
                gram = matrix @ matrix.mT if rows else matrix.mT @ matrix
                gram.diagonal(dim1=1, dim2=2).sub_(1)
                total += gram.square().sum()
                left, right = (gram, matrix) if rows else (matrix, gram)
                _matrices(grad, count).baddbmm_(left, right, alpha=4)

        return call

    return {
        "orthoreg_ext": Way("add_gram_penalty_grad_, groups=", own),
        "eager": Way("a batched mm a layer, autograd, filters' side", eager),
        "closed-small": Way("two batched mm a layer, smaller side", closed_small),
    }


def exact_gradients(weights: list[Tensor], groups: Sequence[int]) -> list[Tensor]:
    """In float64."""
    leaves = [w.detach().double().requires_grad_() for w in weights]
    return list(torch.autograd.grad(penalty(leaves, groups, small=True), leaves))
