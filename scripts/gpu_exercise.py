"""Runs every CUDA operator on ragged layers, compared with the reference on the CPU.

    python scripts/gpu_exercise.py [--quick] [--large] [--emulated]

scripts/gpu_check.sh runs it with --quick under compute-sanitizer, for which the test suite would be
too long: every operator, type and tile once, on tiny layers. Without it there are all types and
precisions, and layers large enough for the largest tiles (on the emulator: scaled down).
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import orthoreg_ext as ox
import orthoreg_ext.functional as F
from orthoreg_ext.penalties import KERNELS
from orthoreg_ext.precision import PRECISIONS, precision
from orthoreg_ext.reference import FISHER_DIAG, REDUCTIONS, SCORES, compute_dtype

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

Shapes = tuple[tuple[int, ...], ...]
Results = dict[str, list[Tensor]]

# One list in which every layer is small, which takes a kernel of its own, one where some are not.
SMALL: Shapes = ((1, 1), (7, 3, 3, 3), (33, 65), (16, 300))
MIXED: Shapes = (*SMALL, (64, 16, 3, 3), (130, 17, 1, 1), (70, 700))
TINY: Shapes = ((1, 1), (7, 3, 3, 3), (33, 65))
TILED: Shapes = ((70, 135), (130, 17, 1, 1))  # more than one tile of 64, more than one of 128
LARGE: Shapes = ((2048, 2048), (512, 4608), (1000, 512))
SCALED: Shapes = ((256, 256), (64, 576), (125, 64))  # LARGE for the emulator
# A G - I that is nearly 0 has either sign in float32, and one flipped sign is a gradient of 1e-3:
# `orthoreg` is compared only where none is (tests/test_benchmarks.py), as many entries have one.
SMOOTH = ("so", "frobenius", "offdiag", "tpp")
CERTAIN = 1e-7
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}
# Of float32 where products are rounded to less; G - I cancels nothing in these random layers.
LOWER = {"mixed": 2e-3, "mixed-bf16": 2e-2, "tf32": 5e-3, "bf16": 5e-2}


@dataclass(frozen=True)
class Run:
    """Layers of one type, and what is called on them.

    Attributes:
        dtype: of the weights.
        mode: the precision.
        shapes: the layers of :func:`grams` and :func:`scores`; none: :func:`rest` alone.
        penalties: those that are compared.
        tile: what ORTHOREG_EXT_TILE is set to.
        rest: whether :func:`rest` is called too.
    """

    dtype: torch.dtype
    mode: str
    shapes: Shapes = ()
    penalties: tuple[str, ...] = tuple(KERNELS)
    tile: str = ""
    rest: bool = True

    @property
    def allowed(self) -> float:
        """The largest relative error."""
        low = self.dtype == torch.float32 and self.mode in LOWER
        return LOWER[self.mode] if low else TOLERANCE[self.dtype]


def random_layers(shapes: Shapes, dtype: torch.dtype, device: str, seed: int) -> list[Tensor]:
    """The same on every device."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    scaled = [w * torch.Size(w.shape[1:]).numel() ** -0.5 for w in drawn]
    made = [w.to(dtype).to(device) for w in scaled]
    return [w.to(memory_format=torch.channels_last) if w.dim() == 4 else w for w in made]


def nearest_to_zero(weights: Sequence[Tensor]) -> float:
    """The smallest |G - I| of all layers and both sides."""
    smallest = float("inf")
    for weight in weights:
        matrix = weight.double().flatten(1)
        for side in (matrix, matrix.t()):
            residual = side @ side.t() - torch.eye(len(side), dtype=torch.float64)
            smallest = min(smallest, float(residual.abs().min()))
    return smallest


