"""Mean and range over seeds: how every number of the page is shown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

from experiments.report.results import Row

NOTHING = 1e-9
Value = Callable[[Row], float | None]


@dataclass(frozen=True)
class Spread:
    """What the seeds say of one number.

    Attributes:
        values: one a seed: the mean of what its units found.
        runs: units that found something.
        planned: units that there should be.
        diverged: units that diverged.
        each: units a seed.
    """

    values: tuple[float, ...]
    runs: int
    planned: int
    diverged: int
    each: int

    @property
    def mean(self) -> float:
        """Over the seeds; there must be one."""
        return fmean(self.values)

    @property
    def low(self) -> float:
        """The least of the seeds."""
        return min(self.values)

    @property
    def high(self) -> float:
        """The most of the seeds."""
        return max(self.values)

    def text(self, form: str = ".1f") -> str:
        """``mean (min..max)``, and in words what is missing; ``-`` where nothing was planned."""
        numbers = ""
        if self.values:
            mean, low, high = (f"{_clean(x):{form}}" for x in (self.mean, self.low, self.high))
            numbers = f"{mean} ({low}..{high})" if len(self.values) > 1 else mean
        return ", ".join(part for part in (numbers, self.missing) if part) or "-"

    @property
    def missing(self) -> str:
        """What is not in it: ``3 of 5 seeds``, ``1 diverged``; or nothing."""
        parts = []
        if 0 < self.runs + self.diverged < self.planned:
            what = "seeds" if self.each == 1 else "runs"
            parts.append(f"{self.runs + self.diverged} of {self.planned} {what}")
        if self.diverged:
            parts.append(f"{self.diverged} diverged")
        return ", ".join(parts)

    def signs(self) -> str:
        """``+ in 4 of 5``: the seeds of which the value is above 0."""
        return f"+ in {sum(_clean(x) > 0 for x in self.values)} of {len(self.values)}"


def _clean(x: float) -> float:
    """Without what is left of 0 where sums of floats cancel."""
    return 0.0 if abs(x) < NOTHING else x


def gather(rows: Sequence[Row], value: Value, seeds: int) -> Spread:
    """The spread of a value over the seeds of rows.

    Args:
        rows: of one cell; several of a seed are averaged before anything else.
        value: of a row, None where it has none.
        seeds: how many were planned.
    """
    by_seed: dict[int, list[Row]] = {}
    for row in rows:
        by_seed.setdefault(row.seed, []).append(row)
    each = max(map(len, by_seed.values()), default=0)
    values, runs = [], 0
    for mine in by_seed.values():
        known = [x for row in mine if not row.diverged and (x := value(row)) is not None]
        runs += len(known)
        if known:
            values.append(fmean(known))
    diverged = sum(row.diverged for row in rows)
    return Spread(tuple(values), runs, each * max(seeds, len(by_seed)), diverged, each)


def of(path: str, factor: float = 1.0) -> Value:
    """The value of that name, times a factor."""

    def value(row: Row) -> float | None:
        found = row.value(path)
        return None if found is None else factor * found

    return value


def over_layers(*paths: str) -> Value:
    """The mean over the layers of a row of one of their values, or of one less another."""

    def value(row: Row) -> float | None:
        found = [
            known
            for layer in row.values.get("layers", {}).values()
            if (known := difference(layer, *paths)) is not None
        ]
        return fmean(found) if found else None

    return value


def difference(values: dict[str, float], first: str, second: str | None = None) -> float | None:
    """A value, or it less another; None where one is missing."""
    if first not in values or (second is not None and second not in values):
        return None
    return values[first] - (values[second] if second is not None else 0.0)
