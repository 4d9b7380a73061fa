"""Groups whose size is written into the forward pass.

`x.reshape(B, N, 3, heads, head_dim)` behind the projection of an attention, a split into pieces of
a stored width, a parameter that is viewed in a stored shape: the dependency graph follows such an
operation, and yet the model fails when its channels go. So every group that meets a view, a split
or a bare parameter is cut on trial.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .inputs import FAILURES, call, device_of, to_device, training_branches, undisturbed
from .removal import Edit, commit, removal_edits, undo
from .units import Group, Structure


def keep_fixed(model: nn.Module, structure: Structure, example_inputs: Any) -> None:
    """Marks the groups that the forward pass does not let go; they are not pruned.

    Each loses half of its units for one forward pass without gradients, all suspects at once first;
    the model is as before afterwards. Whether the outputs are right is checked at the real cut.
    """
    suspects = [group for group in structure.prunable if group.suspect and len(group.units) > 1]
    if not suspects:
        return
    inputs = to_device(example_inputs, device_of(model))
    with undisturbed(model), torch.no_grad():
        if _failure(model, structure, suspects, inputs) is None:
            return
        for group in suspects:
            error = _failure(model, structure, [group], inputs)
            if error is not None:
                group.reason = f"the forward pass fails without some of its channels ({error})"


def _failure(
    model: nn.Module, structure: Structure, groups: list[Group], inputs: Any
) -> str | None:
    """Why the model fails with half of these groups' units, or None."""
    removed: Tensor = torch.cat([group.units[len(group.units) // 2 :] for group in groups])
    done: list[Edit] = []
    try:
        done = commit(removal_edits(model, structure, removed))
    except FAILURES:
        return None  # the real removal says what is wrong
    try:
        call(model, inputs)
        if structure.branches:
            with training_branches(model):
                call(model, inputs)
    except FAILURES as error:
        return str(error).partition("\n")[0]
    finally:
        undo(done)
    return None
