"""Loads the compiled modules, and tells what is compiled, what runs and why something does not."""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

VERSION = "0.1.0"

_FOLDER = Path(__file__).parent
_NOT_BUILT = (
    "orthoreg_ext was installed without compiled modules; pip install --no-build-isolation . "
    "in its source folder builds them"
)


@dataclass(frozen=True)
class Binary:
    """A compiled module of this package, or the reason why there is none."""

    module: ModuleType | None
    reason: str


def _load(name: str) -> Binary:
    """Imports a compiled module; one that is there but does not load warns with the reason."""
    qualified = f"{__package__}.{name}"
    if importlib.util.find_spec(qualified) is None:
        others = sorted(path.name for path in _FOLDER.glob(f"{name}.*.so"))
        if others:
            return Binary(None, f"{', '.join(others)} is built for another Python: build again")
        return Binary(None, _NOT_BUILT)
    try:
        return Binary(importlib.import_module(qualified), "")
    except (ImportError, OSError) as error:
        reason = f"{qualified} does not load: {error}"
        warnings.warn(
            f"{reason}. The pure-PyTorch reference runs in its place, which is slower; "
            "pip install --no-build-isolation . builds it again.",
            RuntimeWarning,
            stacklevel=3,
        )
        return Binary(None, reason)


_operators = _load("_C")  # loading it registers torch.ops.orthoreg.*
_host = _load("_host")

compiled: bool = _operators.module is not None
"""Whether the compiled operators are loaded."""

reason: str = _operators.reason
"""Why they are not; empty when they are."""

cuda_compiled: bool = compiled and hasattr(torch.ops.orthoreg, "_torch_has_cuda")
"""Whether the loaded binary holds CUDA kernels."""

_build: dict[str, Any] = _host.module.build_info() if _host.module is not None else {}
_cuda_reasons: dict[int | None, str] = {}  # by GPU; None: what holds for all of them
_warned: set[str] = set()


def _runs_on(capability: tuple[int, int], architectures: list[str]) -> bool:
    """Whether kernels built for `architectures` (as CMake spells them) run on a GPU.

    Machine code runs on its own major version from its minor version up, PTX on everything newer.
    """
    for architecture in architectures:
        number, _, kind = architecture.partition("-")
        if not number.isdigit():  # 90a, native: only the build knows
            return True
        built = divmod(int(number), 10)
        if kind != "virtual" and built[0] == capability[0] and built[1] <= capability[1]:
            return True
        if kind != "real" and built <= capability:
            return True
    return not architectures


def _find_reason_for_all() -> str:
    if not compiled:
        return reason
    if not cuda_compiled:
        why = _build.get("cuda_reason")
        return f"built without CUDA kernels: {why}" if why else "built without CUDA kernels"
    if torch.version.cuda is None:
        return "torch is built without CUDA"
    if not torch.cuda.is_available():
        return "no GPU is visible to torch"
    if not torch.ops.orthoreg._torch_has_cuda():
        return "torch's CUDA library is not loaded, so its current stream cannot be asked for"
    return ""


def _find_reason(index: int) -> str:
    count = torch.cuda.device_count()
    if not 0 <= index < count:
        raise ValueError(f"index is {index}; expected 0 to {count - 1}, one of the visible GPUs")
    major, minor = torch.cuda.get_device_capability(index)
    architectures = list(_build.get("cuda_architectures", []))
    if not _runs_on((major, minor), architectures):
        return (
            f"the kernels are built for architectures {' '.join(architectures)}, GPU {index} has "
            f"compute capability {major}.{minor}: build again with CMAKE_CUDA_ARCHITECTURES=native"
        )
    return ""


