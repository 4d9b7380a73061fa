"""Planted duplicates: which criterion finds them."""

from __future__ import annotations

from collections.abc import Mapping

from experiments.report.cells import Parts, single
from experiments.report.page import View
from experiments.report.results import Result, having, lacking
from experiments.report.tables import Cell, caption, listing

TOLD = (
    "Found: the share of the pairs of which a filter went. Lost: the share of what was there once "
    "of which nothing is left."
)


def found(result: Result) -> Parts:
    """By criterion."""
    nets, rows = lacking(result.rows, "criterion"), having(result.rows, "criterion")
    before: dict[str, Cell] = {
        "accuracy, %": single(result, "accuracy"),
        "with the copies": single(result, "wide"),
    }
    columns: dict[str, Cell] = {
        "found, %": single(result, "found", ".1f", 100),
        "lost, %": single(result, "lost", ".1f", 100),
        "after the cut, %": single(result, "cut"),
        "fine-tuned, %": single(result, "finetuned"),
    }
    return [
        *listing(nets, ["model", "arm"], before),
        *listing(rows, ["criterion"], columns, tables=["model", "arm"]),
        caption(result, rows, TOLD),
    ]


VIEWS: Mapping[str, View] = {"found": found}
