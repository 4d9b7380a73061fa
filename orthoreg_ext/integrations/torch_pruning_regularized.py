"""Pruners of Torch-Pruning that also regularise towards orthonormal filters."""

from __future__ import annotations

import inspect
import weakref
from typing import Any

import torch
import torch_pruning as tp
from torch import nn

from ..attachment import Attachment
from ..regularizer import OrthoRegularizer


def with_orthoreg(
    pruner: type[Any], optimizer: torch.optim.Optimizer | None = None, **settings: Any
) -> type[Any]:
    """A pruner class of Torch-Pruning that also regularises towards orthonormal filters.

    Its constructor takes what the pruner's takes, and makes an
    :class:`~orthoreg_ext.OrthoRegularizer` of the model, `regularizer`. Two routes: where the
    training loop calls ``pruner.regularize(model)`` after ``loss.backward()`` already, that adds
    the gradient of the term, after whatever the pruner itself adds; elsewhere `optimizer` (or
    ``pruner.attach(optimizer)``) adds it before each optimizer step, and ``regularize`` does not
    add it again. Under a GradScaler take the second, which knows the scale.

    The term is of the layers as they are, so it follows the cuts. Torch-Pruning replaces the
    parameters that it cuts, and an optimizer steps the old ones until it is made anew: attach
    again then (a warning tells if nothing is left). Once the attachment was removed, or its
    optimizer is gone or holds none of the layers any more, ``regularize`` adds the term again.

    Args:
        pruner: a class, e.g. ``tp.pruner.GroupNormPruner``.
        optimizer: one to attach to when the pruner is made.
        settings: of the :class:`~orthoreg_ext.OrthoRegularizer`, e.g. ``penalty="so"``.

    Returns:
        A subclass of the pruner.

    Raises:
        TypeError: `pruner` is no pruner class.
    """
    if not (isinstance(pruner, type) and issubclass(pruner, tp.pruner.BasePruner)):
        what = f"an instance of {type(pruner).__name__}" if not isinstance(pruner, type) else pruner
        raise TypeError(
            f"pruner is {what}, expected a class of tp.pruner: write "
            "with_orthoreg(tp.pruner.BasePruner)(model, ...)"
        )
    base: Any = pruner

    class WithOrthoReg(base):  # type: ignore[misc]
        """The pruner, with a regulariser."""

        def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
            # first: what it refuses is refused before the graph is traced
            self.regularizer = OrthoRegularizer(model, **settings)
            self._steps: weakref.WeakKeyDictionary[torch.optim.Optimizer, Attachment] = (
                weakref.WeakKeyDictionary()
            )
            self._all = _AllParameters(self.regularizer)
            super().__init__(model, *args, **_own_dicts(base, model, args, kwargs))
            if optimizer is not None:
                self.attach(optimizer)

        def attach(self, optimizer: torch.optim.Optimizer) -> Attachment:
            """Adds the term before each step of the optimizer, and no more in ``regularize``."""
            self._steps[optimizer] = self.regularizer.attach(optimizer)
            return self._steps[optimizer]

        @property
        def attached(self) -> bool:
            """Whether the step of an optimizer of the layers, as they are now, adds the term."""
            concerns = self.regularizer.concerns
            return any(step.active and concerns(of) for of, step in self._steps.items())

        def regularize(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
            """The pruner's own, then the gradient of the term, added to each ``.grad``."""
            result = super().regularize(model, *args, **kwargs)
            if not self.attached:
                self._all.add()
            return result

    WithOrthoReg.__name__ = WithOrthoReg.__qualname__ = f"OrthoReg{pruner.__name__}"
    return WithOrthoReg


class _AllParameters:
    """Adds the term to each ``.grad`` of the model, as attached to an optimizer of all of it.

    So the steps of `every` and `schedule` are counted here, and not by whoever looks at the term.
    """

    def __init__(self, regularizer: OrthoRegularizer) -> None:
        self._regularizer = regularizer
        self._optimizer: torch.optim.Optimizer | None = None  # never steps
        self._attachment: Attachment | None = None

    def add(self) -> None:
        """Adds the gradient now."""
        parameters = list(self._regularizer.model.parameters())
        held = [] if self._optimizer is None else self._optimizer.param_groups[0]["params"]
        if list(map(id, parameters)) != list(map(id, held)):  # pruned
            self._attach(torch.optim.SGD(parameters, lr=0.0))
        if self._attachment is not None:
            self._attachment.add()

    def _attach(self, optimizer: torch.optim.Optimizer) -> None:
        if not self._regularizer.concerns(optimizer):  # nothing to train
            return
        before, self._optimizer = self._attachment, optimizer
        if before is not None:
            before.remove()
        self._attachment = self._regularizer.attach(optimizer, hook=False)
        if before is not None:
            self._attachment.step = before.step


def _own_dicts(
    pruner: type[Any], model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Keyword arguments with dicts of the call's own.

    Torch-Pruning 1.6.1 writes into its default dicts (base_pruner.py:234), so that a pruner begins
    with the channel groups of the ones before it.
    """
    signature = inspect.signature(pruner)
    given = signature.bind_partial(model, *args, **kwargs).arguments
    shared: dict[str, Any] = {
        name: {}
        for name, parameter in signature.parameters.items()
        if name not in given and isinstance(parameter.default, dict)
    }
    return {**shared, **kwargs}
