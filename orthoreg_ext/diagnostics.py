"""What the filters of a model look like: tables and numbers for people."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .layers import FilterLayer, SkippedLayer
from .plan import Term

_BLOCK = 1024  # filters compared with all others at once


@dataclass(frozen=True)
class LayerReport:
    """One regularised layer: what it is, its share of the term, its filters' correlation."""

    name: str
    kind: str
    filters: int
    groups: int
    fan_in: int
    side: str
    weight: float
    penalty: float
    correlation: float  # mean |cosine| over the pairs of filters in a group; nan without a pair


@dataclass(frozen=True)
class Report:
    """The regularised layers, and the skipped ones with the reason."""

    rows: list[LayerReport]
    skipped: list[SkippedLayer]

    def __iter__(self) -> Iterator[LayerReport]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> LayerReport:
        return self.rows[index]

    def __str__(self) -> str:
        names = [r.name for r in self.rows] + [s.name for s in self.skipped]
        width = max([len(name) for name in names] + [5])
        lines = [
            f"{'layer':<{width}}  {'kind':<10} {'filters':>7} {'groups':>6} {'fan-in':>6} "
            f"{'side':<4} {'weight':>8} {'penalty':>11} {'mean |cos|':>10}"
        ]
        lines += [
            f"{r.name:<{width}}  {r.kind:<10} {r.filters:>7} {r.groups:>6} {r.fan_in:>6} "
            f"{r.side:<4} {r.weight:>8.4f} {r.penalty:>11.4g} {r.correlation:>10.4f}"
            for r in self.rows
        ]
        lines += [f"{s.name:<{width}}  {s.kind:<10} skipped: {s.reason}" for s in self.skipped]
        return "\n".join(lines)


@torch.no_grad()
def mean_correlation(layer: FilterLayer) -> float:
    """The mean |cosine| over the pairs of filters in each group; nan without a pair.

    A zero filter counts as uncorrelated. Needs memory for 1024 rows of the Gram matrix at most.
    """
    n = layer.filters // layer.groups
    if n < 2:
        return math.nan
    total = 0.0
    with torch.autocast(layer.weight.device.type, enabled=False):
        for filters in layer.weight.detach().flatten(1).split(n):
            unit = torch.nn.functional.normalize(filters.to(torch.float32), dim=1)
            for block in unit.split(_BLOCK):
                total += float((block @ unit.mT).abs().sum())
            total -= float(unit.square().sum())
    return max(total, 0.0) / (layer.groups * n * (n - 1))


def layer_reports(term: Term, values: Tensor) -> list[LayerReport]:
    """A row for each layer of a term, with its values [L]."""
    return [
        LayerReport(
            name=layer.name,
            kind=layer.kind,
            filters=layer.filters,
            groups=layer.groups,
            fan_in=layer.fan_in + int(term.with_bias[i]),
            side="cols" if term.columns[i] else "rows",
            weight=term.factors[i],
            penalty=float(values[i]),
            correlation=mean_correlation(layer),
        )
        for i, layer in enumerate(term.layers)
    ]
