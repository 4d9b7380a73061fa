"""Many processes, by torch.distributed alone: sums over ranks, agreement, and wrapped modules."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

Group = Any
"""A torch.distributed.ProcessGroup, whose name is missing where torch was built without."""

_ASKED: ContextVar[tuple[Group | None] | None] = ContextVar("asked", default=None)


@contextmanager
def among(group: Group | None) -> Iterator[None]:
    """Inside, pruning agrees among the ranks of a process group, instead of all ranks.

    Every function of :mod:`orthoreg_ext.pruning` that scores or removes has to be called on every
    rank of the group then, as often and in the same order.

    Args:
        group: a process group that this rank is in; None: this process decides alone.
    """
    token = _ASKED.set((group,))
    try:
        yield
    finally:
        _ASKED.reset(token)


def current() -> Group | None:
    """The process group that pruning agrees among; None: this process alone."""
    asked = _ASKED.get()
    if asked is not None:
        group = asked[0]
    else:
        group = dist.group.WORLD if dist.is_available() and dist.is_initialized() else None
    return None if group is None or dist.get_world_size(group) == 1 else group


def check_group(group: Group | None) -> Group:
    """Returns the process group, by default that of all ranks.

    Raises:
        RuntimeError: torch.distributed is not initialised, or this rank is not in the group.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError(
            "shard=True deals the layers to the ranks of a process group, but there is none: call "
            "torch.distributed.init_process_group() first, or leave shard out"
        )
    found = dist.group.WORLD if group is None else group
    if dist.get_rank(found) < 0:
        raise RuntimeError(
            f"rank {dist.get_rank()} is not in process_group: make the regulariser on its ranks"
        )
    return found


class Ranks:
    """The process group of a regulariser, which its copies share.

    Args:
        group: None: all ranks.
    """

    def __init__(self, group: Group | None) -> None:
        self.group = group

    def __deepcopy__(self, memo: object) -> Ranks:
        return self

    def __reduce__(self) -> Any:
        if self.group is None:
            return Ranks, (None,)
        raise TypeError(
            "a regulariser with process_group= cannot be pickled, for the group is of this process "
            "alone: save its state_dict() and make it anew, or leave process_group out"
        )


def check_sharing(shard: object, group: Group | None) -> None:
    """Checks the arguments of that name.

    Raises:
        RuntimeError: as :func:`check_group`.
        ValueError: there is a group, but nothing to share.
    """
    if group is not None and not shard:
        raise ValueError("process_group says who shares the layers: pass shard=True too, or none")
    if shard:
        check_group(group)


class Flat:
    """Tensors in one buffer for each device and type, which one collective sums over ranks.

    Args:
        like: tensors whose shapes, types and devices they have; also the order in memory, where
            that is gapless.
    """

    def __init__(self, like: Sequence[Tensor]) -> None:
        kinds: dict[tuple[torch.device, torch.dtype], list[int]] = {}
        for i, tensor in enumerate(like):
            kinds.setdefault((tensor.device, tensor.dtype), []).append(i)
        self.views: list[Tensor] = list(like)
        self._buffers = []
        for (device, dtype), indices in kinds.items():
            sizes = [like[i].numel() for i in indices]
            buffer = torch.zeros(sum(sizes), dtype=dtype, device=device)
            for i, piece in zip(indices, buffer.split(sizes), strict=True):
                strides = torch.empty_like(like[i], device="meta").stride()
                self.views[i] = piece.as_strided(like[i].shape, strides)
            self._buffers.append(buffer)

    def clear(self) -> None:
        """Sets all to 0."""
        for buffer in self._buffers:
            buffer.zero_()

    def sum(self, group: Group) -> None:
        """Sums over the ranks; exact where all but one of them hold 0, and the same on each."""
        for buffer in self._buffers:
            dist.all_reduce(buffer, group=group)


def sum_over_ranks(tensors: Sequence[Tensor]) -> None:
    """Replaces tensors by their sums over the ranks that pruning agrees among, if there are any."""
    group = current()
    if group is None:
        return
    flat = Flat(tensors)
    for view, tensor in zip(flat.views, tensors, strict=True):
        view.copy_(tensor)
    flat.sum(group)
    for view, tensor in zip(flat.views, tensors, strict=True):
        tensor.copy_(view)


