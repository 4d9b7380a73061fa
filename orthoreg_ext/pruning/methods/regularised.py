"""A regulariser that is on for a phase of training, with weight decay off as long."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from ...attachment import Attachment
from ...regularizer import OrthoRegularizer


class Phased:
    """Attaches a regulariser to optimizers and takes it off again.

    While it is on, the weight decay of every parameter group is 0: OrthoReg's released code trains
    all parameters so (config.py), because the decay pulls the norms to 0 and the diagonal of the
    Gram matrix pulls them to 1. Both are put back by :meth:`stop`.

    Args:
        model: the model whose layers are regularised.
        regularizer: of that model, attached to nothing yet.
        optimizers: attached to are those that hold a regularised layer.
        keep_weight_decay: leave the weight decay as it is.

    Raises:
        TypeError: the regulariser is something else.
        ValueError: it is of another model, or no optimizer holds one of its layers.
    """

    def __init__(
        self,
        model: nn.Module,
        regularizer: OrthoRegularizer,
        optimizers: Sequence[Optimizer],
        keep_weight_decay: bool = False,
    ) -> None:
        if not isinstance(regularizer, OrthoRegularizer):
            raise TypeError(
                f"regularizer is {type(regularizer).__name__}, expected an OrthoRegularizer"
            )
        if regularizer.model is not model:
            raise ValueError("regularizer is of another model; make it of the one that is pruned")
        self.regularizer = regularizer
        self.optimizers = optimizers
        self.keep_weight_decay = keep_weight_decay
        self._attachments: list[Attachment] = []
        self._decays: list[list[Any]] | None = None  # of the groups, while it is on
        if not self._holding():
            raise ValueError(
                "optimizer holds none of the regularised layers; pass the one that trains them"
            )

    @property
    def active(self) -> bool:
        """Whether it is on."""
        return self._decays is not None

    def start(self) -> None:
        """Turns it on; on any failure nothing is changed."""
        if self.active:
            return
        try:
            for optimizer in self._holding():
                self._attachments.append(self.regularizer.attach(optimizer))
        except ValueError:
            self._detach()
            raise
        groups = [optimizer.param_groups for optimizer in self.optimizers]
        self._decays = [[group.get("weight_decay") for group in entry] for entry in groups]
        if not self.keep_weight_decay:
            self._set_decays([[0.0] * len(entry) for entry in groups])

    def stop(self) -> None:
        """Turns it off, and gives every parameter group its weight decay back."""
        self._detach()
        if self._decays is not None and not self.keep_weight_decay:
            self._set_decays(self._decays)
        self._decays = None

    def settings(self) -> dict[str, Any]:
        """What a resumed run must share."""
        state = self.regularizer.state_dict()
        settings = {k: v for k, v in state.items() if k not in ("step", "attached_steps", "layers")}
        return {**settings, "keep_weight_decay": self.keep_weight_decay}

    def state(self) -> dict[str, Any]:
        """The steps of the regulariser, and the weight decays to give back."""
        return {"regularizer": self.regularizer.state_dict(), "weight_decays": self._decays}

    def check(self, state: Mapping[str, Any]) -> None:
        """Refuses a state of other parameter groups.

        Raises:
            ValueError: their number differs.
        """
        saved = state["weight_decays"]
        if saved is None:
            return
        sizes = [len(optimizer.param_groups) for optimizer in self.optimizers]
        if [len(entry) for entry in saved] != sizes:
            raise ValueError(
                f"state was saved with {[len(entry) for entry in saved]} parameter groups in the "
                f"optimizers, but here they have {sizes}"
            )

    def load(self, state: Mapping[str, Any]) -> None:
        """Goes on from a :meth:`state`."""
        self.stop()
        self.regularizer.load_state_dict(state["regularizer"])
        if state["weight_decays"] is not None:
            self.start()
            self._decays = [list(entry) for entry in state["weight_decays"]]

    def _holding(self) -> list[Optimizer]:
        names = self.regularizer.state_dict()["layers"]
        modules = [self.regularizer.model.get_submodule(name) for name in names]
        wanted = {id(p) for module in modules for p in module.parameters()}
        return [
            optimizer
            for optimizer in self.optimizers
            if any(id(p) in wanted for group in optimizer.param_groups for p in group["params"])
        ]

    def _detach(self) -> None:
        for attachment in self._attachments:
            attachment.remove()
        self._attachments = []

    def _set_decays(self, decays: Sequence[Sequence[Any]]) -> None:
        for optimizer, values in zip(self.optimizers, decays, strict=True):
            for group, value in zip(optimizer.param_groups, values, strict=True):
                if "weight_decay" in group:
                    group["weight_decay"] = value
