"""A term on an optimizer: its gradient is added just before each step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class Attachment:
    """A regulariser on one optimizer, with a step number of its own.

    Args:
        optimizer: the optimizer whose gradients are added to before each step.
        add: adds the term of a step number to the gradients of the optimizer's parameters.
        step: the number of the first step.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        add: Callable[[torch.optim.Optimizer, int], None],
        step: int,
    ) -> None:
        self.step = step
        self.active = True
        self._add_term = add
        self._handle = optimizer.register_step_pre_hook(self._before_step)

    def remove(self) -> None:
        """Detaches; the optimizer's steps no longer carry the term."""
        self.active = False
        self._handle.remove()

    def _before_step(
        self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._add(optimizer)
            return None

        def with_term() -> Any:  # the closure zeroes the gradients and fills them anew
            loss = closure()
            self._add(optimizer)
            return loss

        if "closure" in kwargs:
            return args, {**kwargs, "closure": with_term}
        return (args[0], with_term, *args[2:]), kwargs

    def _add(self, optimizer: torch.optim.Optimizer) -> None:
        step, self.step = self.step, self.step + 1
        self._add_term(optimizer, step)


def parameters_of(optimizer: torch.optim.Optimizer) -> set[int]:
    """The identities of the parameters that an optimizer steps."""
    return {id(p) for group in optimizer.param_groups for p in group["params"]}
