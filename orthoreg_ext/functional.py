"""Grams, their penalties and filter scores for lists of tensors of any mix of shapes.

A weight is a tensor [n, ...] whose leading dimension counts the filters: a conv or linear weight as
it is, in any memory format. `groups` splits it into that many filter matrices that never see each
other (grouped and depthwise convolutions), `biases` appends one more column to its filters. All
weights of a call live on one device; float64 is computed in float64, float32, bfloat16 and float16
in float32, also under autocast. What torch.func transforms runs in plain PyTorch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from numbers import Real

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import ops, reference, whole_matrix
from .arguments import Layers, by_precision, check_coefficients, check_layers, scale_of
from .backend import namespace_for
from .errors import choose, refuse_transforms
from .in_place import add_in_place, written_in_place
from .members import group_members as group_members  # part of this module's interface
from .options import Options, Stride, check_options, check_taken, split_groups
from .parts import gather, given, pick, take
from .penalties import Penalty, Row, WholeMatrix, get_penalty
from .precision import selected as selected_precision
from .scores import accumulate_fisher_ as accumulate_fisher_
from .scores import filter_scores as filter_scores
from .scores import group_scores as group_scores
from .sides import SIDES, Sides, check_pruned, check_targets, choose_sides, count_pruned, is_tall


def gram(
    weights: Sequence[Tensor],  # each [n, ...]
    side: str = "rows",
    *,
    biases: Sequence[Tensor | None] | None = None,  # each [n]
    groups: Sequence[int] | None = None,
) -> list[Tensor]:  # each [n, n] or [k, k], with groups > 1 [g, n / g, n / g] or [g, k, k]
    """Computes the Gram matrices of the filters, differentiable.

    Args:
        weights: the layers.
        side: ``"rows"`` for W W^T, ``"cols"`` for W^T W, ``"small"`` for the smaller of the two.
        biases: one more column of each filter matrix.
        groups: the filter matrices in each weight, 1 where not given.

    Returns:
        One tensor a layer: float64 for float64 weights, else float32.

    Raises:
        TypeError: as in :func:`gram_penalty`.
        ValueError: as in :func:`gram_penalty`.
    """
    side = choose("side", side, SIDES)
    layers = check_layers(weights, biases, groups)
    count = len(layers.weights)
    columns = [
        side == "cols" or (side == "small" and is_tall(layers.filters(i), layers.fan_in(i)))
        for i in range(count)
    ]
    grams: list[Tensor] = [torch.empty(0)] * count
    for part in by_precision(layers):
        taken, sided = layers.take(part), [columns[i] for i in part]
        # the columns' order is the caller's, not that of the memory
        ordered = [w.contiguous() if c else w for w, c in zip(taken.weights, sided, strict=True)]
        taken = Layers(ordered, taken.biases, taken.groups)
        for i, matrix in zip(part, _grams(taken, sided), strict=True):
            grams[i] = matrix if layers.groups[i] > 1 else matrix.squeeze(0)
    return grams


def _grams(layers: Layers, columns: list[bool]) -> list[Tensor]:  # each [g, m, m]
    namespace = _compiled(layers)
    if namespace is None:
        return [
            reference.gram(reference.filter_matrices(w, b, g), c)
            for w, b, g, c in zip(
                layers.weights, layers.biases, layers.groups, columns, strict=True
            )
        ]
    sizes = ops.gram_sizes(layers.weights, layers.biases, layers.groups, columns)
    flat = getattr(torch.ops, namespace).gram(
        layers.weights, layers.biases, layers.groups, columns, selected_precision()
    )
    pieces = flat.split([g * m * m for g, m, _ in sizes])
    return [piece.view(size) for piece, size in zip(pieces, sizes, strict=True)]


def _namespace(penalty: Penalty | WholeMatrix, layers: Layers) -> str | None:
    if not penalty.compiled:
        return None
    return _compiled(layers)


def _compiled(layers: Layers) -> str | None:
    """The compiled operators; forward-mode derivatives, unknown to them, go without."""
    if not torch.compiler.is_compiling() and any(
        forward_ad.unpack_dual(t).tangent is not None
        for t in (*layers.weights, *filter(Tensor.numel, layers.biases))
    ):
        return None
    return namespace_for(layers.device)


def _penalty_values(
    layers: Layers,
    masks: list[Tensor],
    targets: list[Tensor],
    penalty: Penalty | WholeMatrix,
    sides: Sides,
    options: Options,
) -> Tensor:
    """The values without the penalty's factor."""
    namespace = _namespace(penalty, layers)
    of_rows = (layers.weights, layers.biases, masks, targets, layers.groups, sides.columns)
    if isinstance(penalty, WholeMatrix):
        return whole_matrix.values(penalty.function, *of_rows, options.strides, options.vectors)
    if namespace is None:
        return reference.gram_penalty(*of_rows, sides.offsets, penalty)
    operators = getattr(torch.ops, namespace)
    values: Tensor = operators.gram_penalty(
        *of_rows, sides.offsets, penalty.functor, selected_precision()
    )[0]
    return values


