"""Every criterion against its formula in numpy, in float64, sharing no code with the package."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from orthoreg_ext.pruning import CRITERIA, Criterion, exemplar, variety
from orthoreg_ext.pruning.evidence import Evidence
from orthoreg_ext.pruning.layout import layout
from orthoreg_ext.pruning.units import Group, Slot, Structure

Array = NDArray[np.float64]
SEEDS = range(50)
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5}
DTYPES = sorted(TOLERANCES, key=str)


def case(seed: int) -> tuple[Array, Array]:
    """A weight and a gradient, [n, i, kh, kw], exact in float32."""
    rng = np.random.default_rng(seed)
    kind = ("any", "zero", "identical", "n > k", "k = 9", "one", "all equal")[seed % 7]
    shape = [int(rng.integers(2, 24)), int(rng.integers(1, 9)), *rng.integers(1, 4, 2).tolist()]
    if kind == "n > k":
        shape = [int(rng.integers(8, 24)), 1, *rng.integers(1, 3, 2).tolist()]
    if kind == "k = 9":
        shape = [shape[0], 1, 3, 3]
    if kind == "one":
        shape[0] = 1
    w, g = (rng.standard_normal(shape).astype(np.float32) for _ in range(2))
    if kind == "zero":
        w[rng.integers(0, shape[0], 2)] = 0
    if kind == "identical":
        w[-1] = w[0]
        w[shape[0] // 2] = w[-1]
    if kind == "all equal":
        w[:] = w[0]
    return w.astype(np.float64), g.astype(np.float64)


def structure_of(model: nn.Sequential, units: int) -> Structure:
    """The units of a chain of which the first layer makes them, by hand."""
    slots = []
    for i, module in enumerate(model):
        side = "both" if isinstance(module, nn.BatchNorm2d) else "in" if i else "out"
        where = layout(module, side)
        assert where is not None
        kind = type(module).__name__ if side == "both" else "filters"
        channels = torch.arange(units)
        slots.append(Slot(str(i), str(i), side, kind, where, channels.clone(), channels))
    return Structure(slots, [Group("0", ("0",), torch.arange(units), units, 1)], [])


def scored(row: str | Criterion, model: nn.Sequential, units: int, **options: Any) -> Array:
    row = CRITERIA[row] if isinstance(row, str) else row
    (scores,) = row.score(Evidence(row.name, model, structure_of(model, units), **options))
    assert scores.dtype == torch.float64
    assert bool(scores.isfinite().all())
    return scores.numpy()


def chain(w: Array, g: Array, dtype: torch.dtype, bias: tuple[Array, Array] | None = None) -> Any:
    """A convolution with this weight and gradient, its BatchNorm, and one that reads it."""
    n, inputs, *kernel = w.shape
    model = nn.Sequential(
        nn.Conv2d(inputs, n, tuple(kernel), bias=bias is not None),
        nn.BatchNorm2d(n),
        nn.Conv2d(n, 3, 2),
    ).to(dtype)
    given = [(model[0].weight, w, g)]
    if bias is not None:
        given.append((model[0].bias, *bias))
    for parameter, value, grad in given:
        parameter.data.copy_(torch.from_numpy(value))
        parameter.grad = torch.from_numpy(grad).to(dtype)
    return model


def rows(w: Array) -> Array:
    return w.reshape(len(w), -1)


def compare(got: Array, want: Array, dtype: torch.dtype, terms: Array | None = None) -> None:
    """Relative to the scores, or to the sizes of the terms where these cancel."""
    scale = np.linalg.norm(want if terms is None else terms)
    assert np.linalg.norm(got - want) <= TOLERANCES[dtype] * scale, (got, want)


# ---- from weights and gradients


def pair_distances(w: Array) -> Array:
    return np.sqrt(((w[:, None] - w[None]) ** 2).sum(2))


def pair_cosines(w: Array) -> Array:
    n = len(w)
    found = np.zeros((n, n))
    for i in range(n):
        for j in range(n):
            size = np.sqrt((w[i] ** 2).sum() * (w[j] ** 2).sum())
            found[i, j] = abs((w[i] * w[j]).sum()) / size if size > 0 and i != j else 0.0
    return found


def overlap(w: Array) -> Array:
    lost = np.all(w == 0, axis=1)
    return -np.where(lost, len(w) - 1, pair_cosines(w).sum(1))


FORMULAS = {
    "l1": lambda w, g: np.abs(w).sum(1),
    "l2": lambda w, g: np.sqrt((w**2).sum(1)),
    "taylor": lambda w, g: np.abs((w * g).sum(1)),
    "taylor_sq": lambda w, g: ((w * g) ** 2).sum(1),
    "taylor_abs": lambda w, g: np.abs(w * g).sum(1),
    "fisher": lambda w, g: (w * g).sum(1) ** 2,
    "fpgm": lambda w, g: pair_distances(w).sum(1),
    "repr": lambda w, g: overlap(w),
}
TERMS = {
    "taylor": lambda w, g: np.abs(w * g).sum(1),
    "fisher": lambda w, g: np.abs(w * g).sum(1) ** 2,
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", sorted(FORMULAS))
def test_filters(name: str, dtype: torch.dtype) -> None:
    for seed in SEEDS:
        w, g = case(seed)
        got = scored(name, chain(w, g, dtype), len(w))
        terms = TERMS[name](rows(w), rows(g)) if name in TERMS else None
        compare(got, FORMULAS[name](rows(w), rows(g)), dtype, terms)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", sorted(FORMULAS))
def test_a_bias_is_one_more_entry(name: str, dtype: torch.dtype) -> None:
    for seed in SEEDS:
        w, g = case(seed)
        rng = np.random.default_rng(seed)
        b, h = (rng.standard_normal(len(w)).astype(np.float32).astype(np.float64) for _ in "bh")
        got = scored(name, chain(w, g, dtype, (b, h)), len(w), bias=True)
        w, g = np.concatenate([rows(w), b[:, None]], 1), np.concatenate([rows(g), h[:, None]], 1)
        compare(got, FORMULAS[name](w, g), dtype, TERMS[name](w, g) if name in TERMS else None)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", ["in", "both"])
@pytest.mark.parametrize("name", ["fisher", "l1", "l2", "taylor", "taylor_abs", "taylor_sq"])
def test_input_channels(name: str, dim: str, dtype: torch.dtype) -> None:
    for seed in SEEDS:
        w, g = case(seed)  # the reader: its inputs are the units
        made, slope = case(seed + 7 * (1 + seed))
        made, slope = (np.resize(t, (w.shape[1], *t.shape[1:])) for t in (made, slope))
        n = w.shape[1]
        model = nn.Sequential(
            nn.Conv2d(made.shape[1], n, made.shape[2:], bias=False),
            nn.Conv2d(n, len(w), w.shape[2:], bias=False),
        ).to(dtype)
        for layer, value, grad in ((model[0], made, slope), (model[1], w, g)):
            layer.weight.data.copy_(torch.from_numpy(value))
            layer.weight.grad = torch.from_numpy(grad).to(dtype)
        read = [np.swapaxes(t, 0, 1).reshape(n, -1) for t in (w, g)]
        made_rows = [rows(made), rows(slope)]
        want, terms = FORMULAS[name](*read), TERMS.get(name, FORMULAS[name])(*read)
        if dim == "both":
            want = (want + FORMULAS[name](*made_rows)) / 2
            terms = (terms + TERMS.get(name, FORMULAS[name])(*made_rows)) / 2
        compare(scored(name, model, n, dim=dim), want, dtype, terms)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_batchnorm_scales(dtype: torch.dtype) -> None:
    for seed in SEEDS:
        w, g = case(seed)
        model, n = chain(w, g, dtype), len(w)
        rng = np.random.default_rng(seed)
        gamma, beta, dgamma, dbeta = rng.standard_normal((4, n)).astype(np.float32).astype(float)
        gamma[0] = 0
        for parameter, value, grad in (
            (model[1].weight, gamma, dgamma),
            (model[1].bias, beta, dbeta),
        ):
            parameter.data.copy_(torch.from_numpy(value))
            parameter.grad = torch.from_numpy(grad).to(dtype)
        compare(scored("bn_scale", model, n), np.abs(gamma), dtype)
        compare(scored("bn_scale", model, n, bias=True), np.abs(gamma), dtype)
        compare(scored("bn_taylor", model, n), (gamma * dgamma) ** 2, dtype)
        both = gamma * dgamma, beta * dbeta
        terms = (np.abs(both[0]) + np.abs(both[1])) ** 2
        compare(scored("bn_taylor", model, n, bias=True), sum(both) ** 2, dtype, terms)


# ---- affinity propagation


def propagated(
    similar: Array, preference: Array, damp: float, most: int
) -> NDArray[np.int64] | None:
    """The exemplar of every point: the messages of Frey and Dueck (2007), until they are stable."""
    n = len(similar)
    diagonal = np.arange(n)
    s = similar.copy()
    s[diagonal, diagonal] = preference
    r, a = np.zeros((n, n)), np.zeros((n, n))
    history: list[tuple[int, ...]] = []
    while len(history) < 15 or len(set(history[-15:])) > 1 or not history[-1]:
        if len(history) == most:
            return None
        total = a + s
        others = np.stack([np.delete(total, k, 1).max(1) for k in range(n)], 1)
        r = damp * r + (1 - damp) * (s - others)
        support = np.maximum(r, 0)
        support[diagonal, diagonal] = r[diagonal, diagonal]
        new = support.sum(0) - support
        new[~np.eye(n, dtype=bool)] = np.minimum(0, new[~np.eye(n, dtype=bool)])
        a = damp * a + (1 - damp) * new
        history.append(tuple(np.flatnonzero((a + r)[diagonal, diagonal] > 0)))
    chosen = np.array(history[-1])
    for last in (False, True):
        owner = chosen[s[:, chosen].argmax(1)]
        owner[chosen] = chosen
        if not last:  # scikit-learn then lets the best of each cluster stand for it
            clusters = [np.flatnonzero(owner == k) for k in chosen]
            chosen = np.array([c[s[np.ix_(c, c)].sum(0).argmax()] for c in clusters])
    return owner


def exemplar_scores(w: Array, beta: float) -> Array:
    n, distances, norms = len(w), pair_distances(w), np.sqrt((w**2).sum(1))
    if n == 1:
        return np.array([2.0])
    if np.all(distances == 0):  # the first stands for all
        return np.array([2.0] + [0.0] * (n - 1))
    if n == 2:  # the preference is above the similarity
        return np.array([1.5, 1.5])
    similar = -np.round(distances**2 / (distances**2).max(), 12)
    later = 1e-9 * np.arange(n) / n  # of copies the first
    preference = beta * np.median(similar, axis=0) - later
    for damp, most in ((0.5, 200), (0.7, 1000), (0.9, 2000)):
        owner = propagated(similar - later, preference, damp, most)
        if owner is not None:
            break
    assert owner is not None
    share = np.bincount(owner, minlength=n) / n
    reach = norms + norms[owner]
    far = distances[np.arange(n), owner] / np.where(reach > 0, reach, 1)
    return np.where(owner == np.arange(n), 1 + share, far)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("beta", [0.73, 1.4])
def test_exemplars(beta: float, dtype: torch.dtype) -> None:
    pytest.importorskip("sklearn")
    for seed in SEEDS:
        w, g = case(seed)
        row = "exemplar" if beta == 0.73 else exemplar(beta)
        got = scored(row, chain(w, g, dtype), len(w))
        want = exemplar_scores(rows(w), beta)
        compare(got, want, dtype)


# ---- variety


def rising(values: Array) -> list[float]:
    """Sorted; of equal ones each is the next larger number."""
    found: list[float] = []
    for value in np.sort(values):
        found.append(max(value, np.nextafter(found[-1], np.inf)) if found else value)
    return found


def in_order(host: Array, order: list[int]) -> Array:
    scores = np.empty(len(host))
    scores[order] = rising(host)
    return scores


def pairwise(host: Array, w: Array) -> Array:
    alike = np.round(pair_cosines(w), 12)
    zero = np.all(w == 0, axis=1)
    order = [i for i in np.argsort(host, kind="stable") if zero[i]]
    left = [i for i in range(len(w)) if not zero[i]]
    while len(left) > 1:
        most = max(alike[i, j] for i in left for j in left if i != j)
        pairs = [(i, j) for i in left for j in left if i != j and alike[i, j] == most]
        order.append(min((i for pair in pairs for i in pair), key=lambda i: (host[i], -i)))
        left.remove(order[-1])
    return in_order(host, order + left)


def redundancy(host: Array, w: Array) -> Array:
    alike = np.round(pair_cosines(w), 12)
    found = np.zeros(len(w))
    for i in range(len(w)):
        above = [j for j in range(len(w)) if host[j] > host[i] or (host[j] == host[i] and j < i)]
        found[i] = 1.0 if np.all(w[i] == 0) else max((alike[i, j] for j in above), default=0.0)
    return found


def gated(host: Array, w: Array) -> Array:
    ready = redundancy(host, w) >= 0.5
    return in_order(host, sorted(range(len(w)), key=lambda i: (not ready[i], host[i], i)))


VARIETY = {
    "pairwise": pairwise,
    "reweight": lambda host, w: host * (1 - redundancy(host, w)),
    "gate": gated,
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("host", ["l2", "fisher"])
@pytest.mark.parametrize("mode", sorted(VARIETY))
def test_variety(mode: str, host: str, dtype: torch.dtype) -> None:
    for seed in SEEDS:
        w, g = case(seed)
        got = scored(variety(host, mode), chain(w, g, dtype), len(w))
        want = VARIETY[mode](FORMULAS[host](rows(w), rows(g)), rows(w))
        compare(got, want, dtype)


MEASURED = ["grasp", "rdt", "group_fisher", "group_fisher_macs", "group_fisher_nothing"]


def test_every_criterion_is_transcribed() -> None:
    others = {"bn_scale", "bn_taylor", "exemplar", "variety"}
    assert set(CRITERIA) == set(FORMULAS) | set(MEASURED) | others