def grams(device: str, run: Run) -> Results:
    """The Gram matrices' operators, on both sides."""
    weights = random_layers(run.shapes, run.dtype, device, 0)
    pruned = [torch.arange(len(w), device=device) % 3 == 0 for w in weights]
    out: Results = {}
    for side in ("rows", "cols"):
        out[f"gram {side}"] = F.gram(weights, side)
        for penalty in run.penalties:
            marks = KERNELS[penalty].counts is not None
            if marks and side == "cols":
                continue
            for masks in (pruned,) if marks else (None, pruned):
                leaves = [w.detach().clone().requires_grad_() for w in weights]
                values = F.gram_penalty(leaves, penalty, side=side, pruned=masks)
                values.sum().backward()
                what = f"{penalty} {side}{' pruned' if masks else ''}"
                out[f"gram_penalty {what}"] = [values.detach(), *gradients(leaves)]
            leaves = [w.detach().clone().requires_grad_() for w in weights]
            masks = pruned if marks else None
            values = F.add_gram_penalty_grad_(
                leaves, penalty, side=side, strength=0.5, pruned=masks
            )
            out[f"add_gram_penalty_grad_ {penalty} {side}"] = [values, *gradients(leaves)]
    return out


def scores(device: str, run: Run) -> Results:
    """Scores of filters, of input channels and of both."""
    weights, grads = (random_layers(run.shapes, run.dtype, device, seed) for seed in (0, 1))
    out: Results = {}
    for dim in (0, 1):
        found = F.filter_scores(weights, grads, tuple(SCORES), dim=dim)
        out |= {f"filter_scores {name} dim {dim}": values for name, values in found.items()}
    both = F.filter_scores(weights, grads, tuple(SCORES), dim=(0, 1))
    for dim in (0, 1):
        out |= {f"filter_scores {name} of both {dim}": v for name, v in both[dim].items()}
    return out


def rest(device: str, run: Run) -> Results:
    """Biases, groups and masks together, Fisher accumulators, coupled groups, reg.attach."""
    dtype = run.dtype
    shapes: Shapes = ((6, 2, 3, 3), (35, 40), (4, 1, 3, 3))
    weights, grads = (random_layers(shapes, dtype, device, seed) for seed in (2, 3))
    biases = random_layers(((6,), (35,), (4,)), dtype, device, 4)
    slopes = random_layers(((6,), (35,), (4,)), dtype, device, 5)
    groups = [3, 1, 4]
    pruned = [None, torch.arange(35, device=device) % 4 == 1, None]
    out: Results = {}
    for masks in (None, pruned):
        leaves = [w.detach().clone().requires_grad_() for w in (*weights, *biases)]
        values = F.add_gram_penalty_grad_(
            *(leaves[:3], "so"),
            strength=0.5,
            pruned=masks,
            targets=[2.0, None, torch.linspace(0, 1, 4, device=device)] if masks else None,
            biases=leaves[3:],
            groups=groups,
        )
        what = f"biases, groups{', pruned, targets' if masks else ''}"
        out[f"add_gram_penalty_grad_ {what}"] = [values, *gradients(leaves)]
    out["gram biases, groups"] = F.gram(weights, "small", biases=biases, groups=groups)
    found = F.filter_scores(
        weights, grads, tuple(SCORES), biases=biases, bias_grads=slopes, groups=groups
    )
    out |= {f"filter_scores {name} biases, groups": values for name, values in found.items()}
    fisher = [torch.ones_like(w, dtype=compute_dtype(dtype)) for w in weights]
    names = (*SCORES, FISHER_DIAG)
    scored = F.accumulate_fisher_(weights, grads, fisher, names, dim=(0, 1), groups=groups)
    out["accumulate_fisher_"] = list(fisher)
    for dim in (0, 1):
        single = F.accumulate_fisher_(weights, grads, fisher, names, dim=dim, groups=groups)
        out |= {f"accumulate_fisher_ {name} of both {dim}": v for name, v in scored[dim].items()}
        out |= {f"accumulate_fisher_ {name} dim {dim}": v for name, v in single.items()}
    channels = [
        torch.linspace(0.1, 1, n, dtype=compute_dtype(dtype), device=device) for n in (4, 6)
    ]
    members = [[(0, None), (1, torch.tensor([5, -1, 0, 2]))], [(1, None)]]
    for reduction in REDUCTIONS:
        out[f"group_scores {reduction}"] = F.group_scores(channels, members, reduction)
    out["attach"] = attached(device, dtype)
    return out


