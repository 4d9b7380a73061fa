"""LayerNorm, GroupNorm and RMSNorm as they are once channels have gone.

Their statistics run over channels, so a zero channel is not a missing one: a model with zeros in
place of what goes computes what the pruned one does only if these layers leave the zeros out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as f
from torch.overrides import TorchFunctionMode

from .units import Structure

ACROSS_CHANNELS = ("LayerNorm", "GroupNorm", "RMSNorm")


@contextmanager
def without_channels(
    model: nn.Module, structure: Structure, removed: Tensor
) -> Iterator[Callable[[], bool]]:
    """Lets the normalisations over channels of a model see only the channels that stay.

    The others are zero behind them.

    Args:
        model: the unpruned model.
        structure: its units.
        removed: units, [r] int64.

    Yields:
        a function that says whether every such layer could be treated so: one may compute its
        statistics by hand.
    """
    mode, modules, hooks = _Norms(), [], []
    for slot in structure.slots:
        stays = ~torch.isin(slot.units, removed)
        if slot.kind not in ACROSS_CHANNELS or stays.all():
            continue
        module = model.get_submodule(slot.owner)
        modules.append(module)
        hooks.append(module.register_forward_pre_hook(mode.enter(stays.nonzero().flatten())))
        hooks.append(module.register_forward_hook(mode.leave, always_call=True))
    try:
        if modules:
            with mode:
                yield lambda: mode.treated.issuperset(modules)
        else:
            yield lambda: True
    finally:
        for hook in hooks:
            hook.remove()


class _Norms(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.inside: list[tuple[nn.Module, Tensor]] = []  # the module that runs, what stays of it
        self.treated: set[nn.Module] = set()

    def enter(self, keep: Tensor) -> Callable[[nn.Module, Any], None]:
        return lambda module, _: self.inside.append((module, keep))

    def leave(self, *_: Any) -> None:
        self.inside.pop()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not self.inside or func not in _REPLACED:
            return func(*args, **kwargs)
        module, keep = self.inside[-1]
        self.treated.add(module)
        return _REPLACED[func](keep, *args, **kwargs)


def _layer_norm(
    keep: Tensor,  # [k] int64
    input: Tensor,  # [..., n]
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    _: bool = True,
) -> Tensor:
    keep = keep.to(input.device)
    part = f.layer_norm(input[..., keep], (len(keep),), _at(weight, keep), _at(bias, keep), eps)
    return torch.zeros_like(input).index_copy(-1, keep, part)


def _rms_norm(
    keep: Tensor,  # [k] int64
    input: Tensor,  # [..., n]
    normalized_shape: Any,
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    keep = keep.to(input.device)
    part = f.rms_norm(input[..., keep], (len(keep),), _at(weight, keep), eps)
    return torch.zeros_like(input).index_copy(-1, keep, part)


def _group_norm(
    keep: Tensor,  # [k] int64
    input: Tensor,  # [b, n, ...]
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    _: bool = True,
) -> Tensor:
    keep = keep.to(input.device)
    part = f.group_norm(input[:, keep], num_groups, _at(weight, keep), _at(bias, keep), eps)
    return torch.zeros_like(input).index_copy(1, keep, part)


def _at(tensor: Tensor | None, keep: Tensor) -> Tensor | None:
    return None if tensor is None else tensor[keep]


_REPLACED: dict[Any, Callable[..., Tensor]] = {
    torch.layer_norm: _layer_norm,
    f.layer_norm: _layer_norm,
    torch.group_norm: _group_norm,
    f.group_norm: _group_norm,
    torch.rms_norm: _rms_norm,
    f.rms_norm: _rms_norm,
}
