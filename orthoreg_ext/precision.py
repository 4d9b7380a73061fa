"""How the CUDA kernels multiply float32.

A mode names two products: that of the Gram matrices and that of the gradients S W. Near
orthonormality G - I cancels, and an error of the Gram matrix is all that is left; the gradient's
product has no such step. So torch's own switch (:func:`torch.set_float32_matmul_precision`,
``torch.backends.cuda.matmul.fp32_precision``) lowers the gradient only, and what lowers the Gram
matrix too has to be asked for by name. The CPU operators and the reference compute in float32, and
float64 stays float64, in every mode.

A new mode is one row here and one line in csrc/common/precision.h.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from .errors import choose

ENVIRONMENT = "ORTHOREG_EXT_PRECISION"


@dataclass(frozen=True)
class Precision:
    """One mode.

    Attributes:
        name: the name used everywhere, in Python and in C++.
        gram: the product of Gram matrices: ``float32``, ``3xtf32``, ``tf32`` or ``bf16``.
        gradient: the product of gradients.
        meaning: what it is for.
    """

    name: str
    gram: str
    gradient: str
    meaning: str


PRECISIONS: dict[str, Precision] = {
    mode.name: mode
    for mode in (
        Precision("ieee", "float32", "float32", "no tensor cores: fused multiply-adds"),
        Precision("3xtf32", "3xtf32", "3xtf32", "tensor cores at the accuracy of float32"),
        Precision("mixed", "3xtf32", "tf32", "gradients with errors of a few 1e-4"),
        Precision("mixed-bf16", "3xtf32", "bf16", "gradients with errors of a few 1e-3"),
        Precision("tf32", "tf32", "tf32", "residuals below 1e-3 are lost"),
        Precision("bf16", "bf16", "bf16", "residuals below 1e-2 are lost"),
    )
}

_forced: str | None = None


@contextmanager
def precision(name: str) -> Iterator[None]:
    """Chooses how the CUDA kernels multiply float32 inside a ``with`` block.

    The environment variable ``ORTHOREG_EXT_PRECISION`` does the same for a whole process. Without
    either, torch's switch decides: ``"3xtf32"`` by default, ``"mixed"`` where it allows TF32
    (``"high"``), ``"mixed-bf16"`` where it says ``"medium"``. A backward pass takes the mode of its
    forward pass.

    Args:
        name: a name of :data:`orthoreg_ext.precision.PRECISIONS`.

    Raises:
        ValueError: there is no mode of that name.
    """
    global _forced
    before, _forced = _forced, choose("precision", name, PRECISIONS)
    try:
        yield
    finally:
        _forced = before


def selected() -> str:
    """The mode that operators called now take.

    Raises:
        ValueError: the environment variable names none.
    """
    if _forced is not None:
        return _forced
    name = os.environ.get(ENVIRONMENT)
    if name:
        return choose(f"precision in {ENVIRONMENT}=", name, PRECISIONS)
    torchs: str = _torchs()
    return torchs


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _torchs() -> str:
    """What torch's switches ask for; a graph of torch.compile keeps the answer."""
    if torch.backends.cuda.matmul.fp32_precision != "tf32":  # "none" has inherited its answer
        return "3xtf32"
    try:
        return "mixed-bf16" if torch.get_float32_matmul_precision() == "medium" else "mixed"
    except RuntimeError:  # set through both the old and the new switches, which it refuses to join
        return "mixed"
