"""What some penalties take beside weights, pruned filters and targets: checked once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .arguments import Layers, is_count
from .errors import refuse_transforms, wrong_length
from .penalties import PENALTIES, Row
from .reference import compute_dtype
from .sides import Sides

NUM_GROUPS = 32
"""The default of `num_groups`: that of GOR's released training script."""
LEAST_FILTERS = 4
"""The least number of filters in a group of GOR, as released."""

Stride = int | tuple[int, int]


@dataclass(frozen=True)
class Options:
    """One entry a layer, or none at all."""

    strides: list[tuple[int, int]] = field(default_factory=list)
    vectors: list[Tensor] = field(default_factory=list)  # each [groups, m]

    def take(self, indices: Sequence[int]) -> Options:
        """The options of some of the layers."""
        return Options(
            [self.strides[i] for i in indices] if self.strides else [],
            [self.vectors[i] for i in indices] if self.vectors else [],
        )


def check_taken(row: Row, **given: object) -> None:
    """Refuses what the penalty does not take.

    Raises:
        ValueError: an argument that is not None is not in `takes` of the row.
    """
    for name, value in given.items():
        if value is not None and name not in row.takes:
            takers = ", ".join(repr(r.name) for r in PENALTIES.values() if name in r.takes)
            raise ValueError(f"penalty {row.name!r} takes no {name}=, only {takers}: leave it out")


def count_groups(filters: int, num_groups: int) -> int:
    """GOR's groups of n filters: the largest divisor of n up to min(num_groups, n // 4).

    The released code takes that minimum itself and fails where it is no divisor. At least 1.
    """
    most = max(1, min(num_groups, filters // LEAST_FILTERS))
    return next(count for count in range(most, 0, -1) if filters % count == 0)


def check_num_groups(num_groups: object) -> int:
    """Returns the number of groups, the default for None.

    Raises:
        ValueError: it is no positive integer.
    """
    if num_groups is None:
        return NUM_GROUPS
    if not is_count(num_groups):
        raise ValueError(f"num_groups is {num_groups!r}, expected a positive number of groups")
    return num_groups


def split_groups(layers: Layers, row: Row, num_groups: int | None) -> Layers:
    """The layers with each filter matrix split into the penalty's groups of consecutive filters."""
    if "num_groups" not in row.takes:
        return layers
    most = check_num_groups(num_groups)
    groups = [g * count_groups(layers.filters(i), most) for i, g in enumerate(layers.groups)]
    return replace(layers, groups=groups)


def check_options(
    layers: Layers,
    row: Row,
    sides: Sides,
    strides: Sequence[Stride] | None,
    vectors: Sequence[Tensor] | None,
) -> Options:
    """Checks what the penalty takes.

    Raises:
        TypeError: strides or vectors are no sequences of the right things.
        ValueError: one does not fit its layer, or a layer is none for the penalty.
    """
    count = len(layers.weights)
    if row.convolutional:
        for i, weight in enumerate(layers.weights):
            if weight.dim() not in (2, 4):
                raise ValueError(
                    f"weights[{i}] has shape {tuple(weight.shape)}, but penalty {row.name!r} is of "
                    "2-D convolutions [n, inputs, height, width] and linear layers [n, k]: leave "
                    "the layer out"
                )
            if layers.biases[i].numel():
                raise ValueError(
                    f"biases[{i}]: penalty {row.name!r} is about the convolution, whose bias has "
                    "no part in it; leave biases= out"
                )
    return Options(
        _check_strides(strides, count) if strides is not None else [],
        _check_vectors(vectors, layers, sides) if vectors is not None else [],
    )


def _check_strides(strides: Sequence[Stride], count: int) -> list[tuple[int, int]]:
    if not isinstance(strides, Sequence):
        raise TypeError("strides must be a sequence with one entry for each of the weights")
    if len(strides) != count:
        raise wrong_length("strides", len(strides), count, "weights")
    found = []
    for i, stride in enumerate(strides):
        pair = tuple(stride) if isinstance(stride, Sequence) else (stride, stride)
        if len(pair) != 2 or not all(map(is_count, pair)):
            raise ValueError(
                f"strides[{i}] is {stride!r}, expected a positive number or two of them"
            )
        found.append((pair[0], pair[1]))
    return found


def _check_vectors(vectors: Sequence[Tensor], layers: Layers, sides: Sides) -> list[Tensor]:
    refuse_transforms(
        "srip with vectors improves them",
        "call gram_penalty without vectors=, which finds the true value",
    )
    if isinstance(vectors, Tensor) or not isinstance(vectors, Sequence):
        raise TypeError("vectors must be a sequence with one entry for each of the weights")
    if len(vectors) != len(layers.weights):
        raise wrong_length("vectors", len(vectors), len(layers.weights), "weights")
    for i, (vector, weight) in enumerate(zip(vectors, layers.weights, strict=True)):
        m = layers.fan_in(i) if sides.columns[i] else layers.filters(i)
        expected = (layers.groups[i], m)
        if not isinstance(vector, Tensor) or vector.layout is not torch.strided:
            raise TypeError(f"vectors[{i}] must be a tensor {list(expected)}")
        wide = compute_dtype(weight.dtype)
        if vector.shape != expected or vector.dtype != wide or vector.device != weight.device:
            raise ValueError(
                f"vectors[{i}] is {vector.dtype} {tuple(vector.shape)} on {vector.device}, "
                f"expected {wide} {expected} on {weight.device}: one vector for each group"
            )
        if any(s == 0 and n > 1 for s, n in zip(vector.stride(), vector.shape, strict=True)):
            raise ValueError(
                f"vectors[{i}] has entries that share memory (expand), but is written to: clone it"
            )
        if vector.requires_grad:
            raise ValueError(f"vectors[{i}] requires a gradient, which it would not get: detach it")
    return list(vectors)
