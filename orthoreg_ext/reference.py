"""Every operator in plain PyTorch: the definition, the fallback and the oracle.

Imports nothing of the package. Half-precision inputs are computed in float32, float64 in float64,
also under autocast. A layer is a weight [groups * n, ...] whose leading dimension counts the
filters; flattened and split by group it is a batch of filter matrices [groups, n, k], with the bias
as one more column where one is given. An empty bias means none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


class Entrywise(Protocol):
    """What an entrywise penalty has to say: phi, phi', phi'' and R (see penalties.py)."""

    @property
    def diagonal(self) -> str: ...  # noqa: D102
    @property
    def root(self) -> bool: ...  # noqa: D102
    @property
    def cosines(self) -> bool: ...  # noqa: D102
    @property
    def counts(self) -> Callable[[Tensor, Tensor], Tensor] | None: ...  # noqa: D102
    @property
    def value(self) -> Callable[[Tensor], Tensor]: ...  # noqa: D102
    @property
    def slope(self) -> Callable[[Tensor], Tensor]: ...  # noqa: D102
    @property
    def curvature(self) -> Callable[[Tensor], Tensor]: ...  # noqa: D102


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 stays, everything smaller is computed in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def filter_matrices(
    weight: Tensor,  # [groups * n, ...]
    bias: Tensor,  # [groups * n] or empty
    groups: int,
    pruned: Tensor | None = None,  # bool [groups * n] or empty
) -> Tensor:  # [groups, n, k] or [groups, n, k + 1]
    """The filters as rows, one matrix a group, in the computing precision; pruned ones are 0."""
    matrix = weight.flatten(1) if weight.dim() > 1 else weight.unsqueeze(1)
    if bias.numel():
        matrix = torch.cat([matrix, bias.unsqueeze(1).to(matrix.dtype)], 1)
    if pruned is not None and pruned.numel():
        matrix = matrix.masked_fill(pruned.unsqueeze(1), 0)
    matrices: Tensor = matrix.to(compute_dtype(weight.dtype)).unflatten(
        0, (groups, weight.shape[0] // groups)
    )
    return matrices


class _Product(torch.autograd.Function):
    """Switches autocast off in both passes: the one of a backward pass would round its products."""

    generate_vmap_rule = True

    @staticmethod
    def forward(left: Tensor, right: Tensor) -> Tensor:
        with torch.autocast(left.device.type, enabled=False):
            return left @ right

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        left, right = ctx.saved_tensors
        return product(grad, right.mT), product(left.mT, grad)


class _DualProduct(_Product):
    """The same with derivatives in forward mode, which the compiler refuses to trace."""

    @staticmethod
    def jvp(ctx: Any, left_along: Tensor, right_along: Tensor) -> Tensor:
        left, right = ctx.saved_tensors
        return product(left_along, right) + product(left, right_along)


def product(left: Tensor, right: Tensor) -> Tensor:  # [g, a, b], [g, b, c] -> [g, a, c]
    """The matrix product, computed and differentiated in the precision of its factors."""
    if not torch.is_grad_enabled() or torch._C._get_tracing_state() is not None:
        return _Product.forward(left, right)  # TorchScript saves no functions of Python
    kind = _Product if torch.compiler.is_compiling() else _DualProduct
    result: Tensor = kind.apply(left, right)  # type: ignore[no-untyped-call]
    return result


def gram(matrices: Tensor, columns: bool) -> Tensor:  # [g, n, k] -> [g, n, n] or [g, k, k]
    """G = W W^T, or W^T W on the columns."""
    turned = matrices.mT
    return product(turned, matrices) if columns else product(matrices, turned)


def turn(symmetric: Tensor, matrices: Tensor, columns: bool) -> Tensor:  # [g, m, m], [g, n, k]
    """S W, or W S on the columns."""
    return product(matrices, symmetric) if columns else product(symmetric, matrices)


@dataclass(frozen=True)
class Rows:
    """What a penalty knows of the rows of one layer's Gram matrices, where these are filters."""

    pruned: Tensor | None = None  # bool [g, n]: left out, or marked
    targets: Tensor | None = None  # [g, n]

    @classmethod
    def of(
        cls,
        pruned: Tensor | None,  # bool [groups * n] or empty
        targets: Tensor | None,  # [groups * n] or empty
        groups: int,
        columns: bool,
    ) -> Rows:
        """Of flat tensors, of which an empty one and None mean none."""

        def rows(tensor: Tensor | None) -> Tensor | None:
            if tensor is None or not tensor.numel() or columns:
                return None
            by_group: Tensor = tensor.unflatten(0, (groups, -1))
            return by_group

        return cls(rows(pruned), rows(targets))


def cosines_of(gram_matrix: Tensor) -> tuple[Tensor, Tensor]:  # [g, m, m] -> [g, m, m], [g, m]
    """G_ij / sqrt(G_ii G_jj) with a zero diagonal, and 1 / sqrt(G_ii), both in float64.

    0 for rows of zeros, and for those whose G_ii is no normal number in the precision of G.
    """
    wide = gram_matrix.double()
    square = wide.diagonal(dim1=-2, dim2=-1)
    zero = square < torch.finfo(gram_matrix.dtype).tiny
    inverse = torch.where(zero, 0, square.masked_fill(zero, 1).rsqrt())
    turned = wide * (inverse.unsqueeze(-1) * inverse.unsqueeze(-2))
    return without_diagonal(turned), inverse


def without_diagonal(matrix: Tensor) -> Tensor:  # [g, m, m]
    """The matrix with zeros on its diagonal."""
    eye = torch.eye(matrix.shape[-1], dtype=torch.bool, device=matrix.device)
    return matrix.masked_fill(eye, 0)


def residual(
    gram_matrix: Tensor,  # [g, m, m]
    penalty: Entrywise,
    rows: Rows,
) -> Tensor:  # [g, m, m]
    """R: G - T, or the cosines, with zeros for the entries that do not count."""
    if penalty.cosines:
        return cosines_of(gram_matrix)[0].to(gram_matrix.dtype)
    rest = gram_matrix
    if penalty.diagonal == "target":
        ones = torch.ones_like(rest.diagonal(dim1=-2, dim2=-1))
        target = ones if rows.targets is None else rows.targets
        if rows.pruned is not None:
            target = target.masked_fill(rows.pruned, 0)
        rest = rest - torch.diag_embed(target)
    return only_counted(rest, penalty, rows)


def only_counted(entries: Tensor, penalty: Entrywise, rows: Rows) -> Tensor:  # [g, m, m]
    """Puts 0 for the entries that the penalty does not see."""
    if penalty.counts is not None:
        marked = rows.pruned
        if marked is None:
            marked = torch.zeros_like(entries.diagonal(dim1=-2, dim2=-1), dtype=torch.bool)
        counts = penalty.counts(marked.unsqueeze(-1), marked.unsqueeze(-2))
        entries = entries.masked_fill(~counts, 0)
    return without_diagonal(entries) if penalty.diagonal == "free" else entries


def _left_out(penalty: Entrywise, pruned: Tensor | None) -> Tensor | None:
    """The filters that read as zeros."""
    return None if penalty.counts is not None else pruned


def gram_penalty(
    weights: Sequence[Tensor],  # each [groups * n, ...]
    biases: Sequence[Tensor],  # each [groups * n] or empty
    pruned: Sequence[Tensor],  # each bool [groups * n] or empty; or none at all
    targets: Sequence[Tensor],  # each [groups * n] or empty; or none at all
    groups: Sequence[int],
    columns: Sequence[bool],
    offsets: Sequence[float],
    penalty: Entrywise,
) -> Tensor:  # [L]
    """P_l = offset_l + sum_ij phi(R_ij) for each layer, summed over its groups, or the root of it.

    A pruned filter reads as zeros, with target 0 for its norm: it adds nothing; unless it is only
    marked (see `counts` in penalties.py).
    """
    values = []
    for i, (weight, bias, group, column) in enumerate(
        zip(weights, biases, groups, columns, strict=True)
    ):
        mask = pruned[i] if pruned else None
        rows = Rows.of(mask, targets[i] if targets else None, group, column)
        matrices = filter_matrices(weight, bias, group, _left_out(penalty, mask))
        rest = residual(gram(matrices, column), penalty, rows)
        if penalty.root:  # where the sum overflows the root need not
            rest = rest.double()
        values.append(penalty.value(rest).sum() + offsets[i])
    sums = torch.stack(values)
    return root(sums).to(compute_dtype(weights[0].dtype)) if penalty.root else sums


def root(sums: Tensor) -> Tensor:
    """The root, with gradient 0 where it is 0."""
    zero = sums == 0
    return sums.masked_fill(zero, 1).sqrt().masked_fill(zero, 0)


def slopes(
    matrices: Tensor,  # [g, n, k]
    columns: bool,
    penalty: Entrywise,
    rows: Rows,
) -> Tensor:  # [g, m, m]
    """S, the derivative of P in the entries of G.

    That is phi'(R), but of cosines C, with d = sqrt(G_ii), S_ij = phi'(C_ij) / (d_i d_j) and
    S_ii = -sum_j phi'(C_ij) C_ij / d_i^2.
    """
    matrix = gram(matrices, columns)
    if not penalty.cosines:
        return penalty.slope(residual(matrix, penalty, rows))
    cosine, inverse = cosines_of(matrix)
    slope = penalty.slope(cosine)
    turn = -(slope * cosine).sum(-1) * inverse.square()
    entries = slope * (inverse.unsqueeze(-1) * inverse.unsqueeze(-2)) + torch.diag_embed(turn)
    return entries.to(matrix.dtype)


def gram_penalty_grad(
    matrices: Tensor,  # [g, n, k]
    coefficient: Tensor,  # []
    columns: bool,
    penalty: Entrywise,
    rows: Rows,
) -> Tensor:  # [g, n, k]
    """dP/dW = 2 c S W (rows) or 2 c W S (columns), where P is no root."""
    slope = slopes(matrices, columns, penalty, rows)
    return 2 * coefficient * turn(slope, matrices, columns)


def gram_penalty_grad_grad(
    weight: Tensor,  # [groups * n, ...]
    bias: Tensor,  # [groups * n] or empty
    directions: tuple[Tensor, Tensor],  # like weight and bias, V
    coefficient: Tensor,  # []
    groups: int,
    columns: bool,
    penalty: Entrywise,
    pruned: Tensor | None = None,  # bool [groups * n] or empty
    targets: Tensor | None = None,  # [groups * n] or empty
) -> tuple[Tensor, Tensor]:  # [g, n, k], []
    """Gradient of <V, gram_penalty_grad> with respect to W and to the coefficient.

    With Q = phi''(R) . sym(V W^T) the first is 2 c (S V + 2 Q W), on the columns
    2 c (V S + 2 W Q) with Q = phi''(R) . sym(W^T V); the second is 2 <V, S W>. Those of cosines
    are left to autograd.
    """
    mask = _left_out(penalty, pruned)
    rows = Rows.of(pruned, targets, groups, columns)
    matrices = filter_matrices(weight, bias, groups, mask)
    direction = filter_matrices(*directions, groups, mask)
    if penalty.cosines:
        differentiable = torch.is_grad_enabled() and matrices.requires_grad
        with torch.enable_grad():
            leaf = matrices if differentiable else matrices.detach().requires_grad_()
            unit = gram_penalty_grad(leaf, torch.ones_like(coefficient), columns, penalty, rows)
            inner = (direction * unit).sum()
            (along,) = torch.autograd.grad(inner, leaf, create_graph=True)
        return coefficient * along, inner
    rest = residual(gram(matrices, columns), penalty, rows)
    slope = penalty.slope(rest)
    cross = product(matrices.mT, direction) if columns else product(direction, matrices.mT)
    bend = only_counted(penalty.curvature(rest), penalty, rows) * (cross + cross.mT)  # 2 Q
    moved, bent = turn(slope, direction, columns), turn(bend, matrices, columns)
    unit = turn(slope, matrices, columns)
    return 2 * coefficient * (moved + bent), 2 * (direction * unit).sum()


SCORES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "l1": lambda w, g: w.abs().sum(1),
    "l2": lambda w, g: w.square().sum(1).sqrt(),
    "taylor": lambda w, g: (w * g).sum(1).abs(),
    "taylor_sq": lambda w, g: (w * g).square().sum(1),
    "taylor_abs": lambda w, g: (w * g).abs().sum(1),
    "fisher": lambda w, g: (w * g).sum(1).square(),
}
"""Each criterion from the entries w and gradients g, both [filters, entries], of one layer.

One that needs no gradient (WEIGHT_ONLY) is given an empty g.
"""

