"""The results of one experiment, as rows."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PARTS = {  # what is read of a document beside its units
    "config": ("name", "question", "seeds", "models", "data", "recipe", "options"),
    "machine": ("name", "slug", "device", "threads", "torch"),
}
Scalar = str | int | float | bool | None


@dataclass(frozen=True)
class Row:
    """One unit that was done.

    Attributes:
        keys: what tells it from the others but the seed; those of a nested table beside the rest.
        seed: its seed.
        values: what it found.
    """

    keys: Mapping[str, Any]
    seed: int
    values: Mapping[str, Any]

    @classmethod
    def of(cls, entry: Mapping[str, Any]) -> Row:
        """From an entry of the results."""
        keys: dict[str, Any] = {}
        for name, value in entry["unit"].items():
            keys.update(value if isinstance(value, Mapping) else {name: value})
        for name, value in keys.items():
            keys[name] = value if isinstance(value, Scalar) else json.dumps(value)
        return cls(keys, keys.pop("seed"), entry["values"])

    @property
    def diverged(self) -> bool:
        """The loss was no finite number: there are no values."""
        return "diverged" in self.values

    def value(self, path: str) -> float | None:
        """A value by its name, ``a.b`` for one within another; None where there is none."""
        found: Any = self.values
        for part in path.split("."):
            if not isinstance(found, Mapping) or part not in found:
                return None
            found = found[part]
        return float(found) if found is not None and math.isfinite(found) else None


@dataclass(frozen=True)
class Result:
    """What is known of an experiment, of one machine."""

    document: Mapping[str, Any]
    rows: tuple[Row, ...]

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> Result:
        """From the JSON of the runner."""
        return cls(document, tuple(Row.of(entry) for entry in document["units"]))

    @property
    def config(self) -> Mapping[str, Any]:
        """As it was run."""
        return self.document["config"]  # type: ignore[no-any-return]

    @property
    def name(self) -> str:
        """Of the configuration."""
        return str(self.config["name"])

    @property
    def seeds(self) -> int:
        """How many were planned."""
        return len(self.config["seeds"])

    @property
    def unfinished(self) -> str:
        """A sentence where units are left to do, or nothing."""
        done, planned = len(self.rows), self.document["planned"]
        return f"**Not finished: {done} of {planned} units are done.**" if done < planned else ""


def load(folder: Path) -> list[Result]:
    """The results of every machine.

    Raises:
        ValueError: a file is damaged.
    """
    return [_read(path) for path in sorted(folder.glob("*/*.json"))]


def _read(path: Path) -> Result:
    try:
        document = json.loads(path.read_text())
        _check(document)
        return Result.of(document)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{str(path)!r} holds no results ({type(error).__name__}: {error}); remove it, then "
            f"run python -m experiments {path.stem}, which writes it anew"
        ) from error


def _check(document: Mapping[str, Any]) -> None:
    """Refuses what would fail, or count twice, in a table: a file that was edited by hand."""
    for part, keys in PARTS.items():
        for key in keys:
            document[part][key]  # raises
    for key in ("seconds", "planned"):
        if not isinstance(document[key], int | float):
            raise TypeError(f"{key} is {document[key]!r}, expected a number")
    seen = set[str]()
    for entry in document["units"]:
        unit = json.dumps(entry["unit"], sort_keys=True)
        if not isinstance(entry["values"], Mapping):
            raise TypeError(f"the values of {unit} are {entry['values']!r}, expected a table")
        if unit in seen:
            raise ValueError(f"{unit} is there twice")
        seen.add(unit)


def having(rows: Sequence[Row], *names: str) -> list[Row]:
    """Those that have these keys."""
    return [row for row in rows if all(name in row.keys for name in names)]


def lacking(rows: Sequence[Row], *names: str) -> list[Row]:
    """Those that have none of these keys."""
    return [row for row in rows if not any(name in row.keys for name in names)]


def levels(rows: Sequence[Row], name: str) -> list[Any]:
    """The values of a key: numbers by size, others in the order in which they come."""
    found = list({key: None for row in rows if (key := row.keys.get(name)) is not None})
    return sorted(found) if all(isinstance(key, int | float) for key in found) else found


def varying(rows: Sequence[Row], *names: str) -> tuple[str, ...]:
    """The keys of which not all rows have the same value."""
    return tuple(name for name in names if len({str(row.keys.get(name)) for row in rows}) > 1)


def others(rows: Sequence[Row], *names: str) -> tuple[str, ...]:
    """All keys that vary, but these."""
    found = dict.fromkeys(key for row in rows for key in row.keys)
    return varying(rows, *(key for key in found if key not in names))


def split(rows: Sequence[Row], names: Sequence[str]) -> dict[tuple[Any, ...], list[Row]]:
    """Rows by the values of keys, sorted as `levels` sorts each key; None where there is none."""
    orders = [{key: at for at, key in enumerate(levels(rows, name))} for name in names]
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row.keys.get(name) for name in names), []).append(row)

    def place(keys: tuple[Any, ...]) -> list[int]:
        return [order.get(key, -1) for order, key in zip(orders, keys, strict=True)]

    return {keys: groups[keys] for keys in sorted(groups, key=place)}


def paired(
    rows: Sequence[Row], name: str, base: Any, value: Callable[[Row], float | None]
) -> list[Row]:
    """The gain of every level of a key over `base`, all other keys and the seed alike.

    Returns:
        the rows of the other levels; the value ``gain`` is missing where the row of the base is,
        and a row is diverged where one of the two is.
    """

    def rest(row: Row) -> tuple[Any, ...]:
        return (row.seed, *sorted((k, str(v)) for k, v in row.keys.items() if k != name))

    bases = {rest(row): row for row in rows if row.keys.get(name) == base}
    found = []
    for row in rows:
        if row.keys.get(name) == base:
            continue
        against = bases.get(rest(row))
        if row.diverged or (against is not None and against.diverged):
            values: Mapping[str, Any] = {"diverged": "one of the two"}
        else:
            mine, its = value(row), None if against is None else value(against)
            values = {} if mine is None or its is None else {"gain": mine - its}
        found.append(Row(row.keys, row.seed, values))
    return found
