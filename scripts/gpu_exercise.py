"""Runs every CUDA operator once on ragged layers, compared with the reference on the CPU.

    python scripts/gpu_exercise.py [--quick] [--emulated]

scripts/gpu_check.sh runs it with --quick under compute-sanitizer, for which the test suite would be
too long: two types, small shapes, both ways through the kernels (all layers small, or not). Without
it there are all types and precisions, and layers large enough for the largest tiles.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

import orthoreg_ext as ox
import orthoreg_ext.functional as F
from orthoreg_ext.penalties import PENALTIES
from orthoreg_ext.precision import PRECISIONS, precision

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

SMALL = [(1, 1), (7, 3, 3, 3), (33, 65), (16, 300)]
MIXED = [*SMALL, (64, 16, 3, 3), (130, 17, 1, 1), (70, 700)]
LARGE = [(2048, 2048), (512, 4608), (1000, 512)]
CRITERIA = ("l1", "l2", "taylor", "taylor_sq", "taylor_abs", "fisher")
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}
# Of float32 where products are rounded to less; G - I cancels nothing in these random layers.
LOWER = {"mixed": 2e-3, "mixed-bf16": 2e-2, "tf32": 5e-3, "bf16": 5e-2}
Results = dict[str, list[Tensor]]


def results(
    device: str, dtype: torch.dtype, shapes: Sequence[tuple[int, ...]], penalties: Sequence[str]
) -> Results:
    """Every operator's results on `device`, on the same random layers whatever the device."""
    generator = torch.Generator().manual_seed(0)

    def layers() -> list[Tensor]:
        drawn = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
        scaled = [w * torch.Size(w.shape[1:]).numel() ** -0.5 for w in drawn]
        made = [w.to(dtype).to(device) for w in scaled]
        return [w.to(memory_format=torch.channels_last) if w.dim() == 4 else w for w in made]

    weights, grads = layers(), layers()
    pruned = [torch.arange(len(w), device=device) % 3 == 0 for w in weights]
    out: Results = {}
    for side in ("rows", "cols"):
        out[f"gram {side}"] = F.gram(weights, side)
        for penalty in penalties:
            for masks in (None, pruned):
                leaves = [w.detach().clone().requires_grad_() for w in weights]
                values = F.gram_penalty(leaves, penalty, side=side, pruned=masks)
                values.sum().backward()
                what = f"{penalty} {side}{' pruned' if masks else ''}"
                out[f"gram_penalty {what}"] = [values.detach(), *(w.grad for w in leaves)]
            leaves = [w.detach().clone().requires_grad_() for w in weights]
            values = F.add_gram_penalty_grad_(leaves, penalty, side=side, strength=0.5)
            out[f"add_gram_penalty_grad_ {penalty} {side}"] = [values, *(w.grad for w in leaves)]
    for dim in (0, 1):
        scores = F.filter_scores(weights, grads, CRITERIA, dim=dim)
        out |= {f"filter_scores {name} dim {dim}": values for name, values in scores.items()}
    return out


def differences(
    backend: str, device: str, dtype: torch.dtype, mode: str, shapes: list[tuple[int, ...]]
) -> tuple[int, list[str]]:
    """How many results there are, and those that differ from the reference by more than allowed."""
    # Where products are rounded to less, |G - I| changes its sign: only smooth penalties compare.
    low = dtype == torch.float32 and mode in LOWER
    penalties = ["so"] if low else list(PENALTIES)
    allowed = LOWER[mode] if low else TOLERANCE[dtype]
    with ox.backend(backend), precision(mode):
        found = results(device, dtype, shapes, penalties)
    with ox.backend("reference"):
        expected = results("cpu", dtype, shapes, penalties)
    wrong = []
    for name, tensors in found.items():
        error = max(
            float((a.cpu().double() - b.double()).norm() / b.double().norm().clamp_min(1e-12))
            for a, b in zip(tensors, expected[name], strict=True)
        )
        if not error <= allowed:
            wrong.append(
                f"{dtype} {mode} {name}: relative error {error:.2e}, allowed {allowed:.0e}"
            )
    return len(found), wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few and small, for sanitizers")
    parser.add_argument("--emulated", action="store_true", help="without a GPU, on the emulator")
    options = parser.parse_args()
    backend, device = "cuda", "cuda"
    if options.emulated:
        from tests.emu.backend import register_emulated

        backend, device = register_emulated(), "cpu"
    runs: list[tuple[torch.dtype, str, list[tuple[int, ...]]]]
    runs = [(torch.float32, "3xtf32", SMALL), (torch.float32, "mixed", MIXED)]
    runs += [(torch.bfloat16, "3xtf32", MIXED)]
    if not options.quick:
        runs = [(t, m, s) for s in (SMALL, MIXED) for t in TOLERANCE for m in PRECISIONS]
        if device == "cuda":
            runs += [(torch.float32, m, LARGE) for m in PRECISIONS]
        else:
            runs = [r for r in runs if r[0] == torch.float32 or r[1] == "3xtf32"]
    count, failures = 0, []
    for dtype, mode, shapes in runs:
        number, wrong = differences(backend, device, dtype, mode, shapes)
        count += number
        failures += wrong
    print("\n".join([*failures, f"{len(failures)} of {count} results differ from the reference"]))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
