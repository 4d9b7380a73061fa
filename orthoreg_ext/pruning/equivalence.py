"""Does the pruned model compute what the unpruned one computes without the removed channels?

The dependency graph is inferred from autograd, and an operation that it misreads (a shuffle of
channels, a view) would remove the wrong channels silently. So each cut is checked: the unpruned
model, with zeros in every parameter entry that is about to go, must give the outputs of the pruned.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .inputs import FAILURES, call, device_of, tensors_in, to_device, training_branches, undisturbed
from .norms import without_channels
from .removal import Edit, commit, masked_state, removal_edits, undo
from .units import Structure

# Largest difference allowed, relative to the largest output: rounding in another summation order,
# accumulated over a network.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-4, torch.bfloat16: 0.25, torch.float16: 0.05}
_FAILS = "its forward pass fails"
_T = TypeVar("_T")


@contextmanager
def full_precision() -> Iterator[None]:
    """Computes float32 as float32: no TF32 or bfloat16 inside matrix products and convolutions.

    TF32 keeps 10 bits, so that a right cut would differ by more than rounding. PyTorch has two
    sets of switches for it (`set_float32_matmul_precision`, `allow_tf32`; since 2.9 also one
    `fp32_precision` per operation) and refuses to read the first while the two disagree: both are
    turned off together, and both are restored.
    """
    backends: Any = torch.backends
    cuda: list[Any] = [backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn]
    cpu: list[Any] = [backends.mkldnn.matmul, backends.mkldnn.conv, backends.mkldnn.rnn]
    switches = [(switch, switch.fp32_precision) for switch in cuda + cpu]
    matmul = _readable(torch.get_float32_matmul_precision)
    cudnn = _readable(lambda: bool(backends.cudnn.allow_tf32))
    try:
        if matmul is not None:
            torch.set_float32_matmul_precision("highest")
        if cudnn is not None:
            backends.cudnn.allow_tf32 = False
        for switch, _ in switches:
            switch.fp32_precision = "ieee"
        yield
    finally:
        if matmul is not None:
            torch.set_float32_matmul_precision(matmul)
        if cudnn is not None:
            backends.cudnn.allow_tf32 = cudnn
        for switch, precision in switches:
            switch.fp32_precision = "none"  # inherits from the backend and from all backends
            if switch.fp32_precision != precision:
                switch.fp32_precision = precision


def _readable(read: Callable[[], _T]) -> _T | None:
    """The value of an old switch; None where the user set the new ones, which then rule alone."""
    try:
        return read()
    except RuntimeError:
        return None


def outputs_of(
    model: nn.Module,
    inputs: Any,
    state: dict[str, Tensor] | None = None,
    seed: int | None = None,
    branches: bool = False,
) -> list[Tensor]:
    """The floating-point outputs in eval mode, with some parameters replaced; changes nothing.

    Args:
        model: the model.
        inputs: its example inputs.
        state: qualified parameter name -> tensor to use in its place.
        seed: of the random numbers drawn in it; None goes on from the state as it is.
        branches: followed by the outputs with the branches that are taken while training.
    """

    def run() -> Any:
        if not state:
            return call(model, inputs)
        if isinstance(inputs, dict):
            return torch.func.functional_call(model, state, (), inputs)
        return torch.func.functional_call(model, state, inputs)

    inputs = to_device(inputs, device_of(model))
    with undisturbed(model), torch.no_grad(), full_precision():
        if seed is not None:
            random.seed(seed)
            torch.manual_seed(seed)
        found = [t.clone() for t in tensors_in(run()) if t.is_floating_point()]
        if branches:
            with training_branches(model):
                found += [t.clone() for t in tensors_in(run()) if t.is_floating_point()]
        return found


def difference(expected: list[Tensor], actual: list[Tensor]) -> str | None:
    """What is wrong with the outputs of a pruned model, or None.

    Where the expected output is NaN or infinite, the pruned model must give the same, NaN for NaN:
    a model that overflows on its example inputs can still be pruned. The tolerance is relative to
    the largest of the other values.
    """
    if len(expected) != len(actual):
        return f"it has {len(actual)} outputs instead of {len(expected)}"
    for i, (want, got) in enumerate(zip(expected, actual, strict=True)):
        if want.shape != got.shape:
            return f"output {i} has shape {tuple(got.shape)} instead of {tuple(want.shape)}"
        finite = want.isfinite()
        same = (want == got) | (want.isnan() & got.isnan())
        if not bool((same | (finite & got.isfinite())).all()):
            return f"output {i} is NaN or infinite in other places than it was"
        if not bool(finite.any()):
            continue
        scale = float(want[finite].abs().max())
        worst = float((want[finite] - got[finite]).abs().max())
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
        RuntimeError: the removal failed, the outputs differ, or they are random; the model is as
            before.
    """
    problem = _problem(model, structure, removed, edits, inputs)
    if problem is None:
        return
    if not problem.startswith(_FAILS) and (own := _randomness(model, structure, inputs)):
        raise RuntimeError(
            f"the removal cannot be verified ({problem}): the model's forward is random in eval "
            f"mode, two runs of the unpruned model differ ({own}). The model was restored. Make "
            "its forward deterministic in eval mode (dropout and noise only where self.training), "
            "or pass verify=False"
        )
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


def _randomness(model: nn.Module, structure: Structure, inputs: Any) -> str | None:
    """How two runs of a model with other random numbers differ, or None."""
    first, second = (
        outputs_of(model, inputs, seed=seed, branches=structure.branches) for seed in (0, 1)
    )
    return difference(first, second)


def _problem(
    model: nn.Module,
    structure: Structure,
    removed: Tensor,
    edits: list[Edit],
    inputs: Any,
    revert: bool = False,
) -> str | None:
    """Applies edits and compares; undoes them on a problem, or if told to."""
    masked = masked_state(model, structure, removed)
    with without_channels(model, structure, removed) as faithful:
        expected = outputs_of(model, inputs, masked, branches=structure.branches)
    done = commit(edits)
    try:
        actual = outputs_of(model, inputs, branches=structure.branches)
        if not faithful():  # the shapes alone
            expected = [torch.zeros_like(t) for t in expected]
            actual = [torch.zeros_like(t) for t in actual]
        problem = difference(expected, actual)
    except FAILURES as error:
        problem = f"{_FAILS}: {error}"
    except BaseException:
        undo(done)
        raise
    if problem is not None or revert:
        undo(done)
    return problem
