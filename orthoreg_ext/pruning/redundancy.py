"""Redundancy of filters within one matrix, from their distances and cosines."""

from __future__ import annotations

import importlib
import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import functional as F

BETA = 0.73
_ATTEMPTS = ((0.5, 200), (0.7, 1000), (0.9, 2000), (0.97, 5000))  # damping, iterations


def distances(matrix: Tensor) -> Tensor:  # [n, k] -> [n, n] float64
    """The Euclidean distance of every two filters; exact also for filters that nearly agree."""
    return F.filter_distances([matrix.double()], exact=True)[0]


def cosines(matrix: Tensor) -> Tensor:  # [n, k] -> [n, n] float64
    """The |cosine| of every two filters, 0 on the diagonal and for filters of zeros."""
    wide = matrix.double()
    largest = wide.abs().amax(1, keepdim=True) if matrix.shape[1] else wide.new_zeros(len(wide), 1)
    scaled = wide / torch.where(largest > 0, largest, 1)  # no square under- or overflows
    return F.filter_correlation([scaled])[0].abs().clamp(max=1).fill_diagonal_(0)


def is_zero(matrix: Tensor) -> Tensor:  # [n, k] -> bool [n]
    """Which filters have no entry but 0."""
    return (matrix == 0).all(1)


def fpgm(matrix: Tensor) -> Tensor:  # [n, k] -> [n] float64
    """sum_j |w_i - w_j|: the filters nearest to the geometric median go first.

    He et al., CVPR 2019. The released code would take the cosine by an option that its conditions
    never reach; the paper has the Euclidean distance only.
    """
    return distances(matrix).sum(1)


def repr_(matrix: Tensor) -> Tensor:  # [n, k] -> [n] float64
    """-sum_{j != i} |cos(w_i, w_j)|: the filters that overlap most with the others go first.

    Prakash et al., RePr, CVPR 2019, who divide by n; negated, as low scores go first. A filter of
    zeros overlaps with none, so others count 0 for it; it gets -(n - 1) itself and goes first,
    where the released code has NaN.
    """
    overlap = cosines(matrix).sum(1)
    return -torch.where(is_zero(matrix), float(len(matrix) - 1), overlap)


def exemplars(matrix: Tensor, beta: float = BETA) -> Tensor:  # [n, k] -> int64 [n], CPU
    """The exemplar of every filter by affinity propagation, as EPruner chooses them.

    Frey and Dueck's algorithm (scikit-learn's) on the similarities s_ij = -|w_i - w_j|^2 with the
    preference beta * median_i s_ij for filter j, the diagonal included: Lin et al., EPruner (2021),
    utils/common.py:100-132. A larger beta gives fewer exemplars. Where it does not converge it is
    run again with more damping and more iterations; the released code would go on without
    exemplars. So that the answer is the same on every machine, the similarities are divided by the
    largest and rounded, and of copies the first is the exemplar: each filter is made a little less
    attractive than the one before, by 1e-9 in all.

    Raises:
        ImportError: scikit-learn is not installed.
        ValueError: no convergence at all.
    """
    n = len(matrix)
    if n == 1:
        return torch.zeros(1, dtype=torch.int64)
    square = distances(matrix).square().cpu().numpy()
    similar = -np.round(square / max(square.max(), np.finfo(float).tiny), 12)
    later = 1e-9 * np.arange(n) / n
    preference = beta * np.median(similar, axis=0) - later
    similar -= later
    propagate = _affinity_propagation()
    for damping, iterations in _ATTEMPTS:
        model = propagate(
            affinity="precomputed",
            preference=preference,
            damping=damping,
            max_iter=iterations,
            random_state=0,
        )
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model.fit(similar)
        converged = not any(w.category.__name__ == "ConvergenceWarning" for w in caught)
        if converged and len(model.cluster_centers_indices_):
            centers = np.asarray(model.cluster_centers_indices_)
            return torch.from_numpy(centers[model.labels_].astype(np.int64))
    raise ValueError(
        f"affinity propagation on {n} filters did not converge with beta={beta}, up to damping "
        f"{_ATTEMPTS[-1][0]} and {_ATTEMPTS[-1][1]} iterations; try another beta, e.g. {beta + 0.1}"
    )


def exemplar(matrix: Tensor, beta: float = BETA) -> Tensor:  # [n, k] -> [n] float64
    """Scores by :func:`exemplars`: those that are none go first.

    EPruner keeps the exemplars and no others, and says no more of their order; ours is: a filter i
    of exemplar e has |w_i - w_e| / (|w_i| + |w_e|), in [0, 1], so that copies of an exemplar go
    first; an exemplar has 1 + the share of the filters that it stands for.
    """
    owners = exemplars(matrix, beta).to(matrix.device)
    own = torch.arange(len(matrix), device=matrix.device)
    far = distances(matrix)[own, owners]
    norms = matrix.double().norm(dim=1)
    reach = norms + norms[owners]
    within = (far / torch.where(reach > 0, reach, 1)).clamp(max=1)
    share = torch.bincount(owners, minlength=len(matrix)).double() / len(matrix)
    return torch.where(owners == own, 1 + share, within)


def _affinity_propagation() -> Any:
    try:
        return importlib.import_module("sklearn.cluster").AffinityPropagation
    except ImportError as error:
        raise ImportError(
            "criterion 'exemplar' needs scikit-learn for its affinity propagation: "
            "pip install scikit-learn>=1.3"
        ) from error
