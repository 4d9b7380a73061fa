"""Trainability: accuracy by method, ratio and learning rate; the Jacobian's singular values."""

from __future__ import annotations

from collections.abc import Mapping

from experiments.report.cells import (
    GAINS,
    RATIO,
    SHADE,
    TWICE,
    Parts,
    accuracies,
    gains,
    lines_of,
    single,
)
from experiments.report.figures import Figure, Panel
from experiments.report.page import View
from experiments.report.results import Result, having, lacking, others, split
from experiments.report.spread import of
from experiments.report.tables import Cell, caption, grid, listing, said

BASE = "l1"


def accuracy(result: Result) -> Parts:
    """Fine-tuned, by method, ratio and learning rate."""
    rows = having(result.rows, "lr")
    tables = ["model", "arm", "lr"]
    shown = grid(rows, ["method"], ["ratio"], accuracies(result), tables=tables)
    names = [name for name in tables if name in others(rows)]
    panels = [
        Panel(said(names, keys), lines_of(mine, "method", "ratio", of("finetuned"), result.seeds))
        for keys, mine in split(rows, names).items()
    ]
    y = "accuracy after fine-tuning, %"
    figure = Figure("accuracy", caption(result, rows, SHADE), RATIO, y, tuple(panels))
    return [*shown, caption(result, rows, TWICE), figure]


def effects(result: Result) -> Parts:
    """What a method gains over the plain cut at the same budget."""
    rows = having(result.rows, "lr")
    shown = gains(result, rows, "method", BASE, tables=["model", "arm", "lr"])
    return [*shown, caption(result, rows, GAINS)] if shown else []


def isometry(result: Result) -> Parts:
    """The mean singular value of the Jacobian after the cut, and the accuracies."""
    whole = lacking(result.rows, "method")
    tuned = having(result.rows, "lr")
    columns: dict[str, Cell] = {
        "mean singular value": single(result, "jsv", ".3g"),
        "mean (value - 1)²": single(result, "jsv_distance", ".3g"),
        "cut": single(result, "cut"),
    }
    for (lr,) in split(tuned, ["lr"]):
        columns[f"fine-tuned, lr {lr}"] = _at(result, lr)
    before = {**dict(list(columns.items())[:2]), "accuracy, %": single(result, "accuracy")}
    return [
        "Before the cut:",
        *listing(whole, ["model"], before, tables=["arm"]),
        "After it:",
        *listing(tuned, ["ratio", "method"], columns, tables=["model", "arm"]),
        caption(result, tuned, "Of d outputs / d input, before the fine-tuning."),
    ]


def _at(result: Result, lr: float) -> Cell:
    show = single(result, "finetuned")
    return lambda rows: show([row for row in rows if row.keys["lr"] == lr])


VIEWS: Mapping[str, View] = {"accuracy": accuracy, "effects": effects, "isometry": isometry}
