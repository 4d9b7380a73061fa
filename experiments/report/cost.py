"""Cost: seconds of a training step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from experiments.report.cells import Parts
from experiments.report.page import View
from experiments.report.results import Result, Row
from experiments.report.spread import gather
from experiments.report.tables import Cell, caption, listing

WITHOUT = "without"
ALONE = ", alone"
TOLD = (
    "Percent: what a step takes longer than one without the term, timed in turn, the median; "
    "alone: the term by itself, as a share of that step."
)


def step(result: Result) -> Parts:
    """A line a network: the step, and what every way adds to it."""
    ways = dict.fromkeys(way for row in result.rows for way in row.values.get("ratio", {}))
    columns = {"ms without": _cell(result, "ms", WITHOUT, 0.0, 1.0, ".1f")}
    for way in ways:
        if way != WITHOUT:
            less, form = (0.0, ".2f") if way.endswith(ALONE) else (1.0, "+.2f")
            columns[f"`{way}`, %"] = _cell(result, "ratio", way, less, 100.0, form)
    columns["busy"] = _busy
    rows = result.rows
    return [*listing(rows, ["model"], columns), caption(result, rows, TOLD)]


def _cell(result: Result, kind: str, way: str, less: float, factor: float, form: str) -> Cell:
    def value(row: Row) -> float | None:
        known = row.values.get(kind, {}).get(way)
        return None if known is None else factor * (known["median"] - less)

    return lambda rows: gather(rows, value, result.seeds).text(form)


def _busy(rows: Sequence[Row]) -> str:
    """The runs in which too few rounds were undisturbed, so that all count."""
    busy = sum(row.values.get("state") == "contended" for row in rows)
    return f"{busy} of {len(rows)} runs"


VIEWS: Mapping[str, View] = {"step": step}