WEIGHT_ONLY = ("l1", "l2")
"""The criteria that need no gradient."""


def filter_entries(
    weight: Tensor,  # [groups * n, i, ...]
    bias: Tensor,  # [groups * n] or empty; outputs only
    groups: int,
    dim: int,
) -> Tensor:  # [groups * n, entries] or [groups * i, entries]
    """The entries that one score reduces over: a filter's, or an input channel's."""
    matrices = filter_matrices(weight, bias, groups)
    if dim == 0:
        return matrices.flatten(0, 1)
    inputs = weight.shape[1] if weight.dim() > 1 else 1
    taps = matrices.shape[2] // max(inputs, 1)
    by_input: Tensor = matrices.unflatten(2, (inputs, taps)).transpose(1, 2)
    return by_input.flatten(2).flatten(0, 1)


def filter_scores(
    weights: Sequence[Tensor],  # each [groups * n, i, ...]
    grads: Sequence[Tensor],  # like weights, or none at all
    biases: Sequence[Tensor],  # each [groups * n] or empty
    bias_grads: Sequence[Tensor],  # like biases
    groups: Sequence[int],
    dim: int,
    criteria: Sequence[str],
) -> Tensor:  # [len(criteria), scores of all layers]
    """Every criterion for every filter (dim 0), input channel (1) or both (2) of all layers.

    Of both, the filters of all layers come before all input channels; a bias is an entry of its
    filter only.
    """
    layers = []
    for axis in (0, 1) if dim == 2 else (dim,):
        for i, (weight, bias, group) in enumerate(zip(weights, biases, groups, strict=True)):
            extra = bias if axis == 0 or dim == 1 else bias.new_empty(0)
            w = filter_entries(weight, extra, group, axis)
            g = w.new_empty(0)
            if grads:
                extra = bias_grads[i] if extra.numel() else extra
                g = filter_entries(grads[i], extra, group, axis).to(w.dtype)
            layers.append(torch.stack([SCORES[c](w, g) for c in criteria]))
    return torch.cat(layers, 1)


