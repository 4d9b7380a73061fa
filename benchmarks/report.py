"""Puts the records of a run under results/: JSON, tables, figures; prints the tables.

    python -m benchmarks.report build/bench/records.json
    python -m benchmarks.report build/gpu-check/comparison.json more.json     # of one machine

The folder is named by the hardware. Of several files, later ones replace the same cases.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.plots import draw
from benchmarks.recording import RESULTS
from benchmarks.tables import all_tables, summaries

KEY = ("question", "model", "work", "matmul")


def joined(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The records of one machine and version as one.

    A case replaces an earlier one of the same kind whose ways it has, too.

    Raises:
        ValueError: they are of several ones, or emulated.
    """
    same = {(r["machine"]["slug"], r["machine"]["threads"], r["machine"]["torch"]) for r in records}
    if len(same) > 1:
        raise ValueError(
            f"the files are of several machines: {sorted(same)}; report each by itself"
        )
    if any(r["machine"]["emulated"] for r in records):
        raise ValueError("these are times of the emulator, which mean nothing; run on a GPU")
    cases: list[dict[str, Any]] = []
    for case in (c for r in records for c in r["cases"]):
        covered = [i for i, other in enumerate(cases) if _covers(case, other)]
        place = covered[0] if covered else len(cases)
        cases = [c for i, c in enumerate(cases) if i not in covered]
        cases.insert(place, case)
    limits = [r["ceilings"] for r in records if "ceilings" in r]
    return {
        "machine": records[-1]["machine"],
        "ceilings": limits[-1] if limits else {},
        "cases": cases,
        "not_reached": records[-1]["not_reached"],
    }


def _covers(case: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(case[k] == other[k] for k in KEY) and set(other["ways"]) <= set(case["ways"])


def write(results: dict[str, Any], folder: Path) -> list[Path]:
    """Writes results.json, tables.txt and the figures into the folder of the machine."""
    slug = results["machine"]["slug"]
    if not re.fullmatch("[a-z0-9][a-z0-9-]*", slug):
        raise ValueError(f"the machine's slug is {slug!r}, expected lower-case words and digits")
    own = folder / slug
    own.mkdir(parents=True, exist_ok=True)
    (own / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (own / "tables.txt").write_text(all_tables(results))
    return [own / "results.json", own / "tables.txt", *draw(results, own)]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("records", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(argv)
    try:
        results = joined([json.loads(path.read_text()) for path in options.records])
        written = write(results, options.out)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        names = ", ".join(str(path) for path in options.records)
        print(
            f"report: error: {names}: no records of a benchmark: {type(error).__name__}: {error}",
            file=sys.stderr,
        )
        return 2
    print(summaries(results))
    print("\nwritten: " + " ".join(str(path) for path in written))
    return 0


if __name__ == "__main__":
    sys.exit(main())
