"""The one place where argument errors are worded: argument, got, expected, remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

import torch


def unknown_name(kind: str, got: object, valid: Iterable[str]) -> ValueError:
    """Returns the error for a name that is not in a table, with the nearest valid one.

    Args:
        kind: what the name stands for, e.g. ``"penalty"``.
        got: the value that was passed.
        valid: every name that would have been accepted.
    """
    names = sorted(valid)
    near = difflib.get_close_matches(str(got), names, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    return ValueError(f"unknown {kind} {got!r}{hint} Valid: {', '.join(names) or 'none'}.")


def choose(kind: str, got: object, valid: Iterable[str]) -> str:
    """Returns `got` if it is one of the valid names, else raises :func:`unknown_name`."""
    names = list(valid)
    if isinstance(got, str) and got in names:
        return got
    raise unknown_name(kind, got, names)


def wrong_length(argument: str, got: int, expected: int, what: str) -> ValueError:
    """Returns the error for a per-layer sequence that does not match the layers."""
    return ValueError(
        f"{argument} has {got} entries, expected {expected}: one for each of the {what}"
    )


def is_transformed() -> bool:
    """Whether a function is being transformed by torch.func (grad, vmap, jvp, ...) right now."""
    active: bool = torch._C._are_functorch_transforms_active()
    return active


def refuse_transforms(what: str, remedy: str) -> None:
    """Raises for what changes tensors in place, which a transformation of torch.func cannot follow.

    Raises:
        RuntimeError: a function is being transformed.
    """
    if is_transformed():
        raise RuntimeError(
            f"{what} in place, which no transformation of torch.func (grad, vmap, jvp, jacrev, "
            f"...) can follow: {remedy}"
        )