FISHER_DIAG = "fisher_diag"
"""sum w^2 F with F the accumulated g^2: the saliency of optimal brain damage (LeCun, Denker and
Solla, 1989), twice, with the diagonal of the empirical Fisher matrix for that of the Hessian."""


def accumulate_fisher_(
    weights: Sequence[Tensor],  # each [groups * n, i, ...]
    grads: Sequence[Tensor],  # like weights
    fisher: Sequence[Tensor],  # like weights, in the computing precision
    groups: Sequence[int],
    dim: int,
    criteria: Sequence[str],  # of SCORES, or FISHER_DIAG
) -> Tensor:  # [len(criteria), scores of all layers]
    """F += g^2, and every criterion as in filter_scores, with the new F."""
    for f, g in zip(fisher, grads, strict=True):
        f += g.to(f.dtype).square()
    layers = []
    for axis in (0, 1) if dim == 2 else (dim,):
        for weight, grad, f, group in zip(weights, grads, fisher, groups, strict=True):
            none = weight.new_empty(0)
            w, g, entries = (filter_entries(t, none, group, axis) for t in (weight, grad, f))
            layers.append(
                torch.stack(
                    [
                        (w.square() * entries).sum(1) if c == FISHER_DIAG else SCORES[c](w, g)
                        for c in criteria
                    ]
                )
            )
    return torch.cat(layers, 1)


REDUCTIONS = ("mean", "sum", "max", "first")
"""What group_scores makes of the scores that belong to one root channel."""


def group_scores(
    scores: Sequence[Tensor],  # each [n], of one precision
    entries: Tensor,  # [E] int64: (index of a tensor) * 2^32 + (index in it)
    starts: Tensor,  # [R + 1] int64: entries[starts[r] : starts[r + 1]] belong to root channel r
    reduction: str,
) -> Tensor:  # [R]
    """Gathers the scores of each root channel and reduces them, in double."""
    lengths = torch.tensor([0, *(len(s) for s in scores)], device=entries.device)
    offsets = lengths.cumsum(0)[entries >> 32]
    values = torch.cat(list(scores)).double()[offsets + (entries & 0xFFFFFFFF)]
    counts = starts.diff()
    if reduction == "first":
        return values[starts[:-1]].to(scores[0].dtype)
    where = torch.repeat_interleave(counts)
    total = values.new_zeros(len(counts))
    if reduction == "max":
        total = total.scatter_reduce(0, where, values, "amax", include_self=False)
    else:
        total = total.index_add(0, where, values)
        total = total / counts if reduction == "mean" else total
    return total.to(scores[0].dtype)
