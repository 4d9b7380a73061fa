"""Does the pruned model compute what the unpruned one computes without the removed channels?

The dependency graph is inferred from autograd, and an operation that it misreads (a shuffle of
channels, a view) would remove the wrong channels silently. So each cut is checked: the unpruned
model, with zeros in every parameter entry that is about to go, must give the outputs of the pruned.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .inputs import call, device_of, tensors_in, to_device, undisturbed
from .removal import Edit, commit, masked_state, removal_edits, undo
from .units import Structure

# Largest difference allowed, relative to the largest output: rounding in another summation order,
# accumulated over a network.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-4, torch.bfloat16: 0.25, torch.float16: 0.05}
# Layers whose statistics run over channels: a zero channel is not a missing one.
_ACROSS_CHANNELS = ("LayerNorm", "GroupNorm", "RMSNorm")


def outputs_of(
    model: nn.Module, inputs: Any, state: dict[str, Tensor] | None = None
) -> list[Tensor]:
    """The floating-point outputs in eval mode, with some parameters replaced; changes nothing.

    Args:
        model: the model.
        inputs: its example inputs.
        state: qualified parameter name -> tensor to use in its place.
    """
    inputs = to_device(inputs, device_of(model))
    exact = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
    with undisturbed(model), torch.no_grad(), exact:
        if not state:
            result = call(model, inputs)
        elif isinstance(inputs, dict):
            result = torch.func.functional_call(model, state, (), inputs)
        else:
            result = torch.func.functional_call(model, state, inputs)
        return [t.clone() for t in tensors_in(result) if t.is_floating_point()]


def difference(expected: list[Tensor], actual: list[Tensor]) -> str | None:
    """What is wrong with the outputs of a pruned model, or None."""
    if len(expected) != len(actual):
        return f"it has {len(actual)} outputs instead of {len(expected)}"
    for i, (want, got) in enumerate(zip(expected, actual, strict=True)):
        if want.shape != got.shape:
            return f"output {i} has shape {tuple(got.shape)} instead of {tuple(want.shape)}"
        scale = float(want.abs().max()) if want.numel() else 0.0
        worst = float((want - got).abs().max()) if want.numel() else 0.0
        if worst > _TOLERANCE[want.dtype] * scale:
            return f"output {i} is off by {worst:.3g} where its largest value is {scale:.3g}"
    return None


def checked_commit(
    model: nn.Module, structure: Structure, removed: Tensor, edits: list[Edit], inputs: Any
) -> None:
    """Removes units, and takes everything back if the model does not compute what it should.

    Args:
        model: the model.
        structure: its units; not shrunk here.
        removed: units, [r] int64.
        edits: the removal of those units, as prepared.
        inputs: example inputs.

    Raises:
        RuntimeError: the removal failed or the outputs differ; the model is as before.
    """
    problem = _problem(model, structure, removed, edits, inputs)
    if problem is None:
        return
    guilty = [
        group.layers
        for group in structure.prunable
        if (units := group.units[torch.isin(group.units, removed)]).numel()
        and _problem(
            model, structure, units, removal_edits(model, structure, units), inputs, revert=True
        )
    ]
    where = "; ".join(" + ".join(layers) for layers in guilty) or "a combination of layers"
    raise RuntimeError(
        f"after the removal the model does not compute what it did with these channels at zero "
        f"({problem}): the dependency graph misreads an operation at {where}. The model was "
        "restored. List these layers in ignored; or, where an operation mixes all channels by "
        "design (a mean over channels), pass verify=False"
    )


def _problem(
    model: nn.Module,
    structure: Structure,
    removed: Tensor,
    edits: list[Edit],
    inputs: Any,
    revert: bool = False,
) -> str | None:
    """Applies edits and compares; undoes them on a problem, or if told to."""
    exact = not any(
        slot.kind in _ACROSS_CHANNELS and torch.isin(slot.units, removed).any()
        for slot in structure.slots
    )
    expected = outputs_of(model, inputs, masked_state(model, structure, removed) if exact else None)
    done = commit(edits)
    try:
        actual = outputs_of(model, inputs)
        if not exact:  # the shapes alone
            expected = [torch.zeros_like(t) for t in expected]
            actual = [torch.zeros_like(t) for t in actual]
        problem = difference(expected, actual)
    except (RuntimeError, ValueError, IndexError, TypeError, AssertionError) as error:
        problem = f"its forward pass fails: {error}"
    except BaseException:
        undo(done)
        raise
    if problem is not None or revert:
        undo(done)
    return problem
