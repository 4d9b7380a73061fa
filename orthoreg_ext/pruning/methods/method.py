"""What every method with a schedule is: an object that a training loop tells where it is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.optim import Optimizer

from ...distributed import together
from ..engine import Engine
from ..held import Holders
from ..result import PruneResult
from ..rules import Rules
from ..schedule import check_ratio
from .checks import check_rules, steps


class Method:
    """Base of the methods: counts steps and epochs, chooses and removes units, saves and resumes.

    A training loop calls ::

        loss.backward()
        method.before_step()    # may add to the gradients
        optimizer.step()
        method.after_step()     # may write weights, or remove units; once an optimizer step
        ...
        method.after_epoch()
        ...
        result = method.finish()    # removes what is left to remove

    and may stop when ``method.done``. With a GradScaler, ``scaler.unscale_(optimizer)`` comes
    before ``before_step``. A method writes ``_before_step`` and the later calls as it needs them,
    and what it has to remember in :meth:`_state` and :meth:`_load`.

    Args:
        model: pruned in place.
        example_inputs: a tensor, a tuple of arguments or a dict of keyword arguments.
        ratio: the share of the prunable filters (or of the `target` of the rules) to remove in
            total, in (0, 1); None in methods that find it themselves.
        optimizer: the one that trains the model, or several; their state follows the cut.
        ignored: layers (names or modules) that keep their filters.
        ema: a copy of the model that is cut alike.
        verify: check that every cut leaves what the model computes without the removed channels.
        rules: fields of :class:`~orthoreg_ext.pruning.rules.Rules`: criterion, scope, target,
            round_to, max_layer_ratio, normalize, group_reduction, bias, dim; the method has its own
            defaults. No scope "one_at_a_time".

    Attributes:
        steps: optimizer steps seen.
        epochs: epochs seen.

    Raises:
        TypeError, ValueError: an argument is wrong or cannot be met; nothing was changed.
    """

    DEFAULTS: ClassVar[dict[str, Any]] = {}  # of the rules

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        *,
        ratio: float | None = 0.5,
        optimizer: Optimizer | Sequence[Optimizer] | None = None,
        ignored: Iterable[str | nn.Module] = (),
        ema: nn.Module | None = None,
        verify: bool = True,
        **rules: Any,
    ) -> None:
        with together("checking the arguments"):
            if ratio is not None:
                check_ratio(ratio)
            if rules.get("scope") == "one_at_a_time":
                raise ValueError(
                    "scope='one_at_a_time' scores anew after every few units, which a method with "
                    "a schedule does not; use scope='global', or prune() after the training"
                )
            self.ratio = ratio
            check_rules(type(self).__name__, rules)
            self.engine = Engine(
                model,
                example_inputs,
                Rules(**{**self.DEFAULTS, **rules}),
                optimizer=optimizer,
                ignored=ignored,
                ema=ema,
                verify=verify,
            )
        if ratio is not None:
            self.engine.check_ratio(ratio)
        self.steps = 0
        self.epochs = 0
        self._is_ready = not self._acts_before_steps  # for after_step
        self._holders: Holders | None = None
        self._result: PruneResult | None = None

    @property
    def model(self) -> nn.Module:
        """The model that is pruned."""
        return self.engine.model

    @property
    def holders(self) -> Holders:
        """The parameters of the units, as the model has them now."""
        if self._holders is None:
            self._holders = Holders(self.model, self.engine.structure)
        return self._holders

    @property
    def done(self) -> bool:
        """Whether the schedule is over, so that :meth:`finish` may be called."""
        return self._result is not None

    def before_step(self) -> None:
        """To be called after ``loss.backward()``, before ``optimizer.step()``."""
        self._is_ready = True
        self._before_step()

    def _before_step(self) -> None:
        """What the method does then."""

    def after_step(self) -> None:
        """To be called after ``optimizer.step()``.

        Raises:
            RuntimeError: :meth:`before_step` was not called, so that the step went without what the
                method adds.
        """
        if not self._is_ready:
            raise RuntimeError(
                f"{type(self).__name__}.after_step() was called without before_step(), so this "
                "step went without what the method adds to the gradients: call before_step() "
                "after loss.backward(), in front of every optimizer.step()"
            )
        self._is_ready = not self._acts_before_steps
        self.steps += 1

    @property
    def _acts_before_steps(self) -> bool:
        return type(self)._before_step is not Method._before_step

    def after_epoch(self) -> None:
        """To be called after every epoch."""
        self.epochs += 1

    def finish(self) -> PruneResult:
        """Removes what is left to remove, and says what was done; a second call only says it."""
        if self._result is None:
            self._finish()
            self._result = self.engine.result(method=type(self).__name__, **self._settings())
        return self._result

    def _finish(self) -> None:
        """Removes what is left to remove."""

    def remove(self, units: Tensor) -> None:  # [r] int64
        """Removes units from the model and all that follows it."""
        self.engine.remove(units)
        self._holders = None  # its parameters are others now

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, ready for JSON."""
        return {
            "method": type(self).__name__,
            "settings": {
                **self.engine.rules.document(),
                "ignored": sorted(self.engine.ignored),
                **self._settings(),
            },
            "architecture": self.engine.architecture,
            "steps": self.steps,
            "epochs": self.epochs,
            "history": list(self.engine.history),
            "finished": self._result is not None,
            **self._state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from a :meth:`state_dict`, on a method freshly made for the unpruned model.

        Removes what had been removed; load the weights and the optimizer's state afterwards.

        Raises:
            TypeError: the state is no mapping.
            ValueError: the state is of another method, other settings or another architecture, or
                damaged, or this method has begun already. Nothing was changed.
        """
        if not isinstance(state, Mapping):
            raise TypeError(f"state is {type(state).__name__}, expected what state_dict() returned")
        own = self.state_dict()
        if missing := sorted(set(own) - set(state)):
            raise ValueError(
                f"state has no {', '.join(missing)}: is it the state_dict of a "
                f"{type(self).__name__}?"
            )
        for key in ("method", "architecture", "settings"):
            if state[key] != own[key]:
                raise ValueError(
                    f"state was saved with {key} {state[key]!r}, but here it is {own[key]!r}"
                )
        if self.steps or self.epochs or self.engine.history:
            raise ValueError("this method has begun already; load the state into a fresh one")
        before = dict(vars(self))
        try:
            with self.engine.attempt():
                self.engine.replay(state["history"])
                self._holders = None
                self.steps = steps("steps", state["steps"], zero=True)
                self.epochs = steps("epochs", state["epochs"], zero=True)
                self._load(state)
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            vars(self).clear()
            vars(self).update(before)
            raise ValueError(f"state is damaged, nothing was changed: {error}") from error
        if state["finished"]:
            self._result = self.engine.result(method=type(self).__name__, **self._settings())

    def _settings(self) -> dict[str, Any]:
        """The arguments of the method that a resumed run must share, ready for JSON."""
        return {"ratio": self.ratio}

    def _state(self) -> dict[str, Any]:
        """What this method has to remember beside its counts, ready for JSON."""
        return {}

    def _load(self, state: Mapping[str, Any]) -> None:
        """Takes what :meth:`_state` gave."""

    def lowest(self) -> Tensor:  # [r] int64
        """The units to remove by the rules, for the ratio to be gone in total."""
        return self.engine.select(self.engine.score(), check_ratio(self.ratio))