def _finish(
    sums: Tensor,  # [L]
    penalty: Row,
    sides: Sides,
    masks: list[Tensor],
) -> Tensor:  # [L]
    values = count_pruned(sums, sides, masks)
    return values if penalty.factor == 1 else values * penalty.factor


def gram_penalty(
    weights: Sequence[Tensor],  # each [n, ...]
    penalty: str = "orthoreg",
    *,
    side: str = "small",
    coefficients: Sequence[float] | Tensor | None = None,  # [L]
    pruned: Sequence[Tensor | None] | None = None,  # each bool [n] or int64 indices
    targets: Sequence[float | Tensor | None] | None = None,  # each [n]
    biases: Sequence[Tensor | None] | None = None,  # each [n]
    groups: Sequence[int] | None = None,
    num_groups: int | None = None,
    strides: Sequence[Stride] | None = None,
    vectors: Sequence[Tensor] | None = None,  # each [groups, m]
) -> Tensor:  # [L]
    """Computes one orthonormality penalty a layer, twice differentiable.

    With R = G - I for the Gram matrix G = W W^T (rows) or W^T W (cols), ``orthoreg`` is
    sum |R_ij| (Lubana et al., arXiv 2009.05014, as released: entrywise, not squared, not
    Frobenius), ``so`` is sum R_ij^2, ``frobenius`` its root, ``offdiag`` is sum of G_ij^2 over
    i != j, ``cosine`` the same of G_ij / sqrt(G_ii G_jj), to which rows of zeros add nothing (nor
    do those whose squared norm is below the normal numbers, 1e-38 for all but float64), and
    ``tpp`` is sum of G_ij^2 over all pairs of which one filter is in `pruned` (Wang and Fu, arXiv
    2207.12534, who divide by n^2).
    ``dso`` is ``so`` of both sides added, ``gor`` that of groups of filters, ``mc`` the largest
    sum_j |R_ij|, ``srip`` the largest eigenvalue of R, squared, ``ocnn`` the norm of
    conv(K, K) - I_0 of a convolution. docs/penalties.md has formulas and gradients, and says where
    papers and released code differ. The groups of a layer are added (of roots, their squares).
    The sub-gradient of |.| at 0 is 0.

    Args:
        weights: the layers.
        penalty: a name of :data:`orthoreg_ext.penalties.PENALTIES`.
        side: ``"rows"`` compares filters, ``"cols"`` inputs, ``"small"`` takes the smaller Gram
            matrix. For ``orthoreg``, ``offdiag``, ``cosine`` and ``mc`` the side is part of the
            definition; for ``so`` the two differ by exactly n - k with equal gradients (for
            ``frobenius`` their squares do), so the smaller one is computed; ``srip`` of the larger
            one is at least 1; for ``dso`` it has no meaning. Of ``tpp`` and ``ocnn``, and with
            `targets`, ``"small"`` compares filters.
        coefficients: factors of the layers' values; a tensor on the weights' device avoids a copy.
        pruned: filters to leave out of each Gram matrix, so that an orthonormal target does not
            regrow them; they get no gradient. For ``tpp`` those to be decorrelated from all others.
            A bool mask on the weights' device avoids a copy.
        targets: of penalties that drive norms to 1: the squared norm that each filter is driven
            to instead; one number for a layer, or one for each of its filters. Not of ``dso``.
        biases: one more column of each filter matrix, as OrthoReg's released VGG code does.
        groups: the filter matrices in each weight, 1 where not given.
        num_groups: of ``gor``: a filter matrix of n filters is split into groups of consecutive
            ones, as many as the largest divisor of n up to min(num_groups, n // 4); 32 where not
            given, the default of its source.
        strides: of ``ocnn``: of each convolution, a number or one for height and one for width, 1
            where not given. A convolution of stride S and dilation d has the stride S / gcd(S, d).
        vectors: of ``srip``: estimates of the eigenvectors, as many entries as the Gram matrix has
            rows. Each call makes one step of power iteration in place and takes them as constants:
            the value is at most the true one and the second derivative is that for a fixed vector.
            Without, an eigen-solver finds the true value (which waits for a GPU).

    Returns:
        The values [L]: float64 if any weight is, else float32; an empty tensor for no weights.

    Raises:
        TypeError: a weight is no floating-point tensor, or `weights` is no sequence.
        ValueError: unknown names, mismatched shapes, lengths or devices.
    """
    row, side = get_penalty(penalty), choose("side", side, SIDES)
    check_taken(row, num_groups=num_groups, strides=strides, vectors=vectors)
    layers = check_layers(weights, biases, groups)
    if not layers.weights:
        return torch.zeros(0)
    factors = check_coefficients(coefficients, len(layers.weights), layers.device)
    masks, aims = check_pruned(layers, pruned, row), check_targets(layers, targets, row)
    layers = split_groups(layers, row, num_groups)
    sides = choose_sides(layers, row, side, masks, aims)
    options = check_options(layers, row, sides, strides, vectors)
    parts = by_precision(layers)
    found = [
        _penalty_values(
            *(layers.take(part), take(masks, part), take(aims, part)),
            *(row, sides.take(part), options.take(part)),
        )
        for part in parts
    ]
    values = _finish(gather(found, parts), row, sides, masks)
    return values if factors is None else values * factors.to(values.dtype)


