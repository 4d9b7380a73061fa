"""Penalties of a Gram matrix as a whole, in plain PyTorch: a value a layer, gradients by autograd.

They are no sums over the entries of G, so no kernel has them. Each is a function of
:class:`Filters` and stands in a :class:`~orthoreg_ext.penalties.WholeMatrix` row of penalties.py.
They are computed in float32, of float64 weights in float64, also under autocast.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import reference

KICK = 1e-6
"""What power iteration adds of a fixed vector: else an eigenvector that is no longer the top one
(of a diagonal A, say) would be kept for ever."""


@dataclass(frozen=True)
class Filters:
    """The filters of one layer.

    Attributes:
        matrices: W, [g, n, k]; pruned filters are 0.
        columns: whether G is W^T W instead of W W^T.
        target: the diagonal of T in A = G - T, [g, m]; None: T = I.
        shape: of one filter without its bias: (k,) or (inputs, height, width).
        stride: of the convolution.
        vector: the current top eigenvectors of A, [g, m], to be improved in place.
    """

    matrices: Tensor
    columns: bool
    target: Tensor | None = None
    shape: tuple[int, ...] = ()
    stride: tuple[int, int] = (1, 1)
    vector: Tensor | None = None

    def residual(self, matrices: Tensor, columns: bool) -> Tensor:  # [g, n, k] -> [g, m, m]
        """A = G - T of these filters in some precision."""
        gram = reference.gram(matrices, columns)
        if self.target is None:
            return gram - torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
        return gram - torch.diag_embed(self.target.to(gram.dtype))

    def apply(self, x: Tensor) -> Tensor:  # [g, m] -> [g, m]
        """A x by two products with W, without G."""
        inner, outer = (self.matrices, self.matrices.mT)
        if not self.columns:
            inner, outer = outer, inner
        moved = reference.product(outer, reference.product(inner, x.unsqueeze(-1))).squeeze(-1)
        return moved - (x if self.target is None else self.target * x)


Function = Callable[[Filters], Tensor]  # a scalar


def values(
    function: Function,
    weights: Sequence[Tensor],  # each [groups * n, ...]
    biases: Sequence[Tensor],  # each [groups * n] or empty
    pruned: Sequence[Tensor],  # each bool [groups * n] or empty; or none at all
    targets: Sequence[Tensor],  # each [groups * n] or empty; or none at all
    groups: Sequence[int],
    columns: Sequence[bool],
    strides: Sequence[tuple[int, int]] = (),  # one a layer, or none at all
    vectors: Sequence[Tensor] = (),  # each [groups, m], or none at all
) -> Tensor:  # [L]
    """The function of each layer."""
    found = []
    with torch.autocast(weights[0].device.type, enabled=False):
        for i, (weight, bias, group, column) in enumerate(
            zip(weights, biases, groups, columns, strict=True)
        ):
            mask = pruned[i] if pruned else None
            rows = reference.Rows.of(mask, targets[i] if targets else None, group, column)
            matrices = reference.filter_matrices(weight, bias, group, mask)
            target = rows.targets
            if rows.pruned is not None:
                ones = matrices.new_ones(matrices.shape[:-1]) if target is None else target
                target = ones.masked_fill(rows.pruned, 0)
            filters = Filters(
                *(matrices, column, target, tuple(weight.shape[1:])),
                *(strides[i] if strides else (1, 1), vectors[i] if vectors else None),
            )
            found.append(function(filters))
    return torch.stack(found)


def _largest(entries: Tensor, floor: float = 0.0) -> Tensor:  # [g, m] -> [g]
    """The largest entry of each row, the first of several; `floor` where there is no larger one."""
    with_floor: Tensor = torch.nn.functional.pad(entries, (0, 1), value=floor)
    return with_floor.max(-1).values


def max_row_sum(filters: Filters) -> Tensor:
    """max_i sum_j |A_ij|, the norm of A for the largest component; summed over the groups.

    One row i is active, the first of equal ones; the gradient is (E + E^T) W (rows) or W (E + E^T)
    (cols) with E = e_i s^T, s = sign(A_i), sign(0) = 0.
    """
    rows = filters.residual(filters.matrices, filters.columns).abs().sum(-1)
    return _largest(rows).sum()


def spectral_norm_squared(filters: Filters) -> Tensor:
    """sigma_max(A)^2, summed over the groups.

    Without a vector by an eigen-solver in float64 (which waits for a GPU): the true value, with
    true second derivatives. The two sides have the same eigenvalues but for those -1 that the
    larger one has more, so the smaller one serves for both.

    With a vector u one step of power iteration, u := A u / |A u|, replaces it in place; then
    |A u|^2 with u fixed, whose gradient is 2 (v u^T + u v^T) W with v = A u (W on the right, cols):
    4 s u u^T W where u is the eigenvector of s = +-sigma_max. If both signs occur, any mixture of
    their eigenvectors gives a subgradient. Four products of W and a vector, G is not formed.
    """
    if filters.vector is not None:
        u = _improved(filters, filters.vector, 1)
        with torch.no_grad():
            filters.vector.copy_(u)
        return filters.apply(u).square().sum()
    n, k = filters.matrices.shape[-2:]
    columns, floor = filters.columns, 0.0
    if filters.target is None and n != k:
        columns = n > k
        floor = float(columns != filters.columns)
    residual = filters.residual(filters.matrices.double(), columns)
    finite = residual.isfinite().all(-1).all(-1)  # the solver refuses the others
    eigenvalues = torch.linalg.eigvalsh(residual.masked_fill(~finite[:, None, None], 0))
    largest = _largest(eigenvalues.square(), floor)
    total: Tensor = torch.where(finite, largest, residual.square().sum((-2, -1))).sum()
    return total.to(filters.matrices.dtype)


@torch.no_grad()
def _improved(filters: Filters, vector: Tensor, steps: int) -> Tensor:  # [g, m]
    """Top eigenvectors of A after steps of power iteration; kept where A is 0 or not finite."""
    kick = KICK * _generic(vector)
    for _ in range(steps):
        moved = filters.apply(vector + kick)
        norm = torch.linalg.vector_norm(moved, dim=-1, keepdim=True)
        usable = (norm > 0) & norm.isfinite()
        vector = torch.where(usable, moved / norm.masked_fill(~usable, 1), vector)
    return vector


def _generic(like: Tensor) -> Tensor:  # [g, m]
    """Fixed unit vectors that are at right angles to nothing in particular; made on the device."""
    count = torch.arange(1, like.shape[-1] + 1, dtype=torch.float64, device=like.device)
    wave: Tensor = torch.cos(count * count).to(like.dtype).expand_as(like)
    norm: Tensor = torch.linalg.vector_norm(wave, dim=-1, keepdim=True)
    return wave / norm.clamp_min(1e-30)


@torch.no_grad()
def start_vectors(
    weight: Tensor,  # [groups * n, ...]
    bias: Tensor | None,  # [groups * n]
    groups: int,
    columns: bool,
    steps: int = 100,
) -> Tensor:  # [groups, m]
    """Top eigenvectors for :func:`spectral_norm_squared`, by power iteration from fixed ones."""
    with torch.autocast(weight.device.type, enabled=False):
        none = weight.new_empty(0) if bias is None else bias.detach()
        filters = Filters(reference.filter_matrices(weight.detach(), none, groups), columns)
        g, n, k = filters.matrices.shape
        empty = filters.matrices.new_empty(g, k if columns else n)
        return _improved(filters, _generic(empty).clone(), steps)


def self_convolution_norm(filters: Filters) -> Tensor:
    """The norm of conv(K, K; stride S, padding floor((k - 1) / S) S) - I_0, over all groups.

    The output at a shift is the product of the filters with the filters shifted by it, at shift 0
    the Gram matrix; at the opposite shift stands the transpose, so half of them are formed, each
    from the taps that overlap, and no convolution with its padding. I_0 is the identity at shift 0.
    Squares are added in float64: where they overflow their root need not. The gradient is 0 where
    the value is.
    """
    kernels = filters.matrices.unflatten(-1, (*filters.shape, *(1, 1)[: 3 - len(filters.shape)]))
    tall, wide = kernels.shape[-2:]
    total = filters.residual(filters.matrices, columns=False).double().square().sum()
    for y, x in _shifts((tall, wide), filters.stride):
        height, width = tall - y, wide - abs(x)
        left, right = max(x, 0), max(-x, 0)
        ahead = kernels[..., y:, left : left + width].flatten(2)
        behind = kernels[..., :height, right : right + width].flatten(2)
        total = total + 2 * reference.product(ahead, behind.mT).double().square().sum()
    return reference.root(total).to(filters.matrices.dtype)


def _shifts(size: tuple[int, int], stride: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """One of each two opposite shifts, multiples of the stride, at which taps overlap; not 0."""
    (height, width), (down, across) = size, stride
    reach = (width - 1) // across * across
    for y in range(0, height, down):
        for x in range(-reach, reach + 1, across):
            if (y, x) > (0, 0):
                yield y, x
