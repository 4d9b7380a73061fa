"""Which implementation runs: the compiled CPU or CUDA operators, or the reference."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from . import build_info
from .errors import choose, is_transformed

ENVIRONMENT = "ORTHOREG_EXT_BACKEND"


@dataclass(frozen=True)
class Backend:
    """An implementation: its namespace in torch.ops (None: plain PyTorch) and its devices."""

    namespace: str | None
    device_types: tuple[str, ...]


BACKENDS = {
    "cpu": Backend("orthoreg", ("cpu",)),
    "cuda": Backend("orthoreg", ("cuda",)),
    "reference": Backend(None, ()),
}

_forced: str | None = None


def why_not(name: str, index: int | None = None) -> str:
    """Says why a backend cannot run here, on the GPU of that index; empty when it can."""
    if BACKENDS[name].namespace != "orthoreg":
        return ""
    if not build_info.compiled:
        return build_info.reason
    if name == "cuda":
        return build_info.cuda_reason(index)
    return ""


def _checked(name: str) -> str:
    name = choose("backend", name, BACKENDS)
    if reason := why_not(name):
        raise RuntimeError(f"backend {name!r} cannot run here: {reason}")
    return name


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Forces one implementation inside a ``with`` block.

    The environment variable ``ORTHOREG_EXT_BACKEND`` does the same for a whole process. Without
    either, tensors on the CPU and on CUDA devices take the compiled operators where they were
    built, everything else the reference.

    Args:
        name: ``"cuda"``, ``"cpu"`` or ``"reference"``.

    Raises:
        ValueError: the name is none of these.
        RuntimeError: that backend is not built or has no device; the message says why.
    """
    global _forced
    before, _forced = _forced, _checked(name)
    try:
        yield
    finally:
        _forced = before


def selected() -> str | None:
    """The backend that is forced, by :func:`backend` or by the environment; None: automatic."""
    if _forced is not None:
        return _forced
    name = os.environ.get(ENVIRONMENT)
    return _checked(name) if name else None


def namespace_for(device: torch.device) -> str | None:
    """The namespace of the operators for tensors on `device`; None: the reference.

    What torch.func transforms or torch.jit traces runs in plain PyTorch, which these know.

    Raises:
        RuntimeError: a forced backend does not run on that device.
    """
    name = selected()
    if is_transformed() or torch._C._get_tracing_state() is not None:
        return None
    if name is None:
        namespace: str | None = _automatic(device.type, device.index)
        return namespace
    chosen = BACKENDS[name]
    if chosen.device_types and device.type not in chosen.device_types:
        raise RuntimeError(
            f"backend {name!r} was forced, but the tensors are on {device}; "
            f"move them to {' or '.join(chosen.device_types)} or choose another backend"
        )
    return chosen.namespace


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _automatic(device_type: str, index: int | None) -> str | None:
    """The compiled operators where they run; a graph of torch.compile keeps the answer."""
    if device_type not in ("cpu", "cuda"):
        return None
    if why_not(device_type, index):
        if device_type == "cuda":
            build_info.warn_cuda_fallback_once(index)
        return None
    return BACKENDS[device_type].namespace