def attached(device: str, dtype: torch.dtype) -> list[Tensor]:
    """The gradients after two steps: the first prepares the operator, the second finds it."""
    torch.manual_seed(6)
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3, groups=2), nn.Conv2d(8, 5, 1), nn.Flatten(), nn.Linear(40, 35)
    )
    model = model.to(device, dtype)
    regularizer = ox.OrthoRegularizer(model, "so", 0.5, include="*", bias=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    regularizer.attach(optimizer)
    optimizer.step()
    optimizer.step()
    return gradients(list(model.parameters()))


def gradients(leaves: Sequence[Tensor]) -> list[Tensor]:
    return [leaf.grad for leaf in leaves if leaf.grad is not None]


def results(device: str, run: Run) -> Results:
    """What every operator of a run computes on a device."""
    out = {**grams(device, run), **scores(device, run)} if run.shapes else {}
    return out | (rest(device, run) if run.rest else {})


@functools.cache
def expected(run: Run) -> Results:
    """What the reference computes on the CPU."""
    with ox.backend("reference"):
        return results("cpu", run)


def differences(backend: str, device: str, run: Run) -> tuple[int, list[str]]:
    """How many results there are, and those that differ from the reference by more than allowed."""
    os.environ["ORTHOREG_EXT_TILE"] = run.tile  # the kernels read it at every call
    with ox.backend(backend), precision(run.mode):
        found = results(device, run)
    wrong = []
    # the reference knows neither modes nor tiles
    same = Run(run.dtype, "ieee", run.shapes, run.penalties, rest=run.rest)
    for name, tensors in found.items():
        error = max(
            float((a.cpu().double() - b.double()).norm() / b.double().norm().clamp_min(1e-12))
            for a, b in zip(tensors, expected(same)[name], strict=True)
        )
        if not error <= run.allowed:
            tile = f" tile {run.tile}" if run.tile else ""
            wrong.append(
                f"{run.dtype} {run.mode}{tile} {name}: relative error {error:.2e}, "
                f"allowed {run.allowed:.0e}"
            )
    return len(found), wrong


def quick_runs() -> list[Run]:
    """Every operator, type and tile, and products of every kind."""
    single = torch.float32
    runs = [Run(single, "3xtf32", TINY)]
    runs += [Run(single, m, TINY, ("so",), rest=False) for m in ("ieee", "tf32", "mixed-bf16")]
    runs += [Run(single, "mixed", TILED, ("so",), rest=False)]
    tiles = [(tile, mode) for tile in ("32", "64", "128") for mode in ("3xtf32", "bf16")]
    runs += [Run(single, m, TILED, ("so",), tile=t, rest=False) for t, m in tiles]
    return runs + [Run(t, "3xtf32", TINY, SMOOTH) for t in TOLERANCE if t != single]


def all_runs(*, emulated: bool) -> list[Run]:
    """All types, precisions and sizes."""
    runs = []
    for dtype in TOLERANCE:
        for mode in PRECISIONS:
            if emulated and dtype != torch.float32 and mode != "3xtf32":
                continue
            low = dtype == torch.float32 and mode in LOWER
            runs += [Run(dtype, mode, SMALL, SMOOTH if low else tuple(KERNELS))]
            exact = dtype == torch.float64
            runs += [Run(dtype, mode, MIXED, tuple(KERNELS) if exact else SMOOTH)]
    large = SCALED if emulated else LARGE
    runs += [Run(torch.float32, mode, large, ("so",), rest=False) for mode in PRECISIONS]
    tiles = [(tile, mode) for tile in ("32", "64", "128") for mode in ("3xtf32", "bf16")]
    return runs + [Run(torch.float32, m, TILED, SMOOTH, tile=t, rest=False) for t, m in tiles]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few and small, for sanitizers")
    parser.add_argument("--emulated", action="store_true", help="without a GPU, on the emulator")
    parser.add_argument(
        "--large", action="store_true", help="large layers; no others but --quick's"
    )
    options = parser.parse_args()
    backend, device = "cuda", "cuda"
    if options.emulated:
        from tests.emu.backend import register_emulated

        backend, device = register_emulated(), "cpu"
    runs = all_runs(emulated=options.emulated)
    if options.quick or options.large:
        large = [run for run in runs if run.shapes in (LARGE, SCALED)]
        runs = [*(quick_runs() if options.quick else []), *(large if options.large else [])]
    count, failures = 0, []
    for run in runs:
        number, wrong = differences(backend, device, run)
        count += number
        failures += wrong
    print("\n".join([*failures, f"{len(failures)} of {count} results differ from the reference"]))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
