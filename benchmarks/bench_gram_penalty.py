"""What does the regulariser cost? Penalty `so` and its gradient for all layers of a model.

eager: each layer's filters against the identity with autograd, as a training script writes it.
closed-small: the smaller Gram matrix and the gradient in closed form, one layer after the other.
orthoreg_ext: `loss + reg()`, value and backward. attached: `reg.attach(optimizer)`, into .grad.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import orthoreg_ext.functional as F
from benchmarks.conftest import finished
from benchmarks.models import QUICK, weights


def eager(layers: list[Tensor]) -> None:
    total = torch.zeros((), device=layers[0].device)
    for weight in layers:
        matrix = weight.flatten(1)
        eye = torch.eye(len(matrix), device=matrix.device)
        total = total + (matrix @ matrix.T - eye).square().sum()
    total.backward()


@torch.no_grad()
def closed_small(layers: list[Tensor]) -> None:
    for weight in layers:
        matrix = weight.flatten(1)
        rows = matrix.shape[0] <= matrix.shape[1]
        gram = matrix @ matrix.T if rows else matrix.T @ matrix
        gram.diagonal().sub_(1)
        gram.square().sum()
        grad = gram @ matrix if rows else matrix @ gram
        weight.grad.add_(grad.view_as(weight), alpha=4)


def orthoreg_ext(layers: list[Tensor]) -> None:
    F.gram_penalty(layers, "so").sum().backward()


def attached(layers: list[Tensor]) -> None:
    F.add_gram_penalty_grad_(layers, "so", strength=1.0)


@pytest.mark.parametrize(
    "run", [eager, closed_small, orthoreg_ext, attached], ids=lambda f: f.__name__
)
@pytest.mark.parametrize("model", QUICK)
def bench_penalty_and_gradient(benchmark, model: str, run, device: str) -> None:
    benchmark.group = f"penalty and gradient, {model}, {device}"
    layers = weights(model, device)
    for weight in layers:
        weight.grad = torch.zeros_like(weight)
    benchmark(finished(lambda: run(layers), device))
