"""The numbers of a run, as they are stored, reported and compared."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ..pruning import Counts, GroupSensitivity, Sensitivity
from ..report.scores import ScoreCounts
from .settings import Settings


@dataclass(frozen=True)
class Epoch:
    """One epoch: its stage (``train`` or ``tune``), means over its steps, and what it led to."""

    stage: str
    cut: int  # cuts made before it
    epoch: int  # from 1, within the stage
    loss: float
    penalty: float  # strength and layer weights included; 0 without a regulariser
    accuracy: float  # percent, held-out images
    correlation: float  # mean |filter correlation|


@dataclass(frozen=True)
class Size:
    """Filters, parameters and multiply-accumulates of one image."""

    filters: int
    params: int
    macs: int

    @classmethod
    def of(cls, counts: Counts) -> Size:
        """The part of a model's counts that a run records."""
        return cls(counts.filters, counts.params, counts.macs)


@dataclass(frozen=True)
class Cut:
    """One cut: the accuracy around it and what it removed."""

    ratio: float  # of the prunable filters that were left
    accuracy_before: float
    accuracy_after: float
    before: Size
    after: Size
    prunable: tuple[int, int]  # filters that may go at all, before and after
    layers: list[tuple[str, int, int]]  # name, filters before, after
    saved: float = 0.0  # share of the target that went with this cut
    scores: ScoreCounts | None = None  # of the first seed's networks; old runs have none


@dataclass
class Arm:
    """One network of one seed on its way: regularised, or its unregularised twin."""

    seed: int
    regularised: bool
    criterion: str
    done: int = 0  # steps of the plan
    epochs: list[Epoch] = field(default_factory=list)
    cuts: list[Cut] = field(default_factory=list)
    layer_correlations: dict[str, float] = field(default_factory=dict)  # before the first cut
    checkpoint: dict[str, Any] = field(default_factory=dict)  # replays all cuts
    # runs of older versions have neither
    final_correlations: dict[str, float] = field(default_factory=dict)  # pruned and fine-tuned
    sensitivity: Sensitivity | None = None  # before the first cut, of the first seed's networks
    sensitivity_note: str = ""  # on what it was measured, or why there is none

    @property
    def name(self) -> str:
        """What progress and tables call it."""
        return "regularised" if self.regularised else "twin"

    @property
    def key(self) -> str:
        """What its tensors are filed under."""
        return f"{self.name}.{self.seed}"

    def last(self, stage: str) -> Epoch:
        """Returns the last epoch of a stage."""
        return [epoch for epoch in self.epochs if epoch.stage == stage][-1]


@dataclass
class Run:
    """Everything about a run but its tensors."""

    settings: Settings
    versions: dict[str, str]
    data: dict[str, Any]
    arms: list[Arm]
    matrix_layer: str = ""  # whose correlations are drawn
    latency: dict[str, dict[str, float]] = field(default_factory=dict)  # batch, network: ms
    export: dict[str, float] = field(default_factory=dict)
    finished: bool = False

    def to_json(self) -> dict[str, Any]:
        """Returns what ``json.dumps`` accepts."""
        return asdict(self)

    @staticmethod
    def from_json(record: Mapping[str, Any]) -> Run:
        """Returns the run that :meth:`to_json` wrote."""
        arms = [
            Arm(
                **{
                    **arm,
                    "epochs": [Epoch(**epoch) for epoch in arm["epochs"]],
                    "cuts": [_cut(cut) for cut in arm["cuts"]],
                    "sensitivity": _sensitivity(arm.get("sensitivity")),
                }
            )
            for arm in record["arms"]
        ]
        return Run(**{**record, "settings": Settings(**record["settings"]), "arms": arms})

    def side(self, regularised: bool) -> list[Arm]:
        """Returns the regularised networks or their twins, in the order of the seeds."""
        return [arm for arm in self.arms if arm.regularised is regularised]

    def median(self, regularised: bool, value: Callable[[Arm], float]) -> float:
        """Returns the median over the seeds."""
        return statistics.median(value(arm) for arm in self.side(regularised))


def _cut(record: Mapping[str, Any]) -> Cut:
    return Cut(
        **{
            **record,
            "before": Size(**record["before"]),
            "after": Size(**record["after"]),
            "prunable": tuple(record["prunable"]),
            "layers": [tuple(layer) for layer in record["layers"]],
            "scores": ScoreCounts.from_json(record.get("scores")),
        }
    )


