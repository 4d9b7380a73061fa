"""Runs every CUDA operator once on ragged layers, compared with the reference on the CPU.

scripts/gpu_check.sh runs it under compute-sanitizer, for which the test suite would be too long.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

import orthoreg_ext as ox
import orthoreg_ext.functional as F
from orthoreg_ext.penalties import PENALTIES

SHAPES = [(1, 1), (7, 3, 3, 3), (64, 16, 3, 3), (33, 65), (130, 17, 1, 1), (16, 300)]
CRITERIA = ("l1", "l2", "taylor", "taylor_sq", "taylor_abs", "fisher")
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}


def results(device: str, dtype: torch.dtype) -> dict[str, list[Tensor]]:
    """Every operator's results on `device`, on the same random layers whatever the device."""
    generator = torch.Generator().manual_seed(0)

    def layers() -> list[Tensor]:
        drawn = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]
        return [(0.2 * w).to(dtype).to(device) for w in drawn]

    weights, grads = layers(), layers()
    weights[2] = weights[2].contiguous(memory_format=torch.channels_last)
    out = {}
    for side in ("rows", "cols"):
        out[f"gram {side}"] = F.gram(weights, side)
        for penalty in PENALTIES:
            leaves = [w.detach().clone().requires_grad_() for w in weights]
            values = F.gram_penalty(leaves, penalty, side=side)
            values.sum().backward()
            out[f"gram_penalty {penalty} {side}"] = [values.detach(), *(w.grad for w in leaves)]
            leaves = [w.detach().clone().requires_grad_() for w in weights]
            values = F.add_gram_penalty_grad_(leaves, penalty, side=side, strength=0.5)
            out[f"add_gram_penalty_grad_ {penalty} {side}"] = [values, *(w.grad for w in leaves)]
    for dim in (0, 1):
        chosen = slice(None) if dim == 0 else slice(1, None)
        scores = F.filter_scores(weights[chosen], grads[chosen], CRITERIA, dim=dim)
        out |= {f"filter_scores {name} dim {dim}": values for name, values in scores.items()}
    return out


def main() -> int:
    failures = 0
    for dtype, tolerance in TOLERANCE.items():
        with ox.backend("cuda"):
            found = results("cuda", dtype)
        with ox.backend("reference"):
            expected = results("cpu", dtype)
        for name, tensors in found.items():
            pairs = zip(tensors, expected[name], strict=True)
            error = max(
                float((a.cpu().double() - b.double()).norm() / b.double().norm().clamp_min(1e-12))
                for a, b in pairs
            )
            if not error <= tolerance:
                failures += 1
                print(f"{dtype} {name}: relative error {error:.2e}, allowed {tolerance:.0e}")
    print(f"{failures} of {4 * len(found)} results differ from the reference")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
