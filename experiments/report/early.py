"""Early pruning: accuracy by the moment of the cut, and how far masks are from each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from experiments.report.cells import GAINS, LEFT, SHADE, TWICE, Parts, accuracies, gains, lines_of
from experiments.report.figures import Figure, Line, Panel, Point
from experiments.report.page import View
from experiments.report.results import Result, Row, having, others, split
from experiments.report.spread import gather, of
from experiments.report.tables import caption, grid, said

LATE = 1.0  # after all of the training
DISTANCE = "Distance: the share of all filters that only one of two masks removes."


def accuracy(result: Result) -> Parts:
    """By the share of the training after which was cut."""
    rows = having(result.rows, "at")
    down = ["criterion", "ratio", "arm"]
    shown = grid(rows, down, ["at"], accuracies(result), tables=["model"])
    names = ["model", "criterion", "ratio"]
    names = [name for name in names if name in others(rows)]
    panels = [
        Panel(said(names, keys), lines_of(mine, "arm", "at", of("finetuned"), result.seeds))
        for keys, mine in split(rows, names).items()
    ]
    told = f"At: the share of the training after which was cut{_epochs(result, rows)}."
    figure = Figure(
        "accuracy",
        caption(result, rows, SHADE),
        "share of the training after which was cut",
        "accuracy after fine-tuning, %",
        tuple(panels),
        log="x",
    )
    return [*shown, caption(result, rows, TWICE, LEFT, told), figure]


def _epochs(result: Result, rows: Sequence[Row]) -> str:
    """What the shares are in whole epochs."""
    cuts = {row.keys["at"]: epochs for row in rows if (epochs := row.value("epochs")) is not None}
    told = ", ".join(f"{at:g} is {cuts[at]:.0f}" for at in sorted(cuts))
    return f"; {told} of {result.config['recipe']['epochs']} epochs" if told else ""


def effects(result: Result) -> Parts:
    """What cutting early and what the regulariser gains."""
    rows = having(result.rows, "at")
    early = gains(result, rows, "at", LATE, tables=["model", "arm", "criterion"])
    arms = gains(result, rows, "arm", "none", tables=["model", "at", "criterion"])
    return [*early, *arms, caption(result, rows, GAINS)] if early or arms else []


def masks(result: Result) -> Parts:
    """The distance of every epoch's mask to those before, and to the last one."""
    rows = [row for row in having(result.rows, "masks") if not row.diverged]
    names = [name for name in ("model", "arm") if name in others(rows)]
    panels = []
    for keys, mine in split(rows, names).items():
        lines = [
            Line(f"{level[0]}, {words}", points)
            for level, there in split(mine, ["masks"]).items()
            for path, words in (("distance", "in its window"), ("to_last", "to the last"))
            if (points := _course(there, path, result.seeds))
        ]
        panels.append(Panel(said(names, keys), tuple(lines)))
    lost = len(having(result.rows, "masks")) - len(rows)
    told = [DISTANCE, SHADE, *([f"{lost} diverged."] if lost else [])]
    short = [replace(row, keys={k: v for k, v in row.keys.items() if k != "masks"}) for row in rows]
    figure = Figure(
        "masks",
        caption(result, short, *told),
        "epoch",
        "distance of masks",
        tuple(panels),
    )
    return [figure]


def _course(rows: Sequence[Row], path: str, seeds: int) -> tuple[Point, ...]:
    """One value an epoch."""
    points = []
    for at in range(max(len(row.values.get(path, [])) for row in rows)):
        spread = gather(rows, lambda row, at=at: _at(row, path, at), seeds)  # type: ignore[misc]
        points += [Point.of(at + 1, spread)] if spread.values else []
    return tuple(points)


def _at(row: Row, path: str, at: int) -> float | None:
    values = row.values.get(path, [])
    return values[at] if at < len(values) else None


VIEWS: Mapping[str, View] = {"accuracy": accuracy, "effects": effects, "masks": masks}
