"""Grams, their penalties and filter scores for lists of tensors of any mix of shapes.

A weight is a tensor [n, ...] whose leading dimension counts the filters: a conv or linear weight as
it is, in any memory format. `groups` splits it into that many filter matrices that never see each
other (grouped and depthwise convolutions), `biases` appends one more column to its filters. All
weights of a call live on one device; float64 is computed in float64, float32, bfloat16 and float16
in float32, also under autocast.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from numbers import Real

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import ops, reference
from .arguments import (
    SIDES,
    Layers,
    Sides,
    check_coefficients,
    check_grads,
    check_layers,
    check_pruned,
    choose_sides,
    drop_pruned,
    keep_taps_together,
    subtract_pruned,
)
from .backend import namespace_for
from .errors import choose
from .penalties import Penalty, get_penalty


def _by_precision(layers: Layers) -> list[list[int]]:
    """The indices of the layers computed in float32 and of those computed in float64."""
    double = [i for i, w in enumerate(layers.weights) if w.dtype == torch.float64]
    single = [i for i, w in enumerate(layers.weights) if w.dtype != torch.float64]
    return [indices for indices in (single, double) if indices]


def _gather(parts: list[Tensor], indices: list[list[int]]) -> Tensor:  # [L]
    """Puts per-precision results back into the order of the layers, in the widest precision."""
    if len(parts) == 1:
        return parts[0]
    order = [i for part in indices for i in part]
    double = any(part.dtype == torch.float64 for part in parts)
    joined = torch.cat([part.double() if double else part for part in parts])
    return joined[torch.tensor([order.index(i) for i in range(len(order))], device=joined.device)]


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
        side == "cols" or (side == "small" and layers.filters(i) > layers.fan_in(i))
        for i in range(count)
    ]
    grams: list[Tensor] = [torch.empty(0)] * count
    for part in _by_precision(layers):
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
    flat = getattr(torch.ops, namespace).gram(layers.weights, layers.biases, layers.groups, columns)
    pieces = flat.split([g * m * m for g, m, _ in sizes])
    return [piece.view(size) for piece, size in zip(pieces, sizes, strict=True)]


def _namespace(penalty: Penalty, layers: Layers) -> str | None:
    if not penalty.compiled:
        return None
    return _compiled(layers)


def _compiled(layers: Layers) -> str | None:
    """The compiled operators; forward-mode derivatives, unknown to them, go without."""
    if not torch.compiler.is_compiling() and any(
        forward_ad.unpack_dual(t).tangent is not None for t in (*layers.weights, *layers.biases)
    ):
        return None
    return namespace_for(layers.device)


def _penalty_values(layers: Layers, penalty: Penalty, sides: Sides) -> Tensor:
    namespace = _namespace(penalty, layers)
    if namespace is None:
        return reference.gram_penalty(
            layers.weights, layers.biases, layers.groups, sides.columns, sides.offsets, penalty
        )
    operators = getattr(torch.ops, namespace)
    values: Tensor = operators.gram_penalty(
        layers.weights, layers.biases, layers.groups, sides.columns, sides.offsets, penalty.name
    )[0]
    return values


def gram_penalty(
    weights: Sequence[Tensor],  # each [n, ...]
    penalty: str = "orthoreg",
    *,
    side: str = "small",
    coefficients: Sequence[float] | Tensor | None = None,  # [L]
    pruned: Sequence[Tensor | None] | None = None,  # each bool [n] or int64 indices
    biases: Sequence[Tensor | None] | None = None,  # each [n]
    groups: Sequence[int] | None = None,
) -> Tensor:  # [L]
    """Computes one orthonormality penalty a layer, twice differentiable.

    With R = G - I for the Gram matrix G = W W^T (rows) or W^T W (cols), ``orthoreg`` is
    sum |R_ij| (Lubana et al., arXiv 2009.05014, as released: entrywise, not squared, not
    Frobenius), ``so`` is sum R_ij^2 and ``offdiag`` is sum of G_ij^2 over i != j. The sub-gradient
    of |.| at 0 is 0.

    Args:
        weights: the layers.
        penalty: a name of :data:`orthoreg_ext.penalties.PENALTIES`.
        side: ``"rows"`` compares filters, ``"cols"`` inputs, ``"small"`` takes the smaller Gram
            matrix. For ``orthoreg`` and ``offdiag`` the side is part of the definition; for ``so``
            the two differ by exactly n - k with equal gradients, so the smaller one is computed.
        coefficients: factors of the layers' values; a tensor on the weights' device avoids a copy.
        pruned: filters to leave out of each Gram matrix, so that an orthonormal target does not
            regrow them; they get no gradient.
        biases: one more column of each filter matrix, as OrthoReg's released VGG code does.
        groups: the filter matrices in each weight, 1 where not given.

    Returns:
        The values [L]: float64 if any weight is, else float32; an empty tensor for no weights.

    Raises:
        TypeError: a weight is no floating-point tensor, or `weights` is no sequence.
        ValueError: unknown names, mismatched shapes, lengths or devices.
    """
    row, side = get_penalty(penalty), choose("side", side, SIDES)
    layers = check_layers(weights, biases, groups)
    if not layers.weights:
        return torch.zeros(0)
    factors = check_coefficients(coefficients, len(layers.weights), layers.device)
    layers, counts = drop_pruned(layers, check_pruned(layers, pruned))
    sides = choose_sides(layers, row, side)
    parts = _by_precision(layers)
    values = _gather(
        [_penalty_values(layers.take(part), row, sides.take(part)) for part in parts], parts
    )
    values = subtract_pruned(values, sides, counts)
    return values if factors is None else values * factors.to(values.dtype)


def add_gram_penalty_grad_(
    weights: Sequence[Tensor],  # each [n, ...]
    penalty: str = "orthoreg",
    *,
    strength: float | Tensor,
    side: str = "small",
    coefficients: Sequence[float] | Tensor | None = None,  # [L]
    pruned: Sequence[Tensor | None] | None = None,
    biases: Sequence[Tensor | None] | None = None,
    groups: Sequence[int] | None = None,
) -> Tensor:  # [L]
    """Adds the gradient of strength * sum(coefficients * gram_penalty) to each ``.grad``.

    No graph is built: the compiled operator writes straight into ``weight.grad`` and
    ``bias.grad``, which are created where they are None. Tensors that do not require a gradient
    contribute their value and stay untouched. Tensors computed from parameters (transposed views,
    parametrizations) go through autograd to the parameters they come from.

    Args:
        weights: the layers, usually parameters.
        penalty: as in :func:`gram_penalty`.
        strength: the factor of the whole sum; a 0-d tensor on the device is not read on the host.
        side: as in :func:`gram_penalty`.
        coefficients: as in :func:`gram_penalty`.
        pruned: as in :func:`gram_penalty`.
        biases: as in :func:`gram_penalty`.
        groups: as in :func:`gram_penalty`.

    Returns:
        The values of :func:`gram_penalty` with these arguments, without a graph.

    Raises:
        TypeError: as in :func:`gram_penalty`.
        ValueError: as in :func:`gram_penalty`.
    """
    row, side = get_penalty(penalty), choose("side", side, SIDES)
    if not isinstance(strength, (Real, Tensor)):
        raise TypeError(f"strength must be a number or a tensor, got {type(strength).__name__}")
    original = list(weights)
    layers = check_layers(original, biases, groups)
    if not layers.weights:
        return torch.zeros(0)
    count = len(layers.weights)
    masks = check_pruned(layers, pruned)
    factors = check_coefficients(coefficients, count, layers.device)
    double = any(w.dtype == torch.float64 for w in layers.weights)
    precision = torch.float64 if double else torch.float32
    scale = torch.ones(count, dtype=precision, device=layers.device) * strength
    if factors is not None:
        factors = factors.detach()
        scale = scale * factors
    sides = choose_sides(layers, row, side)
    in_place = [False] * count
    if _namespace(row, layers) is not None:
        in_place = _written_in_place(original, layers, masks)
    parts: list[list[int]] = []
    results: list[Tensor] = []
    rest = [i for i in range(count) if not in_place[i]]
    if rest:  # first: what it refuses, it refuses before any gradient is written
        with torch.enable_grad():
            values = gram_penalty(
                [original[i] for i in rest],
                penalty,
                side=side,
                pruned=None if masks is None else [masks[i] for i in rest],
                biases=None if biases is None else [biases[i] for i in rest],
                groups=[layers.groups[i] for i in rest],
            )
            if values.requires_grad:
                (values * _rows(scale, rest).to(values.dtype)).sum().backward()
        parts.append(rest)
        results.append(values.detach())
    for precision_part in _by_precision(layers):
        part = [i for i in precision_part if in_place[i]]
        if part:
            taken = layers.take(part)
            parts.append(part)
            results.append(_add_in_place(taken, row, sides.take(part), _rows(scale, part)))
    values = _gather(results, parts)
    return values if factors is None else values * factors.to(values.dtype)


def _rows(tensor: Tensor, indices: list[int]) -> Tensor:
    """Some entries of a tensor; all of them in order are not copied."""
    return tensor if indices == list(range(len(tensor))) else tensor[indices]


def _written_in_place(
    original: list[Tensor], layers: Layers, masks: list[Tensor | None] | None
) -> list[bool]:
    """Whether the operator writes the layer's gradients itself.

    The others go through autograd: views and copies, frozen tensors, and tensors that several
    layers share, which the operator's threads would update at the same time.
    """
    uses = Counter(id(t) for t in (*original, *layers.biases) if t.numel())
    found = []
    for i, weight in enumerate(original):
        bias = layers.biases[i]
        tensors = [weight, bias] if bias.numel() else [weight]
        found.append(
            layers.weights[i] is weight
            and (masks is None or masks[i] is None)
            and all(uses[id(t)] == 1 and _takes_grad(t) for t in tensors if t.numel())
        )
    return found


def _takes_grad(tensor: Tensor) -> bool:
    """Whether a gradient can be written into tensor.grad in the memory order of the tensor."""
    if not (tensor.requires_grad and tensor.is_leaf):
        return False
    grad = tensor.grad
    return grad is None or (
        grad.dtype == tensor.dtype
        and grad.layout is torch.strided
        and grad.stride() == tensor.stride()
    )


def _add_in_place(layers: Layers, penalty: Penalty, sides: Sides, scale: Tensor) -> Tensor:
    grads = []
    for tensor in (*layers.weights, *layers.biases):
        if tensor.numel() and tensor.grad is None:
            tensor.grad = torch.zeros_like(tensor)
        grads.append(tensor.grad if tensor.numel() else tensor)
    count = len(layers.weights)
    namespace = namespace_for(layers.device)
    with torch.no_grad():
        values: Tensor = getattr(torch.ops, str(namespace)).add_gram_penalty_grad_(
            layers.weights,
            layers.biases,
            grads[:count],
            grads[count:],
            scale.to(reference.compute_dtype(layers.weights[0].dtype)),
            layers.groups,
            sides.columns,
            sides.offsets,
            penalty.name,
        )
    return values


def filter_scores(
    weights: Sequence[Tensor],  # each [n, ...]
    grads: Sequence[Tensor] | None = None,  # like weights
    criteria: Sequence[str] = ("l1",),
    *,
    dim: int = 0,
    biases: Sequence[Tensor | None] | None = None,  # each [n]
    bias_grads: Sequence[Tensor | None] | None = None,  # each [n]
    groups: Sequence[int] | None = None,
) -> dict[str, list[Tensor]]:
    """Scores every filter of every layer in one pass over weight and gradient.

    With w and g the entries of a filter and of its gradient: ``l1`` = sum |w|, ``l2`` =
    sqrt(sum w^2), ``taylor`` = |sum w g|, ``taylor_sq`` = sum (w g)^2, ``taylor_abs`` = sum |w g|,
    ``fisher`` = (sum w g)^2. The last is OrthoReg's released estimator, the square of the mean
    gradient product: take g as the mean over the calibration samples in eval mode, because behind a
    BatchNorm in train mode sum w g is identically 0.

    Args:
        weights: the layers; [n] is allowed, e.g. the scale of a BatchNorm.
        grads: their gradients, needed by every criterion but ``l1`` and ``l2``.
        criteria: any of the names above.
        dim: 0 scores filters (outputs), 1 scores input channels.
        biases: with dim 0, one more entry of each filter.
        bias_grads: their gradients, where gradients are needed.
        groups: the filter matrices in each weight; with dim 1 there are groups * i inputs.

    Returns:
        For each criterion one tensor a layer: [n], or [groups * i] with dim 1; float64 for float64
        weights, else float32.

    Raises:
        TypeError: a weight is no floating-point tensor.
        ValueError: unknown criteria, missing gradients, mismatched shapes, lengths or devices.
    """
    if isinstance(criteria, str):
        raise TypeError(f"criteria must be a sequence of names; write ({criteria!r},)")
    names = [choose("criterion", name, reference.SCORES) for name in criteria]
    if not names:
        raise ValueError(f"criteria is empty, expected some of {', '.join(reference.SCORES)}")
    if dim not in (0, 1):
        raise ValueError(f"dim is {dim!r}, expected 0 (filters) or 1 (input channels)")
    if dim == 1 and biases is not None:
        raise ValueError(
            "biases belong to filters, not to input channels: leave them out with dim=1"
        )
    layers = check_layers(weights, biases, groups, minimum_dim=1)
    count = len(layers.weights)
    with_grads = any(name not in reference.WEIGHT_ONLY for name in names)
    slopes = None
    if dim == 1:
        layers = keep_taps_together(layers)
    if with_grads:
        layers, slopes = check_grads(layers, grads, bias_grads, names)
    scores: dict[str, list[Tensor]] = {name: [torch.empty(0)] * count for name in names}
    for part in _by_precision(layers):
        taken = layers.take(part)
        flat = _flat_scores(taken, slopes.take(part) if slopes else None, dim, names)
        lengths = [
            w.shape[0] if dim == 0 else g * (w.shape[1] if w.dim() > 1 else 1)
            for w, g in zip(taken.weights, taken.groups, strict=True)
        ]
        for name, row in zip(names, flat, strict=True):
            for i, piece in zip(part, row.split(lengths), strict=True):
                scores[name][i] = piece
    return scores


def _flat_scores(
    layers: Layers, slopes: Layers | None, dim: int, names: list[str]
) -> Tensor:  # [criteria, filters]
    grads = slopes.weights if slopes else []
    bias_grads = slopes.biases if slopes else []
    namespace = namespace_for(layers.device)
    with torch.no_grad():
        arguments = (layers.weights, grads, layers.biases, bias_grads, layers.groups, dim, names)
        if namespace is None:
            return reference.filter_scores(*arguments)
        flat: Tensor = getattr(torch.ops, namespace).filter_scores(*arguments)
        return flat


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


def filter_distances(weights: Sequence[Tensor]) -> list[Tensor]:  # each [n, n]
    """Computes the Euclidean distance between every two filters of each layer.

    They come from the Gram matrix, so those of nearly equal filters have few correct digits.
    Raises as :func:`gram` does.
    """
    distances = []
    for matrix in gram(weights):
        square = matrix.diagonal()
        distances.append(_square_root(square.unsqueeze(1) + square - 2 * matrix))
    return distances


def _square_root(square: Tensor) -> Tensor:
    """The root of what is positive, else 0, with gradient 0 there instead of NaN."""
    positive = square > 0
    return torch.where(positive, torch.where(positive, square, 1).sqrt(), 0)
