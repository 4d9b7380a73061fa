"""What does scoring cost? Five criteria for every filter of a model.

eager: each layer and criterion by its formula. orthoreg_ext: all of them in one pass.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import orthoreg_ext.functional as F
from benchmarks.conftest import finished
from benchmarks.models import QUICK, weights

CRITERIA = ("l1", "l2", "taylor", "taylor_sq", "fisher")


def eager(layers: list[Tensor], grads: list[Tensor], dim: int) -> None:
    for weight, grad in zip(layers, grads, strict=True):
        over = [d for d in range(weight.dim()) if d != dim]
        product = weight * grad
        signed = product.sum(over)
        weight.abs().sum(over), weight.square().sum(over).sqrt()
        signed.abs(), product.square().sum(over), signed.square()


def orthoreg_ext(layers: list[Tensor], grads: list[Tensor], dim: int) -> None:
    F.filter_scores(layers, grads, CRITERIA, dim=dim)


@pytest.mark.parametrize("run", [eager, orthoreg_ext], ids=lambda f: f.__name__)
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("model", QUICK)
def bench_five_scores(benchmark, model: str, dim: int, run, device: str) -> None:
    benchmark.group = f"five scores, dim {dim}, {model}, {device}"
    layers = [w.detach() for w in weights(model, device)]
    grads = [torch.randn_like(w) for w in layers]
    benchmark(finished(lambda: run(layers, grads, dim), device))
