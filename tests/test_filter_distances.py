"""filter_distances and filter_correlation against numpy; where the Gram matrix is too coarse."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import orthoreg_ext.functional as F

DTYPES = {torch.float64: 1e-10, torch.float32: 1e-5}
SEEDS = range(50)


def filters(seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    n, k = int(rng.integers(1, 40)), int(rng.integers(1, 200))
    n, k = {2: (60, 5), 3: (n, 9), 4: (1, k)}.get(seed % 6, (n, k))
    rows = rng.standard_normal((n, k)).astype(np.float32)
    if seed % 6 == 0:
        rows[rng.integers(0, n, 3)] = 0
    if seed % 6 == 1:
        rows[rng.integers(0, n, 5)] = rows[0]
    if seed % 6 == 5:
        rows = rows[0] + rows * np.float32(1e-3)
    return rows


def error(got: torch.Tensor, want: np.ndarray) -> float:
    difference = np.linalg.norm(got.detach().cpu().double().numpy() - want)
    return float(difference / np.linalg.norm(want)) if difference > 0 else 0.0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_distances_are_those_of_the_differences(dtype: torch.dtype) -> None:
    for seed in SEEDS:
        rows = filters(seed)
        wide = rows.astype(np.float64)
        want = np.sqrt(((wide[:, None] - wide[None]) ** 2).sum(2))
        weight = torch.from_numpy(rows).to(dtype)
        (got,) = F.filter_distances([weight], exact=True)
        assert error(got, want) <= DTYPES[dtype], f"seed {seed}"
        assert torch.equal(got, got.T)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_correlations(dtype: torch.dtype) -> None:
    for seed in SEEDS:
        rows = filters(seed)
        wide = rows.astype(np.float64)
        norms = np.linalg.norm(wide, axis=1)
        unit = wide / np.where(norms > 0, norms, 1)[:, None]
        (got,) = F.filter_correlation([torch.from_numpy(rows).to(dtype)])
        assert error(got, unit @ unit.T) <= DTYPES[dtype], f"seed {seed}"


def test_near_filters_of_several_layers_by_hand() -> None:
    first = torch.tensor([[1e4, 0.0], [1e4, 1e-3], [0.0, 0.0]])
    second = torch.ones(2, 3, 1, 1)
    got = F.filter_distances([first, second], exact=True)
    want = torch.tensor([[0, 1e-3, 1e4], [1e-3, 0, 1e4], [1e4, 1e4, 0]])
    torch.testing.assert_close(got[0].cpu(), want, rtol=1e-6, atol=0)
    assert got[1].tolist() == [[0.0, 0.0], [0.0, 0.0]]
    assert float(F.filter_distances([first])[0][0, 1]) != pytest.approx(1e-3)  # without


def test_exact_distances_are_differentiable() -> None:
    rows = torch.randn(5, 4, dtype=torch.float64)
    rows[3] = rows[1] * (1 + 1e-5)
    rows.requires_grad_()
    mask = torch.triu(torch.ones(5, 5), 1).bool()
    assert torch.autograd.gradcheck(
        lambda w: F.filter_distances([w], exact=True)[0][mask], rows, eps=1e-8, atol=1e-4
    )
