"""Which scores belong to which channel of a coupled group, ready for functional.group_scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Member = tuple[int, Tensor | None]
"""The index of a tensor of scores, and for each root channel the index in it, [r] int64.

-1 where the member has nothing for a root channel; None takes its scores as they are.
"""


@dataclass(frozen=True)
class GroupMembers:
    """The index tables of all groups on one device; made once, used in every call.

    Attributes:
        entries: [E] int64, (index of a tensor) * 2^32 + (index in it), by root channel, and for one
            root channel in the order of the members.
        starts: [R + 1] int64, where the entries of each root channel start.
        sizes: the root channels of each group.
        lengths: the scores of each tensor that the tables were made for.
    """

    entries: Tensor
    starts: Tensor
    sizes: tuple[int, ...]
    lengths: tuple[int, ...]


def group_members(
    members: Sequence[Sequence[Member]],
    lengths: Sequence[int],
    device: torch.device | str = "cpu",
) -> GroupMembers:
    """Checks the members of every group and puts their index tables on a device.

    Args:
        members: for each group its members; the first one counts the root channels.
        lengths: the scores of each tensor that members name.
        device: where the scores are.

    Raises:
        TypeError: members are no sequences of pairs of an index and a tensor of indices or None.
        ValueError: a group without members, unequal lengths, an index outside the scores, a root
            channel without a score.
    """
    if isinstance(members, Tensor) or not isinstance(members, Sequence):
        raise TypeError(f"members must be a sequence of groups, got {type(members).__name__}")
    pieces: list[Tensor] = []
    counts: list[Tensor] = []
    sizes = []
    for number, group in enumerate(members):
        if isinstance(group, Tensor) or not isinstance(group, Sequence):
            raise TypeError(f"members[{number}] must be a sequence, got {type(group).__name__}")
        if not group:
            raise ValueError(f"members[{number}] is empty, expected (score index, indices) pairs")
        rows = [_entries(number, member, lengths) for member in group]
        size = len(rows[0])
        for row, (tensor, _) in zip(rows, group, strict=True):
            if len(row) != size:
                raise ValueError(
                    f"members[{number}] has {size} root channels by its first member, but "
                    f"{len(row)} by that of scores[{tensor}]"
                )
        table = torch.stack(rows, 1)  # [r, members]
        held = table >= 0
        if not held.any(1).all():
            bare = int((~held.any(1)).nonzero()[0])
            raise ValueError(f"root channel {bare} of members[{number}] has no score")
        pieces.append(table[held])
        counts.append(held.sum(1))
        sizes.append(size)
    none = torch.zeros(1, dtype=torch.int64)
    starts = torch.cat([none, *counts]).cumsum(0)
    entries = torch.cat([none[:0], *pieces])
    return GroupMembers(entries.to(device), starts.to(device), tuple(sizes), tuple(lengths))


def _are_indices(value: object) -> bool:
    return (
        isinstance(value, Tensor)
        and value.layout is torch.strided
        and not (value.is_nested or value.is_floating_point() or value.is_complex())
        and value.dtype != torch.bool
        and value.device.type != "meta"
    )


def _entries(number: int, member: Member, lengths: Sequence[int]) -> Tensor:  # [r] int64
    pair = tuple(member) if isinstance(member, Sequence) else ()
    right = len(pair) == 2 and isinstance(pair[0], int)
    if not right or not (pair[1] is None or _are_indices(pair[1])):
        raise TypeError(
            f"members[{number}] holds {member!r}, expected (score index, int64 indices or None)"
        )
    tensor, indices = member
    if not 0 <= tensor < len(lengths):
        raise ValueError(
            f"members[{number}] names scores[{tensor}], but there are {len(lengths)} tensors"
        )
    length = lengths[tensor]
    if indices is None:
        indices = torch.arange(length)
    indices = indices.detach().cpu().long()
    if indices.dim() != 1:
        raise ValueError(
            f"members[{number}]: the indices of scores[{tensor}] have shape "
            f"{tuple(indices.shape)}, expected [root channels]"
        )
    if len(indices) and not -1 <= int(indices.min()) <= int(indices.max()) < length:
        raise ValueError(
            f"members[{number}]: the indices of scores[{tensor}] run from {int(indices.min())} to "
            f"{int(indices.max())}, but it has {length} scores"
        )
    return torch.where(indices < 0, indices, (tensor << 32) + indices)
