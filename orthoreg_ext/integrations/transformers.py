"""A callback for the Trainer of Hugging Face Transformers."""

from __future__ import annotations

import inspect
import json
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from ..attachment import Attachment
from ..regularizer import OrthoRegularizer
from . import missing

try:
    from transformers import TrainerCallback
    from transformers.trainer_callback import ExportableState
except ModuleNotFoundError as error:
    raise missing(__name__, error) from None


class OrthoRegCallback(TrainerCallback, ExportableState):
    """Adds the gradient of an :class:`OrthoRegularizer` before each optimizer step.

    ``Trainer(callbacks=[OrthoRegCallback(strength=1e-3)])`` is all. The term is added in
    ``on_pre_optimizer_step``: once a step however many batches were accumulated, after the Trainer
    has unscaled (fp16) and clipped the gradients, so it is outside of ``max_grad_norm`` and not in
    the ``grad_norm`` that is logged, nor in the logged loss. A step that the loss scaler skips
    counts, as it does in ``state.global_step``.

    The steps of `every` and `schedule` are saved in the checkpoint's ``trainer_state.json``, and
    ``trainer.train(resume_from_checkpoint=...)`` goes on with them, with or without
    ``restore_callback_states_from_checkpoint``. With it the Trainer builds callbacks anew from
    JSON, which cannot hold functions and schedules: a callback that has some refuses to go on.

    Args:
        penalty: as in :class:`OrthoRegularizer`.
        strength: as in :class:`OrthoRegularizer`.
        name: tells several of these callbacks apart in a checkpoint.
        options: the other arguments of :class:`OrthoRegularizer`.

    Attributes:
        regularizer: the regulariser of the model, from the start of the training on.

    Raises:
        TypeError: :class:`OrthoRegularizer` has no such argument.
        ValueError: when training starts: no layer is left, the optimizer holds none, the
            checkpoint is of other settings, or DeepSpeed or FSDP gives a process only a part of
            each weight.
    """

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
        self.lost: list[str] = []  # arguments of the callback that this one was built after
        self.saved: dict[str, Any] | None = None  # the same one's state
        self._attachment: Attachment | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Finds the layers, and the steps of the checkpoint."""
        model, optimizer = kwargs["model"], kwargs["optimizer"]
        self._check(args, model)
        regularizer = OrthoRegularizer(model, **self.options)
        if state.global_step:
            saved = self._find(state.stateful_callbacks)
            if saved is None:
                warnings.warn(
                    f"the checkpoint has no state of OrthoRegCallback(name={self.name!r}): the "
                    "steps of its schedule begin with 0",
                    stacklevel=2,
                )
            else:
                regularizer.load_state_dict(_from_json(saved))
        self._attachment = regularizer.attach(optimizer, hook=False)
        self.regularizer = regularizer
        self._enter(state.stateful_callbacks)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Adds the term to the gradients, which are accumulated, unscaled and clipped."""
        assert self._attachment is not None
        self._attachment.add()

    def state(self) -> dict[str, Any]:
        """What the Trainer writes into a checkpoint."""
        kept = {key: value for key, value in self.options.items() if _is_json(value)}
        saved = None if self.regularizer is None else _to_json(self.regularizer.state_dict())
        return {
            "args": {"name": self.name, **kept},
            "attributes": {"saved": saved, "lost": sorted(self.options.keys() - kept.keys())},
        }

    def __getstate__(self) -> dict[str, Any]:
        """A copy or a pickle is attached to nothing; its steps come from the checkpoint."""
        return {**self.__dict__, "regularizer": None, "_attachment": None}

    def _find(self, stored: dict[str, Any]) -> dict[str, Any] | None:
        """The newest state of this callback; the Trainer appends where there are several."""
        entries = _as_list(stored.get(type(self).__name__))
        mine = [entry for entry in entries if entry["args"].get("name") == self.name]
        return mine[-1]["attributes"]["saved"] if mine else None

    def _enter(self, stored: dict[str, Any]) -> None:
        """Adds this callback to those of a checkpoint that was written without it.

        The Trainer writes states of those only that it finds there, and fails at others.
        """
        entries = _as_list(stored.get(type(self).__name__))
        if all(entry["args"].get("name") != self.name for entry in entries):
            stored[type(self).__name__] = [*entries, self.state()] if entries else self.state()

    def _check(self, args: Any, model: nn.Module) -> None:
        if self.lost:
            raise ValueError(
                f"restore_callback_states_from_checkpoint=True loses {', '.join(self.lost)} of "
                "OrthoRegCallback, which JSON cannot hold: leave it out, for this callback goes on "
                "with its steps without it"
            )
        whole = [type(m).__name__ == "FullyShardedDataParallel" for m in model.modules()]
        if any(whole) or getattr(args, "deepspeed", None):
            raise ValueError(
                f"{'FSDP' if any(whole) else 'DeepSpeed'} gives a process only a part of each "
                "weight, but the penalty is of whole filters: train with DDP or on one device"
            )


def _as_list(entries: Any) -> list[dict[str, Any]]:
    return entries if isinstance(entries, list) else [entries] if entries else []


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except TypeError:
        return False
    return True


def _to_json(state: dict[str, Any]) -> dict[str, Any]:
    vectors: dict[str, Tensor] = state.get("vectors", {})
    lists = {name: vector.tolist() for name, vector in vectors.items()}
    return {**state, "vectors": lists} if lists else state


def _from_json(state: dict[str, Any]) -> dict[str, Any]:
    lists = state.get("vectors", {})
    vectors = {name: torch.tensor(v, dtype=torch.float64) for name, v in lists.items()}
    return {**state, "vectors": vectors} if vectors else state
