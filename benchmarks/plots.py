"""The figures, from records alone: roofline, cost against flops, sweeps, share of a step."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

Record = Mapping[str, Any]

OWN = "orthoreg_ext"
COLORS = {
    OWN: "#2a7de1",
    "eager": "#e0712b",
    "compile": "#8a63d2",
    "closed-small": "#4f9d69",
    "closed": "#999933",
    "orthoreg-repo": "#b03a6f",
}
STYLE = {
    "font.family": "sans-serif",
    "font.size": 9,
    "svg.fonttype": "none",
    "svg.hashsalt": "orthoreg",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "legend.frameon": False,
    "figure.facecolor": "white",
}


def draw(results: Record, folder: Path) -> list[Path]:
    """Writes every figure for which there are records; returns their paths."""
    import matplotlib

    matplotlib.use("Agg", force=False)
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    written = []
    with plt.rc_context(STYLE):
        for name, make in FIGURES.items():
            figure = make(plt, results)
            if figure is not None:
                path = folder / f"{name}.svg"
                path.write_text(svg(figure))
                plt.close(figure)
                written.append(path)
    return written


def svg(figure: Any) -> str:
    """The same text for the same records."""
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", bbox_inches="tight", metadata=nothing)
    return re.sub(r"[ \t]+$", "", buffer.getvalue(), flags=re.MULTILINE)


def _of(results: Record, question: str) -> list[Record]:
    """In float32 at full precision, smallest first."""
    found = [c for c in results["cases"] if c["question"] == question and c["rows"]]
    plain = [c for c in found if c.get("matmul", "highest") == "highest"]
    return sorted(plain, key=lambda c: c.get("flops_needed") or 0)


def _points(records: Iterable[Record], way: str) -> list[tuple[Record, float]]:
    """Records with that way, and its median seconds."""
    return [(r, 1e-3 * r["rows"][way]["ms"]["median"]) for r in records if way in r["rows"]]


def _name(results: Record) -> str:
    machine = results["machine"]
    where = "" if machine["device"] == "cuda" else f", {machine['threads']} threads"
    return f"{machine['name']}{where}"


def _label(
    axes: Any, points: Iterable[tuple[float, float, str]], *, up: bool, apart: float
) -> None:
    """Names at points of a log axis; those nearer than a factor of `apart` are stacked."""
    level, last = 0, 0.0
    for x, y, text in sorted(points):
        level = level + 1 if last and x < apart * last else 0
        last = x
        axes.annotate(
            text,
            (x, y),
            xytext=(4, 8 + 9 * level) if up else (4, -10 - 9 * level),
            textcoords="offset points",
            fontsize=7.5,
            arrowprops={"arrowstyle": "-", "lw": 0.4, "color": "gray", "shrinkB": 2},
        )


def roofline(plt: Any, results: Record) -> Any:
    """Rate on the flops needed against flops a byte, under the measured ceilings."""
    records, limits = _of(results, "penalty"), results.get("ceilings")
    if not records or not limits:
        return None
    peak, bandwidth = (limits[name]["rate"] for name in ("sgemm", "read"))
    figure, axes = plt.subplots(figsize=(7, 4.2))
    intensity = [r["flops_needed"] / r["bytes"] for r in records]
    ends = [min(*intensity, peak / bandwidth) / 2, 2 * max(*intensity, peak / bandwidth)]
    roof = sorted({*ends, peak / bandwidth})
    axes.plot(roof, [1e-9 * min(peak, bandwidth * x) for x in roof], color="black", lw=1)
    axes.annotate(
        f"{limits['sgemm']['meaning']}: {1e-9 * peak:.0f} Gflop/s",
        (peak / bandwidth, 1e-9 * peak),
        ha="left",
        va="bottom",
    )
    axes.annotate(
        f"read {1e-9 * bandwidth:.0f} GB/s",
        (ends[0], 1e-9 * min(peak, bandwidth * ends[0])),
        va="bottom",
    )
    for way in (OWN, "closed-small", "eager"):
        points = _points(records, way)
        rates = [(r["flops_needed"] / r["bytes"], 1e-9 * r["flops_needed"] / t) for r, t in points]
        if rates:
            axes.scatter(*zip(*rates, strict=True), color=COLORS[way], label=way, s=22, zorder=3)
        if way == OWN:
            named = [(*at, r["model"]) for at, (r, _) in zip(rates, points, strict=True)]
            _label(axes, named, up=True, apart=1.5)
    axes.set(xscale="log", yscale="log", title=f"Penalty and gradient, {_name(results)}")
    axes.set(xlabel="flops needed / byte of weights and gradients", ylabel="Gflop/s needed")
    axes.set_ylim(top=5e-9 * peak)  # room for the names
    axes.legend(loc="lower right")
    return figure


def cost(plt: Any, results: Record) -> Any:
    """Time of penalty and gradient against the flops needed, over the models."""
    records = [r for r in _of(results, "penalty") if r["flops_needed"]]
    if not records:
        return None
    figure, axes = plt.subplots(figsize=(7, 4.2))
    ways = [w for w in COLORS if any(w in r["rows"] for r in records)]
    for way in ways:
        points = [(1e-9 * r["flops_needed"], 1e3 * t) for r, t in _points(records, way)]
        axes.plot(*zip(*points, strict=True), "o-", ms=4, lw=1, color=COLORS[way], label=way)
    named = [(1e-9 * r["flops_needed"], 1e3 * t, r["model"]) for r, t in _points(records, OWN)]
    _label(axes, named, up=False, apart=1.25)
    if results.get("ceilings"):
        rate = results["ceilings"]["sgemm"]["rate"]
        ends = [1e-9 * f(r["flops_needed"] for r in records) for f in (min, max)]
        times = [1e12 * x / rate for x in ends]
        axes.plot(ends, times, color="black", lw=1, ls="--", label="at the rate of sgemm")
    axes.set(xscale="log", yscale="log", title=f"Penalty and gradient, {_name(results)}")
    axes.set(xlabel="Gflop needed (3 m² M, summed over the layers)", ylabel="ms")
    axes.legend()
    return figure


PANELS = (
    (r"^n=(\d+)$", "filters n, n x n x 3 x 3"),
    (r"^n=128 k=(\d+)$", "entries k of each of 128 filters"),
    (r"^(\d+) of 64 x 576$", "layers of 64 x 576"),
)


def scaling(plt: Any, results: Record) -> Any:
    """Time against n, k and the number of layers."""
    records = _of(results, "scaling")
    if not records:
        return None
    figure, panels = plt.subplots(1, len(PANELS), figsize=(10, 3.2), constrained_layout=True)
    for axes, (pattern, label) in zip(panels, PANELS, strict=True):
        found = [r for r in records if re.match(pattern, r["model"])]
        for way in (OWN, "closed-small", "eager"):
            points = sorted(
                (int(re.match(pattern, r["model"])[1]), 1e3 * t)  # type: ignore[index]
                for r, t in _points(found, way)
            )
            if points:
                lines = zip(*points, strict=True)
                axes.plot(*lines, "o-", ms=4, lw=1, color=COLORS[way], label=way)
        axes.set(xscale="log", yscale="log", xlabel=label, ylabel="ms")
    panels[0].legend()
    figure.suptitle(f"Penalty and gradient, {_name(results)}", fontsize=10)
    return figure


def step(plt: Any, results: Record) -> Any:
    """What the term takes of a training step: alone, and as what it adds to the step."""
    records = [r for r in _of(results, "step") if "plain" in r["rows"]]
    if not records:
        return None
    bars = [
        (f"{r['model']}\n{name}", row)
        for r in records
        for name, row in r["rows"].items()
        if name != "plain" and row["ratio"]
    ]
    if not bars:
        return None
    figure, axes = plt.subplots(figsize=(7, 0.6 + 0.42 * len(bars)))
    for place, (_, row) in enumerate(bars):
        added = 0.0 if row["computes"] == "term" else 1.0
        middle, low, high = (100 * (row["ratio"][k] - added) for k in ("median", "low", "high"))
        color = COLORS[OWN] if "orthoreg_ext" in bars[place][0] else COLORS["eager"]
        axes.barh(place, middle, color=color, alpha=0.6 if added else 1.0)
        axes.plot([low, high], [place, place], color="black", lw=1)
        axes.annotate(
            f"{middle:.2g} %",
            (max(middle, high, 0), place),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
        )
    axes.set_yticks(range(len(bars)), [name for name, _ in bars], fontsize=7.5)
    axes.invert_yaxis()
    axes.set(xlabel="% of the step without a term", title=f"Training step, {_name(results)}")
    return figure


FIGURES = {"cost": cost, "roofline": roofline, "scaling": scaling, "step": step}
