"""The scores a cut had to choose from, and which of them went, kept while it is made."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..pruning import Criterion, PruneResult
from ..pruning.evidence import Evidence
from ..pruning.scores import get_criterion

BINS = 36
DEPTH = 1e-10  # of the largest score: what is below shares the first bin
LOG_FROM = 30.0  # a wider range of scores, as a ratio, is shown on a logarithmic axis


@dataclass(frozen=True)
class ScoreCounts:
    """Histograms of the scores of one cut, a row for each coupled group.

    Attributes:
        criterion: what the scores are.
        log: whether the bins are equally wide in the logarithm.
        edges: of the bins, ascending, one more than there are bins.
        layers: the first layer of each group.
        kept: units that stayed, by group and bin.
        gone: units that were removed, by group and bin.
        cut: the largest score that was removed. Limits of a layer may keep lower ones.
        below: units in the first bin whose score is below it, on a logarithmic axis: often 0.
    """

    criterion: str
    log: bool
    edges: list[float]
    layers: list[str]
    kept: list[list[int]]
    gone: list[list[int]]
    cut: float
    below: int

    @staticmethod
    def from_json(record: Mapping[str, Any] | None) -> ScoreCounts | None:
        """Returns what ``dataclasses.asdict`` wrote; None for a record that has none."""
        return None if record is None else ScoreCounts(**record)


@dataclass(frozen=True)
class _Group:
    layer: str
    scores: list[float]
    channels: list[tuple[str, int]]  # of each unit: a layer, and its filter there


class ScoreRecorder:
    """Hands :func:`orthoreg_ext.pruning.prune` a criterion and keeps the scores that it gives.

    Nothing is computed twice, and the cut is the one without it::

        recorder = ScoreRecorder("fisher")
        result = ox.pruning.prune(model, x, criterion=recorder.criterion, data=data)
        write_report(result, "report.html", scores=recorder)

    Args:
        criterion: a name or a row of :data:`orthoreg_ext.pruning.CRITERIA`.

    Attributes:
        criterion: for ``prune(criterion=...)``.

    Raises:
        ValueError: an unknown name.
    """

    def __init__(self, criterion: str | Criterion) -> None:
        row = get_criterion(criterion)
        self._row = row
        self._scored: list[list[_Group]] = []
        self.criterion: Criterion = replace(row, score=self._score)

    def counts(self, result: PruneResult) -> list[ScoreCounts]:
        """Returns the histograms of every round of a prune.

        Where a round scored several times (scope "one_at_a_time"), there is one histogram: of the
        scores of the whole model, and of all that went.

        Args:
            result: what the prune with :attr:`criterion` returned.

        Raises:
            ValueError: nothing was scored with :attr:`criterion`.
        """
        if not self._scored:
            raise ValueError(
                "scores: nothing was scored; pass criterion=recorder.criterion to prune, and the "
                "recorder of that call to the report"
            )
        rounds: dict[int, set[tuple[str, int]]] = {}
        for entry in result.history:
            gone = rounds.setdefault(entry["round"], set())
            gone.update((entry["layer"], filter_) for filter_ in entry["removed"])
        if len(self._scored) != len(rounds):
            everything = set().union(*rounds.values())
            return [_counted(self._row.name, self._scored[0], everything)]
        removed = [rounds[number] for number in sorted(rounds)]
        return [
            _counted(self._row.name, groups, gone)
            for groups, gone in zip(self._scored, removed, strict=True)
        ]

    def _score(self, evidence: Evidence) -> list[Any]:
        scores = self._row.score(evidence)
        filters: dict[int, tuple[str, int]] = {}
        for slot in evidence.structure.slots:
            if slot.has_filters:
                for unit, channel in zip(slot.units.tolist(), slot.channels.tolist(), strict=True):
                    filters.setdefault(unit, (slot.layer, channel))
        order = {name: place for place, (name, _) in enumerate(evidence.model.named_modules())}
        groups = [
            _Group(group.name, values.tolist(), [filters[u] for u in group.units.tolist()])
            for group, values in zip(evidence.structure.prunable, scores, strict=True)
        ]
        self._scored.append(sorted(groups, key=lambda group: order.get(group.layer, len(order))))
        return scores


def _counted(name: str, groups: Sequence[_Group], gone: set[tuple[str, int]]) -> ScoreCounts:
    every = [score for group in groups for score in group.scores]
    log, edges = _bins(every)
    kept = [[0] * BINS for _ in groups]
    cut = [[0] * BINS for _ in groups]
    removed = []
    for row, group in enumerate(groups):
        for score, place in zip(group.scores, group.channels, strict=True):
            counts = cut if place in gone else kept
            counts[row][_bin(score, log, edges)] += 1
            if place in gone:
                removed.append(score)
    below = sum(score < edges[0] for score in every) if log else 0
    layers = [group.layer for group in groups]
    highest = max(removed, default=min(every))
    return ScoreCounts(name, log, edges, layers, kept, cut, highest, below)


def _bins(scores: Iterable[float]) -> tuple[bool, list[float]]:
    """Whether the axis is logarithmic, and the edges of its bins."""
    values = list(scores)
    high = max(values)
    positive = [value for value in values if value > 0]
    if min(values) >= 0 and positive and high > LOG_FROM * min(positive):
        low = max(min(positive), DEPTH * high)
        ends = math.log10(low), math.log10(high)
        return True, [low * 10 ** ((ends[1] - ends[0]) * i / BINS) for i in range(BINS)] + [high]
    low = min(values)
    width = (high - low) or abs(high) or 1.0  # all alike: one bin of them
    return False, [low + width * i / BINS for i in range(BINS + 1)]


def _bin(score: float, log: bool, edges: Sequence[float]) -> int:
    if score <= edges[0]:
        return 0
    ends = (edges[0], score, edges[-1])
    low, at, high = (math.log10(end) for end in ends) if log else ends
    return min(int(BINS * (at - low) / (high - low)), BINS - 1)
