"""The layers of one precision, taken out of a call's and put together again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def gather(parts: list[Tensor], indices: list[list[int]]) -> Tensor:  # [L]
    """Puts per-precision results back into the order of the layers, in the widest precision."""
    if len(parts) == 1:
        return parts[0]
    order = [i for part in indices for i in part]
    double = any(part.dtype == torch.float64 for part in parts)
    joined = torch.cat([part.double() if double else part for part in parts])
    return pick(joined, sorted(range(len(order)), key=order.__getitem__))


def pick(tensor: Tensor, indices: list[int]) -> Tensor:  # [len(indices), ...]
    """Some entries of a tensor, at least one; a run of neighbours is not copied.

    No tensor of indices is made: it would have to be copied from the host, which waits for a GPU
    and which no CUDA graph can capture.
    """
    runs: list[list[int]] = []  # [first, behind the last]
    for i in indices:
        if runs and runs[-1][1] == i:
            runs[-1][1] = i + 1
        else:
            runs.append([i, i + 1])
    pieces = [tensor[first:behind] for first, behind in runs]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def take(of_rows: list[Tensor], indices: Sequence[int]) -> list[Tensor]:
    """The masks or targets of some of the layers; no list where none of them has one."""
    taken = [of_rows[i] for i in indices] if of_rows else []
    return taken if any(of.numel() for of in taken) else []


def given(of_rows: list[Tensor], indices: Sequence[int]) -> list[Tensor | None]:
    """The masks or targets of some of the layers, as an argument."""
    return [of_rows[i] if of_rows and of_rows[i].numel() else None for i in indices]
