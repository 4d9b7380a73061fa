"""A callback for Lightning's Trainer, of the package `lightning` or `pytorch_lightning`."""

from __future__ import annotations

import inspect
import sys
import weakref
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import nn

from ..attachment import Attachment
from ..regularizer import OrthoRegularizer

_PACKAGES = ("lightning.pytorch", "pytorch_lightning")
_SHARDED = ("FSDPStrategy", "DeepSpeedStrategy")


class OrthoRegCallback:
    """Adds the gradient of an :class:`OrthoRegularizer` before each optimizer step.

    ``Trainer(callbacks=[OrthoRegCallback(strength=1e-3)])`` is all, for automatic and for manual
    optimization: the term is added in ``on_before_optimizer_step``, once a step however many
    batches were accumulated, to the layers that the stepped optimizer holds (one that holds none is
    left alone; each counts its own steps). Lightning unscales the gradients before that hook and
    clips them after it, so the term is inside ``gradient_clip_val``; what a module clips by itself
    under manual optimization it clips without the term. Fused optimizers under ``16-mixed``
    unscale in their step: there the term is added by that step, scaled alike (Lightning refuses to
    clip with them). A step that the loss scaler skips counts, as it does in
    ``trainer.global_step``; one without any gradient, whose ``training_step`` gave None, does not
    and gets no term.

    The steps of `every` and `schedule` are saved in the checkpoint, so a resumed run goes on with
    them. A layer that is frozen at a step (``toggle_optimizer``) has no part in it, nor in the
    normalised weights of the others: give each network a callback of its own by ``include=``.

    Args:
        penalty: as in :class:`OrthoRegularizer`.
        strength: as in :class:`OrthoRegularizer`.
        name: tells several of these callbacks apart in a checkpoint.
        options: the other arguments of :class:`OrthoRegularizer`.

    Attributes:
        regularizer: the regulariser of the module, from the start of the training on.

    Raises:
        ImportError: neither package is installed.
        TypeError: :class:`OrthoRegularizer` has no such argument.
        ValueError: when training starts: no layer is left, no optimizer holds one, or the strategy
            (FSDP, DeepSpeed) gives a process only a part of each weight.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> OrthoRegCallback:
        """Makes it a Callback of the package in use, which may be imported after this module."""
        return object.__new__(_as_callback(cls, _callback_classes()))  # type: ignore[arg-type]

    def __init__(
        self,
        penalty: str = "orthoreg",
        strength: float = 1e-2,
        *,
        name: str = "orthoreg",
        **options: Any,
    ) -> None:
        inspect.signature(OrthoRegularizer).bind(nn.Identity(), penalty, strength, **options)
        self.name = name
        self.options = {"penalty": penalty, "strength": strength, **options}
        self.regularizer: OrthoRegularizer | None = None
        self._saved: dict[str, Any] = {}
        self._made: list[Attachment] = []  # also those whose optimizers are gone, after the run
        self._attached: weakref.WeakKeyDictionary[torch.optim.Optimizer, Attachment] = (
            weakref.WeakKeyDictionary()
        )

    @property
    def state_key(self) -> str:
        """The key of this callback's state in a checkpoint."""
        return f"OrthoRegCallback{{'name': {self.name!r}}}"

    def on_train_start(self, trainer: Any, pl_module: nn.Module) -> None:
        """Finds the layers and the optimizers that hold them."""
        if (strategy := type(trainer.strategy).__name__) in _SHARDED:
            raise ValueError(
                f"{strategy} gives a process only a part of each weight, but the penalty is of "
                "whole filters: use DDPStrategy or a single device"
            )
        saved = self._saved
        if self.regularizer and self.regularizer.model is pl_module and trainer.global_step:
            saved = saved or self.state_dict()  # fit() goes on
        regularizer = OrthoRegularizer(pl_module, **self.options)
        if saved:
            regularizer.load_state_dict(saved)
        self.regularizer, self._saved = regularizer, {}
        for made in self._made:
            made.remove()
        self._attached.clear()
        self._made.clear()
        attached = [self._attach(trainer, optimizer) for optimizer in trainer.optimizers]
        if not any(attached):
            raise ValueError(
                "no optimizer of configure_optimizers holds any of the regularised layers: give it "
                "their parameters, or name other layers in include="
            )

    def on_before_optimizer_step(
        self, trainer: Any, pl_module: nn.Module, optimizer: torch.optim.Optimizer
    ) -> None:
        """Adds the term to the gradients, which are accumulated and unscaled but not clipped."""
        attachment = self._attach(trainer, optimizer)
        if attachment and attachment.by_hand and _has_gradient(optimizer):
            attachment.add()

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs; empty before the training has started."""
        if self._saved or self.regularizer is None:
            return dict(self._saved)
        state, steps = self.regularizer.state_dict(), [made.step for made in self._made]
        return {**state, "attached_steps": steps + state["attached_steps"][len(steps) :]}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continues from a checkpoint when the training starts."""
        self._saved = dict(state_dict)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy or a pickle is attached to nothing and goes on with the steps that were made."""
        cls = next(c for c in type(self).__mro__ if c is not type(self))
        of_run = ("_attached", "_made", "log", "log_dict")  # the last two are set by the Trainer
        state = {key: value for key, value in self.__dict__.items() if key not in of_run}
        return _restore, (cls, {**state, "regularizer": None, "_saved": self.state_dict()})

    def _attach(self, trainer: Any, optimizer: torch.optim.Optimizer) -> Attachment | None:
        """The attachment of an optimizer, None if it holds no layer that is regularised now."""
        assert self.regularizer is not None
        if optimizer not in self._attached and self.regularizer.concerns(optimizer):
            scaler = getattr(trainer.precision_plugin, "scaler", None)
            unscales = getattr(optimizer, "_step_supports_amp_scaling", False)
            hook = scaler is not None and unscales
            self._attached[optimizer] = self.regularizer.attach(optimizer, hook=hook)
            self._made.append(self._attached[optimizer])
        return self._attached.get(optimizer)


def _has_gradient(optimizer: torch.optim.Optimizer) -> bool:
    return any(p.grad is not None for group in optimizer.param_groups for p in group["params"])


def _callback_classes() -> tuple[type, ...]:
    """Callback of each package that is loaded, or else of the first one that is installed."""
    loaded = [module for name in _PACKAGES if (module := sys.modules.get(name))]
    for name in () if loaded else _PACKAGES:
        try:
            loaded = [import_module(name)]
            break
        except ModuleNotFoundError as error:
            if error.name not in (name, name.partition(".")[0]):
                raise
    if not loaded:
        raise ImportError(
            "OrthoRegCallback needs lightning or pytorch_lightning, and neither is installed: "
            "pip install lightning",
            name="lightning",
        )
    return tuple(module.Callback for module in loaded)


@cache
def _as_callback(cls: type, bases: tuple[type, ...]) -> type:
    missing = tuple(base for base in bases if not issubclass(cls, base))
    return type(cls.__name__, (cls, *missing), {"__module__": cls.__module__}) if missing else cls


def _restore(cls: type[OrthoRegCallback], state: dict[str, Any]) -> OrthoRegCallback:
    callback = cls.__new__(cls)
    callback.__dict__.update(state, _attached=weakref.WeakKeyDictionary(), _made=[])
    return callback
