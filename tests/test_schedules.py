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
from orthoreg_ext.penalties import PENALTIES
from orthoreg_ext.reference import FISHER_DIAG, REDUCTIONS, SCORES, compute_dtype
from tests.conftest import Layers, random_layers, relative_error

# A sanitizer watches memory, not numbers, and costs a factor of a hundred: one order that is
# neither of the plain ones, and each code path once.
SANITIZED = "ORTHOREG_EMU_SANITIZE" in os.environ
SCHEDULES = ("7",) if SANITIZED else ("up", "down", "7")
DTYPES = [torch.float32, torch.float64]
PATHS = ["orthoreg"]  # penalties differ in a line of the epilogue
PRODUCTS = [("3xtf32", "128"), ("bf16", "32")]
if not SANITIZED:
    DTYPES += [torch.float16, torch.bfloat16]
    PATHS = list(PENALTIES)
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


def all_results(layers: Layers) -> list[Tensor]:
    """Everything that the kernels compute, for all penalties, sides and dimensions."""
    results: list[Tensor] = []
    for name in PATHS:
        for side in ("rows", "cols"):
            value = F.gram_penalty(penalty=name, side=side, **layers.arguments())
            results += [value, *torch.autograd.grad(value.sum(), layers.parameters())]
    for parameter in layers.parameters():
        parameter.grad = torch.ones_like(parameter)
    results.append(F.add_gram_penalty_grad_(strength=0.5, **layers.arguments()))
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
    return results


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_schedule_gives_the_same_bits(
    emulator: str, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    layers = layers_of(dtype)
    runs = []
    for schedule in SCHEDULES:
        monkeypatch.setenv("CUDA_EMU_ORDER", schedule)
        with ox.backend(emulator):
            runs.append(all_results(layers))
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))
    with ox.backend("reference"):
        want = all_results(layers.double())
    rounding = {torch.float16: 2**-11, torch.bfloat16: 2**-8, torch.float64: 1e-12}.get(dtype, 1e-5)
    for got, expected in zip(runs[0], want, strict=True):
        # gradients are stored in the weights' precision, scores are taken of rounded cosines
        assert relative_error(got, expected) <= 4 * rounding


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
