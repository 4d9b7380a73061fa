"""Taking channels out of a model, its gradients, its optimizers and its copies: all or nothing.

Every new tensor is made first; then the old objects are replaced one by one, each replacement with
its inverse at hand. The old tensors are never written, so undoing is exact.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .units import Structure

Keep = dict[int, Tensor]  # dimension -> the positions that stay, [kept] int64


@dataclass(frozen=True)
class Edit:
    """One replacement and its inverse."""

    what: str
    apply: Callable[[], None]
    undo: Callable[[], None]
    place: Hashable = None  # equal for edits of the same entry


@dataclass
class TensorCut:
    """What stays of one parameter or buffer, and every place that holds it."""

    tensor: Tensor
    keep: Keep
    holders: list[tuple[str, str]]  # (qualified module name, attribute)


def tensor_cuts(model: nn.Module, structure: Structure, removed: Tensor) -> list[TensorCut]:
    """Lists every tensor of a model that loses channels.

    Args:
        model: the model that was traced, or a copy of it with the same names.
        structure: its units.
        removed: units, [r] int64.

    Raises:
        RuntimeError: layers that share a parameter would lose different channels.
    """
    cuts: dict[int, TensorCut] = {}
    for slot in structure.slots:
        gone = torch.isin(slot.units, removed)
        if not gone.any():
            continue
        module = model.get_submodule(slot.owner)
        for place in slot.layout.places:
            tensor = getattr(module, place.tensor)
            if tensor is None:
                continue
            keep = (~gone[: len(gone) // place.groups]).nonzero().flatten()
            cut = cuts.setdefault(id(tensor), TensorCut(tensor, {}, []))
            if place.dim in cut.keep and not torch.equal(cut.keep[place.dim], keep):
                raise RuntimeError(
                    f"{slot.layer}.{place.tensor} is shared, and its holders would lose different "
                    "channels; list the layer in ignored"
                )
            cut.keep[place.dim] = keep
            if (slot.owner, place.tensor) not in cut.holders:
                cut.holders.append((slot.owner, place.tensor))
    return list(cuts.values())


def take(tensor: Tensor, keep: Keep) -> Tensor:
    """Copies the kept positions, in the memory format of the tensor."""
    result = tensor.detach()
    for dim, positions in keep.items():
        result = result.index_select(dim, positions.to(tensor.device))
    format_ = memory_format(tensor)
    if format_ is _DENSE:
        return result.contiguous()
    return torch.empty_like(result, memory_format=format_).copy_(result)


def memory_format(tensor: Tensor) -> torch.memory_format:
    """The format a tensor is laid out in: channels_last where its strides say so."""
    for dims, format_ in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if tensor.dim() == dims and not tensor.is_contiguous():
            return format_ if tensor.is_contiguous(memory_format=format_) else _DENSE
        if tensor.dim() == dims and tensor.is_contiguous(memory_format=format_):
            # both formats fit (1 x 1 kernels): only the strides tell
            like = torch.empty(tensor.shape, device="meta", memory_format=format_)
            return format_ if tensor.stride() == like.stride() else _DENSE
    return _DENSE


_DENSE = torch.contiguous_format


def removal_edits(
    model: nn.Module,
    structure: Structure,
    removed: Tensor,
    optimizers: Sequence[Optimizer] = (),
    *,
    label: str = "model",
) -> list[Edit]:
    """Prepares the removal of units from a model and its optimizers; changes nothing yet.

    Args:
        model: the traced model, or a copy with the same names.
        structure: its units.
        removed: units, [r] int64.
        optimizers: those that hold parameters of the model.
        label: what to call the model in messages.
    """
    edits: list[Edit] = []
    replaced: dict[Tensor, tuple[nn.Parameter, Keep]] = {}
    for cut in tensor_cuts(model, structure, removed):
        new: Tensor = take(cut.tensor, cut.keep)
        table = "_buffers"
        if isinstance(cut.tensor, nn.Parameter):
            table = "_parameters"
            new = _new_parameter(cut.tensor, new, cut.keep)
            replaced[cut.tensor] = (new, cut.keep)
        for owner, attribute in cut.holders:
            place = getattr(model.get_submodule(owner), table)
            what = f"{label} {owner}.{attribute}"
            edits.append(_set_item(what, place, attribute, new))
    edits += _size_edits(model, structure, removed, label)
    for optimizer in optimizers:
        edits += _optimizer_edits(optimizer, replaced)
    return edits


def _new_parameter(old: nn.Parameter, data: Tensor, keep: Keep) -> nn.Parameter:
    new = nn.Parameter(data, requires_grad=old.requires_grad)
    new.__dict__.update(old.__dict__)
    if old.grad is not None:
        new.grad = take(old.grad, keep)
    return new


def _set_item(what: str, table: Any, key: Any, new: Any) -> Edit:
    old, place = table[key], (id(table), key)
    return Edit(
        what, lambda: table.__setitem__(key, new), lambda: table.__setitem__(key, old), place
    )


def _size_edits(model: nn.Module, structure: Structure, removed: Tensor, label: str) -> list[Edit]:
    edits = []
    for slot in structure.slots:
        left = int((~torch.isin(slot.units, removed)).sum())
        if left == len(slot.units):
            continue
        module = model.get_submodule(slot.owner)
        for size in slot.layout.sizes:
            value: Any = (left,) if size == "normalized_shape" else left
            edits.append(_set_item(f"{label} {slot.layer}.{size}", module.__dict__, size, value))
    return edits


def check_optimizer(optimizer: Optimizer, model: nn.Module) -> None:
    """Refuses an optimizer whose state cannot follow a removal.

    Raises:
        ValueError: it holds no parameter of the model, or its state has tensors of a shape that is
            neither the parameter's nor a scalar.
    """
    kind = type(optimizer).__name__
    names = {parameter: name for name, parameter in model.named_parameters()}
    held = [p for group in optimizer.param_groups for p in group["params"] if p in names]
    if not held:
        raise ValueError(
            f"optimizer ({kind}) holds no parameter of the model; pass the one that trains it"
        )
    for parameter in held:
        for key, value in optimizer.state.get(parameter, {}).items():
            if value is None or isinstance(value, (bool, int, float, str)):
                continue
            if isinstance(value, Tensor) and (value.shape == parameter.shape or value.numel() == 1):
                continue
            shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"optimizer ({kind}) keeps {key!r} for {names[parameter]!r} as {shape}, which "
                f"cannot follow the removal of channels (parameter {tuple(parameter.shape)}); "
                "prune first and make the optimizer afterwards"
            )


def _optimizer_edits(
    optimizer: Optimizer, replaced: dict[Tensor, tuple[nn.Parameter, Keep]]
) -> list[Edit]:
    edits = []
    for i, group in enumerate(optimizer.param_groups):
        if any(p in replaced for p in group["params"]):
            params = [replaced[p][0] if p in replaced else p for p in group["params"]]
            edits.append(_set_item(f"optimizer group {i}", group, "params", params))
    if any(p in replaced for p in optimizer.state):
        state: dict[Tensor, Any] = defaultdict(dict)
        for parameter, values in optimizer.state.items():
            if parameter not in replaced:
                state[parameter] = values
                continue
            new, keep = replaced[parameter]
            state[new] = {
                key: take(value, keep)
                if isinstance(value, Tensor) and value.shape == parameter.shape
                else value
                for key, value in values.items()
            }
        edits.append(_set_item("optimizer state", optimizer.__dict__, "state", state))
    return edits


def commit(edits: Iterable[Edit]) -> list[Edit]:
    """Applies edits in order; on any failure undoes those done.

    Returns:
        the applied edits, for :func:`undo`.

    Raises:
        RuntimeError: an edit failed; everything is as before.
    """
    done: list[Edit] = []
    try:
        for edit in edits:
            done.append(edit)
            edit.apply()
    except Exception as error:
        undo(done)
        raise RuntimeError(
            f"removal failed at {done[-1].what} ({error}); the model was restored and nothing is "
            "pruned"
        ) from error
    except BaseException:  # an interrupt
        undo(done)
        raise
    return done


def undo(done: Sequence[Edit]) -> None:
    """Takes applied edits back, the last one first."""
    for edit in reversed(done):
        edit.undo()


def masked_state(model: nn.Module, structure: Structure, removed: Tensor) -> dict[str, Tensor]:
    """The parameters that lose channels, with zeros in place of what goes.

    With them the unpruned model computes what the pruned one must compute.

    Returns:
        qualified parameter name -> tensor of the unpruned shape.
    """
    masked = {}
    for cut in tensor_cuts(model, structure, removed):
        if not isinstance(cut.tensor, nn.Parameter):
            continue
        data = cut.tensor.detach().clone()
        for dim, positions in cut.keep.items():
            gone = torch.ones(data.shape[dim], dtype=torch.bool)
            gone[positions] = False
            data.index_fill_(dim, gone.nonzero().flatten().to(data.device), 0)
        owner, attribute = cut.holders[0]
        masked[f"{owner}.{attribute}" if owner else attribute] = data
    return masked
