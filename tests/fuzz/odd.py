"""What the functions are given: tensors of odd values and odd memory, and things that are none."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from math import prod
from typing import Any, TypeVar

import torch
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from torch import Tensor

# All tests of this folder together draw about so many examples; `make fuzz` asks for 10 000.
TOTAL = int(os.environ.get("ORTHOREG_FUZZ_EXAMPLES", "600"))
# Without it the same examples every time; a number or the word `random` draws others.
SEED = os.environ.get("ORTHOREG_FUZZ_SEED", "")
SHRINK = bool(os.environ.get("ORTHOREG_FUZZ_SHRINK"))  # makes what fails small; takes minutes
Test = TypeVar("Test", bound=Callable[..., None])


def fuzz(share: float, least: int = 3) -> Callable[[Test], Test]:
    """Runs a test on this share of the examples."""
    chosen = settings(
        max_examples=max(least, round(share * TOTAL)),
        derandomize=not SEED,
        database=None,
        deadline=None,
        phases=[Phase.explicit, Phase.generate, *([Phase.shrink] if SHRINK else [])],
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )

    def decorate(test: Test) -> Test:
        drawn: Test = chosen(test)
        if not SEED:
            return drawn
        number = random.SystemRandom().getrandbits(32) if SEED == "random" else int(SEED)
        print(f"ORTHOREG_FUZZ_SEED={number}")
        seeded: Test = seed(number)(drawn)
        return seeded

    return decorate


FLOATS = (torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16)
SIZES = (0, 1, 1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 33)
VALUES = ("normal",) * 6 + ("zero", "one", "denormal", "small", "huge", "largest", "inf", "nan")
LAYOUTS = ("plain",) * 4 + (
    "channels_last",
    "permuted",
    "every second",
    "unaligned",
    "rows apart",
    "expanded",
    "overlapping",
    "negative",
    "zero tensor",
    "subclass",
)
ENTRIES = 400  # of a tensor, at most


class Subclass(Tensor):
    """A tensor that is not exactly a Tensor."""


def fill(shape: tuple[int, ...], dtype: torch.dtype, values: str, number: int) -> Tensor:
    """A plain tensor of that shape."""
    generator = torch.Generator().manual_seed(number)
    t = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    limits = torch.finfo(dtype)
    if values == "zero":
        return t.zero_()
    if values == "one":
        return t.fill_(1)
    if values == "denormal":
        return t.mul_(limits.tiny / 4)
    if values == "small":
        return t.mul_(limits.tiny**0.5)
    if values == "huge":
        return t.mul_(limits.max**0.4)
    if values == "largest":
        return t.sign_().mul_(limits.max)
    if values in ("inf", "nan") and t.numel():
        t.view(-1)[number % t.numel()] = float(values)
    return t


def lay(t: Tensor, layout: str) -> Tensor:
    """The tensor in other memory; of the values only those are kept that the memory can have."""
    shape, n = t.shape, t.numel()
    if layout == "channels_last" and t.dim() == 4:
        return t.contiguous(memory_format=torch.channels_last)
    if layout == "permuted":
        order = list(reversed(range(t.dim())))
        return t.permute(order).contiguous().permute(order)
    if layout == "every second" and t.dim():
        wide = t.new_full((*shape[:-1], 2 * shape[-1]), 7)
        wide[..., ::2] = t
        return wide[..., ::2]
    if layout == "unaligned":
        flat = t.new_full((n + 1,), 7)
        flat[1:] = t.reshape(-1)
        return flat[1:].view(shape)
    if layout == "rows apart" and t.dim() > 1:
        wide = t.new_full((shape[0], prod(shape[1:]) + 3), 7)
        wide[:, : prod(shape[1:])] = t.flatten(1)
        return wide.as_strided(shape, (wide.stride(0), *t.contiguous().stride()[1:]))
    if layout == "expanded" and t.dim() and n:
        return t[:1].clone().expand(shape)
    if layout == "overlapping" and t.dim() and n:
        return (
            t.reshape(-1)[: sum(shape)].clone().resize_(sum(shape)).as_strided(shape, [1] * t.dim())
        )
    if layout == "negative":
        return torch._neg_view(-t)
    if layout == "zero tensor":
        return torch._efficientzerotensor(shape, dtype=t.dtype)
    if layout == "subclass":
        return t.as_subclass(Subclass)
    return t


@st.composite
def tensors(
    draw: st.DrawFn,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    layouts: tuple[str, ...] = LAYOUTS,
    values: tuple[str, ...] = VALUES,
) -> Tensor:
    """A floating-point tensor of that shape and type in odd memory."""
    t = fill(shape, dtype, draw(st.sampled_from(values)), draw(st.integers(0, 2**20)))
    return lay(t, draw(st.sampled_from(layouts)))


@st.composite
def shapes(draw: st.DrawFn, least: int = 2) -> tuple[int, ...]:
    """The shape of a weight: filters first."""
    dims = draw(st.sampled_from((least, 2, 2, 3, 4, 4, 5)))
    shape: list[int] = []
    for _ in range(dims):
        largest = ENTRIES // max(1, prod(shape))
        shape.append(min(draw(st.sampled_from(SIZES if len(shape) < 2 else SIZES[:6])), largest))
    return tuple(shape)


JUNK: tuple[Callable[[tuple[int, ...]], Any], ...] = (
    lambda shape: None,
    lambda shape: 3,
    lambda shape: "weight",
    lambda shape: [[1.0, 2.0]],
    lambda shape: float("nan"),
    lambda shape: object(),
    lambda shape: torch.zeros(shape).numpy(),
    lambda shape: torch.ones(()),
    lambda shape: torch.ones(3),
    lambda shape: torch.ones(shape, dtype=torch.int64),
    lambda shape: torch.ones(shape, dtype=torch.bool),
    lambda shape: torch.ones(shape, dtype=torch.complex64),
    lambda shape: torch.ones(shape, dtype=torch.uint8),
    lambda shape: torch.ones(shape).to(torch.float8_e4m3fn),
    lambda shape: torch.ones(shape).to_sparse(),
    lambda shape: torch.ones(max(shape[:1], default=1), 3).to_sparse_csr(),
    lambda shape: torch.ones((2, 3)).to_mkldnn(),
    lambda shape: torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(1, 3)]),
    lambda shape: torch.empty(shape, device="meta"),
    lambda shape: torch.ones((*shape, 1)),
    lambda shape: torch.ones((2, *shape)),
    lambda shape: torch.ones(shape, dtype=torch.float64),
    lambda shape: torch.ones(shape, dtype=torch.float16),
    lambda shape: torch.ones(shape, requires_grad=True) * 2,
    lambda shape: torch.nn.Parameter(torch.ones(shape)),
    lambda shape: torch.nn.UninitializedParameter(),
    lambda shape: torch.ones(shape)[..., None].expand(*shape, 2).real,
)


def junk(shape: tuple[int, ...]) -> st.SearchStrategy[Any]:
    """Something in a tensor's place: another type, dtype, shape, device, layout, or nothing."""
    return st.integers(0, len(JUNK) - 1).map(lambda i: JUNK[i](shape))


