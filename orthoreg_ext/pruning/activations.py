"""Group Fisher: what the loss says of the channels that layers read, sample by sample."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..distributed import largest_over_ranks, sum_over_ranks
from ..layers import layer_kind
from .calibration import Loss, batches, one_pass
from .inputs import call, device_of, undisturbed
from .units import NEVER, Slot, Structure

FREED = ("memory", "macs", "nothing")
"""What :func:`group_fisher` divides by."""


class Contributions:
    """Collects, through hooks, what each unit contributes to the loss of each sample.

    After a forward and a backward pass, for sample n and unit u ::

        c[n, u] = sum_x sum_hw a_x * da_x

    over the layers x that read channels of u (convolutions, also depthwise, and linear layers; a
    layer that runs twice counts twice), with a_x their input and da_x the gradient by what this
    layer reads, not by what others make of the same tensor. A context manager: inside, the hooks
    are there; the model computes the same.

    Args:
        model: the model.
        structure: its units.

    Attributes:
        inputs: what the layers have read since the last :meth:`take`, to differentiate by.
        written: the numbers that a unit's channels take in the outputs of the layers that make
            them, for one sample, [units] float64, from the first forward pass on.
        macs: the multiply-accumulates that leave with a unit, alike.
    """

    def __init__(self, model: nn.Module, structure: Structure) -> None:
        units = [int(slot.units.max()) for slot in structure.slots if len(slot.units)]
        self.units = max(units, default=NEVER) + 1
        self.written = torch.zeros(self.units, dtype=torch.float64)
        self.macs = torch.zeros(self.units, dtype=torch.float64)
        self.inputs: list[Tensor] = []
        self._sums: Tensor | None = None  # [samples, units + 1], the last for what cannot go
        self._measured = False
        self._handles: list[Any] = []
        self._slots: list[tuple[nn.Module, Slot]] = []
        for slot in structure.slots:
            module = model.get_submodule(slot.owner)
            if slot.kind == "filters" and layer_kind(module):
                self._slots.append((module, slot))

    def __enter__(self) -> Contributions:
        for module, slot in self._slots:
            if slot.side != "out":
                hook = self._reader(module, slot)
                self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
            self._handles.append(module.register_forward_hook(self._meter(slot), with_kwargs=True))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def take(self) -> Tensor | None:  # [samples, units]
        """What was collected since the last call; None if no gradient passed."""
        sums, self._sums, self._measured = self._sums, None, True
        self.inputs.clear()
        return None if sums is None else sums[:, : self.units]

    def _reader(self, owner: nn.Module, slot: Slot) -> Callable[..., Any]:
        index: dict[torch.device, Tensor] = {}

        def read(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            seen = args[0] if args else kwargs["input"]
            if module is not owner or not seen.requires_grad:  # a deep copy has the hooks too
                return None
            own = seen.view_as(seen)  # its gradient is that of this layer alone
            if own.device not in index:
                where = torch.where(slot.units == NEVER, self.units, slot.units)
                index[own.device] = where.to(own.device)
            self.inputs.append(own)
            value = own.detach()
            axis = -1 if isinstance(module, nn.Linear) else 1
            own.register_hook(lambda grad: self._add(slot, index[own.device], axis, value, grad))
            return ((own, *args[1:]), kwargs) if args else (args, {**kwargs, "input": own})

        return read

    def _add(self, slot: Slot, index: Tensor, axis: int, value: Tensor, grad: Tensor) -> None:
        if value.dim() < 2 or value.shape[axis] != len(index):
            raise ValueError(
                f"layer {slot.layer!r} reads {tuple(value.shape)}, expected samples first and "
                f"{len(index)} channels: pass data in batches, as in training"
            )
        wide = torch.promote_types(value.dtype, torch.float32)
        product = (value.to(wide) * grad.detach().to(wide)).movedim(axis, 1)
        product = product.flatten(2).sum(2) if product.dim() > 2 else product
        if self._sums is None:
            self._sums = product.new_zeros(len(product), self.units + 1)
        if len(product) != len(self._sums):
            raise ValueError(
                f"layer {slot.layer!r} reads {len(product)} rows where other layers read "
                f"{len(self._sums)}: the model folds other dimensions into that of the batch, so "
                "samples cannot be told apart; use a criterion that reads no activations"
            )
        self._sums.index_add_(1, index, product)

    def _meter(self, slot: Slot) -> Callable[..., None]:
        def measure(module: Any, args: tuple[Any, ...], kwargs: Any, output: Tensor) -> None:
            if self._measured:
                return
            seen = args[0] if args else kwargs["input"]
            samples, width = max(1, len(output)), max(1, len(slot.units))
            pairs = seen if getattr(module, "transposed", False) else output
            macs = pairs.numel() * module.weight[0].numel() / samples / width
            for unit in slot.units[slot.units != NEVER].tolist():
                self.macs[unit] += macs
                if slot.side != "in":
                    self.written[unit] += output.numel() / samples / width

        return measure


def check_read(structure: Structure) -> None:
    """Refuses a structure with units that no layer reads, so that they contribute nothing.

    Raises:
        ValueError: naming the layer that makes them.
    """
    read = [slot.units for slot in structure.slots if slot.kind == "filters" and slot.side != "out"]
    known = torch.cat(read) if read else torch.empty(0, dtype=torch.int64)
    for group in structure.prunable:
        if not torch.isin(group.units, known).all():
            raise ValueError(
                f"no convolution or linear layer reads all channels of layer {group.name!r}, so "
                "group Fisher has no score for them; list it in ignored, or use another criterion"
            )


def group_fisher(
    model: nn.Module,
    structure: Structure,
    data: Iterable[Any],
    loss: Loss | None = None,
    freed: str = "memory",
) -> Tensor:  # [units] float64, CPU
    """Scores units by Group Fisher (Liu et al., ICML 2021), over the data in eval mode.

    With c of :class:`Contributions`, of each sample's own loss, ::

        s[u] = sum_n c[n, u]^2 / freed[u]

    so the sum over the coupled layers is inside the square (their eq. 4; it differs from any
    reduction of scores of single layers). Nothing of the model changes; one batch at a time is in
    memory, with the gradients of its activations.

    Paper against code: both divide by the memory freed, that is the numbers that the layers before
    write for a channel (``"memory"``), or by the multiply-accumulates of the layers before and
    behind at their present widths (``"macs"``). The released code takes the gradient of the mean
    loss, a constant factor for batches of one size, and runs while training; channels of a grouped
    convolution, which the code has no rule for, are summed as the paper says.

    Args:
        model: the model.
        structure: its units.
        data: (input, target) batches.
        loss: (output, target) -> scalar mean over the batch; cross entropy by default.
        freed: "memory", "macs" or "nothing".

    Raises:
        ValueError: as :func:`~.calibration.mean_gradients`, or a layer reads something else than
            one row a sample.
    """
    total: Tensor | None = None
    kept = undisturbed(model), Contributions(model, structure)
    with kept[0], kept[1] as collected, one_pass("scoring", need_classes=loss is None) as seen:
        for batch in batches(model, data, seen):
            value = batch.loss(call(model, batch.inputs), loss)
            if value.requires_grad and collected.inputs:
                torch.autograd.grad(value, collected.inputs, allow_unused=True)
            found = collected.take()
            if found is None:
                raise ValueError(
                    f"no gradient of the loss of batch {batch.index} reaches what the layers read; "
                    "check the loss"
                )
            if len(found) != batch.size:
                raise ValueError(
                    f"the layers read {len(found)} rows for the {batch.size} samples of batch "
                    f"{batch.index}: samples cannot be told apart; use a criterion that reads no "
                    "activations"
                )
            squares = (found.double() * batch.size).square().sum(0)
            total = squares if total is None else total + squares
    device = device_of(model)
    scores = torch.zeros(collected.units, dtype=torch.float64, device=device)
    scores = scores if total is None else total  # None: this rank has no data
    sum_over_ranks([scores])
    if freed == "nothing":
        return scores.cpu()
    size = {"memory": collected.written, "macs": collected.macs}[freed].to(device)
    largest_over_ranks(size)
    return scores.cpu() / size.cpu().clamp(min=1)
