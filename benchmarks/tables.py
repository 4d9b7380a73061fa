"""Records as text: every case in full, and one table a question."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

Record = Mapping[str, Any]

QUESTIONS = {
    "penalty": "What does penalty + gradient cost? (x: times the package's own time)",
    "penalties": "What do other penalties and masks cost? (x: times `so` on the same side)",
    "scores": "What do five scores of every filter cost? (x: times the package's own time)",
    "importance": "And the importance of coupled groups? (x: times the package's own time)",
    "step": "What part of a training step is the regulariser? (% of the step without it)",
    "methods": "What does a pruning method add to a training step? (% of the step without it)",
    "memory": "How much memory does a step take beside weights and gradients? (MB)",
    "scaling": "How does the cost grow with n, with k and with the number of layers?",
}
STATES = {"contended": "THE MACHINE WAS BUSY", "unwatched": "other load not watched", "quiet": ""}


def spread(value: Mapping[str, float] | None, digits: int = 3) -> str:
    """A median with the middle half."""
    if value is None:
        return ""
    low, high = (f"{value[key]:.{digits}g}" for key in ("low", "high"))
    return f"{value['median']:.{digits}g} ({low}-{high})"


def percent(value: Mapping[str, float] | None) -> str:
    """A share of 1."""
    return "" if value is None else f"{100 * value['median']:.3g} %"


def columns(rows: Iterable[Iterable[str]]) -> list[str]:
    """Text in aligned columns, the first to the left."""
    table = [list(row) for row in rows]
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    return [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in table
    ]


def case_table(record: Record) -> str:
    """One case, every way on a line."""
    if record["work"] == "memory":
        head = f"memory {record['model']}, {record['layers']} layers"
        rows = [["way", "extra MB"]]
        rows += [[name, f"{row['extra_mb']:.1f}"] for name, row in record["rows"].items()]
    else:
        layers = f", {record['layers']} layers" if record["layers"] else ""
        matmul = f"float32 matmul {record['matmul']!r}"
        state = f"; {STATES[record['state']]}" if STATES[record["state"]] else ""
        head = (
            f"{record['work']} {record['model']}, {matmul}{layers}, {record['rounds']} rounds, "
            f"{record['rejected']} disturbed{state}"
        )
        limit = (record["ceiling"] or {"name": "ceiling"})["name"]
        rows = [["way", "computes", "ms", "host us", "x base", f"of {limit}", "error"]]
        for name, row in record["rows"].items():
            host, error = row["host_us"], row["error"]
            rows.append(
                [
                    name,
                    row["computes"],
                    spread(row["ms"], 4),
                    "" if host is None else f"{host:.1f}",
                    spread(row["ratio"]),
                    percent(row["share"]),
                    "" if error is None else f"{error:.1e}",
                ]
            )
    lines = [head, *(f"  {line}" for line in columns(rows))]
    lines += [f"  {name} left out: {why}" for name, why in record["left_out"].items()]
    return "\n".join(lines)


def _lines_of(record: Record) -> list[tuple[str, list[str]]]:
    """The ways of a case that others are divided by, with those others."""
    found: dict[str, list[str]] = {}
    for name, row in record["rows"].items():
        if row["ratio"] is not None:
            found.setdefault(row["ratio"]["to"], []).append(name)
    return list(found.items())


def _short(name: str, base: str) -> str:
    """Of the ways that differ by what they compute, the name without it."""
    return name.removesuffix("-both") if base.endswith("-both") else name


def summary(records: Iterable[Record], question: str) -> str:
    """One question, a model on a line; empty where nothing was measured for it."""
    chosen = [r for r in records if r["question"] == question]
    if not chosen:
        return ""
    rows = _memory(chosen) if question == "memory" else _timed(chosen, question)
    lines = [QUESTIONS[question], *(f"  {line}" for line in columns(rows))]
    for record in chosen:
        failed = [f"{name} ({record['left_out'][name]})" for name in record["failed"]]
        if failed:
            lines.append(f"  FAILED in {record['model']}: {'; '.join(failed)}")
    return "\n".join(lines)


def _memory(records: list[Record]) -> list[list[str]]:
    names = list(dict.fromkeys(n for r in records for n in (*r["rows"], *r["left_out"])))
    rows = [["model", "weights", "Gram matrices", *names]]
    for record in records:
        own = [record["rows"].get(name) for name in names]
        extra = ["-" if row is None else f"{row['extra_mb']:.1f}" for row in own]
        about = [f"{record['weights_mb']:.0f}", f"{record['gram_mb']:.1f}"]
        rows.append([record["model"], *about, *extra])
    return rows


def _timed(records: list[Record], question: str) -> list[list[str]]:
    lines = [(record, base, others) for record in records for base, others in _lines_of(record)]
    names = list(dict.fromkeys(_short(n, base) for _, base, others in lines for n in others))
    share = next((r["ceiling"]["name"] for r in records if r["ceiling"]), "")
    head = ["model", "base", "ms", *([f"of {share}"] if share else []), "error"]
    rows = [[*head, *names, "rounds"]]
    for record, base, others in lines:
        own, by_name = record["rows"][base], {_short(n, base): n for n in others}
        error = own["error"]
        cells = [record["model"], base, spread(own["ms"])]
        cells += [percent(own["share"])] if share else []
        cells.append("" if error is None else f"{error:.0e}")
        for name in names:
            row = record["rows"].get(by_name.get(name, ""))
            cells.append("-" if row is None else _ratio(row, question))
        mark = {"contended": "!", "unwatched": "?", "quiet": ""}[record["state"]]
        rows.append([*cells, f"{record['rounds']}{mark}"])
    return rows


def _ratio(row: Mapping[str, Any], question: str) -> str:
    if question not in ("step", "methods"):
        return spread(row["ratio"])
    added = 0.0 if row["computes"] == "term" else 1.0  # a step with the term, or the term alone
    values = {key: 100 * (row["ratio"][key] - added) for key in ("median", "low", "high")}
    return spread(values)


def all_tables(results: Record) -> str:
    """Every question, then every case in full."""
    machine = results["machine"]
    head = (
        f"{machine['name']}, {machine['threads']} threads, torch {machine['torch']}, "
        f"orthoreg_ext {machine['orthoreg_ext']}"
    )
    if machine["emulated"]:
        head += ", EMULATED: no time here counts"
    parts = [head, summaries(results), *(case_table(case) for case in results["cases"])]
    return "\n\n".join(part for part in parts if part) + "\n"


def summaries(results: Record) -> str:
    """One table a question, what the machine gives, and what there was no time for."""
    parts = [summary(results["cases"], question) for question in QUESTIONS]
    for name, found in results.get("ceilings", {}).items():
        parts.append(f"{name}: {found['rate'] / 1e9:.1f} G{found['unit']} ({found['meaning']})")
    states = {case.get("state") for case in results["cases"]}
    notes = []
    if "contended" in states:
        notes.append("! too few undisturbed rounds: all rounds count, do not trust the line")
    if "unwatched" in states:
        notes.append("? other load was not watched")
    if results["not_reached"]:
        notes.append("no time was left for: " + "; ".join(results["not_reached"]))
    return "\n\n".join(part for part in (*parts, *notes) if part)
