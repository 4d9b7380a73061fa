"""The result of a diagnosis: a table, arrays, JSON, and plots."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..layers import SkippedLayer
from .additivity import Additivity
from .jacobian import Spectrum
from .weights import WeightNumbers


@dataclass(frozen=True)
class LayerDiagnosis:
    """One layer: what it is, the numbers of its weights and, with data, of its importances."""

    name: str
    kind: str
    filters: int
    groups: int
    fan_in: int  # entries of one filter, the bias included where it counts
    weights: WeightNumbers
    additivity: Additivity | None = None  # None without data


@dataclass(frozen=True)
class Diagnosis:
    """The numbers of every layer and of the model.

    Attributes:
        rows: A row a layer.
        skipped: The layers left out, and why.
        silent: The channels of normalisation layers whose scale and shift are both 0.
        samples: How many samples the additivity gaps are of; 0 without data.
        spectrum: The singular values of the Jacobians; None without data, or as `notes` say.
        notes: What else one should know.
    """

    rows: tuple[LayerDiagnosis, ...]
    skipped: tuple[SkippedLayer, ...] = ()
    silent: dict[str, tuple[int, ...]] | None = None
    samples: int = 0
    spectrum: Spectrum | None = None
    notes: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[LayerDiagnosis]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: int | str) -> LayerDiagnosis:
        """Returns a row by its number or by the layer's name."""
        if isinstance(key, int):
            return self.rows[key]
        for row in self.rows:
            if row.name == key:
                return row
        raise KeyError(key)

    @property
    def gap(self) -> float | None:
        """sum_l off_l / sum_l mass_l of the layers' :class:`Additivity`; None without data."""
        parts = [row.additivity for row in self.rows if row.additivity is not None]
        mass = math.fsum(part.mass for part in parts)
        if not parts:
            return None
        return math.fsum(part.off for part in parts) / mass if mass else 0.0

    @property
    def mean_gap(self) -> float | None:
        """The mean over the layers of their gaps: each counts alike; None without data."""
        return self._mean("gap")

    def _mean(self, name: str) -> float | None:
        values = [getattr(row.additivity, name) for row in self.rows if row.additivity is not None]
        return math.fsum(values) / len(values) if values else None

    @property
    def dead(self) -> int:
        """The filters of zeros in all layers."""
        return sum(len(row.weights.dead) for row in self.rows)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Returns the columns as arrays [layers], and what is of the model.

        ``name``, ``kind``, ``side`` (strings), ``filters``, ``groups``, ``fan_in``, ``pairs``,
        ``dead`` (counts), ``degree``, ``mean_cosine``, ``max_cosine``, ``condition`` (inf for a
        matrix without full rank); with data also ``gap``, ``gap_floor``, ``group_ratio``, ``idle``
        (a count), ``singular_values`` [samples, m] and ``jacobian_condition`` [samples]. There is
        no NaN in them.
        """
        weights = [row.weights for row in self.rows]
        found: dict[str, NDArray[Any]] = {
            "name": np.array([row.name for row in self.rows], dtype=str),
            "kind": np.array([row.kind for row in self.rows], dtype=str),
            "side": np.array([w.side for w in weights], dtype=str),
        }
        for name in ("filters", "groups", "fan_in"):
            found[name] = np.array([getattr(row, name) for row in self.rows], dtype=np.int64)
        found["pairs"] = np.array([w.pairs for w in weights], dtype=np.int64)
        found["dead"] = np.array([len(w.dead) for w in weights], dtype=np.int64)
        for name in ("degree", "mean_cosine", "max_cosine", "condition"):
            found[name] = np.array([getattr(w, name) for w in weights], dtype=np.float64)
        parts = [row.additivity for row in self.rows if row.additivity is not None]
        if parts:
            found["gap"] = np.array([part.gap for part in parts])
            found["gap_floor"] = np.array([part.floor for part in parts])
            found["group_ratio"] = np.array([part.ratio for part in parts])
            found["idle"] = np.array([len(part.idle) for part in parts], dtype=np.int64)
        if self.spectrum is not None:
            found["singular_values"] = self.spectrum.values
            found["jacobian_condition"] = self.spectrum.conditions
        return found

    def to_json(self) -> dict[str, Any]:
        """Returns what ``json.dumps`` accepts; an infinite condition number is null."""
        columns = {
            key: values.tolist()
            for key, values in self.arrays().items()
            if key not in ("singular_values", "jacobian_condition")
        }
        layers = []
        for i, row in enumerate(self.rows):
            entry = {key: _finite(values[i]) for key, values in columns.items()}
            entry["dead"] = list(row.weights.dead)
            if row.additivity is not None:
                entry["idle"] = list(row.additivity.idle)
            layers.append(entry)
        found: dict[str, Any] = {
            "layers": layers,
            "skipped": {layer.name: layer.reason for layer in self.skipped},
            "silent": {name: list(channels) for name, channels in (self.silent or {}).items()},
            "samples": self.samples,
            "gap": self.gap,
            "mean_gap": self.mean_gap,
            "jacobian": None,
            "notes": list(self.notes),
        }
        if (s := self.spectrum) is not None:
            found["jacobian"] = {
                "samples": len(s.values),
                "mean": s.mean,
                "std": s.std,
                "largest": s.largest,
                "smallest": s.smallest,
                "condition": _finite(s.condition),
                "deficient": s.deficient,
                "distance": s.distance,
            }
        return found

    def plot(self, where: str | PathLike[str] | Sequence[Any] | None = None) -> Any:
        """Draws degree, |cosines|, condition numbers, and with data gaps and singular values.

        Args:
            where: A file to write (SVG, PNG or PDF, by its suffix), a sequence of matplotlib axes
                to draw on, as many as there are panels (3, with data 4, and 5 with a spectrum), or
                None.

        Returns:
            The matplotlib figure.

        Raises:
            ImportError: matplotlib is not installed.
            ValueError: the number of axes is not that of the panels.
        """
        from .plot import draw

        return draw(self, where)

    def __str__(self) -> str:
        more = f" {'gap':>6} {'floor':>6} {'ratio':>8} {'idle':>5}" if self.samples else ""
        names = [row.name or "(model)" for row in self.rows] + [s.name for s in self.skipped]
        width = max([len(name) for name in names] + [5])
        lines = [
            f"{'layer':<{width}}  {'kind':<10} {'filters':>7} {'groups':>6} {'side':<4} "
            f"{'degree':>6} {'mean |cos|':>10} {'max |cos|':>9} {'condition':>9} {'dead':>5}{more}"
        ]
        lines += [_line(row, width) for row in self.rows]
        lines += [f"{s.name:<{width}}  {s.kind:<10} skipped: {s.reason}" for s in self.skipped]
        if self.gap is not None:
            lines.append(
                f"additivity gap {self.gap:.4f} over all layers, {self.mean_gap:.4f} on average, "
                f"floor {self._mean('floor'):.4f}, of {self.samples} samples"
            )
        if (s := self.spectrum) is not None:
            lines.append(
                f"Jacobian singular values: mean {s.mean:.4g}, std {s.std:.4g}, "
                f"{s.smallest:.4g} to {s.largest:.4g}, mean condition {s.condition:.4g}, "
                f"of {len(s.values)} samples"
                + (f" ({s.deficient} without full rank)" if s.deficient else "")
            )
        for name, channels in (self.silent or {}).items():
            lines.append(f"{name or '(model)'}: {len(channels)} channels of scale and shift 0")
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def _line(row: LayerDiagnosis, width: int) -> str:
    w, a = row.weights, row.additivity
    mean = f"{w.mean_cosine:.4f}" if w.pairs else "-"
    largest = f"{w.max_cosine:.4f}" if w.pairs else "-"
    line = (
        f"{row.name or '(model)':<{width}}  {row.kind:<10} {row.filters:>7} {row.groups:>6} "
        f"{w.side:<4} {w.degree:>6.4f} {mean:>10} {largest:>9} {w.condition:>9.4g} "
        f"{len(w.dead):>5}"
    )
    if a is None:
        return line
    return f"{line} {a.gap:>6.4f} {a.floor:>6.4f} {a.ratio:>8.4g} {len(a.idle):>5}"


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
