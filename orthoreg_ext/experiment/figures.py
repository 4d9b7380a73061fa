"""The figures of the report, as inline SVG that follows the page's colours."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from .extras import require
from .record import Arm, Run

OWN, TWIN = "#2a7de1", "#e0712b"  # regularised, twin: readable on white and on black
INK = "#0a0b0c"  # stands for the page's text colour; see _svg
STYLE = {
    "font.family": "sans-serif",
    "font.size": 10,
    "svg.fonttype": "none",
    "svg.hashsalt": "orthoreg",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9,
    "legend.frameon": False,
    "savefig.transparent": True,
    **dict.fromkeys(
        ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK
    ),
}


def figures(run: Run, matrices: Mapping[str, Tensor]) -> list[tuple[str, str, str]]:
    """Returns the figures as (title, description, SVG text).

    Args:
        run: A finished run.
        matrices: |cosines| of the filters of one layer, each [n, n], under ``"regularised before"``
            (the cut), ``"twin before"``, ``"regularised after"`` and ``"twin after"``.
    """
    seed = run.settings.seed
    drawn = [
        (
            "Accuracy and penalty by epoch",
            f"Held-out accuracy, and the penalty that was added to the loss; seed {seed}, other "
            "seeds thin. Dashed lines: cuts.",
            _epochs,
        ),
        (
            "Filter correlation by layer",
            f"Mean |cosine| between the filters of a layer before the cut, medians over "
            f"{run.settings.seeds} seed{'s' if run.settings.seeds > 1 else ''}.",
            _layers,
        ),
        (
            "Filter correlation, before and after the cut",
            f"|cosine| between every two filters of layer {run.matrix_layer!r}, seed {seed}; the "
            "diagonal is left out. After: pruned and fine-tuned.",
            lambda plt, run: _matrices(plt, matrices),
        ),
        (
            "Widths by layer",
            f"Filters before (pale) and after the cut, seed {seed}.",
            _widths,
        ),
    ]
    matplotlib = require("matplotlib")
    matplotlib.use("Agg", force=False)
    plt = require("matplotlib.pyplot")
    found = []
    with plt.rc_context(STYLE):
        for index, (title, text, draw) in enumerate(drawn):
            figure = draw(plt, run)
            found.append((title, text, _svg(figure, f"fig{index}-", f"{title}. {text}")))
            plt.close(figure)
    return found


def _svg(figure: Any, prefix: str, label: str) -> str:
    """One figure as an ``<svg>`` element without outside references, in the page's text colour."""
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", bbox_inches="tight", metadata=nothing)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg)  # HTML knows both
    svg = re.sub(r' (width|height)="[^"]*pt"', "", svg, count=2)  # the page sets the size
    used = set(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', svg))
    names = {first or second for first, second in used}
    svg = re.sub(r' id="([^"]*)"', lambda match: match[0] if match[1] in names else "", svg)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\1{prefix}", svg)  # unique on the page
    svg = re.sub(r'font-family: [^;"]*', "font-family: inherit", svg)
    label = label.replace('"', "&quot;").replace("<", "&lt;")
    return svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1).strip()


def _epochs(plt: Any, run: Run) -> Any:
    figure, axes = plt.subplots(2, 1, figsize=(5, 4.4), sharex=True, layout="constrained")
    first = {True, False}
    for arm in run.arms:
        colour = OWN if arm.regularised else TWIN
        main = arm.seed == run.settings.seed
        style = {"color": colour, "linewidth": 1.8 if main else 0.7, "alpha": 1 if main else 0.45}
        style["marker"] = "." if main else ""
        accuracies, cuts = _course(arm)
        label = arm.name if arm.regularised in first else None
        first.discard(arm.regularised)
        axes[0].plot(*zip(*accuracies, strict=True), label=label, **style)
        if arm.regularised:
            trained = [epoch for epoch in arm.epochs if epoch.stage == "train"]
            axes[1].plot([e.epoch for e in trained], [e.penalty for e in trained], **style)
    for axis in axes:
        for cut in cuts:
            axis.axvline(cut, color=INK, linewidth=0.8, linestyle="--", alpha=0.5)
        axis.grid(alpha=0.2)
    axes[0].set_ylabel("accuracy, %")
    axes[0].legend(loc="lower right")
    axes[1].set_ylabel("penalty")
    axes[1].set_ylim(bottom=0)
    axes[1].set_xlabel("epoch")
    axes[1].set_xlim(left=0.5)
    axes[1].xaxis.get_major_locator().set_params(integer=True)
    return figure