@torch.inference_mode(False)  # backward passes are to add to the gradients
def add_gram_penalty_grad_(
    weights: Sequence[Tensor],  # each [n, ...]
    penalty: str = "orthoreg",
    *,
    strength: float | Tensor,
    side: str = "small",
    coefficients: Sequence[float] | Tensor | None = None,  # [L]
    pruned: Sequence[Tensor | None] | None = None,
    targets: Sequence[float | Tensor | None] | None = None,
    biases: Sequence[Tensor | None] | None = None,
    groups: Sequence[int] | None = None,
    num_groups: int | None = None,
    strides: Sequence[Stride] | None = None,
    vectors: Sequence[Tensor] | None = None,  # each [groups, m]
) -> Tensor:  # [L]
    """Adds the gradient of strength * sum(coefficients * gram_penalty) to each ``.grad``.

    No graph is built: the compiled operator writes straight into ``weight.grad`` and
    ``bias.grad``, which are created where they are None. ``mc``, ``srip`` and ``ocnn``, which have
    none, go through autograd. Tensors that do not require a gradient
    contribute their value and stay untouched. Tensors computed from parameters (transposed views,
    parametrizations) go through autograd to the parameters they come from.

    Args:
        weights: the layers, usually parameters.
        penalty: as in :func:`gram_penalty`.
        strength: the factor of the whole sum; a 0-d tensor on the device is not read on the host.
        side: as in :func:`gram_penalty`.
        coefficients: as in :func:`gram_penalty`.
        pruned: as in :func:`gram_penalty`.
        targets: as in :func:`gram_penalty`.
        biases: as in :func:`gram_penalty`.
        groups: as in :func:`gram_penalty`.
        num_groups: as in :func:`gram_penalty`.
        strides: as in :func:`gram_penalty`.
        vectors: as in :func:`gram_penalty`.

    Returns:
        The values of :func:`gram_penalty` with these arguments, without a graph.

    Raises:
        RuntimeError: inside a transformation of torch.func.
        TypeError: as in :func:`gram_penalty`.
        ValueError: as in :func:`gram_penalty`.
    """
    refuse_transforms(
        "add_gram_penalty_grad_ changes .grad",
        "transform a function that returns gram_penalty(...) instead",
    )
    row, side = get_penalty(penalty), choose("side", side, SIDES)
    if not isinstance(strength, (Real, Tensor)):
        raise TypeError(f"strength must be a number or a tensor, got {type(strength).__name__}")
    check_taken(row, num_groups=num_groups, strides=strides, vectors=vectors)
    if isinstance(weights, Tensor) or not isinstance(weights, Iterable):
        check_layers(weights, biases, groups)  # which refuses it
    original = list(weights)
    layers = check_layers(original, biases, groups)
    if not layers.weights:
        return torch.zeros(0)
    count = len(layers.weights)
    masks, aims = check_pruned(layers, pruned, row), check_targets(layers, targets, row)
    factors = check_coefficients(coefficients, count, layers.device)
    if factors is not None:
        factors = factors.detach()
    scale = scale_of(layers, strength, factors)
    given_groups = layers.groups
    layers = split_groups(layers, row, num_groups)
    sides = choose_sides(layers, row, side, masks, aims)
    check_options(layers, row, sides, strides, vectors)
    namespace, precision = _namespace(row, layers), selected_precision()
    in_place = [False] * count if namespace is None else written_in_place(original, layers)
    parts: list[list[int]] = []
    results: list[Tensor] = []
    rest = [i for i in range(count) if not in_place[i]]
    if rest:  # first: what it refuses, it refuses before any gradient is written
        # autocast would round the products of the backward pass
        with torch.enable_grad(), torch.autocast(layers.device.type, enabled=False):
            values = gram_penalty(
                [original[i] for i in rest],
                penalty,
                side=side,
                pruned=given(masks, rest),
                targets=given(aims, rest),
                biases=None if biases is None else [biases[i] for i in rest],
                groups=[given_groups[i] for i in rest],
                num_groups=num_groups,
                strides=None if strides is None else [strides[i] for i in rest],
                vectors=None if vectors is None else [vectors[i] for i in rest],
            )
            if values.requires_grad:
                values.backward(pick(scale, rest).to(values.dtype))
        parts.append(rest)
        results.append(values.detach())
    for precision_part in by_precision(layers):
        part = [i for i in precision_part if in_place[i]]
        if part:
            taken, sided, masked = layers.take(part), sides.take(part), take(masks, part)
            added = add_in_place(
                *(str(namespace), taken, masked, take(aims, part)),
                *(row, sided, pick(scale, part), precision),
            )
            parts.append(part)
            results.append(_finish(added, row, sided, masked))
    values = gather(results, parts)
    return values if factors is None else values * factors.to(values.dtype)


