"""What each unit contributes to the loss of each sample, collected while a model trains."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..units import NEVER, Slot, Structure


class Contributions:
    """Collects what units contribute, through hooks.

    After a forward and a backward pass, for sample n and unit u ::

        c[n, u] = sum_x sum_hw a_x * da_x

    over the layers x that read channels of u, with a_x their input and da_x the gradient by what
    this layer reads, not by what others make of the same tensor. A context manager: inside, the
    hooks are there; the model computes the same.
    """

    def __init__(self, model: nn.Module, structure: Structure) -> None:
        units = [int(slot.units.max()) for slot in structure.slots if len(slot.units)]
        self.units = max(units, default=NEVER) + 1
        self.inputs: list[Tensor] = []
        self._sums: Tensor | None = None  # [samples, units + 1]
        self._handles: list[Any] = []
        self._slots = [
            (model.get_submodule(slot.owner), slot)
            for slot in structure.slots
            if slot.side != "out" and slot.kind == "filters"
        ]

    def __enter__(self) -> Contributions:
        for module, slot in self._slots:
            hook = module.register_forward_pre_hook(self._reader(module, slot), with_kwargs=True)
            self._handles.append(hook)
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def take(self) -> Tensor | None:  # [samples, units]
        """What was collected since the last call; None if no gradient passed."""
        sums, self._sums = self._sums, None
        self.inputs.clear()
        return None if sums is None else sums[:, : self.units]

    def _reader(self, own_module: nn.Module, slot: Slot) -> Callable[..., Any]:
        def read(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            seen = args[0] if args else kwargs["input"]
            if module is not own_module or not seen.requires_grad:  # a copy has the hooks too
                return None
            own = seen.view_as(seen)  # its gradient is that of this layer alone
            self.inputs.append(own)
            value = own.detach()
            own.register_hook(lambda grad: self._add(module, slot, value, grad))
            return ((own, *args[1:]), kwargs) if args else (args, {**kwargs, "input": own})

        return read

    def _add(self, module: nn.Module, slot: Slot, value: Tensor, grad: Tensor) -> None:
        wide = torch.promote_types(value.dtype, torch.float32)
        product = value.to(wide) * grad.detach().to(wide)
        if isinstance(module, nn.Linear):
            product = product.movedim(-1, 1)
        product = product.flatten(2).sum(2) if product.dim() > 2 else product
        if self._sums is None:
            self._sums = product.new_zeros(len(product), self.units + 1)
        if len(product) != len(self._sums):
            raise ValueError(
                f"layer {slot.layer!r} reads {len(product)} rows where other layers read "
                f"{len(self._sums)}: the model folds other dimensions into that of the batch, so "
                "samples cannot be told apart; use another method"
            )
        units = torch.where(slot.units == NEVER, self.units, slot.units)
        self._sums.index_add_(1, units.to(product.device), product)
