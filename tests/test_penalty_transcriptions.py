"""Every penalty against its formula written out with loops, in float64, apart from the package.

The loops form one entry of a Gram matrix after the other; autograd differentiates them. Where a
penalty has several gradients (equal rows of `mc`, equal eigenvalues of `srip`) each is accepted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor

import orthoreg_ext.functional as F
from orthoreg_ext.penalties import PENALTIES

SHAPES = 60
Found = tuple[float, list[Tensor]]  # the value of one filter matrix, and its gradients


@dataclass(frozen=True)
class Case:
    """One layer: filter matrices, and which filters are marked (pruned, or tpp's)."""

    groups: list[Tensor]  # each [n, k], float64
    marked: list[list[int]]  # of each group
    with_bias: bool  # the last column is one
    stride: int
    taps: int  # of a square kernel


@cache
def cases() -> list[Case]:
    """Zero filters, identical filters, n > k, k = 9, one filter, one entry, orthonormal rows."""
    rng = np.random.default_rng(5)
    made = []
    for index in range(SHAPES):
        n, k = (int(v) for v in rng.integers(1, 11, 2))
        taps = 1
        if index % 4 == 1:
            k = 9
        if index % 6 == 2:
            n = 1
        if index % 6 == 4:
            n = k + int(rng.integers(1, 5))
        if index % 5 == 3:  # a convolution
            taps = 2 + index // 5 % 2
            k = taps * taps * int(rng.integers(1, 3))
        if index == 7:
            k = 1
        if index in (20, 21):  # gor makes several groups of these
            n = 12 + 4 * (index - 20)
        count = int(rng.choice([1, 1, 1, 2, 3]))
        groups, marked = [], []
        for _ in range(count):
            matrix = rng.standard_normal((n, k)) * k**-0.5
            if index % 7 == 5:
                matrix[:: max(n // 2, 1)] = 0
            if index % 7 == 6 and n > 1:
                matrix[-1] = matrix[0]
            if index in (30, 31):
                matrix = np.eye(n, k)
            groups.append(torch.from_numpy(matrix.astype(np.float32)).double())
            marked.append(sorted(rng.choice(n, n // 3, replace=False).tolist()))
        made.append(Case(groups, marked, index % 3 == 0 and k > 1, 1 + index // 10 % 2, taps))
    return made


def entries(matrix: Tensor, columns: bool) -> list[list[Tensor]]:
    """The Gram matrix, entry by entry."""
    vectors = list(matrix.T if columns else matrix)
    return [[(a * b).sum() for b in vectors] for a in vectors]


def total(terms: list[Tensor], matrix: Tensor) -> Tensor:
    return torch.stack([*terms, 0 * matrix.sum()]).sum()


def residuals(matrix: Tensor, columns: bool) -> list[list[Tensor]]:
    gram = entries(matrix, columns)
    return [[g - 1 if i == j else g for j, g in enumerate(row)] for i, row in enumerate(gram)]


def by_autograd(value: Callable[[Tensor], Tensor], matrix: Tensor) -> Found:
    leaf = matrix.clone().requires_grad_()
    found = value(leaf)
    return found.item(), [torch.autograd.grad(found, leaf)[0]]


def summed(entry: Callable[[Tensor], Tensor], matrix: Tensor, columns: bool) -> Found:
    return by_autograd(
        lambda w: total([entry(r) for row in residuals(w, columns) for r in row], w), matrix
    )


def orthoreg(matrix: Tensor, columns: bool, case: Case) -> Found:
    return summed(lambda r: r.abs(), matrix, columns)


def so(matrix: Tensor, columns: bool, case: Case) -> Found:
    return summed(lambda r: r * r, matrix, columns)


def frobenius(matrix: Tensor, columns: bool, case: Case) -> Found:
    value, (gradient,) = so(matrix, columns, case)
    root = value**0.5
    return root, [gradient / (2 * root) if root else 0 * gradient]


def offdiag(matrix: Tensor, columns: bool, case: Case) -> Found:
    def value(w: Tensor) -> Tensor:
        gram = entries(w, columns)
        pairs = [(i, j) for i in range(len(gram)) for j in range(len(gram)) if i != j]
        return total([gram[i][j] ** 2 for i, j in pairs], w)

    return by_autograd(value, matrix)


def cosine(matrix: Tensor, columns: bool, case: Case) -> Found:
    def value(w: Tensor) -> Tensor:
        vectors = [v for v in (w.T if columns else w) if float(v.detach().norm()) > 0]
        terms = [
            ((a * b).sum() / (a.norm() * b.norm())) ** 2
            for i, a in enumerate(vectors)
            for j, b in enumerate(vectors)
            if i != j
        ]
        return total(terms, w)

    return by_autograd(value, matrix)


def tpp(matrix: Tensor, columns: bool, case: Case) -> Found:
    marked = next(m for g, m in zip(case.groups, case.marked, strict=True) if g is matrix)

    def value(w: Tensor) -> Tensor:
        gram = entries(w, False)
        pairs = [(i, j) for i in range(len(gram)) for j in range(len(gram))]
        return total([gram[i][j] ** 2 for i, j in pairs if i in marked or j in marked], w)

    return by_autograd(value, matrix)


def dso(matrix: Tensor, columns: bool, case: Case) -> Found:
    (a, (left,)), (b, (right,)) = so(matrix, False, case), so(matrix, True, case)
    return a + b, [left + right]


def gor(matrix: Tensor, columns: bool, case: Case) -> Found:
    n = len(matrix)
    most = max(1, min(3, n // 4))
    while n % most:
        most -= 1
    value, gradients = 0.0, []
    for first in range(0, n, n // most):
        part = matrix[first : first + n // most]
        found = so(part, len(part) > part.shape[1] if columns is None else columns, case)
        value += found[0]
        gradients.append(found[1][0])
    return value, [torch.cat(gradients)]


def mc(matrix: Tensor, columns: bool, case: Case) -> Found:
    def row_sum(w: Tensor, i: int) -> Tensor:
        return total([r.abs() for r in residuals(w, columns)[i]], w)

    size = matrix.shape[1 if columns else 0]
    sums = [float(row_sum(matrix, i)) for i in range(size)]
    best = max(sums)
    active = [i for i in range(size) if sums[i] >= best * (1 - 2e-6)]
    return best, [by_autograd(lambda w, i=i: row_sum(w, i), matrix)[1][0] for i in active]


def srip(matrix: Tensor, columns: bool, case: Case) -> Found:
    w = matrix.numpy()
    gram = w.T @ w if columns else w @ w.T
    eigenvalues, eigenvectors = np.linalg.eigh(gram - np.eye(len(gram)))
    best = float(max(abs(eigenvalues)))
    gradients = []
    for s, u in zip(eigenvalues, eigenvectors.T, strict=True):
        if abs(s) >= best * (1 - 1e-9):
            both = np.outer(u, u)
            gradients.append(torch.from_numpy(4 * s * (w @ both if columns else both @ w)))
    return best**2, gradients


def ocnn(matrix: Tensor, columns: bool, case: Case) -> Found:
    k, stride, n = case.taps, case.stride, len(matrix)
    reach = (k - 1) // stride * stride

    def square(w: Tensor) -> Tensor:
        kernels = w.reshape(n, -1, k, k)
        terms = []
        for y in range(-reach, reach + 1, stride):
            for x in range(-reach, reach + 1, stride):
                out = torch.zeros(n, n, dtype=torch.float64)
                if y == 0 and x == 0:
                    out = -torch.eye(n, dtype=torch.float64)
                for a in range(k):
                    for b in range(k):
                        if 0 <= a + y < k and 0 <= b + x < k:
                            out = out + kernels[:, :, a, b] @ kernels[:, :, a + y, b + x].T
                terms.append((out * out).sum())
        return total(terms, w)

    value, (gradient,) = by_autograd(square, matrix)
    root = value**0.5
    return root, [gradient / (2 * root) if root else 0 * gradient]


FORMULAS = {f.__name__: f for f in (orthoreg, so, frobenius, offdiag, cosine, tpp)} | {
    f.__name__: f for f in (dso, gor, mc, srip, ocnn)
}
ROOTS = ("frobenius", "ocnn")
ONLY_ROWS = ("tpp", "ocnn")


def arguments(name: str, side: str, case: Case, dtype: torch.dtype, leave_out: bool) -> dict:
    """The layer as the package takes it."""
    rows = torch.cat(case.groups).to(dtype)
    with_bias = case.with_bias and name != "ocnn"
    weight = rows[:, :-1] if with_bias else rows
    if name == "ocnn":
        weight = weight.reshape(len(rows), -1, case.taps, case.taps)
    given: dict = {
        "weights": [weight.clone().requires_grad_()],
        "penalty": name,
        "side": side,
        "groups": [len(case.groups)],
    }
    if with_bias:
        given["biases"] = [rows[:, -1].clone().requires_grad_()]
    if name == "gor":
        given["num_groups"] = 3
    if name == "ocnn":
        given["strides"] = [case.stride]
    if name == "tpp" or leave_out:
        n = len(case.groups[0])
        marks = [n * g + i for g, marked in enumerate(case.marked) for i in marked]
        given["pruned"] = [torch.tensor(marks, dtype=torch.int64)]
    return given


@cache
def transcribed(name: str, side: str, index: int, leave_out: bool) -> list[Found]:
    """The formula of each filter matrix of a case, whose numbers are the same in float32."""
    found, case = [], cases()[index]
    for matrix, marked in zip(case.groups, case.marked, strict=True):
        kept = [i for i in range(len(matrix)) if not (leave_out and i in marked)]
        n, k = matrix.shape
        columns = side == "cols" or (side == "small" and n > k)
        if name == "gor" and side == "small":
            columns = None  # by the size of the groups
        if name in ONLY_ROWS:
            columns = False
        part = matrix[kept] if leave_out else matrix
        value, gradients = FORMULAS[name](part, columns, case)
        full = []
        for gradient in gradients:
            whole = torch.zeros_like(matrix)
            whole[kept] = gradient
            full.append(whole)
        found.append((value, full))
    return found


def check(name: str, side: str, dtype: torch.dtype, tolerance: float, leave_out: bool) -> None:
    for index, case in enumerate(cases()):
        where = f"{name} {side} {dtype} case {index}: {[tuple(g.shape) for g in case.groups]}"
        given = arguments(name, side, case, dtype, leave_out)
        leaves = [*given["weights"], *given.get("biases", [])]
        values = F.gram_penalty(**given)
        grads = torch.autograd.grad(values.sum(), leaves)
        added = F.add_gram_penalty_grad_(**given, strength=0.5)
        parts = transcribed(name, side if name not in ONLY_ROWS else "rows", index, leave_out)
        if name in ROOTS:
            want = sum(value**2 for value, _ in parts) ** 0.5
        else:
            want = sum(value for value, _ in parts)
        for got in (values, added):
            assert abs(got.item() - want) <= tolerance * max(want, 1e-30), where
        for together, strength in ((grads, 1.0), ([leaf.grad for leaf in leaves], 0.5)):
            got = together[0].double().flatten(1)
            if len(together) == 2:
                got = torch.cat([got, together[1].double()[:, None]], 1)
            for matrix, rows, (value, gradients) in zip(
                case.groups, got.chunk(len(case.groups)), parts, strict=True
            ):
                share = value / want if name in ROOTS and want else 1.0
                floor = {"cosine": _sum_of_inverse_norms(matrix), "srip": float(matrix.norm())}
                errors = [
                    float((rows - strength * share * g).norm())
                    / max(float(strength * share * g.norm()), floor.get(name, 0.0), 1e-30)
                    for g in gradients
                ]
                assert min(errors) <= tolerance, (where, strength, min(errors))


def _sum_of_inverse_norms(matrix: Tensor) -> float:
    """How large the terms of the cosines' gradient are, which cancel for parallel filters."""
    norms = torch.cat([matrix.norm(dim=0), matrix.norm(dim=1)])
    return float((1 / norms[norms > 0]).sum())


def sides() -> list[tuple[str, str]]:
    both = ("rows", "cols", "small")
    return [(n, s) for n in PENALTIES for s in both if s != "cols" or n not in ONLY_ROWS]


def test_every_penalty_has_a_transcription() -> None:
    assert FORMULAS.keys() == PENALTIES.keys()


@pytest.mark.parametrize(("name", "side"), sides())
def test_values_and_gradients_in_float64(name: str, side: str) -> None:
    check(name, side, torch.float64, 1e-10, leave_out=False)


@pytest.mark.parametrize(("name", "side"), sides())
def test_values_and_gradients_in_float32(name: str, side: str) -> None:
    check(name, side, torch.float32, 1e-5, leave_out=False)


LEFT_OUT = [(n, s) for n, s in sides() if n not in ("tpp", "gor") and s != "small"]


@pytest.mark.parametrize(("name", "side"), LEFT_OUT)
def test_filters_that_are_left_out(name: str, side: str) -> None:
    """As if the layer had the others only."""
    check(name, side, torch.float64, 1e-10, leave_out=True)


def test_gor_with_filters_left_out() -> None:
    """Groups are counted before: those that are left out leave theirs."""
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(8, 5, generator=generator, dtype=torch.float64)
    value = F.gram_penalty([weight], "gor", num_groups=2, pruned=[torch.tensor([1, 6])])
    halves = [weight[[0, 2, 3]], weight[[4, 5, 7]]]
    case = cases()[0]
    assert float(value) == pytest.approx(sum(so(h, False, case)[0] for h in halves), rel=1e-12)


@pytest.mark.parametrize("name", ["orthoreg", "so", "frobenius", "gor", "mc", "srip", "ocnn"])
def test_targets_take_the_place_of_ones(name: str) -> None:
    """Of what drives G_ii to t_i: the values of filters whose G_ii is 1 + (G_ii - t_i)."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    aims = torch.tensor([0.5, 2.0, 1.0, 0.0], dtype=torch.float64)
    got = F.gram_penalty([weight], name, side="rows", targets=[aims])
    rest = weight @ weight.T - torch.diag(aims)
    want = {
        "orthoreg": rest.abs().sum(),
        "so": rest.square().sum(),
        "frobenius": rest.norm(),
        "gor": rest.square().sum(),
        "mc": rest.abs().sum(1).max(),
        "srip": torch.linalg.matrix_norm(rest, 2) ** 2,
        "ocnn": rest.norm(),
    }
    assert float(got) == pytest.approx(float(want[name]), rel=1e-12)
