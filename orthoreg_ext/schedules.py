"""How the strength of a regulariser changes: functions from the step number to a factor of it.

Each is a small frozen object for ``OrthoRegularizer(schedule=)``, whose ``state_dict`` it joins, so
that a run that is resumed with another schedule is refused. Any other function of the step serves
as well; one with ``state_dict`` and ``load_state_dict`` is saved and restored, too. Steps count
from 0.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, Protocol, runtime_checkable

from .arguments import is_count, is_factor
from .errors import choose


@runtime_checkable
class Stateful(Protocol):
    """A schedule that is saved with the regulariser."""

    def state_dict(self) -> Mapping[str, Any]: ...  # noqa: D102
    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...  # noqa: D102


@dataclass(frozen=True)
class _Fixed:
    """A schedule that its arguments determine."""

    def state_dict(self) -> dict[str, Any]:
        """Returns the schedule's name and arguments."""
        return {"schedule": type(self).__name__, **asdict(self)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Compares: there is nothing to restore.

        Raises:
            ValueError: the state is of another schedule, or of one with other arguments.
        """
        own = self.state_dict()
        saved = {k: tuple(v) if isinstance(v, list) else v for k, v in state.items()}  # JSON
        if saved != own:
            raise ValueError(
                f"the state is of the schedule {_text(saved)}, but this one is {_text(own)}: "
                "resume with the schedule it was saved with"
            )


def _text(state: Mapping[str, Any]) -> str:
    arguments = ", ".join(f"{k}={v!r}" for k, v in state.items() if k != "schedule")
    return f"{state.get('schedule', 'unknown')}({arguments})"


@dataclass(frozen=True)
class Constant(_Fixed):
    """The same factor at every step.

    Raises:
        ValueError: it is no finite number of at least 0.
    """

    factor: float = 1.0

    def __post_init__(self) -> None:
        """Checks the arguments."""
        _check_factor("factor", self.factor)

    def __call__(self, step: int) -> float:
        """The factor."""
        return self.factor


@dataclass(frozen=True)
class _Ramp(_Fixed):
    """From `start` to `end` in `steps` steps.

    Raises:
        ValueError: start or end is no finite number of at least 0, or steps is below 1.
    """

    steps: int
    start: float = 1.0
    end: float = 0.0

    def __post_init__(self) -> None:
        """Checks the arguments."""
        _check_count("steps", self.steps)
        _check_factor("start", self.start)
        _check_factor("end", self.end)

    def __call__(self, step: int) -> float:
        """The factor at that step; `end` from step `steps` on, exactly."""
        return self.end if step >= self.steps else self._before_end(step)

    def _before_end(self, step: int) -> float:
        raise NotImplementedError


@dataclass(frozen=True)
class Linear(_Ramp):
    """start + (end - start) * min(step / steps, 1).

    Raises:
        ValueError: start or end is no finite number of at least 0, or steps is below 1.
    """

    def _before_end(self, step: int) -> float:
        return self.start + (self.end - self.start) * (step / self.steps)


@dataclass(frozen=True)
class Cosine(_Ramp):
    """end + (start - end) * (1 + cos(pi * min(step / steps, 1))) / 2.

    Raises:
        ValueError: start or end is no finite number of at least 0, or steps is below 1.
    """

    def _before_end(self, step: int) -> float:
        return self.end + (self.start - self.end) * (1 + math.cos(math.pi * step / self.steps)) / 2


@dataclass(frozen=True)
class Growing(_Fixed):
    """min(start + delta * floor(step / every), ceiling), as TPP and GReg grow their penalty.

    The defaults are those of their released code on CIFAR (ImageNet: every 5 steps): 10 000 updates
    until the ceiling. There the first step has 0, as it has here.

    Source: Wang and Fu, arXiv 2207.12534; Wang et al., arXiv 2012.09243.

    Raises:
        ValueError: delta, ceiling or start is no finite number of at least 0, start is above the
            ceiling, or every is below 1.
    """

    delta: float = 1e-4
    every: int = 10
    ceiling: float = 1.0
    start: float = 0.0

    def __post_init__(self) -> None:
        """Checks the arguments."""
        _check_count("every", self.every)
        for name in ("delta", "ceiling", "start"):
            _check_factor(name, getattr(self, name))
        if self.start > self.ceiling:
            raise ValueError(f"start is {self.start}, expected at most the ceiling {self.ceiling}")

    def __call__(self, step: int) -> float:
        """The factor at that step."""
        return min(self.start + self.delta * (step // self.every), self.ceiling)


READINGS = ("multiply", "set")


@dataclass(frozen=True)
class BansalSteps(_Fixed):
    """The steps of Bansal et al., arXiv 1810.09102, in both readings.

    With the released code (``"multiply"``, train_n.py of Wide-ResNet) the strength is multiplied by
    1 in the epochs 1 to 20, by 1e-3 to 50, by 1e-4 to 70, by 1e-6 to 120, then by 0; that code
    begins with strength 1e-2 on CIFAR and 1e-6 on ImageNet, where the first step is after epoch 30.
    The paper (``"set"``) begins with 0.1 and sets the strength to 1e-3, 1e-4, 1e-6 and 0. A
    schedule gives factors, so it has to know the regulariser's strength: 0.1 unless `strength`
    says another one, and a regulariser of another strength refuses this one.

    Args:
        steps_per_epoch: optimizer steps in an epoch; the first epoch is number 1.
        reading: ``"multiply"`` or ``"set"``.
        epochs: the last epoch of each of the first four parts.
        strength: the regulariser's strength, for ``"set"`` only.

    Raises:
        ValueError: steps_per_epoch is below 1, the reading is unknown, the epochs are not four
            growing numbers, or the strength is no finite number above 0.
    """

    steps_per_epoch: int
    reading: str = "multiply"
    epochs: tuple[int, int, int, int] = (20, 50, 70, 120)
    strength: float = 0.1

    def __post_init__(self) -> None:
        """Checks the arguments."""
        _check_count("steps_per_epoch", self.steps_per_epoch)
        choose("reading", self.reading, READINGS)
        epochs = tuple(self.epochs) if isinstance(self.epochs, Sequence) else ()
        rising = all(map(is_count, epochs)) and all(a < b for a, b in pairwise(epochs))
        if len(epochs) != 4 or not rising:
            raise ValueError(f"epochs is {self.epochs!r}, expected four growing numbers of epochs")
        object.__setattr__(self, "epochs", epochs)
        _check_factor("strength", self.strength)
        if self.strength == 0:
            raise ValueError("strength is 0, expected the strength of the regulariser, above 0")

    def check_strength(self, strength: float) -> None:
        """Compares with the strength of the regulariser.

        Raises:
            ValueError: the reading is ``"set"`` for another one.
        """
        if self.reading == "set" and strength != self.strength:
            raise ValueError(
                f"schedule sets the strength {self.strength} to others, but strength is "
                f"{strength}: give both the same one (0.1 in the paper)"
            )

    def __call__(self, step: int) -> float:
        """The factor at that step."""
        part = bisect_left(self.epochs, step // self.steps_per_epoch + 1)
        factor = (1.0, 1e-3, 1e-4, 1e-6, 0.0)[part]
        return factor if part == 0 or self.reading == "multiply" else factor / self.strength


def _check_factor(name: str, value: object) -> None:
    if not is_factor(value):
        raise ValueError(f"{name} is {value!r}, expected a finite number of at least 0")


def _check_count(name: str, value: object) -> None:
    if not is_count(value):
        raise ValueError(f"{name} is {value!r}, expected a positive number of steps")
