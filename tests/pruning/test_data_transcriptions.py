"""Every criterion that is measured on data against its formula in numpy, in float64.

The logits of the networks are mean over pixels of (read + also) tanh(make x).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .test_criteria_transcriptions import DTYPES, MEASURED, SEEDS, Array, compare, scored


class Net(nn.Sequential):
    """Two layers read what one makes."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self[0](x))
        return (self[1](hidden) + self[2](hidden)).mean(2)


Weights = tuple[NDArray[Any], NDArray[Any], NDArray[Any]]


def network(seed: int) -> tuple[Weights, list[tuple[Array, NDArray[np.int64]]]]:
    """Weights [n, d], [c, n], [c, n] and batches [b, d, pixels], [b]."""
    rng = np.random.default_rng(seed)
    n, d, c = (int(rng.integers(low, high)) for low, high in ((2, 12), (1, 12), (2, 6)))
    kind = ("any", "zero", "identical", "n > k", "k = 9", "one")[seed % 6]
    n, d = {"n > k": (11, 2), "k = 9": (n, 9), "one": (1, d)}.get(kind, (n, d))
    made = rng.standard_normal((n, d))
    if kind == "zero":
        made[0] = 0
    if kind == "identical":
        made[-1] = made[0]
    weights = made, rng.standard_normal((c, n)), rng.standard_normal((c, n))
    data = []
    for size in (3, 5):
        x = rng.standard_normal((size, d, int(rng.integers(1, 4)))).astype(np.float32)
        data.append((x.astype(np.float64), np.arange(size) % c))
    a, b, e = (w.astype(np.float32).astype(np.float64) for w in weights)
    return (a, b, e), data


def on(weights: Weights, data: list[Any], dtype: torch.dtype) -> tuple[Net, list[Any]]:
    (n, d), c = weights[0].shape, len(weights[1])
    net = Net(*(nn.Conv1d(*shape, 1, bias=False) for shape in ((d, n), (n, c), (n, c)))).to(dtype)
    for layer, w in zip(net, weights, strict=True):
        layer.weight.data.copy_(torch.from_numpy(w)[:, :, None])
    return net, [(torch.from_numpy(x).to(dtype), torch.from_numpy(y)) for x, y in data]


def forward(weights: Weights, x: Array) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Activations [b, n, p], logits and chances [b, c]."""
    hidden = np.tanh(np.einsum("nd,bdp->bnp", weights[0], x))
    logits = hidden.mean(2) @ (weights[1] + weights[2]).T
    grown = np.exp(logits)
    return hidden, logits, grown / grown.sum(1, keepdims=True)


def backward(weights: Weights, x: Array, hidden: NDArray[Any], slope: NDArray[Any]) -> Weights:
    """From a gradient by the logits, [b, c], to those by the weights."""
    back = (slope @ (weights[1] + weights[2]))[:, :, None] / x.shape[2]
    read = slope.T @ hidden.mean(2)
    return np.einsum("bnp,bdp->nd", back * (1 - hidden**2), x), read, read


def gradients(weights: Weights, data: list[Any], temperature: float) -> Weights:
    """Of the mean cross entropy over all samples, also in complex numbers."""
    samples, total = sum(len(y) for _, y in data), [0.0, 0.0, 0.0]
    for x, y in data:
        hidden, logits, _ = forward(weights, x)
        grown = np.exp(logits / temperature)
        slope = grown / grown.sum(1, keepdims=True) - np.eye(len(weights[1]))[y]
        parts = backward(weights, x, hidden, slope / samples / temperature)
        total = [a + b for a, b in zip(total, parts, strict=True)]
    return tuple(total)


def curvature(weights: Weights, data: list[Any]) -> tuple[Array, Array]:
    """sum w (H g), and the sizes of its terms; H g by a step in the imaginary direction."""
    g = gradients(weights, data, 200.0)
    step = 1e-30 / max(np.abs(part).max() for part in g)
    moved = tuple(w + 1j * step * part for w, part in zip(weights, g, strict=True))
    bent = gradients(moved, data, 200.0)[0].imag / step
    return (weights[0] * bent).sum(1), np.abs(weights[0] * bent).sum(1)


def divergence(weights: Weights, data: list[Any]) -> Array:
    total = np.zeros_like(weights[0])
    for x, y in data:
        hidden, _, chances = forward(weights, x)
        for c, chance in enumerate(chances.mean(0)):
            slope = (np.eye(len(weights[1]))[c] - chances) / len(y)
            total += chance * backward(weights, x, hidden, slope)[0] ** 2 * len(y)
    return (total / total.mean()).sum(1) if total.any() else total.sum(1)


def joint(weights: Weights, data: list[Any], freed: str) -> Array:
    total, pixels = np.zeros(len(weights[0])), 0
    for x, y in data:
        hidden, _, chances = forward(weights, x)
        slope = chances - np.eye(len(weights[1]))[y]
        sums = [hidden.sum(2) * (slope @ w) / x.shape[2] for w in weights[1:]]
        total += ((sums[0] + sums[1]) ** 2).sum(0)
        pixels = pixels or x.shape[2]
    (_, d), c = weights[0].shape, len(weights[1])
    return total / {"nothing": 1, "memory": pixels, "macs": pixels * (d + 2 * c)}[freed]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MEASURED)
def test_measured_on_data(name: str, dtype: torch.dtype) -> None:
    for seed in SEEDS:
        weights, data = network(seed)
        net, batches = on(weights, data, dtype)
        got, terms = scored(name, net, len(weights[0]), data=batches), None
        if name == "grasp":
            want, terms = curvature(weights, data)
        elif name == "rdt":
            want = divergence(weights, data)
        else:
            want = joint(weights, data, {"group_fisher": "memory"}.get(name, name[13:]))
        compare(got, want, dtype, terms)
