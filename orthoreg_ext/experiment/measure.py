"""What the job measures on a network besides its accuracy."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..functional import filter_correlation
from ..layers import filter_layers
from ..regularizer import OrthoRegularizer

BATCH_SIZES = (1, 64)
REPEATS = 30


def correlation_by_layer(model: nn.Module) -> dict[str, float]:
    """Returns the mean |cosine| over the pairs of filters of each layer that gets regularised."""
    rows = OrthoRegularizer(model).report()
    return {row.name: row.correlation for row in rows if math.isfinite(row.correlation)}


def mean_correlation(model: nn.Module) -> float:
    """Returns the mean of :func:`correlation_by_layer` over the layers; 0 without any pair."""
    values = list(correlation_by_layer(model).values())
    return statistics.fmean(values) if values else 0.0


def correlation_matrix(model: nn.Module) -> tuple[str, Tensor]:
    """Returns the name and the |cosines|, [n, n], of the regularised layer in the middle."""
    names = [row.name for row in OrthoRegularizer(model).report()]
    name = names[len(names) // 2]
    layer = next(layer for layer in filter_layers(model) if layer.name == name)
    return name, filter_correlation([layer.weight.detach()])[0].abs()


@torch.no_grad()
def latencies(
    models: Mapping[str, nn.Module],
    images: Tensor,  # [1, channels, height, width]
) -> dict[int, dict[str, float]]:
    """Returns the median milliseconds of a forward pass by batch size and model.

    The models take turns, so that whatever else the machine does hits them alike.
    """
    found: dict[int, dict[str, float]] = {}
    for size in BATCH_SIZES:
        batch = images.expand(size, -1, -1, -1).contiguous()
        times: dict[str, list[float]] = {name: [] for name in models}
        for repeat in range(REPEATS + 3):
            for name, model in models.items():
                model.eval()
                start = _now(batch.device)
                model(batch)
                if repeat >= 3:  # the first ones warm up
                    times[name].append(1000 * (_now(batch.device) - start))
        found[size] = {name: statistics.median(values) for name, values in times.items()}
    return found


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
