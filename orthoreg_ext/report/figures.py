"""The figures of a report, from plain numbers; :mod:`.svg` draws them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import count

import torch
from torch import Tensor
from torch.nn import functional as nnf

from ..pruning import Sensitivity
from .page import figure, folded
from .scores import ScoreCounts
from .svg import WIDTH, Axis, Chart, box, heat, label, number, picture

CELLS = 128  # rows of a heat map; larger matrices are averaged
GLYPH = 7.4  # user units for a letter of a layer's name, in a wide font
OPEN_ROWS = 24  # layers of score histograms that are not folded away


@dataclass(frozen=True)
class Arm:
    """One of the networks a report tells of: how it is called and marked."""

    name: str
    kind: str = "own"  # CSS class: "own" or "twin"


@dataclass(frozen=True)
class Path:
    """The way of a network through its cuts: MACs and accuracy, in percent.

    Attributes:
        arm: whose it is.
        steps: (MACs, accuracy before the cut, MACs after it, accuracy after it, accuracy tuned).
        main: drawn with marks; the others are thin lines.
    """

    arm: Arm
    steps: Sequence[tuple[float, float, float, float, float]]
    main: bool = True


def tradeoff(paths: Sequence[Path], caption: str) -> str:
    """Accuracy against MACs: solid between trained networks, dashed for what a cut costs.

    Where cuts cost most of the accuracy, the trained networks are shown once more, closer.
    """
    trained = [value for path in paths for step in path.steps for value in (step[1], step[4])]
    cut = [step[3] for path in paths for step in path.steps]
    panels = [("With the drop at each cut", _tradeoff(paths, [*trained, *cut], True))]
    if min(trained) > min(cut) + 10:
        panels.append(("Trained networks only, closer", _tradeoff(paths, trained, False)))
    return figure(panels, caption, _legend(paths))


def _tradeoff(paths: Sequence[Path], values: Sequence[float], drops: bool) -> str:
    macs = [macs for path in paths for step in path.steps for macs in (step[0], step[2])]
    low, high = min(macs), max(macs)
    title = "multiply-accumulates of one image"
    across = Axis(0.8 * low, 1.25 * high, title, log=True)
    if high < 8 * low or len(across.ticks()) < 2:
        across = Axis(0, 1.05 * high, title)
    chart = Chart(across, _percent(values, "accuracy, %"), height=240)
    for path in sorted(paths, key=lambda path: path.main):
        name, kind = path.arm.name, path.arm.kind
        points = [(path.steps[0][0], path.steps[0][1])]
        points += [(step[2], step[4]) for step in path.steps]
        chart.line(points, f"{kind} thick" if path.main else kind)
        if not path.main:
            continue
        for before, accuracy, after, worst, _ in path.steps if drops else ():
            chart.line([(before, accuracy), (after, worst)], f"{kind} dashed")
            chart.dot(after, worst, f"{kind} gone", _tip(f"{name}, just cut", worst, after))
        for size, accuracy in points:
            chart.dot(size, accuracy, kind, _tip(f"{name}, trained", accuracy, size))
    said = "; ".join(
        f"{_tip(path.arm.name, path.steps[0][1], path.steps[0][0])}; "
        f"{_tip('pruned and tuned', path.steps[-1][4], path.steps[-1][2])}"
        for path in paths
        if path.main
    )
    return chart.svg(f"Accuracy against MACs. {said}")


def _tip(what: str, accuracy: float, macs: float) -> str:
    return f"{what}: {accuracy:.2f} % at {macs:,.0f} MACs"


@dataclass(frozen=True)
class Course:
    """What one network did epoch by epoch."""

    arm: Arm
    accuracy: Sequence[tuple[float, float]]  # epoch, percent; two at a cut
    penalty: Sequence[tuple[float, float]]
    cuts: Sequence[float]  # epochs
    main: bool = True


def courses(found: Sequence[Course], caption: str) -> str:
    """Accuracy and penalty by epoch, the cuts marked."""
    last = max(epoch for course in found for epoch, _ in course.accuracy)
    epochs = Axis(0, max(last, 1), "epoch", whole=True)
    values = [value for course in found for _, value in course.accuracy]
    accuracy = Chart(epochs, _percent(values, "accuracy, %"))
    panels = [("Accuracy", accuracy)]
    highest = max((value for course in found for _, value in course.penalty), default=0.0)
    if highest > 0:
        panels.append(("Penalty", Chart(epochs, Axis(0, highest * 1.05, "penalty"))))
    for _, chart in panels:
        for cut in found[0].cuts:
            chart.rule(cut, "cut" if len(found[0].cuts) == 1 else "")
    for course in sorted(found, key=lambda course: course.main):
        kind = course.arm.kind + (" thick" if course.main else "")
        accuracy.line(course.accuracy, kind)
        if course.main:
            for epoch, value in course.accuracy:
                accuracy.dot(epoch, value, course.arm.kind, f"{course.arm.name}: {value:.2f} %", 2)
        if highest > 0 and len(course.penalty) > 1:
            panels[1][1].line(course.penalty, kind)
    said = "; ".join(f"{c.arm.name} ends at {c.accuracy[-1][1]:.2f} %" for c in found if c.main)
    names = {"Accuracy": f"Accuracy by epoch: {said}", "Penalty": "Penalty by epoch, falling"}
    if highest > 0:
        ends = [course.penalty for course in found if course.main and course.penalty]
        parts = (f"from {points[0][1]:.4g} to {points[-1][1]:.4g}" for points in ends)
        names["Penalty"] = "Penalty by epoch: " + "; ".join(parts)
    drawn = [(title, chart.svg(names[title])) for title, chart in panels]
    return figure(drawn, caption, _legend(found))


@dataclass(frozen=True)
class Bar:
    """One bar of a layer, the part before the cut in outline around the part after it."""

    arm: Arm
    after: float
    before: float | None = None


def layer_bars(
    panels: Mapping[str, Mapping[str, Sequence[Bar]]], what: str, caption: str, digits: int = 4
) -> str:
    """A row for each layer, a bar in it for each network, all on one scale.

    Args:
        panels: by title, the bars by layer.
        what: the numbers are; names the picture.
        caption: of the figure.
        digits: significant digits of what is written behind a bar.
    """
    every = [bar for rows in panels.values() for bars in rows.values() for bar in bars]
    highest = max((max(bar.after, bar.before or 0) for bar in every), default=0) or 1
    drawn = [
        (title, _layer_bars(rows, f"{what} {title}".strip(), highest, digits))
        for title, rows in panels.items()
    ]
    return figure(drawn, caption, {bar.arm.name: bar.arm.kind for bar in every})


def _layer_bars(rows: Mapping[str, Sequence[Bar]], what: str, highest: float, digits: int) -> str:
    thick, gap = (11, 8) if len(rows) <= 20 else (10, 5)
    names = min(max(map(len, rows), default=0), 16)
    left, room = 8 + GLYPH * names, 86
    scale = (WIDTH - left - room) / highest
    parts, down, spoken = [], 2.0, []
    for name, bars in rows.items():
        middle = down + (thick + 2) * len(bars) / 2 + 3
        parts.append(_row_name(name, names, middle))
        for bar in bars:
            text = number(bar.after, digits)
            if bar.before is not None:
                kind = f"bar {bar.arm.kind} gone"
                parts.append(box(left, down, max(bar.before * scale, 0.5), thick, kind))
                text = f"{number(bar.before, digits)} → {text}"
            tip = f"{bar.arm.name}: {text}"
            kind = f"bar {bar.arm.kind}"
            parts.append(box(left, down, max(bar.after * scale, 0.5), thick, kind, tip))
            end = left + max(bar.after, bar.before or 0) * scale + 5
            parts.append(label(end, down + thick - 1.5, text))
            spoken.append(f"{name} {tip}")
            down += thick + 2
        down += gap
    said = "; ".join(spoken) if len(spoken) <= 40 else f"{len(rows)} layers, see the table"
    return picture(WIDTH, down, "".join(parts), f"{what}: {said}")


def _row_name(name: str, most: int, down: float, tip: str = "") -> str:
    """The name of a row, shortened if it is too long; whole under the pointer."""
    return f"<g><title>{escape(tip or name)}</title>{label(0, down, shortened(name, most))}</g>"


def shortened(name: str, most: int) -> str:
    """A layer's name in that many characters, still another than its siblings' in other blocks."""
    *parents, last = name.split(".")
    for place, parent in enumerate(parents):  # blocks.2.1.se.conv -> b.2.1.se.conv
        if len(name) <= most:
            return name
        parents[place] = parent if parent.isdigit() else parent[:1]
        name = ".".join([*parents, last])
    if len(name) <= most:
        return name
    if len(name) - len(last) + 5 <= most:  # there is room for some of its last part
        return f"{name[: most - 1]}…"
    return f"…{name[1 - most :]}"


def heat_maps(found: Mapping[str, Tensor], caption: str) -> str:
    """|cosines| between filters, on one scale from 0 to the largest of all.

    Args:
        found: matrices [n, n] by title; the diagonal is left out.
        caption: of the figure.
    """
    numbers, panels = count(), []
    bare = {title: m.float().abs() - m.float().abs().diag().diag() for title, m in found.items()}
    top = max((float(m.max()) for m in bare.values() if m.numel()), default=0.0) or 1.0
    for title, matrix in bare.items():
        pairs = max(len(matrix) * (len(matrix) - 1), 1)
        mean = f"mean {float(matrix.sum()) / pairs:.4f}"
        said = f"{title}: {len(matrix)} filters, {mean} between two, largest {matrix.max():.4f}"
        svg = heat(_at_most(matrix / top, CELLS), f"heat-{next(numbers)}", said)
        panels.append((f"{title}: {len(matrix)} filters, {mean}", svg))
    return figure(panels, caption, {f"0 to {top:.3g}": "scale"}, "half")


def score_histograms(found: Mapping[str, tuple[Arm, ScoreCounts]], caption: str) -> str:
    """Scores of all units, kept (solid) and removed (outline), all together and by layer.

    The layers are folded away where they would take many screens.
    """
    legend = {"kept": "neutral", "removed": "neutral gone"}
    whole = [(title, _all_scores(*pair)) for title, pair in found.items()]
    layers = [(f"{title}, by layer", _ridges(*pair)) for title, pair in found.items()]
    if sum(len(counts.layers) for _, counts in found.values()) <= OPEN_ROWS:
        pairs = zip(whole, layers, strict=True)
        return figure([panel for pair in pairs for panel in pair], caption, legend)
    return figure(whole, caption, legend) + folded(
        "Layer by layer", figure(layers, "The same scores, layer by layer.", legend)
    )


def _scores_axis(counts: ScoreCounts) -> Axis:
    return Axis(counts.edges[0], counts.edges[-1], f"score: {counts.criterion}", counts.log)


def _all_scores(arm: Arm, counts: ScoreCounts) -> str:
    kept = [sum(column) for column in zip(*counts.kept, strict=True)]
    gone = [sum(column) for column in zip(*counts.gone, strict=True)]
    highest = max(a + b for a, b in zip(kept, gone, strict=True))
    chart = Chart(_scores_axis(counts), Axis(0, highest * 1.15, "units", whole=True))
    for i, (stay, go) in enumerate(zip(kept, gone, strict=True)):
        edges = counts.edges[i], counts.edges[i + 1]
        if go:
            chart.bar(edges, (0, go), f"{arm.kind} gone", f"{go} removed")
        if stay:
            chart.bar(edges, (go, go + stay), arm.kind, f"{stay} kept")
    chart.rule(min(max(counts.cut, counts.edges[0]), counts.edges[-1]), "cut")
    return chart.svg(
        f"Scores of {sum(kept) + sum(gone)} units by {counts.criterion}: {sum(gone)} removed, up "
        f"to a score of {counts.cut:.3g}; {sum(kept)} kept"
    )


def _ridges(arm: Arm, counts: ScoreCounts) -> str:
    """A small histogram for each layer, below each other on one axis."""
    high, names = 24, min(max(map(len, counts.layers)), 14)
    left, right, down, parts = 8 + GLYPH * names, WIDTH - 10, 4.0, []
    axis = _scores_axis(counts)
    step = (right - left) / len(counts.kept[0])
    for name, kept, gone in zip(counts.layers, counts.kept, counts.gone, strict=True):
        highest = max(a + b for a, b in zip(kept, gone, strict=True))
        tip = f"{name}: {sum(gone)} of {sum(kept) + sum(gone)} removed"
        parts.append(_row_name(name, names, down + high - 4, tip))
        base = down + high
        for kind, sizes, under in ((" gone", gone, [0] * len(gone)), ("", kept, gone)):
            bars = "".join(
                f"M{left + i * step:.1f} {base - high * low / highest:.1f}h{step - 0.6:.1f}"
                f"v{-high * size / highest:.1f}h{0.6 - step:.1f}z"
                for i, (size, low) in enumerate(zip(sizes, under, strict=True))
                if size
            )
            if bars:
                parts.append(f'<path class="bar {arm.kind}{kind}" d="{bars}"/>')
        parts.append(f'<path class="axis" d="M{left:.1f} {base:.1f}H{right}"/>')
        down += high + 6
    cut = left + axis.share(min(max(counts.cut, axis.low), axis.high)) * (right - left)
    parts.append(f'<path class="rule" d="M{cut:.1f} 0V{down - 6:.1f}"/>')
    for value in axis.ticks(5):
        across = left + axis.share(value) * (right - left)
        parts.append(f'<path class="axis" d="M{across:.1f} {down - 6:.1f}v4"/>')
        parts.append(label(min(across, right - 6), down + 9, number(value), "middle"))
    down += 14
    said = "; ".join(
        f"{name} {sum(gone)} of {sum(kept) + sum(gone)}"
        for name, kept, gone in zip(counts.layers, counts.kept, counts.gone, strict=True)
    )
    return picture(WIDTH, down, "".join(parts), f"Removed units by layer: {said}")


def sensitivities(found: Sequence[tuple[Arm, Sensitivity]], caption: str) -> str:
    """A small chart for each coupled group: the metric against the share of it that is cut."""
    values = [v for _, s in found for group in s.groups for v in (*group.values, s.baseline)]
    metric = found[0][1].metric
    percent = metric == "accuracy" and min(values) >= 0 and max(values) <= 100
    top = max(values)
    low = min(0.0, min(values))
    down = _percent(values, "") if percent else Axis(low, (top - low or 1.0) * 1.05 + low)
    groups = {group.name: group for _, s in found for group in s.groups}
    panels = []
    for name, group in groups.items():
        chart = Chart(Axis(0, 1), down, width=170, height=112, left=30)
        spoken = []
        for arm, table in found:
            row = next((g for g in table.groups if g.name == name), None)
            if row is None:
                continue
            removed = [count / row.units for count in row.removed]
            points = [(0.0, table.baseline), *zip(removed, row.values, strict=True)]
            chart.line(points, f"{arm.kind} thick")
            for share, value in points:
                tip = f"{arm.name}: {value:.4g} with {share:.0%} of {name} removed"
                chart.dot(share, value, arm.kind, tip, 2.5)
            spoken.append(f"{arm.name} {', '.join(f'{v:.4g} at {s:.0%}' for s, v in points)}")
        title = name + (f" + {len(group.layers) - 1}" if len(group.layers) > 1 else "")
        said = f"{metric} against the share of {name} removed: {'; '.join(spoken)}"
        panels.append((f"{title} ({group.units})", chart.svg(said)))
    return figure(panels, caption, {arm.name: arm.kind for arm, _ in found}, "small")


def _percent(values: Sequence[float], title: str) -> Axis:
    """An axis for percentages: from 0, or closer where none is below 60."""
    return Axis(0 if min(values) < 60 else 5 * (int(min(values)) // 5), 102, title)


def _legend(marked: Sequence[Path | Course]) -> dict[str, str]:
    return {entry.arm.name: entry.arm.kind for entry in marked}


def _at_most(matrix: Tensor, size: int) -> Tensor:  # [n, n] -> [m, m], m <= size
    if len(matrix) <= size:
        return matrix
    with torch.no_grad():
        return nnf.adaptive_avg_pool2d(matrix[None, None], size)[0, 0]
