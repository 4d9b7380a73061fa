"""The records of one run: written after every case, so that a run that is stopped keeps them."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from benchmarks.tables import all_tables, case_table

RESULTS = Path(__file__).parent / "results"


class Recorder:
    """Hands out the time that is left, and keeps what was measured.

    Args:
        machine: what the figures belong to.
        stem: writes ``STEM.json`` and ``STEM.txt``.
        cases: how many there will be.
        seconds: for all of them; one that is under way still finishes.
    """

    def __init__(self, machine: dict[str, Any], stem: Path, cases: int, seconds: float) -> None:
        self.record: dict[str, Any] = {"machine": machine, "cases": [], "not_reached": []}
        self._stem, self._cases = stem, cases
        self._stop = time.monotonic() + seconds
        stem.parent.mkdir(parents=True, exist_ok=True)
        for suffix in (".json", ".txt"):  # nobody shall take those of another run for this one's
            stem.with_suffix(suffix).unlink(missing_ok=True)

    def share(self) -> float | None:
        """Seconds for the next case; None where none are left."""
        left = self._stop - time.monotonic()
        self._cases -= 1
        return None if left <= 0 else max(1.0, left / (self._cases + 1))

    def ceilings(self, found: dict[str, Any]) -> None:
        """Keeps what the machine gives."""
        self.record["ceilings"] = found

    def add(self, case: dict[str, Any]) -> str:
        """Keeps a case, and returns it as text."""
        self.record["cases"].append(case)
        self._write()
        return case_table(case)

    def skip(self, title: str) -> None:
        """Notes a case for which no time was left."""
        self.record["not_reached"].append(title)
        self._write()

    def _write(self) -> None:
        half = self._stem.with_suffix(".part")
        half.write_text(json.dumps(self.record, indent=1) + "\n")
        half.replace(self._stem.with_suffix(".json"))
        self._stem.with_suffix(".txt").write_text(all_tables(self.record))
