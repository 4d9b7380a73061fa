"""What does the regulariser cost? Penalty `so` and its gradient for all layers of a model.

The ways are those of baselines.py: a training script's autograd, the closed form one layer after
the other, `loss + reg()`, the call that writes into .grad, a step after `reg.attach(optimizer)`.
"""

from __future__ import annotations

import pytest
import torch

from benchmarks.baselines import REGULARISE
from benchmarks.conftest import finished
from benchmarks.models import QUICK, weights

WAYS = (
    *("eager", "closed-small", "orthoreg_ext-autograd", "orthoreg_ext"),
    "orthoreg_ext-attached",
)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("model", QUICK)
def bench_penalty_and_gradient(benchmark, model: str, way: str, device: str) -> None:
    benchmark.group = f"penalty and gradient, {model}, {device}"
    layers = weights(model, device)
    for weight in layers:
        weight.grad = torch.zeros_like(weight)
    benchmark(finished(REGULARISE[way].prepare(layers), device))
