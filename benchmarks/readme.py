"""The README's table and figure, made of the JSON files under results/.

python -m benchmarks.readme            rewrites the block of README.md and docs/figures/
python -m benchmarks.readme --check    says whether they are what it would write
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.recording import RESULTS
from benchmarks.tables import percent, spread

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- benchmarks: python -m benchmarks.readme -->", "<!-- /benchmarks -->"
FIGURE = "cost.svg"
NONE = "No results yet: `make bench` writes them."
BASELINES = ("eager", "compile", "closed-small", "orthoreg-repo")

Record = Mapping[str, Any]


def load(folder: Path) -> list[Record]:
    """The results of every machine."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*/results.json"))]


def block(results: Sequence[Record]) -> str:
    """The text between the markers."""
    parts = [_machine(result) for result in results]
    return "\n\n".join(part for part in parts if part) or NONE


def _machine(result: Record) -> str:
    machine = result["machine"]
    threads = "" if machine["device"] == "cuda" else f", {machine['threads']} threads"
    figure = f"docs/figures/{machine['slug']}-{FIGURE}"
    tables = [_penalty(result), _scores(result), _step(result)]
    head = f"**{machine['name']}**{threads}, torch {machine['torch']}, float32:"
    link = f"![time of penalty and gradient against the flops needed]({figure})"
    shown = [link] if _penalty(result) else []
    return "\n\n".join([head, *(table for table in tables if table), *shown])


def markdown(rows: Sequence[Sequence[str]]) -> str:
    head, *rest = rows
    lines = [head, ["---"] * len(head), *rest]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _cases(result: Record, question: str) -> list[Record]:
    found = [c for c in result["cases"] if c["question"] == question]
    plain = [c for c in found if c["matmul"] == "highest"]
    return sorted(plain, key=lambda c: c["flops_needed"] or c["bytes"] or 0)


def _ratio(cases: Sequence[Record], way: str, base: str) -> str:
    """With the middle half; of the case where it was divided by that base."""
    for case in cases:
        ratio = case["rows"].get(way, {}).get("ratio")
        if ratio and ratio["to"] == base:
            return spread(ratio) + _busy(case)
    return "-"


def _busy(case: Record) -> str:
    return " (machine was busy)" if case["state"] == "contended" else ""


def _error(row: Record) -> str:
    return "-" if row["error"] is None else f"{row['error']:.0e}"


def _time(case: Record, way: str) -> list[str]:
    """Of the package: milliseconds, and the share of the ceiling."""
    row = case["rows"].get(way)
    return [spread(row["ms"]), percent(row["share"]) or "-"] if row else ["-", "-"]


def _penalty(result: Record) -> str:
    head = ("penalty + gradient", "error", "attached, ms", "one call, ms", "of sgemm's rate")
    rows = [[*head, *BASELINES]]
    by_model: dict[str, list[Record]] = {}
    for case in _cases(result, "penalty"):
        if "orthoreg_ext" in case["rows"]:
            by_model.setdefault(case["model"], []).append(case)
    for model, cases in by_model.items():
        first = cases[0]
        name = model + _busy(first)
        attached = _time(first, "orthoreg_ext-attached")[:1]
        own = [_error(first["rows"]["orthoreg_ext"]), *attached, *_time(first, "orthoreg_ext")]
        ratios = [
            _ratio(cases, way, "orthoreg_ext-l1" if way == "orthoreg-repo" else "orthoreg_ext")
            for way in BASELINES
        ]
        rows.append([name, *own, *ratios])
    return markdown(rows) if len(rows) > 1 else ""


def _scores(result: Record) -> str:
    each = [
        [f"{dims}, ms", "of the read bandwidth", "eager"]
        for dims in ("filters", "filters + inputs")
    ]
    rows = [["five scores", "error", *each[0], *each[1]]]
    for case in _cases(result, "scores"):
        if "orthoreg_ext-both" in case["rows"]:
            cells = [case["model"] + _busy(case), _error(case["rows"]["orthoreg_ext-both"])]
            for suffix in ("", "-both"):
                own = f"orthoreg_ext{suffix}"
                cells += [*_time(case, own), _ratio([case], f"eager{suffix}", own)]
            rows.append(cells)
    return markdown(rows) if len(rows) > 1 else ""


def _step(result: Record) -> str:
    names = ("orthoreg_ext-alone", "eager-alone")
    rows = [["training step", "ms without", "the term of it", "eager's"]]
    for case in [c for c in result["cases"] if c["question"] == "step"]:
        plain = case["rows"].get("plain")
        if plain:
            shares = [percent(case["rows"].get(name, {}).get("ratio")) or "-" for name in names]
            rows.append([case["model"] + _busy(case), spread(plain["ms"]), *shares])
    return markdown(rows) if len(rows) > 1 else ""


def rewritten(readme: str, results: Sequence[Record]) -> str:
    """The README with the block of these results.

    Raises:
        ValueError: it has no markers.
    """
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README.md has no lines {BEGIN!r} and {END!r}")
    return f"{before}{BEGIN}\n\n{block(results)}\n\n{END}{after}"


def files(root: Path, folder: Path) -> dict[Path, str]:
    """Everything that is made of the results, and its text."""
    results = load(folder)
    made = {root / "README.md": rewritten((root / "README.md").read_text(), results)}
    for result in results:
        slug = result["machine"]["slug"]
        figure = folder / slug / FIGURE
        if figure.exists():
            made[root / "docs" / "figures" / f"{slug}-{FIGURE}"] = figure.read_text()
    return made


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; 1 where they differ")
    options = parser.parse_args(argv)
    old = [
        path
        for path, text in files(ROOT, RESULTS).items()
        if not path.exists() or path.read_text() != text
    ]
    if options.check:
        for path in old:
            print(f"{path.relative_to(ROOT)} is not what python -m benchmarks.readme writes")
        return 1 if old else 0
    for path, text in files(ROOT, RESULTS).items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    print(
        "written: " + " ".join(str(path.relative_to(ROOT)) for path in old) if old else "as it was"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
