"""What the machine gives, measured beside everything else: products in float32, and reading."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from orthoreg_ext.timing import measure, watch


@dataclass(frozen=True)
class Ceiling:
    """A call that does nothing but what limits the others.

    Attributes:
        name: ``"sgemm"`` or ``"read"``.
        meaning: what is called.
        call: the call, which takes part in every round.
        amount: flops or bytes of one call.
    """

    name: str
    meaning: str
    call: Callable[[], object]
    amount: float


def _products(device: str) -> dict[str, Ceiling]:
    found = {}
    for n in (512, 1024, 2048) if device == "cpu" else (4096, 8192):
        torch.manual_seed(0)
        left, right = (torch.randn(n, n, device=device) for _ in "ab")
        calls: dict[str, Callable[[], object]] = {
            f"torch.mm, n={n}": functools.partial(torch.mm, left, right)
        }
        if device == "cpu" and torch.backends.mkldnn.is_available():
            packed = left.to_mkldnn(), right.to_mkldnn()
            calls[f"oneDNN linear, n={n}"] = functools.partial(
                torch.ops.aten.mkldnn_linear, *packed
            )
        for name, call in calls.items():
            found[name] = Ceiling("sgemm", name, call, 2.0 * n**3)
    return found


@functools.cache
def sgemm(device: str, matmul: str = "highest") -> Ceiling:
    """The fastest large product in float32, at torch's matmul precision."""
    torch.set_float32_matmul_precision(matmul)
    found = _products(device)
    timing = measure({n: c.call for n, c in found.items()}, device, 1.0, load=watch(device))
    rates = {name: c.amount / timing.spread(name).median for name, c in found.items()}
    return found[max(rates, key=rates.__getitem__)]


def read(device: str, size: int) -> Ceiling:
    """A sum over as many bytes as there are."""
    buffer = torch.ones(max(1, size // 4), device=device)
    return Ceiling("read", f"torch.sum of {size / 1e6:.3g} MB", buffer.sum, 4.0 * buffer.numel())


def measured(device: str, seconds: float = 2.0) -> dict[str, Any]:
    """Both ceilings of the machine, for the roofline; reading from memory, not from a cache."""
    large = 256 << 20 if device == "cpu" else 4 << 30
    found = {"sgemm": sgemm(device), "read": read(device, large)}
    timing = measure({n: c.call for n, c in found.items()}, device, seconds, load=watch(device))
    return {
        name: {
            "meaning": c.meaning,
            "rate": c.amount / timing.spread(name).median,
            "unit": "flop/s" if name == "sgemm" else "byte/s",
            **timing.about(),
        }
        for name, c in found.items()
    }