def mean_of_ranks(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The means over the ranks that pruning agrees among; of one, the tensors as they are."""
    group = current()
    if group is None:
        return list(tensors)
    found = [tensor.detach().clone() for tensor in tensors]
    sum_over_ranks(found)
    return [tensor / dist.get_world_size(group) for tensor in found]


def largest_over_ranks(tensor: Tensor) -> None:
    """Replaces every entry by the largest of the ranks that pruning agrees among."""
    group = current()
    if group is not None:
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group)


def mean_over_ranks(value: float) -> float:
    """The mean of a number over the ranks, the same on each."""
    group = current()
    if group is None:
        return value
    found: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, value, group)
    return float(sum(found)) / len(found)


@contextmanager
def together(doing: str) -> Iterator[list[Any]]:
    """Inside, every rank works by itself; an error of one becomes an error of all at the end.

    So no rank waits for another one that has given up. What is put into the list that it yields is
    replaced by that of all ranks, in their order.

    Args:
        doing: what is done, for the message on the other ranks.

    Raises:
        RuntimeError: it failed on another rank; that rank raises its own error.
    """
    group = current()
    notes: list[Any] = []
    if group is None:
        yield notes
        return
    error: Exception | None = None
    try:
        yield notes
    except Exception as caught:  # noqa: BLE001 - raised below, when the others know
        error = caught
    text = None if error is None else f"{type(error).__name__}: {error}"
    found: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, (text, notes), group)
    if error is not None:
        raise error
    for rank, (failure, _) in enumerate(found):
        if failure is not None:
            raise RuntimeError(f"{doing} failed on rank {rank}, nothing is done here: {failure}")
    notes[:] = [note for _, own in found for note in own]


def require_same(group: Group, what: str, own: Sequence[Any], remedy: str) -> None:
    """Refuses lists that differ between the ranks.

    Raises:
        RuntimeError: on every rank, naming two of them and the first difference.
    """
    found: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, list(own), group)
    for rank, other in enumerate(found):
        if other != found[0]:
            pairs = zip([*found[0], None], [*other, None], strict=False)
            first, second = next((a, b) for a, b in pairs if a != b)
            raise RuntimeError(
                f"{what} differ between the ranks: {first} on rank 0, but {second} on rank {rank}. "
                f"{remedy}"
            )


def require_same_cut(described: Sequence[str]) -> None:
    """Refuses a cut that differs between the ranks that pruning agrees among.

    Raises:
        RuntimeError: on every rank, before anything is removed.
    """
    group = current()
    if group is not None:
        require_same(
            group,
            "the cuts",
            described,
            "Nothing was removed. Are weights, arguments and order of calls the same on all ranks? "
            "A process that prunes alone does so inside orthoreg_ext.distributed.among(None)",
        )


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside DistributedDataParallel or DataParallel; it has the same parameters."""
    while isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        model = model.module
    return model


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor: of FSDP2 (fully_shard) or tensor parallelism."""
    return type(tensor).__name__ == "DTensor"


def whole(tensor: Tensor) -> Tensor:
    """A plain tensor as it is; a DTensor gathered, whose gradient goes back to the shards.

    To be called on all ranks of its mesh then.
    """
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def is_fully_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 (fully_shard) manages the model or a part of it."""
    classes = {base for module in model.modules() for base in type(module).__mro__}
    return any(base.__name__ == "FSDPModule" for base in classes)


def refuse_flat_parameters(model: nn.Module) -> None:
    """Refuses FSDP1, where a parameter is a piece of several layers and has lost its filters.

    Raises:
        TypeError: naming the module and what to use instead.
    """
    for name, module in model.named_modules():
        bases = [base.__name__ for base in type(module).__mro__]
        owned = module._parameters
        flat = "_flat_param" in owned or any(
            getattr(parameter, "_fsdp_flattened", False) for parameter in owned.values()
        )
        if flat or "FullyShardedDataParallel" in bases:
            raise TypeError(
                f"module {name!r} is sharded by FullyShardedDataParallel, whose flat parameters "
                "have no filters: use torch.distributed.fsdp.fully_shard (FSDP2) instead, or DDP"
            )
