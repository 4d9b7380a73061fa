"""Adapters to training and pruning frameworks, each imported when first asked for."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

# adapter -> (the module it needs, what to install), None where it needs nothing
_NEEDS: dict[str, tuple[str, str] | None] = {
    "lightning": ("lightning", "lightning"),
    "peft": ("peft", "peft"),
    "scalars": None,
    "torch_pruning": ("torch_pruning", "'orthoreg_ext[pruning]'"),
    "transformers": ("transformers", "transformers accelerate"),
}

__all__ = ["lightning", "peft", "scalars", "torch_pruning", "transformers"]


def missing(adapter: str, error: ModuleNotFoundError) -> ImportError:
    """What an adapter raises when its framework cannot be imported.

    Args:
        adapter: the module name of the adapter, with or without its package.
        error: what the import raised; returned as it is if another module is missing.
    """
    name = adapter.rpartition(".")[2]
    needs = _NEEDS[name]
    if needs is None or error.name != needs[0]:
        return error
    return ImportError(
        f"orthoreg_ext.integrations.{name} needs {needs[0]}, which is not installed: "
        f"pip install {needs[1]}",
        name=needs[0],
    )


def __getattr__(name: str) -> ModuleType:
    """Imports the adapter `name`; an ImportError names a missing framework and its remedy."""
    if name not in _NEEDS:
        raise AttributeError(
            f"module {__name__!r} has no attribute {name!r}. Valid: {', '.join(__all__)}."
        )
    try:
        return import_module(f"{__name__}.{name}")
    except ModuleNotFoundError as error:
        raise missing(name, error) from None


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
