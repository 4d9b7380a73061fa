"""The table of named penalties.

An entrywise penalty is P(W) = sum_ij phi(R_ij), or its root, where R is the residual of the Gram
matrix G: G - T for a diagonal target T, G with a zero diagonal where only pairs count, or the
cosines of G. The gradient of the sum is 2 S W (side "rows", G = W W^T) or 2 W S (side "cols",
G = W^T W), with S = phi'(R) unless R are cosines.

A new penalty is one row here and one functor of the same name in csrc/common/entrywise.h, which the
CPU and the CUDA kernels share; tests/test_gram_penalty.py then covers it. Without the functor the
row says compiled=False, and the reference runs it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .errors import unknown_name


@dataclass(frozen=True)
class Penalty:
    """One entrywise penalty on the residual R of a Gram matrix.

    Attributes:
        name: the name used everywhere, in Python and in C++.
        formula: what it computes, for reports and error messages.
        source: paper or released code.
        diagonal: what stands on the diagonal of R: ``"target"`` G_ii less its target (1, or what
            the filter is given, or 0 if it is pruned), ``"free"`` zero, so that the norms of the
            filters are free, ``"kept"`` G_ii.
        value: phi, entrywise.
        slope: phi', entrywise; 0 where phi has a kink.
        curvature: phi'', entrywise, almost everywhere.
        sides_agree: whether the sums on the two sides differ by exactly n - k with equal
            gradients, so that the smaller Gram matrix serves for both.
        root: whether P is the root of the sum; its gradient is 0 where P is.
        cosines: whether R is G_ij / sqrt(G_ii G_jj) instead of G; rows of zeros give 0.
        counts: whether a pair of filters counts, from two bool tensors that say which filters of
            it are marked. With it `pruned` marks filters instead of leaving them out, and filters
            (rows) are compared whatever side is asked for.
        compiled: whether csrc/common/entrywise.h has a functor of that name.
    """

    name: str
    formula: str
    source: str
    diagonal: Literal["target", "free", "kept"]
    value: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]
    curvature: Callable[[Tensor], Tensor]
    sides_agree: bool = False
    root: bool = False
    cosines: bool = False
    counts: Callable[[Tensor, Tensor], Tensor] | None = None
    compiled: bool = True


def _twice(r: Tensor) -> Tensor:
    return 2 * r


def _two(r: Tensor) -> Tensor:
    return torch.full_like(r, 2)


PENALTIES: dict[str, Penalty] = {
    penalty.name: penalty
    for penalty in (
        Penalty(
            name="orthoreg",
            formula="sum |G - I|",
            source=(
                "Lubana et al., arXiv 2009.05014; the released code takes the entrywise L1 norm, "
                "neither squared nor Frobenius, and the side is part of the definition"
            ),
            diagonal="target",
            value=torch.abs,
            slope=torch.sign,
            curvature=torch.zeros_like,
        ),
        Penalty(
            name="so",
            formula="sum (G - I)^2",
            source="soft orthogonality: Xie et al. 2017; Bansal et al. 2018",
            diagonal="target",
            value=torch.square,
            slope=_twice,
            curvature=_two,
            sides_agree=True,
        ),
        Penalty(
            name="frobenius",
            formula="sqrt(sum (G - I)^2)",
            source=(
                "Zhang et al., AdaLoRA, arXiv 2303.10512, who square it; their released code and "
                "PEFT do not"
            ),
            diagonal="target",
            value=torch.square,
            slope=_twice,
            curvature=_two,
            sides_agree=True,
            root=True,
        ),
        Penalty(
            name="offdiag",
            formula="sum_{i != j} G_ij^2",
            source="soft orthogonality with free norms, for filters in front of BatchNorm",
            diagonal="free",
            value=torch.square,
            slope=_twice,
            curvature=_two,
        ),
        Penalty(
            name="cosine",
            formula="sum_{i != j} cos(w_i, w_j)^2",
            source="`offdiag` of normalised filters: a function of their directions alone",
            diagonal="free",
            value=torch.square,
            slope=_twice,
            curvature=_two,
            cosines=True,
        ),
        Penalty(
            name="tpp",
            formula="sum G_ij^2 over i or j marked",
            source=(
                "Wang and Fu, arXiv 2207.12534, who take its mean: coefficient 1 / n^2; the "
                "released code sums over the same pairs, the diagonal of the marked ones included"
            ),
            diagonal="kept",
            value=torch.square,
            slope=_twice,
            curvature=_two,
            counts=torch.logical_or,
        ),
    )
}


def get_penalty(name: str) -> Penalty:
    """Returns the penalty of that name.

    Raises:
        ValueError: there is none; the message names the nearest one.
    """
    if not isinstance(name, str) or name not in PENALTIES:
        raise unknown_name("penalty", name, PENALTIES)
    return PENALTIES[name]
