"""The table of named penalties: one row each. docs/penalties.md shows them side by side.

There are three kinds of rows, one after the other in `PENALTIES`:

1. :class:`Penalty`, entrywise: P(W) = sum_ij phi(R_ij), or its root, where R is the residual of the
   Gram matrix G: G - T for a diagonal target T, G with a zero diagonal where only pairs count, or
   the cosines of G. The gradient of the sum is 2 S W (side "rows", G = W W^T) or 2 W S (side
   "cols", G = W^T W), with S = phi'(R) unless R are cosines. A new one is a row here and a
   functor of the same name in csrc/common/entrywise.h, which the CPU and the CUDA kernels share;
   its tests are in tests/test_gram_penalty.py already. Without the functor the row says
   compiled=False, and the reference runs it.
2. The same, computed by the kernels of another row: `replace` of that row, with `kernel` its name.
3. :class:`WholeMatrix`, anything else: a row here and one function in whole_matrix.py.

Each row comes with its formula written out once more in tests/test_penalty_transcriptions.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from . import whole_matrix
from .errors import unknown_name


@dataclass(frozen=True, kw_only=True)
class Row:
    """What every penalty says of itself.

    Attributes:
        name: the name used everywhere, in Python and in C++.
        formula: what it computes, for reports and error messages.
        gradient: its gradient on the rows, G = W W^T.
        source: the paper.
        code: where released code differs from the paper, and which of them this is.
        diagonal: what stands on the diagonal of R: ``"target"`` G_ii less its target (1, or what
            the filter is given, or 0 if it is pruned), ``"free"`` zero, so that the norms of the
            filters are free, ``"kept"`` G_ii.
        counts: whether a pair of filters counts, from two bool tensors that say which filters of
            it are marked. With it `pruned` marks filters instead of leaving them out, and filters
            (rows) are compared whatever side is asked for.
        convolutional: whether it is about 2-D convolutions (and linear layers, as convolutions of
            one tap): filters are compared, and a bias has no part in it.
        both_sides: whether it is half the sum of both sides; side= has no meaning then.
        sides_agree: whether the sums on the two sides differ by exactly n - k with equal
            gradients, so that the smaller Gram matrix serves for both.
        root: whether P is the root of the sum; its gradient is 0 where P is.
        takes: the arguments that are for this penalty only, of ``num_groups`` (groups of filters),
            ``strides`` and ``vectors``.
        factor: of what is computed.
    """

    name: str
    formula: str
    gradient: str
    source: str
    code: str
    diagonal: Literal["target", "free", "kept"]
    counts: Callable[[Tensor, Tensor], Tensor] | None = None
    convolutional: bool = False
    both_sides: bool = False
    sides_agree: bool = False
    root: bool = False
    takes: tuple[str, ...] = ()
    factor: float = 1.0

    @property
    def of_filters(self) -> bool:
        """Whether filters (rows) are compared, and nothing else."""
        return self.counts is not None or self.convolutional


@dataclass(frozen=True, kw_only=True)
class Penalty(Row):
    """One entrywise penalty on the residual R of a Gram matrix.

    Attributes:
        value: phi, entrywise.
        slope: phi', entrywise; 0 where phi has a kink.
        curvature: phi'', entrywise, almost everywhere.
        cosines: whether R is G_ij / sqrt(G_ii G_jj) instead of G; rows of zeros give 0.
        compiled: whether csrc/common/entrywise.h has a functor of that name.
        kernel: the row whose functor computes it; empty: its own.
    """

    value: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]
    curvature: Callable[[Tensor], Tensor]
    cosines: bool = False
    compiled: bool = True
    kernel: str = ""

    @property
    def functor(self) -> str:
        """The name that the compiled operators know."""
        return self.kernel or self.name


@dataclass(frozen=True, kw_only=True)
class WholeMatrix(Row):
    """A penalty of a Gram matrix as a whole, in plain PyTorch.

    Attributes:
        function: of the filters of one layer (see whole_matrix.py).
    """

    function: whole_matrix.Function
    compiled: ClassVar[bool] = False


def _twice(r: Tensor) -> Tensor:
    return 2 * r


def _two(r: Tensor) -> Tensor:
    return torch.full_like(r, 2)


_SO = Penalty(
    name="so",
    formula="sum (G - I)^2",
    gradient="4 (G - I) W",
    source="soft orthogonality: Xie et al. 2017; Bansal et al., arXiv 1810.09102",
    code=(
        "Bansal's released code has no `so`; the value of the side that is asked for is given, "
        "n - k apart from the other side's"
    ),
    diagonal="target",
    value=torch.square,
    slope=_twice,
    curvature=_two,
    sides_agree=True,
)

_ROWS: tuple[Penalty | WholeMatrix, ...] = (
    # 1. entrywise, each with a functor of its own
    Penalty(
        name="orthoreg",
        formula="sum |G - I|",
        gradient="2 sign(G - I) W, sign(0) = 0",
        source="OrthoReg: Lubana et al., arXiv 2009.05014",
        code=(
            "the released code, which this is, takes the entrywise L1 norm, neither squared nor "
            "Frobenius, and hard-codes a side for each network; here the side is an argument and "
            "part of the definition"
        ),
        diagonal="target",
        value=torch.abs,
        slope=torch.sign,
        curvature=torch.zeros_like,
    ),
    _SO,
    Penalty(
        name="frobenius",
        formula="sqrt(sum (G - I)^2)",
        gradient="2 (G - I) W / P, 0 where P = 0",
        source="Zhang et al., AdaLoRA, arXiv 2303.10512; Wang et al., OCNN, arXiv 1911.12207",
        code="both papers square it; their released code and PEFT do not, nor does this",
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
        gradient="4 (G with a zero diagonal) W",
        source="`so` with free norms, for filters in front of BatchNorm",
        code="no single paper or released code: the part of `so` that BatchNorm does not undo",
        diagonal="free",
        value=torch.square,
        slope=_twice,
        curvature=_two,
    ),
    Penalty(
        name="cosine",
        formula="sum_{i != j} cos(w_i, w_j)^2",
        gradient="2 S W, S_ij = 2 C_ij / (|w_i| |w_j|), S_ii = -2 sum_j C_ij^2 / |w_i|^2",
        source="`offdiag` of normalised filters: a function of their directions alone",
        code=(
            "no single paper or released code; F.normalize, which is often used, has a gradient of "
            "1e12 at zero filters, which here add nothing and get none"
        ),
        diagonal="free",
        value=torch.square,
        slope=_twice,
        curvature=_two,
        cosines=True,
    ),
    Penalty(
        name="tpp",
        formula="sum G_ij^2 over i or j marked",
        gradient="4 (G where i or j is marked) W",
        source="Wang and Fu, arXiv 2207.12534",
        code=(
            "paper and released code take the mean (coefficient 1 / n^2), the code 1000 times it; "
            "this is the sum over the same pairs, the diagonal of the marked ones included"
        ),
        diagonal="kept",
        value=torch.square,
        slope=_twice,
        curvature=_two,
        counts=torch.logical_or,
    ),
    # 2. by the kernels of another row
    replace(
        _SO,
        name="dso",
        formula="sum (W W^T - I)^2 + sum (W^T W - I)^2",
        gradient="8 (G - I) W",
        source="double soft orthogonality: Bansal et al., arXiv 1810.09102",
        code=(
            "not in the released code; the two sums differ by n - k, so this is 2 so + |n - k| on "
            "the smaller side, with the gradient of `so` at twice the strength"
        ),
        kernel="so",
        both_sides=True,
        factor=2.0,
    ),
    replace(
        _SO,
        name="gor",
        formula="sum over groups of filters of sum (G_g - I)^2",
        gradient="4 (G_g - I) W_g for each group",
        source="group orthogonalization: Kurtz et al., arXiv 2306.10001",
        code=(
            "the released code's `inter`: min(num_groups, n // 4) groups of consecutive filters, "
            "the smaller side of each. It fails where that is no divisor of n, this takes "
            "the largest divisor below. Its `intra` (filters of different groups) is not here"
        ),
        kernel="so",
        takes=("num_groups",),
    ),
    # 3. of the matrix as a whole, each with a function in whole_matrix.py
    WholeMatrix(
        name="mc",
        formula="max_i sum_j |G_ij - I_ij|",
        gradient="(E + E^T) W, E = e_i s^T for the active row i and its signs s",
        source="mutual coherence: Bansal et al., arXiv 1810.09102",
        code=(
            "not in the released code; the paper takes the columns, here the side is an argument "
            "and part of the definition. max |G_ij - I_ij| also goes by that name"
        ),
        diagonal="target",
        function=whole_matrix.max_row_sum,
    ),
    WholeMatrix(
        name="srip",
        formula="sigma_max(G - I)^2",
        gradient="4 s u u^T W for the top eigenvalue s and its unit eigenvector u",
        source="spectral restricted isometry: Bansal et al., arXiv 1810.09102",
        code=(
            "the paper does not square it, the released PyTorch code does, and so does this. That "
            "code takes one step of power iteration from a fresh random vector (its gradient has a "
            "cosine of 0.03 to 0.25 with the true one) and gives NaN where G = I; here the vector "
            "is kept from step to step, or an eigen-solver gives the true value"
        ),
        diagonal="target",
        takes=("vectors",),
        function=whole_matrix.spectral_norm_squared,
    ),
    WholeMatrix(
        name="ocnn",
        formula="|conv(K, K, stride S, padding floor((k - 1) / S) S) - I_0|",
        gradient="d(P^2) / (2 P) by autograd, 0 where P = 0",
        source="Wang et al., OCNN, arXiv 1911.12207",
        code=(
            "the paper squares it, the released code does not, nor does this. That code pads by 1 "
            "on strided layers, so that the shift 0 is not among its outputs and another one is "
            "driven to the identity; here the padding is the paper's"
        ),
        diagonal="target",
        convolutional=True,
        takes=("strides",),
        function=whole_matrix.self_convolution_norm,
    ),
)

PENALTIES: dict[str, Penalty | WholeMatrix] = {row.name: row for row in _ROWS}

KERNELS: dict[str, Penalty] = {
    row.name: row for row in _ROWS if isinstance(row, Penalty) and row.compiled and not row.kernel
}
"""The rows that have a functor: the names that the compiled operators know."""


def get_penalty(name: str) -> Penalty | WholeMatrix:
    """Returns the penalty of that name.

    Raises:
        ValueError: there is none; the message names the nearest one.
    """
    if not isinstance(name, str) or name not in PENALTIES:
        raise unknown_name("penalty", name, PENALTIES)
    return PENALTIES[name]
