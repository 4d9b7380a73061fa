"""Scalars of a regulariser for TensorBoard, Weights & Biases or any other logger."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from ..arguments import is_count
from ..regularizer import OrthoRegularizer


class ScalarLogger:
    """Writes what :meth:`OrthoRegularizer.report` measures to a logger, every so many steps.

    Call it once a training step. It writes ``orthoreg/penalty``, the sum over the layers of
    weight * penalty (the term without its strength), and ``orthoreg/correlation``, the mean over
    the layers of the mean |cosine| between filters; with `per_layer` also
    ``orthoreg/penalty/LAYER`` and ``orthoreg/correlation/LAYER``. Layers without a pair of filters
    have no correlation and write none. A measurement waits for the GPU, so `every` should not be
    small there. With many processes make one in the first process only.

    Args:
        regularizer: what to measure.
        add_scalar: a function of tag, value and step, such as TensorBoard's
            ``SummaryWriter.add_scalar``.
        log: a function of a dict and ``step=``, such as ``wandb.log``, or ``log_metrics`` of a
            Lightning logger.
        every: measures in steps that are a multiple of it.
        per_layer: whether each layer's scalars are written, too.
        prefix: what all tags begin with.

    Raises:
        TypeError: not exactly one of `add_scalar` and `log` is given, or it is no function.
        ValueError: every is below 1.
    """

    def __init__(
        self,
        regularizer: OrthoRegularizer,
        *,
        add_scalar: Callable[[str, float, int], Any] | None = None,
        log: Callable[..., Any] | None = None,
        every: int = 100,
        per_layer: bool = False,
        prefix: str = "orthoreg/",
    ) -> None:
        if (add_scalar is None) == (log is None):
            raise TypeError("pass add_scalar= (writer.add_scalar) or log= (wandb.log), one of them")
        if not callable(add_scalar or log):
            raise TypeError(
                f"{add_scalar or log!r} is no function: pass writer.add_scalar or wandb.log"
            )
        if not is_count(every):
            raise ValueError(f"every is {every!r}, expected a positive number of steps")
        self.regularizer, self.every = regularizer, every
        self.per_layer, self.prefix = per_layer, prefix
        self.step = 0
        self._add_scalar, self._log = add_scalar, log

    def __call__(self, step: int | None = None) -> dict[str, float]:
        """Measures and writes, if it is time to.

        Args:
            step: the number of the step; without it the calls are counted, from 0.

        Returns:
            What was written, from tag to value; empty if it was not time to.
        """
        now = self.step if step is None else step
        self.step = now + 1
        if now % self.every:
            return {}
        scalars = self.measure()
        if self._log is not None:
            self._log(scalars, step=now)
        elif self._add_scalar is not None:
            for tag, value in scalars.items():
                self._add_scalar(tag, value, now)
        return scalars

    def measure(self) -> dict[str, float]:
        """The scalars now, from tag to value."""
        rows = self.regularizer.report().rows
        correlations = {r.name: r.correlation for r in rows if not math.isnan(r.correlation)}
        found = {"penalty": math.fsum(row.weight * row.penalty for row in rows)}
        if correlations:
            found["correlation"] = math.fsum(correlations.values()) / len(correlations)
        if self.per_layer:
            found |= {f"penalty/{row.name}": row.penalty for row in rows}
            found |= {f"correlation/{name}": value for name, value in correlations.items()}
        return {self.prefix + name: value for name, value in found.items()}
