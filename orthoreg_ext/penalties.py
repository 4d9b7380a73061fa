"""The table of named penalties.

An entrywise penalty is P(W) = sum_ij phi(R_ij), where R is the residual of the Gram matrix G:
G - I where the target is the identity, G with a zero diagonal where only pairs count. Its gradient
is 2 phi'(R) W (side "rows", G = W W^T) or 2 W phi'(R) (side "cols", G = W^T W).

A new penalty is one row here and one functor of the same name in csrc/common/entrywise.h, which the
CPU and the CUDA kernels share; tests/test_gram_penalty.py then covers it. Without the functor the
row says compiled=False, and the reference runs it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

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
        identity: whether the diagonal of the Gram matrix is driven to one. If not, the diagonal
            of R is zero and the norms of the filters are free.
        value: phi, entrywise.
        slope: phi', entrywise; 0 where phi has a kink.
        curvature: phi'', entrywise, almost everywhere.
        sides_agree: whether the values on the two sides differ by exactly n - k with equal
            gradients, so that the smaller Gram matrix serves for both.
        compiled: whether csrc/common/entrywise.h has a functor of that name.
    """

    name: str
    formula: str
    source: str
    identity: bool
    value: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]
    curvature: Callable[[Tensor], Tensor]
    sides_agree: bool = False
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
            identity=True,
            value=torch.abs,
            slope=torch.sign,
            curvature=torch.zeros_like,
        ),
        Penalty(
            name="so",
            formula="sum (G - I)^2",
            source="soft orthogonality: Xie et al. 2017; Bansal et al. 2018",
            identity=True,
            value=torch.square,
            slope=_twice,
            curvature=_two,
            sides_agree=True,
        ),
        Penalty(
            name="offdiag",
            formula="sum_{i != j} G_ij^2",
            source="soft orthogonality with free norms, for filters in front of BatchNorm",
            identity=False,
            value=torch.square,
            slope=_twice,
            curvature=_two,
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