def _sensitivity(record: Mapping[str, Any] | None) -> Sensitivity | None:
    if record is None:
        return None
    groups = [
        GroupSensitivity(**{**group, "layers": tuple(group["layers"])})
        for group in record["groups"]
    ]
    return Sensitivity(**{**record, "ratios": tuple(record["ratios"]), "groups": groups})


@dataclass(frozen=True)
class Verdict:
    """One claim, held against the numbers."""

    holds: bool
    text: str


CORRELATION_TARGET = 2.5  # times below the twin's
ACCURACY_TARGET = 1.0  # points of difference before the cut that count as equal


def verdicts(run: Run) -> list[Verdict]:
    """Says, from the medians over the seeds, which of the claims hold."""
    seeds = f"the median of {run.settings.seeds} seeds" if run.settings.seeds > 1 else "one seed"
    own, twin = (run.median(side, lambda a: a.last("train").correlation) for side in (True, False))
    times = twin / own if own else float("inf")
    found = [
        Verdict(
            times >= CORRELATION_TARGET,
            f"mean |filter correlation| {own:.4f}, {times:.1f}x below its twin's {twin:.4f} on "
            f"{seeds} (target: {CORRELATION_TARGET}x)"
            if own <= twin
            else f"mean |filter correlation| {own:.4f} is ABOVE its twin's {twin:.4f} on {seeds}",
        )
    ]
    own, twin = (run.median(side, lambda a: a.cuts[0].accuracy_before) for side in (True, False))
    equal = abs(own - twin) <= ACCURACY_TARGET
    found.append(
        Verdict(
            equal,
            f"accuracy before the cut {own:.2f} % against its twin's {twin:.2f} %: "
            f"{'within' if equal else 'NOT within'} {ACCURACY_TARGET:g} point on {seeds}",
        )
    )
    own, twin = (run.median(side, lambda a: a.last("tune").accuracy) for side in (True, False))
    macs = [short(run.median(side, lambda a: a.cuts[-1].after.macs)) for side in (True, False)]
    holds = own >= twin
    found.append(
        Verdict(
            holds,
            f"with {run.settings.removed()} removed, fine-tuned accuracy "
            f"{own:.2f} % {'is at least' if holds else 'is NOT at least'} its twin's {twin:.2f} % "
            f"on {seeds} (MACs left: {macs[0]} against {macs[1]})",
        )
    )
    return found


def short(number: float) -> str:
    """Returns a count with three or four digits: 12.3 k, 4.56 M."""
    for least, scale, unit in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if number >= least:
            return f"{number / scale:.{1 if unit == 'k' else 2}f} {unit}"
    return f"{number:g}"


def table(run: Run) -> list[tuple[str, str, str]]:
    """Returns the rows of the final table: what, regularised, twin; medians over the seeds."""

    def row(label: str, text: str, value: Callable[[Arm], float]) -> tuple[str, str, str]:
        return label, *(text.format(run.median(side, value)) for side in (True, False))  # type: ignore[return-value]

    def shrunk(label: str, size: Callable[[Size], int]) -> tuple[str, str, str]:
        cells = (
            f"{short(run.median(side, lambda a: size(a.cuts[0].before)))} -> "
            f"{short(run.median(side, lambda a: size(a.cuts[-1].after)))}"
            for side in (True, False)
        )
        return label, *cells  # type: ignore[return-value]

    rows = [
        row("accuracy before the cut, %", "{:.2f}", lambda a: a.cuts[0].accuracy_before),
        row("accuracy after the cut, %", "{:.2f}", lambda a: a.cuts[-1].accuracy_after),
        row("accuracy fine-tuned, %", "{:.2f}", lambda a: a.last("tune").accuracy),
        row("mean |filter correlation|", "{:.4f}", lambda a: a.last("train").correlation),
        shrunk("filters", lambda size: size.filters),
        shrunk("parameters", lambda size: size.params),
        shrunk("MACs of one image", lambda size: size.macs),
    ]
    for batch, times in run.latency.items():
        cells = [f"{times['dense']:.3f} -> {times[name]:.3f}" for name in ("regularised", "twin")]
        rows.append((f"latency, batch {batch}, ms", cells[0], cells[1]))
    return rows


def summary(run: Run) -> dict[str, Any]:
    """Returns the table and the verdicts as JSON values."""
    return {
        "table": [{"what": row[0], "regularised": row[1], "twin": row[2]} for row in table(run)],
        "verdicts": [asdict(verdict) for verdict in verdicts(run)],
    }
