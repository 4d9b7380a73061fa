"""Figures as plain data, and how they are drawn."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from benchmarks.plots import STYLE, svg
from experiments.config import fingerprint
from experiments.report.spread import Spread
from orthoreg_ext.experiment.extras import require

# Okabe and Ito's colours, which the colour-blind can tell apart; the first is for what is plain.
COLORS = ("#666666", "#e69f00", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#a6761d")
MARKERS = "osD^vPX*"
COLUMNS = 4
NEAR = 0.1  # of the axis: the room of a tick's label
TICKS = 7  # where no more than so many places are measured, they are marked


@dataclass(frozen=True)
class Point:
    """A mean with its range, up and perhaps along."""

    x: float
    y: float
    low: float
    high: float
    left: float | None = None
    right: float | None = None

    @classmethod
    def of(cls, x: float | Spread, y: Spread) -> Point:
        """Of what the seeds say."""
        if isinstance(x, Spread):
            return cls(x.mean, y.mean, y.low, y.high, x.low, x.high)
        return cls(x, y.mean, y.low, y.high)


@dataclass(frozen=True)
class Line:
    """A series; its colour is that of its name in the whole figure."""

    name: str
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Panel:
    """One pair of axes."""

    title: str
    lines: tuple[Line, ...]

    @property
    def drawn(self) -> bool:
        """Whether there is a line in it: of one point each a table says more."""
        return any(len(line.points) > 1 for line in self.lines)


@dataclass(frozen=True)
class Figure:
    """All that is drawn.

    Attributes:
        name: of the view, for the name of the file.
        caption: what is to be seen; also the text in place of the picture.
        x: what is along.
        y: what is up.
        panels: its axes, which share their limits.
        scatter: points alone, no lines.
        log: the axes that are logarithmic: ``""``, ``"x"``, ``"y"`` or ``"xy"``.
        zero: draw a line at 0.
        columns: of panels.
        first: the place of the first series among the colours.
    """

    name: str
    caption: str
    x: str
    y: str
    panels: tuple[Panel, ...]
    scatter: bool = False
    log: str = ""
    zero: bool = False
    columns: int = COLUMNS
    first: int = 0

    def __bool__(self) -> bool:
        """Whether there is anything to draw."""
        return any(panel.lines for panel in self.panels)

    @property
    def names(self) -> list[str]:
        """The series, in the order of the legend."""
        return list(dict.fromkeys(line.name for panel in self.panels for line in panel.lines))

    @property
    def mark(self) -> str:
        """A comment that tells whether a file was drawn of the same numbers."""
        return f"<!-- drawn of {fingerprint(asdict(self))} -->"


def draw(figure: Figure) -> str:
    """The SVG; the same text for the same numbers and the same matplotlib."""
    require("matplotlib").use("Agg", force=False)
    from matplotlib import pyplot

    plt: Any = pyplot  # its keys are literals to mypy
    columns = min(figure.columns, len(figure.panels))
    down = -(-len(figure.panels) // columns)
    size = (7, 4) if len(figure.panels) == 1 else (max(6, 2.6 * columns), 2.2 * down + 0.7)
    with plt.rc_context(STYLE):
        drawn, grid = plt.subplots(
            down,
            columns,
            figsize=size,
            squeeze=False,
            sharex=True,
            sharey=True,
            layout="constrained",
        )
        for axes in grid.flat[len(figure.panels) :]:
            axes.set_axis_off()
        for axes, panel in zip(grid.flat, figure.panels, strict=False):
            _fill(axes, figure, panel)
        drawn.supxlabel(figure.x, fontsize=9)
        drawn.supylabel(figure.y, fontsize=9)
        drawn.legend(handles=_handles(figure), loc="outside upper center", ncols=4)
        text: str = svg(drawn)
        plt.close(drawn)
    return f"{text}{figure.mark}\n"


def _fill(axes: Any, figure: Figure, panel: Panel) -> None:
    axes.set_title(panel.title)
    if figure.zero:
        axes.axhline(0, color="black", lw=0.6)
    for line in panel.lines:
        look = _look(figure, line.name)
        x, y = [point.x for point in line.points], [point.y for point in line.points]
        if figure.scatter:
            up = [[p.y - p.low for p in line.points], [p.high - p.y for p in line.points]]
            along = [
                [p.x - (p.x if p.left is None else p.left) for p in line.points],
                [(p.x if p.right is None else p.right) - p.x for p in line.points],
            ]
            axes.errorbar(x, y, up, along, ls="", lw=0.5, ms=4, **look)
        else:
            axes.plot(x, y, ms=3.5, lw=1.2, **look)
            low, high = [p.low for p in line.points], [p.high for p in line.points]
            axes.fill_between(x, low, high, color=look["color"], alpha=0.15, lw=0)
    axes.set_xscale("log" if "x" in figure.log else "linear")
    axes.set_yscale("log" if "y" in figure.log else "linear")
    lines = [line for other in figure.panels for line in other.lines]  # the axes share their ticks
    known = sorted({point.x for line in lines for point in line.points})
    if not figure.scatter and len(known) <= TICKS:
        axes.set_xticks(known, _told(known, log="x" in figure.log))
        axes.set_xticks([], minor=True)


def _told(places: Sequence[float], *, log: bool) -> list[str]:
    """The labels of ticks, without those that would run into the next one."""
    at = [math.log(x) for x in places] if log else list(places)
    near = NEAR * (at[-1] - at[0])
    gaps = [after - before for before, after in pairwise(at)]
    return [f"{x:g}" if gap >= near else "" for x, gap in zip(places, [*gaps, near], strict=True)]


def _look(figure: Figure, name: str) -> dict[str, str]:
    at = (figure.first + figure.names.index(name)) % len(COLORS)
    return {"color": COLORS[at], "marker": MARKERS[at]}


def _handles(figure: Figure) -> Sequence[Any]:
    from matplotlib.lines import Line2D

    style = "" if figure.scatter else "-"
    names = figure.names
    return [Line2D([], [], ls=style, ms=4, label=n, **_look(figure, n)) for n in names]  # type: ignore[arg-type]