def _course(arm: Arm) -> tuple[list[tuple[float, float]], list[float]]:
    """Accuracies over the epochs with the drop at each cut, and where the cuts are."""
    points: list[tuple[float, float]] = []
    cuts = []
    done = 0
    for number, epoch in enumerate(arm.epochs, start=1):
        if epoch.cut > done:
            done = epoch.cut
            cuts.append(number - 0.5)
            points.append((number - 0.5, arm.cuts[done - 1].accuracy_after))
        points.append((float(number), epoch.accuracy))
    return points, cuts


def _layers(plt: Any, run: Run) -> Any:
    names = list(run.arms[0].layer_correlations)
    figure, axis = plt.subplots(figsize=(5, 2.6), layout="constrained")
    for side, colour, offset in ((True, OWN, -0.2), (False, TWIN, 0.2)):
        heights = [
            run.median(side, lambda arm, n=name: arm.layer_correlations.get(n, 0.0))  # type: ignore[misc]
            for name in names
        ]
        places = [i + offset for i in range(len(names))]
        axis.bar(places, heights, 0.4, color=colour, label="regularised" if side else "twin")
    _name_layers(axis, names)
    axis.set_ylabel("mean |cosine|")
    axis.legend()
    return figure


def _matrices(plt: Any, matrices: Mapping[str, Tensor]) -> Any:
    figure, axes = plt.subplots(2, 2, figsize=(5, 4.8), layout="constrained")
    top = max(float((m - m.diag().diag()).max()) for m in matrices.values())
    for row, when in enumerate(("before", "after")):
        for axis, name in zip(axes[row], ("regularised", "twin"), strict=True):
            matrix = matrices[f"{name} {when}"]
            off = matrix - matrix.diag().diag()
            image = axis.imshow(off.tolist(), vmin=0, vmax=max(top, 1e-6), cmap="viridis")
            pairs = max(len(off) * (len(off) - 1), 1)
            axis.set_title(f"{name}, {when}: mean {float(off.sum()) / pairs:.4f}")
            axis.set_xticks([])
            axis.set_yticks([])
    figure.colorbar(image, ax=axes, shrink=0.6)
    return figure


def _widths(plt: Any, run: Run) -> Any:
    figure, axis = plt.subplots(figsize=(5, 2.6), layout="constrained")
    arms = [arm for arm in run.arms if arm.seed == run.settings.seed]
    names = [name for name, _, _ in arms[0].cuts[0].layers]
    for arm, colour, offset in zip(arms, (OWN, TWIN), (-0.2, 0.2), strict=True):
        places = [i + offset for i in range(len(names))]
        before = [width for _, width, _ in arm.cuts[0].layers]
        after = [width for _, _, width in arm.cuts[-1].layers]
        axis.bar(places, before, 0.4, color=colour, alpha=0.25)
        bars = axis.bar(places, after, 0.4, color=colour, label=arm.name)
        if len(names) <= 16:
            axis.bar_label(bars, fontsize=8, padding=1)
    _name_layers(axis, names)
    axis.set_ylabel("filters")
    axis.legend()
    return figure


def _name_layers(axis: Any, names: Sequence[str]) -> None:
    turned = max(map(len, names), default=0) * len(names) > 60
    style = {"rotation": 60, "ha": "right", "rotation_mode": "anchor"} if turned else {}
    axis.set_xticks(range(len(names)), names, **style)
    axis.set_xlabel("layer")