def cuda_reason(index: int | None = None) -> str:
    """Says why the CUDA kernels cannot run on a GPU; empty when they can.

    Asks torch once a process and GPU.

    Args:
        index: The GPU, as torch counts them; None takes the current one, which is the first until
            the process has used one.

    Raises:
        ValueError: There are GPUs, but none of that index.
    """
    if None not in _cuda_reasons:
        _cuda_reasons[None] = _find_reason_for_all()
    if _cuda_reasons[None]:
        return _cuda_reasons[None]
    if index is None:
        index = torch.cuda.current_device() if torch.cuda.is_initialized() else 0
    if index not in _cuda_reasons:
        _cuda_reasons[index] = _find_reason(index)
    return _cuda_reasons[index]


def warn_cuda_fallback_once(index: int | None = None) -> None:
    """Warns, once for each reason, that tensors on a GPU take the reference.

    For the place that falls back. Silent where the kernels run, where torch is built without CUDA
    or sees no GPU, and without any compiled operators (chosen, or warned of when they were loaded).

    Args:
        index: The GPU, as for :func:`cuda_reason`.
    """
    why = cuda_reason(index)
    if not why or why in _warned:
        return
    if not compiled or torch.version.cuda is None or not torch.cuda.is_available():
        return
    _warned.add(why)
    warnings.warn(
        f"the CUDA kernels of orthoreg_ext cannot run: {why}. The pure-PyTorch reference runs in "
        "their place, which is slower.",
        RuntimeWarning,
        stacklevel=3,
    )


def build_info() -> dict[str, Any]:
    """Tells what is compiled, what runs on this machine, and why something does not.

    Returns:
        A dictionary that ``json.dumps`` accepts: ``version``; ``python``; ``torch`` (``version``,
        ``cuda`` it is built with or None, ``target``: the oldest torch the binary loads under, None
        without ``_host``); ``compiled`` (``loaded``, ``reason``); ``cpu`` (``compiled``, ``levels``
        that were built, ``runs``: the level chosen on this processor, or ``reference``, or None
        with a ``reason`` where ``ORTHOREG_EXT_CPU`` asks for one that cannot run); ``cuda``
        (``compiled``, ``toolkit``, ``architectures``, ``usable`` and ``reason`` on the current GPU,
        ``devices``: the names of all); ``host`` (``loaded``, ``reason``); ``compiler``; ``backend``
        (the forced one, or ``automatic``) and ``backend_reason`` (why it cannot run). Every reason
        is empty where there is nothing to explain; nothing is raised.
    """
    from .backend import ENVIRONMENT, selected  # it asks this module whether a backend can run

    why_no_cuda = cuda_reason()
    level: str | None = "reference"
    why_no_level = why_no_backend = ""
    if compiled and hasattr(torch.ops.orthoreg, "_cpu_level"):
        try:
            level = str(torch.ops.orthoreg._cpu_level())
        except RuntimeError as error:  # of ORTHOREG_EXT_CPU
            level, why_no_level = None, str(error).partition("\n")[0]
    try:
        backend = selected() or "automatic"
    except (RuntimeError, ValueError) as error:
        backend, why_no_backend = os.environ[ENVIRONMENT], str(error)
    return {
        "version": VERSION,
        "python": platform.python_version(),
        "torch": {
            "version": str(torch.__version__),
            "cuda": torch.version.cuda,
            "target": _build.get("torch_target"),
        },
        "compiled": {"loaded": compiled, "reason": reason},
        "cpu": {
            "compiled": compiled,
            "levels": _build.get("cpu_levels", []),
            "runs": level,
            "reason": why_no_level,
        },
        "cuda": {
            "compiled": cuda_compiled,
            "toolkit": _build.get("cuda_version") or None,
            "architectures": _build.get("cuda_architectures", []),
            "usable": not why_no_cuda,
            "reason": why_no_cuda,
            "devices": []
            if why_no_cuda
            else [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        },
        "host": {"loaded": _host.module is not None, "reason": _host.reason},
        "compiler": _build.get("compiler"),
        "backend": backend,
        "backend_reason": why_no_backend,
    }
