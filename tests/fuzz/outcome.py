"""What comes out: a value, or a refusal that says what was wrong; and nothing changed by it."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Refused:
    """An error of a documented type."""

    error: Exception

    def __str__(self) -> str:
        return f"{type(self.error).__name__}: {self.error}"


def call(
    function: Callable[..., Any],
    *arguments: Any,
    documented: tuple[type[Exception], ...] = (TypeError, ValueError),
    **options: Any,
) -> Any:
    """The result, or :class:`Refused`; fails on an error that is none of the documented ones.

    An error must have been raised by the package (not by torch somewhere below) and must name an
    argument of the function.
    """
    try:
        return function(*arguments, **options)
    except documented as error:
        if isinstance(error, RuntimeError):
            return Refused(error)  # of a model that cannot be run or followed
        names = {*inspect.signature(function).parameters, "layer", "criterion", "penalty"}
        singular = {name.removesuffix("s") for name in names}
        words = set(re.findall(r"[a-z_]+", str(error).lower()))
        if not words & (names | singular):
            raise AssertionError(f"names no argument of {names}: {error!r}") from error
        return Refused(error)


def snapshot(tensors: Iterable[Tensor]) -> list[Any]:
    """Everything of the tensors that a call could change, with their gradients."""
    found = []
    for t in tensors:
        grad = t.grad if t.is_leaf else None
        found.append((t, _bits(t), grad, None if grad is None else _bits(grad)))
    return found


def _bits(t: Tensor) -> Any:
    if torch.nn.parameter.is_lazy(t):
        return None
    if t.layout is not torch.strided or t.device.type == "meta" or t.is_nested or not t.numel():
        return None
    with torch.no_grad():
        values: Tensor = t.detach().as_subclass(Tensor).reshape(-1).clone()
    return values.as_strided((values.numel(),), (1,)).view(torch.uint8)


def assert_unchanged(before: list[Any]) -> None:
    for i, (tensor, bits, grad, grad_bits) in enumerate(before):
        assert _same(bits, _bits(tensor)), f"tensor {i} was changed"
        assert (tensor.grad if tensor.is_leaf else None) is grad, (
            f"the gradient of tensor {i} was replaced"
        )
        if grad is not None:
            assert _same(grad_bits, _bits(grad)), f"the gradient of tensor {i} was changed"


def _same(a: Any, b: Any) -> bool:
    return (a is None and b is None) or (a is not None and b is not None and torch.equal(a, b))


def assert_near(
    got: Tensor,
    expected: Tensor,  # float64, by the definition
    size: Tensor,  # float64: the sum of the absolute values of what was added up
    what: str = "",
    dtype: torch.dtype | None = None,  # it was computed in, if wider since
) -> None:
    """Right to the precision of the sums; NaN where that is right; not finite where they overflow.

    An infinite entry makes an infinity or, met by another or by a zero, NaN: which of the two
    depends on the order of the sum.
    """
    assert got.shape == expected.shape, f"{what}: shape {tuple(got.shape)}"
    limits = torch.finfo(dtype or got.dtype)
    rows = (t.detach().double().reshape(-1).tolist() for t in (got, expected, size))
    for g, e, s in zip(*rows, strict=True):
        if s < limits.max / 16:
            close = abs(g - e) <= 1000 * limits.eps * s + limits.tiny
            assert close, f"{what}: {g}, expected {e}, a sum of size {s}"
        elif s != s:  # a NaN went in
            assert g != g or abs(g) == math.inf or g == e, f"{what}: {g}, but a NaN went in"
        elif abs(e) > 4 * torch.finfo(got.dtype).max:
            assert not abs(g) < math.inf, f"{what}: {g}, expected {e}, which overflows"
