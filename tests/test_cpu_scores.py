"""The CPU kernels of the scores: every instruction set, thread count, range and rounding."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import orthoreg_ext as ox
import orthoreg_ext.functional as F
from orthoreg_ext.build_info import compiled, reason
from orthoreg_ext.reference import FISHER_DIAG, SCORES, compute_dtype
from tests.conftest import relative_error

pytestmark = pytest.mark.skipif(not compiled, reason=reason)

ALL = (*SCORES, FISHER_DIAG)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SHAPES = {  # shape: groups
    (130, 40, 3, 3): 1,  # several blocks and strips, no whole number of them
    (67, 259): 1,
    (3, 5000): 1,
    (40, 1): 1,
    (21,): 1,
    (64, 4, 3, 3): 16,
    (300, 1, 3, 3): 300,
    (270, 33, 1, 1): 1,
    (5, 2, 1, 7): 5,
}


def case(seed: int, dtype: torch.dtype, last: bool) -> tuple[list[Tensor], list[Tensor]]:
    """Weights of all shapes and their gradients."""
    generator = torch.Generator().manual_seed(seed)
    layout = torch.channels_last if last else torch.contiguous_format
    tensors = []
    for shape in list(SHAPES) * 2:
        tensor = torch.randn(shape, generator=generator).to(dtype)
        tensors.append(
            tensor.contiguous(memory_format=layout) if tensor.dim() == 4 else tensor.contiguous()
        )
    return tensors[: len(SHAPES)], tensors[len(SHAPES) :]


def all_scores(weights: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    """Every statistic of both dimensions, of one call and of two; twice the F; what F becomes."""
    groups = list(SHAPES.values())
    fisher = [torch.zeros_like(w, dtype=compute_dtype(w.dtype)) for w in weights]
    found = []
    for dim in (0, 1):
        scores = F.filter_scores(weights, grads, tuple(SCORES), dim=dim, groups=groups)
        found += [t for name in SCORES for t in scores[name]]
    for _ in range(2):
        both = F.accumulate_fisher_(weights, grads, fisher, ALL, dim=(0, 1), groups=groups)
        found += [t for scores in both for name in ALL for t in scores[name]]
    return found + fisher


def errors_here() -> list[float]:
    """The largest relative error of each precision and layout, against float64."""
    found = []
    for seed, dtype in enumerate(DTYPES):
        for last in (False, True):
            weights, grads = case(seed, dtype, last)
            with ox.backend("reference"):
                double = ([t.double().contiguous() for t in ts] for ts in (weights, grads))
                want = all_scores(*double)
            got = all_scores(weights, grads)
            found.append(max(relative_error(a, b) for a, b in zip(got, want, strict=True)))
    return found


@pytest.mark.parametrize("level", ["generic", "avx2", "avx512"])
def test_every_instruction_set_agrees_with_float64(level: str) -> None:
    code = "import json, tests.test_cpu_scores as t; print(json.dumps(t.errors_here()))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parent.parent,
        env={**os.environ, "ORTHOREG_EXT_CPU": level, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if "does not have these instructions" in done.stderr or "is unknown" in done.stderr:
        pytest.skip(f"this processor or build has no {level}")
    assert done.returncode == 0, done.stderr
    errors = json.loads(done.stdout)
    for dtype, pair in zip(DTYPES, zip(errors[::2], errors[1::2], strict=True), strict=True):
        assert max(pair) <= (1e-13 if dtype == torch.float64 else 1e-6), dtype


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("last", [False, True])
def test_results_do_not_depend_on_the_threads(dtype: torch.dtype, last: bool) -> None:
    weights, grads = case(1, dtype, last)
    before = torch.get_num_threads()
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(all_scores(weights, grads))
    torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("scale", [1e-42, 1e-30, 1e-20, 1e-12, 1e18, 1e25, 1e37])
def test_squares_that_leave_the_range_of_float(scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(9, 70, generator=generator)
    weight[4] *= scale
    weight[:, 7] *= scale
    grad = torch.randn(9, 70, generator=generator)
    grad[5] = 1e-20
    got = F.filter_scores([weight], [grad], tuple(SCORES), dim=(0, 1))
    with ox.backend("reference"):
        want = F.filter_scores([weight.double()], [grad.double()], tuple(SCORES), dim=(0, 1))
    for one, other in zip(got, want, strict=True):
        for name in SCORES:
            # 2e-45: what is below the smallest float is lost
            torch.testing.assert_close(
                one[name][0], other[name][0].float(), rtol=2e-6, atol=2e-45, msg=name
            )


@pytest.mark.parametrize("value", [0.1, 1 / 3, 0.7])
def test_equal_entries_do_not_add_up_their_rounding(value: float) -> None:
    weight, grad = torch.full((300, 4000), value), torch.full((300, 4000), 1 / value)
    exact = weight[0, 0].double()
    for axis, scores in enumerate(F.filter_scores([weight], [grad], tuple(SCORES), dim=(0, 1))):
        count = (4000, 300)[axis]
        product = exact * grad[0, 0].double()
        want = {
            "l1": count * exact,
            "l2": count**0.5 * exact,
            "taylor": count * product,
            "taylor_sq": count * product**2,
            "taylor_abs": count * product,
            "fisher": (count * product) ** 2,
        }
        for name, expected in want.items():
            error = (scores[name][0].double() / expected - 1).abs().max().item()
            assert error <= 1e-6, name


def test_rows_of_nothing_but_zeros_score_zero() -> None:
    weight, grad = torch.randn(6, 40), torch.randn(6, 40)
    weight[2], grad[3] = 0, 0
    scores = F.filter_scores([weight], [grad], tuple(SCORES))
    assert all(scores[name][0][2] == 0 for name in SCORES)
    assert all(scores[name][0][3] == 0 for name in SCORES if name not in ("l1", "l2"))


@pytest.mark.parametrize("dim", [0, 1, (0, 1)])
def test_what_needs_no_check_and_what_is_checked_score_alike(dim) -> None:
    weights, grads = case(2, torch.float32, last=True)
    groups = list(SHAPES.values())
    plain = F.filter_scores(weights, grads, tuple(SCORES), dim=dim, groups=groups)
    none = None if dim == 1 else [None] * len(weights)  # biases that are none: all is checked
    mixed = F.filter_scores(
        [*weights, torch.ones(2, 3, dtype=torch.float64)],
        [*grads, torch.ones(2, 3)],
        tuple(SCORES),
        dim=dim,
        biases=none and [*none, None],
        groups=[*groups, 1],
    )
    for one, other in zip(*((s if dim == (0, 1) else (s,)) for s in (plain, mixed)), strict=True):
        for name in SCORES:
            for a, b in zip(one[name], other[name][:-1], strict=True):
                assert torch.equal(a, b)
                assert not a.requires_grad
