"""What the questions share: accuracies, gains, and lines over a key."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from experiments.report.figures import Figure, Line, Point
from experiments.report.results import Result, Row, levels, paired, split
from experiments.report.spread import Spread, Value, gather, of
from experiments.report.tables import Cell, grid, label

Parts = Sequence[str | Figure]

TWICE = "Accuracy in percent after fine-tuning; below it after the cut."
LEFT = "Last: the share of the multiply-accumulates that is left."
SHADE = "Lines: the mean; shaded: from the least to the most of the seeds."
RATIO = "ratio of filters removed"


def single(result: Result, path: str, form: str = ".1f", factor: float = 1.0) -> Cell:
    """A cell with one value."""
    return lambda rows: gather(rows, of(path, factor), result.seeds).text(form)


def accuracies(result: Result) -> Cell:
    """A cell with the accuracy after fine-tuning, that after the cut, and what is left."""

    def text(rows: Sequence[Row]) -> str:
        tuned = gather(rows, of("finetuned"), result.seeds)
        cut = gather(rows, of("cut"), result.seeds)
        left = gather(rows, _left, result.seeds)
        if not cut.values:
            return tuned.text()
        macs = f"<br>{left.mean:.0f} % MACs" if left.values else ""
        return f"{tuned.text()}<br>cut {bare(cut)}{macs}"

    return text


def _left(row: Row) -> float | None:
    gone = row.value("saved.macs")
    return None if gone is None else 100 * (1 - gone)


def bare(spread: Spread, form: str = ".1f") -> str:
    """A spread without what is missing, where that has been said before."""
    return Spread(spread.values, 0, 0, 0, spread.each).text(form)


def gains(
    result: Result, rows: Sequence[Row], name: str, base: Any, *, tables: Sequence[str] = ()
) -> list[str]:
    """Tables of what every level of a key gains over `base`, by the ratio."""
    if base not in levels(rows, name) or len(levels(rows, name)) < 2:
        return []
    tuned, cut = (paired(rows, name, base, of(path)) for path in ("finetuned", "cut"))
    after = dict(zip(map(_key, tuned), cut, strict=True))

    def text(mine: Sequence[Row]) -> str:
        gain = gather(mine, of("gain"), result.seeds)
        if not gain.values:
            return gain.text()
        of_cut = gather([after[_key(row)] for row in mine], of("gain"), result.seeds)
        return f"{gain.text('+.2f')}<br>{gain.signs()}<br>cut {bare(of_cut, '+.2f')}"

    told = f"Gain over {label(name, base)}, all else alike, in points."
    return [told, *grid(tuned, [name], ["ratio"], text, tables=tables)]


GAINS = (
    "First after fine-tuning, with the seeds in which it is above 0; last after the cut. "
    "What is neither a line nor a column is averaged within a seed."
)


def _key(row: Row) -> tuple[Any, ...]:
    return (row.seed, *sorted((k, str(v)) for k, v in row.keys.items()))


def lines_of(rows: Sequence[Row], name: str, x: str, value: Value, seeds: int) -> tuple[Line, ...]:
    """A line for every level of a key, over the levels of another."""
    found = []
    for level, mine in split(rows, [name]).items():
        points = [(at[0], gather(there, value, seeds)) for at, there in split(mine, [x]).items()]
        known = tuple(Point.of(at, spread) for at, spread in points if spread.values)
        found.append(Line(label(name, level[0]), known))
    return tuple(line for line in found if line.points)
