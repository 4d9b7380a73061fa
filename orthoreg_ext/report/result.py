"""The report of a prune that was done from Python, with the figures of the command's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from math import isnan
from pathlib import Path as FilePath

import torch
from torch import nn

from ..diagnostics import mean_correlation
from ..functional import filter_correlation
from ..layers import filter_layers
from ..pruning import PruneResult, Sensitivity
from . import figures
from .figures import Arm, Bar
from .page import Section, folded, note, page, table
from .scores import ScoreRecorder

_ARM = Arm("the network")


def write_report(
    result: PruneResult,
    path: str | FilePath,
    *,
    title: str = "What was pruned",
    scores: ScoreRecorder | None = None,
    sensitivity: Sensitivity | None = None,
    unpruned: nn.Module | None = None,
    heat_map_of: str | None = None,
    accuracy: Mapping[str, float] | None = None,
) -> FilePath:
    """Writes what a prune did as one HTML page, like ``report.html`` of ``orthoreg prune``.

    Sizes, widths, history and settings are always there; a figure whose argument is missing is
    left out. The page needs nothing else, and works on a phone and in dark mode.

    Args:
        result: what :func:`orthoreg_ext.pruning.prune` or a method returned; call this after
            fine-tuning, correlations are those of ``result.model`` as it is now.
        path: the file; it appears complete or not at all, and replaces one that is there.
        title: heading of the page.
        scores: what recorded the scores; draws their histograms with the cut.
        sensitivity: of the unpruned model; draws its curves.
        unpruned: a copy of the model before the prune; draws the correlation of its filters beside
            those of the pruned one, by layer, and for one layer filter by filter.
        heat_map_of: the layer; by default the pruned one in the middle.
        accuracy: numbers of yours for the table of results, by name, e.g. ``{"accuracy before, %":
            93.1, "accuracy fine-tuned, %": 92.8}``.

    Returns:
        the path.

    Raises:
        ValueError: `scores` recorded nothing, or no layer has the name `heat_map_of`.
        OSError: the file cannot be written.
    """
    from ..experiment.files import write_atomic

    sections = [Section("result", "Result", _result(result, accuracy or {}))]
    if unpruned is not None:
        body = _correlation(result, unpruned, heat_map_of)
        sections.append(Section("correlation", "Filter correlation", body))
    if scores is not None:
        rounds = scores.counts(result)
        found = {
            f"round {number}" if len(rounds) > 1 else "all layers": (_ARM, counts)
            for number, counts in enumerate(rounds, start=1)
        }
        caption = (
            "Scores of all units that could go. Dashed: the largest score that was removed; units "
            "below it were kept where limits of their layer, the scope or rounding asked for it."
        )
        body = figures.score_histograms(found, caption)
        sections.append(Section("scores", "Scores and the cut", body))
    if sensitivity is not None:
        caption = (
            f"The metric ({sensitivity.metric}) against the share of one coupled group that is "
            "removed, all others whole. In brackets: units of the group; + n: n more layers lose "
            "filters with it."
        )
        body = figures.sensitivities([(_ARM, sensitivity)], caption)
        sections.append(Section("sensitivity", "Sensitivity of the layers", body))
    sections += [
        Section("widths", "Layer widths", _widths(result)),
        Section("configuration", "Configuration and versions", _configuration(result)),
    ]
    content = page(title, f"<p>{escape(_summed_up(result))}</p>", sections)
    where = FilePath(path)
    write_atomic(where, content.encode())
    return where


def _summed_up(result: PruneResult) -> str:
    saved = result.saved
    parts = ", ".join(f"{100 * saved[name]:.1f} % of the {_NAMES[name]}" for name in _NAMES)
    return f"Removed by {result.settings['criterion']}: {parts}."


_NAMES = {"filters": "filters", "params": "parameters", "macs": "MACs", "memory": "memory"}


def _result(result: PruneResult, accuracy: Mapping[str, float]) -> str:
    before, after = vars(result.before), vars(result.after)
    rows = [
        (_NAMES[name], f"{before[name]:,}", f"{after[name]:,}", f"{100 * result.saved[name]:.1f} %")
        for name in _NAMES
    ]
    body = table(
        "Sizes; MACs for the example inputs, memory in bytes with feature maps",
        ("size", "before", "after", "removed"),
        rows,
    )
    if result.latency:
        share = f"{100 * result.saved['latency']:.1f} %"
        body += note(f"Latency: {share} less ({result.latency['state']}).")
    if accuracy:
        measured = [(name, f"{value:g}") for name, value in accuracy.items()]
        body += table("Measured", ("what", "value"), measured)
    return body


def _correlation(result: PruneResult, unpruned: nn.Module, chosen: str | None) -> str:
    before, after = (
        {layer.name: layer for layer in filter_layers(model)} for model in (unpruned, result.model)
    )
    names = [name for name in after if name in before]
    if chosen is not None and chosen not in names:
        raise ValueError(f"heat_map_of is {chosen!r}, expected one of {', '.join(names)}")
    arms = {Arm("before", "twin"): before, Arm("after", "own"): after}
    rows = {
        name: [Bar(arm, mean_correlation(layers[name])) for arm, layers in arms.items()]
        for name in names
    }
    # without a second filter in any group there is no pair
    paired = {name: bars for name, bars in rows.items() if not any(isnan(b.after) for b in bars)}
    body = figures.layer_bars(
        {"": paired},
        "Mean correlation by layer",
        "Mean |cosine| between the filters of a layer, of the unpruned model and of this one.",
        digits=2,
    )
    cut = {row.name for row in result.layers if row.after < row.before}
    whole = [name for name in paired if after[name].groups == 1]
    likely = [name for name in whole if name in cut] or whole
    if chosen is None and not likely:
        return body
    shown = chosen or likely[len(likely) // 2]
    with torch.no_grad():
        weights = [layers[shown].weight.detach() for layers in (before, after)]
        first, second = (filter_correlation([weight])[0].abs().cpu() for weight in weights)
    return body + figures.heat_maps(
        {"before": first, "after": second},
        f"|cosine| between every two filters of layer {shown!r}, on one scale; the diagonal is "
        "left out.",
    )


def _widths(result: PruneResult) -> str:
    rows = {row.name: [Bar(_ARM, row.after, row.before)] for row in result.layers}
    caption = "Filters of each layer before (outline) and after (solid)."
    cells = [(row.name, str(row.before), str(row.after), row.reason) for row in result.layers]
    rounds = sorted({entry["round"] for entry in result.history})
    body = figures.layer_bars({"": rows}, "Filters by layer", caption)
    body += folded("The numbers", table("Layers", ("layer", "before", "after", "why"), cells))
    if len(rounds) > 1:
        found = [(str(number), *_removed(result, number)) for number in rounds]
        body += table("Rounds", ("round", "filters removed", "layers"), found)
    return body


def _removed(result: PruneResult, number: int) -> Sequence[str]:
    entries = [entry for entry in result.history if entry["round"] == number]
    return str(sum(len(entry["removed"]) for entry in entries)), str(len(entries))


def _configuration(result: PruneResult) -> str:
    from ..experiment.measure import versions

    settings = {key.replace("_", " "): str(value) for key, value in result.settings.items()}
    device = next((p.device.type for p in result.model.parameters()), "cpu")
    parts = {"Settings": settings, "Versions": versions(device)}
    return "".join(
        table(name, ("what", "value"), list(found.items()), "facts")
        for name, found in parts.items()
    )