def describe(value: Any) -> str:
    """A tensor in one line."""
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(describe, value))}]"
    if isinstance(value, torch.nn.UninitializedParameter):
        return "UninitializedParameter"
    if not isinstance(value, Tensor) or value.layout is not torch.strided or value.is_nested:
        return f"{type(value).__name__} {str(value)[:60]!r}"
    if value.device.type == "meta" or not value.numel():
        return f"{type(value).__name__} {value.dtype} {list(value.shape)} on {value.device}"
    largest = float(value.detach().as_subclass(Tensor).abs().max())
    memory = f"strides {value.stride()} from {value.storage_offset()}"
    return (
        f"{type(value).__name__} {value.dtype} {list(value.shape)}, {memory}, up to {largest:g}"
        f"{' negated' if value.is_neg() else ''}{' zero' if value._is_zerotensor() else ''}"
    )


class Layers:
    """The layers of a call; `spoilt` says that something was put in that may be refused."""

    def __init__(self, weights: Any, biases: Any, groups: Any) -> None:
        self.weights, self.biases, self.groups, self.spoilt = weights, biases, groups, False

    def __repr__(self) -> str:
        rows = {"weights": self.weights, "biases": self.biases, "groups": self.groups}
        return "; ".join(f"{name}: {describe(row)}" for name, row in rows.items())

    def tensors(self) -> list[Tensor]:
        """What could be changed by a call."""
        rows = [self.weights, self.biases]
        return [t for row in rows if isinstance(row, list) for t in row if isinstance(t, Tensor)]


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0] or [1]


@st.composite
def layers(draw: st.DrawFn, least: int = 2, biases: bool = True, spoil: bool = True) -> Layers:
    """Some layers: right ones, of which in one of four draws something is spoilt."""
    count = draw(st.sampled_from((1, 1, 2, 3, 0)))
    chosen = [draw(shapes(least)) for _ in range(count)]
    weights: list[Any] = []
    extra: list[Any] = []
    groups: list[Any] = []
    for shape in chosen:
        dtype = draw(st.sampled_from(FLOATS))
        weights.append(draw(tensors(shape, dtype)))
        with_bias = biases and draw(st.booleans())
        extra.append(draw(tensors(shape[:1], dtype)) if with_bias else None)
        groups.append(draw(st.sampled_from(divisors(shape[0]))) if draw(st.booleans()) else 1)
    if count > 1 and draw(st.integers(0, 7)) == 0:
        weights[1], extra[1], groups[1] = weights[0], extra[0], groups[0]  # one tensor, two layers
    made = Layers(
        weights,
        extra if draw(st.booleans()) else None,
        groups if draw(st.booleans()) else None,
    )
    if spoil and count and draw(st.integers(0, 3)) == 0:
        made.spoilt = True
        at = draw(st.integers(0, count - 1))
        where = draw(st.sampled_from(("weights", "weights", "biases", "groups", "whole", "length")))
        if where == "weights":
            made.weights[at] = draw(junk(chosen[at]))
        elif where == "biases":
            made.biases = extra
            made.biases[at] = draw(junk(chosen[at][:1]))
        elif where == "groups":
            made.groups = groups
            made.groups[at] = draw(st.sampled_from((0, -1, 7, 2**40, 1.0, "1", None, True)))
        elif where == "whole":
            name = draw(st.sampled_from(("weights", "biases", "groups")))
            setattr(made, name, draw(junk(chosen[at])))
        else:
            made.biases, made.groups = [*extra, None], groups
    return made


def is_right(weight: Any) -> bool:
    """Whether it has the shape and type of a weight."""
    if not isinstance(weight, Tensor) or isinstance(weight, torch.nn.UninitializedParameter):
        return False
    return weight.dtype in FLOATS and weight.layout is torch.strided and not weight.is_nested


def plain(t: Tensor) -> Tensor:
    """The same values in plain memory, in float64, of no subclass and without history."""
    with torch.no_grad():
        return t.detach().as_subclass(Tensor).clone().to(torch.float64).contiguous()
