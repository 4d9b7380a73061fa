"""The emulated kernels give the same bits in whatever order blocks and warps run.

This file is also what runs under AddressSanitizer and ThreadSanitizer:
``python -m tests.emu.sanitize thread tests/test_schedules.py``.
"""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

import orthoreg_ext as ox
import orthoreg_ext.functional as F
from orthoreg_ext.reference import FISHER_DIAG, REDUCTIONS, SCORES, compute_dtype
from tests.conftest import (
    NAMES,
    Layers,
    gradient_error,
    gradient_floor,
    penalty_arguments,
    random_layers,
    random_targets,
)

# A sanitizer watches memory, not numbers, and costs a factor of a hundred: one order that is
# neither of the plain ones, and each code path once.
SANITIZED = "ORTHOREG_EMU_SANITIZE" in os.environ
SCHEDULES = ("7",) if SANITIZED else ("up", "down", "7")
DTYPES = [torch.float32, torch.float64]
PATHS = ["orthoreg", "cosine"]  # others differ in a line of the epilogue
PRODUCTS = [("3xtf32", "128"), ("bf16", "32")]
if not SANITIZED:
    DTYPES += [torch.float16, torch.bfloat16]
    PATHS = NAMES
    PRODUCTS += [("mixed", "64"), ("mixed-bf16", "128"), ("tf32", "32"), ("bf16", "64")]


def layers_of(dtype: torch.dtype) -> Layers:
    """Ragged edges, several tiles, groups, biases, one filter, one entry."""
    layers = random_layers(3, torch.device("cpu"), dtype, count=4, largest=40, budget=10_000)
    generator = torch.Generator().manual_seed(1)
    for shape in ((70, 5), (1, 1), (6, 3, 3, 3), (3, 67)):
        weight = torch.randn(shape, generator=generator).to(dtype).requires_grad_()
        layers.weights.append(weight)
        layers.biases.append(torch.ones(shape[0], dtype=dtype, requires_grad=True))
        layers.groups.append(3 if shape[0] % 3 == 0 else 1)
    return layers


def all_results(layers: Layers) -> tuple[list[Tensor], list[float]]:
    """Everything that the kernels compute, for all penalties, sides and dimensions.

    With it the size that errors are small beside, where that is not the result's.
    """
    results: list[Tensor] = []
    floors: dict[int, float] = {}  # by the place of the result
    for name in PATHS:
        for side in ("rows", "cols"):
            chosen = penalty_arguments(name, side, layers.weights)
            value = F.gram_penalty(**chosen, **layers.arguments())
            first = len(results) + 1
            results += [value, *torch.autograd.grad(value.sum(), layers.parameters())]
            floors |= dict(enumerate(gradient_floor(name, side, layers), first))
    for parameter in layers.parameters():
        parameter.grad = torch.ones_like(parameter)
    targets = random_targets(layers.weights, 1)
    results.append(F.add_gram_penalty_grad_(strength=0.5, targets=targets, **layers.arguments()))
    small = Layers(layers.weights[-2:], layers.biases[-2:], [1, 1])  # in one launch
    results.append(F.add_gram_penalty_grad_(strength=0.5, penalty="cosine", **small.arguments()))
    first = len(results)
    floors |= dict(enumerate(gradient_floor("cosine", "small", layers), first))
    results += [parameter.grad.clone() for parameter in layers.parameters()]
    results += F.gram(side="small", **layers.arguments())
    weights = [w.detach() for w in layers.weights]
    grads = [torch.cos(w) for w in weights]
    for dim in (0, 1):
        for scores in F.filter_scores(weights, grads, tuple(SCORES), dim=dim).values():
            results += scores
        for scores in F.filter_scores(weights, criteria=("l1", "l2"), dim=dim).values():
            results += scores
    fisher = [torch.ones_like(w, dtype=compute_dtype(w.dtype)) for w in weights]
    names = (*SCORES, FISHER_DIAG)
    for scored in F.accumulate_fisher_(weights, grads, fisher, names, dim=(0, 1)):
        for scores in scored.values():
            results += scores
    results += fisher
    filters = results[-len(fisher) - 1]
    half = torch.arange(len(filters)) // 2
    for reduction in REDUCTIONS:
        results += F.group_scores([filters], [[(0, None), (0, half)]], reduction)
    return results, [floors.get(i, 0.0) for i in range(len(results))]


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_schedule_gives_the_same_bits(
    emulator: str, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    layers = layers_of(dtype)
    runs = []
    for schedule in SCHEDULES:
        monkeypatch.setenv("CUDA_EMU_ORDER", schedule)
        with ox.backend(emulator):
            runs.append(all_results(layers)[0])
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))
    with ox.backend("reference"):
        want, floors = all_results(layers.double())
    rounding = {torch.float16: 2**-11, torch.bfloat16: 2**-8, torch.float64: 1e-12}.get(dtype, 1e-5)
    for got, expected, floor in zip(runs[0], want, floors, strict=True):
        # gradients are stored in the weights' precision, scores are taken of rounded cosines
        assert gradient_error(got, expected, floor) <= 4 * rounding


@pytest.mark.parametrize(("precision", "tile"), PRODUCTS)
def test_products_and_tiles_under_every_schedule(
    emulator: str, monkeypatch: pytest.MonkeyPatch, precision: str, tile: str
) -> None:
    """Ragged, biased, masked layers: of several slices, of one tile, of several tiles."""
    generator = torch.Generator().manual_seed(2)
    shapes = {"rows": [(9, 390), (35, 5)], "cols": [(390, 9), (5, 35)]}
    if not SANITIZED:
        shapes = {side: [*small, (150, 140)] for side, small in shapes.items()}
    monkeypatch.setenv("ORTHOREG_EXT_TILE", tile)

    def layers_of(side: str) -> Layers:
        return Layers(
            [torch.randn(s, generator=generator).requires_grad_() for s in shapes[side]],
            [torch.randn(n, generator=generator).requires_grad_() for n, _ in shapes[side]],
            [1] * len(shapes[side]),
        )

    layers = {side: layers_of(side) for side in shapes}

    def run() -> list[Tensor]:
        out: list[Tensor] = []
        for side, mine in layers.items():
            masks = [torch.arange(len(w)) % 5 == 3 for w in mine.weights]
            arguments = {"penalty": "so", "side": side, "pruned": masks, **mine.arguments()}
            values = F.gram_penalty(**arguments)
            out += [values.detach(), *torch.autograd.grad(values.sum(), mine.parameters())]
            for parameter in mine.parameters():
                parameter.grad = torch.ones_like(parameter)
            out.append(F.add_gram_penalty_grad_(strength=0.5, **arguments))
            out += [parameter.grad.clone() for parameter in mine.parameters()]
        return out

    runs = []
    for schedule in SCHEDULES:
        monkeypatch.setenv("CUDA_EMU_ORDER", schedule)
        with ox.backend(emulator), ox.precision(precision):
            runs.append(run())
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))
