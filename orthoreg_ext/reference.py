"""Every operator in plain PyTorch: the definition, the fallback and the oracle.

Imports nothing of the package. Half-precision inputs are computed in float32, float64 in float64,
also under autocast. A layer is a weight [groups * n, ...] whose leading dimension counts the
filters; flattened and split by group it is a batch of filter matrices [groups, n, k], with the bias
as one more column where one is given. An empty bias means none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor


class Entrywise(Protocol):
    """What an entrywise penalty has to say: phi, phi' and the target (see penalties.py)."""

    @property
    def identity(self) -> bool: ...  # noqa: D102
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
) -> Tensor:  # [groups, n, k] or [groups, n, k + 1]
    """The filters as rows, one matrix a group, in the computing precision."""
    matrix = weight.flatten(1) if weight.dim() > 1 else weight.unsqueeze(1)
    if bias.numel():
        matrix = torch.cat([matrix, bias.unsqueeze(1).to(matrix.dtype)], 1)
    matrices: Tensor = matrix.to(compute_dtype(weight.dtype)).unflatten(
        0, (groups, weight.shape[0] // groups)
    )
    return matrices


def gram(matrices: Tensor, columns: bool) -> Tensor:  # [g, n, k] -> [g, n, n] or [g, k, k]
    """G = W W^T, or W^T W on the columns."""
    with torch.autocast(matrices.device.type, enabled=False):
        return matrices.mT @ matrices if columns else matrices @ matrices.mT


def residual(gram_matrix: Tensor, identity: bool) -> Tensor:  # [g, m, m] -> [g, m, m]
    """R = G - I, or G without its diagonal."""
    eye = torch.eye(gram_matrix.shape[-1], dtype=gram_matrix.dtype, device=gram_matrix.device)
    return gram_matrix - eye if identity else gram_matrix * (1 - eye)


def gram_penalty(
    weights: Sequence[Tensor],  # each [groups * n, ...]
    biases: Sequence[Tensor],  # each [groups * n] or empty
    groups: Sequence[int],
    columns: Sequence[bool],
    offsets: Sequence[float],
    penalty: Entrywise,
) -> Tensor:  # [L]
    """P_l = offset_l + sum_ij phi(R_ij) for each layer, summed over its groups."""
    values = [
        penalty.value(residual(gram(filter_matrices(w, b, g), c), penalty.identity)).sum() + o
        for w, b, g, c, o in zip(weights, biases, groups, columns, offsets, strict=True)
    ]
    return torch.stack(values)


def gram_penalty_grad(
    matrices: Tensor,  # [g, n, k]
    coefficient: Tensor,  # []
    columns: bool,
    penalty: Entrywise,
) -> Tensor:  # [g, n, k]
    """dP/dW = 2 c S W (rows) or 2 c W S (columns), with S = phi'(R)."""
    slope = penalty.slope(residual(gram(matrices, columns), penalty.identity))
    with torch.autocast(matrices.device.type, enabled=False):
        return 2 * coefficient * (matrices @ slope if columns else slope @ matrices)


def gram_penalty_grad_grad(
    matrices: Tensor,  # [g, n, k]
    direction: Tensor,  # [g, n, k], V
    coefficient: Tensor,  # []
    columns: bool,
    penalty: Entrywise,
) -> tuple[Tensor, Tensor]:  # [g, n, k], []
    """Gradient of <V, gram_penalty_grad> with respect to W and to the coefficient.

    With Q = phi''(R) . sym(V W^T) the first is 2 c (S V + 2 Q W), on the columns
    2 c (V S + 2 W Q) with Q = phi''(R) . sym(W^T V); the second is 2 <V, S W>.
    """
    rest = residual(gram(matrices, columns), penalty.identity)
    slope = penalty.slope(rest)
    with torch.autocast(matrices.device.type, enabled=False):
        cross = matrices.mT @ direction if columns else direction @ matrices.mT
        bend = residual_mask(penalty, penalty.curvature(rest)) * (cross + cross.mT)  # 2 Q
        if columns:
            moved, turned, unit = direction @ slope, matrices @ bend, matrices @ slope
        else:
            moved, turned, unit = slope @ direction, bend @ matrices, slope @ matrices
    return 2 * coefficient * (moved + turned), 2 * (direction * unit).sum()


def residual_mask(penalty: Entrywise, entries: Tensor) -> Tensor:  # [g, m, m] -> [g, m, m]
    """Drops the diagonal of `entries` where the penalty does not see it."""
    return entries if penalty.identity else residual(entries, identity=False)


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
    by_input: Tensor = matrices.unflatten(2, (inputs, -1)).transpose(1, 2)
    return by_input.flatten(2).flatten(0, 1)


def filter_scores(
    weights: Sequence[Tensor],  # each [groups * n, i, ...]
    grads: Sequence[Tensor],  # like weights, or none at all
    biases: Sequence[Tensor],  # each [groups * n] or empty
    bias_grads: Sequence[Tensor],  # like biases
    groups: Sequence[int],
    dim: int,
    criteria: Sequence[str],
) -> Tensor:  # [len(criteria), sum of filters]
    """Every criterion for every filter (dim 0) or input channel (dim 1) of all layers."""
    layers = []
    for i, (weight, bias, group) in enumerate(zip(weights, biases, groups, strict=True)):
        w = filter_entries(weight, bias, group, dim)
        g = w.new_empty(0)
        if grads:
            g = filter_entries(grads[i], bias_grads[i], group, dim).to(w.dtype)
        layers.append(torch.stack([SCORES[c](w, g) for c in criteria]))
    return torch.cat(layers, 1)
