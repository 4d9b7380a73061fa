"""Markdown tables of rows."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.readme import markdown
from experiments.report.results import Result, Row, split, varying

BARE = (
    "model",
    "arm",
    "criterion",
    "scope",
    "method",
    "host",
    "mode",
)  # levels that say what they are
Cell = Callable[[Sequence[Row]], str]


def label(name: str, level: Any) -> str:
    """A level of a key, in words."""
    said = text(level)
    return said if name in BARE else f"{name.replace('_', ' ')} {said}"


def said(names: Sequence[str], keys: Sequence[Any]) -> str:
    """Levels of keys, in words; what a unit does not say is as it is by default."""
    known = [label(n, key) for n, key in zip(names, keys, strict=True) if key is not None]
    return ", ".join(known) or ("default" if names else "")


def grid(
    rows: Sequence[Row],
    down: Sequence[str],
    across: Sequence[str],
    cell: Cell,
    *,
    tables: Sequence[str] = (),
) -> list[str]:
    """Tables with the levels of some keys down and those of others across.

    Args:
        rows: what is shown.
        down: keys of the lines, a column each; those with a single level are left out.
        across: keys of the columns.
        cell: the text of all rows that meet.
        tables: keys of which every combination is a table of its own, with a heading.
    """
    parts = []
    for keys, mine in split(rows, varying(rows, *tables)).items():
        heading = said(varying(rows, *tables), keys)
        parts += [f"**{heading}**"] if heading else []
        lines, columns = varying(mine, *down) or tuple(down)[:1], list(split(mine, across))
        head = [name.replace("_", " ") for name in lines]
        body = [[*head, *(said(across, column) for column in columns)]]
        for level, there in split(mine, lines).items():
            cells = split(there, across)
            shown = [cell(cells[column]) if column in cells else "-" for column in columns]
            body.append([*(text(key) for key in level), *shown])
        parts.append(markdown(body))
    return parts


def text(level: Any) -> str:
    """A level below the name of its key; of a network of our own without its module."""
    if level is None:
        return "default"
    return level.rpartition(":")[2] if isinstance(level, str) else json.dumps(level)


def listing(
    rows: Sequence[Row],
    down: Sequence[str],
    columns: dict[str, Cell],
    *,
    tables: Sequence[str] = (),
) -> list[str]:
    """Tables with the levels of some keys down and several values across."""
    parts = []
    for keys, mine in split(rows, varying(rows, *tables)).items():
        heading = said(varying(rows, *tables), keys)
        parts += [f"**{heading}**"] if heading else []
        lines = varying(mine, *down) or tuple(down)[:1]
        body = [[*(name.replace("_", " ") for name in lines), *columns]]
        for level, there in split(mine, lines).items():
            body.append([*map(text, level), *(cell(there) for cell in columns.values())])
        parts.append(markdown(body))
    return parts


def caption(result: Result, rows: Sequence[Row], *parts: str) -> str:
    """What a table or a figure shows: how it is averaged, and what is alike in all of it."""
    names = dict.fromkeys(name for row in rows for name in row.keys)
    alike = [name for name in names if name not in varying(rows, *names)]
    keys = [rows[0].keys[name] for name in alike]
    source = result.config["data"]["source"]
    everywhere = f"{source}, {said(alike, keys)}" if alike else source
    seeds = (
        f"Mean (min..max) over {result.seeds} seed{'s' if result.seeds > 1 else ''}; {everywhere}."
    )
    diverged = sum(row.diverged for row in rows)
    lost = f"{diverged} of {len(rows)} runs diverged and are in no mean." if diverged else ""
    return " ".join(part for part in (*parts, seeds, lost) if part)