def filter_correlation(weights: Sequence[Tensor]) -> list[Tensor]:  # each [n, n]
    """Computes the cosine between every two filters of each layer.

    The diagonal is 1, rows and columns of a zero filter are 0. Raises as :func:`gram` does.
    """
    correlations = []
    for matrix in gram(weights):
        norms = _square_root(matrix.diagonal())
        inverse = torch.where(norms > 0, 1 / torch.where(norms > 0, norms, 1), 0)
        correlations.append(inverse.unsqueeze(1) * matrix * inverse)
    return correlations


def filter_distances(
    weights: Sequence[Tensor], *, exact: bool = False
) -> list[Tensor]:  # each [n, n]
    """Computes the Euclidean distance between every two filters of each layer.

    They come from the Gram matrix, so those of nearly equal filters have few correct digits.

    Args:
        weights: the layers.
        exact: compute the distances of near filters again, from their difference. It waits for the
            GPU, and there is no single graph for the compiler.

    Raises:
        TypeError: as in :func:`gram`.
        ValueError: as in :func:`gram`.
    """
    distances = []
    for weight, matrix in zip(weights, gram(weights), strict=True):
        norms = matrix.diagonal()
        scale = norms.unsqueeze(1) + norms
        square = scale - 2 * matrix
        found = _square_root(square)
        if exact:
            near = square <= _NEAR[square.dtype] * scale
            found = _recomputed(found, weight.flatten(1).to(square.dtype), near)
        distances.append(found)
    return distances


_NEAR = {torch.float32: 0.1, torch.float64: 1e-4}
"""Where the Gram matrix has too few digits left: |w_i - w_j|^2 over |w_i|^2 + |w_j|^2."""


def _recomputed(
    distances: Tensor,  # [n, n]
    rows: Tensor,  # [n, k]
    near: Tensor,  # bool [n, n]
) -> Tensor:  # [n, n]
    i, j = near.triu(1).nonzero(as_tuple=True)
    step = max(1, 2**22 // max(1, rows.shape[1]))  # a few dozen MiB at once
    found = [
        torch.linalg.vector_norm(rows[i[at : at + step]] - rows[j[at : at + step]], dim=1)
        for at in range(0, len(i), step)
    ]
    if not found:
        return distances
    values = torch.cat(found)
    return distances.index_put((i, j), values).index_put((j, i), values)


def _square_root(square: Tensor) -> Tensor:
    """The root of what is positive, else 0, with gradient 0 there instead of NaN."""
    positive = square > 0
    return torch.where(positive, torch.where(positive, square, 1).sqrt(), 0)
