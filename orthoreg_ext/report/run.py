"""``report.html``: a run of ``orthoreg prune`` on one page that needs nothing else."""

from __future__ import annotations

import re
import shlex
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields
from html import escape
from typing import TYPE_CHECKING

from torch import Tensor

from . import figures
from .figures import Bar, Course, Path
from .page import Section, folded, note, page, table

if TYPE_CHECKING:
    from ..experiment.record import Arm, Run

OLD = "This run began with a version that did not measure it; a new run shows it."


def report_html(
    run: Run,
    matrices: Mapping[str, Tensor],  # name: |cosines| of one layer's filters, [n, n]
) -> str:
    """Returns the report of a finished run: verdicts, tables, figures, configuration.

    One HTML page with its style and figures inside, for wide screens, phones and dark mode.

    Args:
        run: A finished run. What one of an older version does not hold is named in its place.
        matrices: |cosines| of the filters of one layer under ``"regularised before"`` (the cut),
            ``"twin before"``, ``"regularised after"`` (and fine-tuned) and ``"twin after"``.
    """
    settings = run.settings
    title = f"{settings.model} on {settings.data}, {settings.removed()} removed"
    sections = [
        Section("result", "Result", _result(run)),
        Section("tradeoff", "Accuracy against MACs", _tradeoff(run)),
        Section("course", "Accuracy and penalty by epoch", _course(run)),
        Section("correlation", "Filter correlation", _correlation(run, matrices)),
        Section("scores", "Scores and the cut", _scores(run)),
        Section("sensitivity", "Sensitivity of the layers", _sensitivity(run)),
        Section("widths", "Layer widths", _widths(run)),
        Section("seeds", "Every seed", _seeds(run)),
        Section("configuration", "Configuration and versions", _configuration(run)),
    ]
    return page(title, _lede(run), sections)


def _lede(run: Run) -> str:
    from ..experiment.record import verdicts

    settings = run.settings
    marks = "".join(
        f'<li class="{"yes" if v.holds else "no"}"><b>{"yes" if v.holds else "no"}</b> '
        f"{escape(_units_stay(v.text))}</li>"
        for v in verdicts(run)
    )
    return f"""<p>One network was trained with the <code>{escape(settings.penalty)}</code> penalty
and cut by <code>{escape(settings.criterion)}</code>; its twin, with the same initial parameters and
the same batches, was trained without it and cut by <code>l1</code>. Both were fine-tuned alike,
without it. Numbers are {_seeds_named(run)}.</p>
<ul class="verdicts">{marks}</ul>"""


def _result(run: Run) -> str:
    from ..experiment.record import table as rows

    return table(
        f"Before the first cut → after the last; {_seeds_named(run)}",
        ("result", "regularised", "twin"),
        [[_unbroken(cell) for cell in row] for row in rows(run)],
    ) + note(
        f"Latency: median of interleaved runs on the machine below, networks of seed "
        f"{run.settings.seed}."
    )


def _tradeoff(run: Run) -> str:
    paths = [Path(_marked(arm), _steps(arm), arm.seed == run.settings.seed) for arm in run.arms]
    caption = (
        f"Held-out accuracy against the multiply-accumulates of one image, seed {run.settings.seed}"
        f"{_others(run)}. Solid: from trained to pruned and fine-tuned. Dashed, outlined marks: "
        "just cut, before fine-tuning."
    )
    head = ("network", "cut", "MACs", "params", "just cut, %", "tuned, %")
    rows = [
        (
            f"{arm.name}, seed {arm.seed}",
            str(number),
            f"{cut.before.macs:,} → {cut.after.macs:,}",
            f"{cut.before.params:,} → {cut.after.params:,}",
            f"{cut.accuracy_before:.2f} → {cut.accuracy_after:.2f}",
            f"{_tuned(arm, number):.2f}",
        )
        for arm in run.arms
        for number, cut in enumerate(arm.cuts, start=1)
    ]
    return figures.tradeoff(paths, caption) + folded(
        "The numbers", table("Every cut of every network", head, rows)
    )


def _course(run: Run) -> str:
    found = [_points(arm, arm.seed == run.settings.seed) for arm in run.arms]
    caption = (
        f"Held-out accuracy, and the penalty that was added to the loss while training; seed "
        f"{run.settings.seed}{_others(run)}. Dashed, upright: cuts."
    )
    return figures.courses(found, caption)


def _correlation(run: Run, matrices: Mapping[str, Tensor]) -> str:
    first = {arm.name: arm for arm in run.arms if arm.seed == run.settings.seed}
    found: dict[tuple[str, str], dict[str, float]] = {}  # by network and moment: by layer
    for name, arm in first.items():
        side = run.side(arm.regularised)
        found[name, "before"] = _medians([other.layer_correlations for other in side])
        found[name, "after"] = _medians([other.final_correlations for other in side])
    titles = {"before": "Trained, before the cut", "after": "Pruned and fine-tuned"}
    panels = {
        title: {
            layer: [Bar(_marked(arm), found[name, when][layer]) for name, arm in first.items()]
            for layer in found["regularised", "before"]
            if all(layer in found[name, when] for name in first)
        }
        for when, title in titles.items()
    }
    bars = figures.layer_bars(
        {title: rows for title, rows in panels.items() if rows},
        "Mean correlation by layer",
        f"Mean |cosine| between the filters of a layer; {_seeds_named(run)}.",
        digits=2,
    )
    if not panels[titles["after"]]:
        bars += note(f"After the cut: {OLD[0].lower()}{OLD[1:]}")
    numbers = table(
        f"Mean |cosine| by layer; {_seeds_named(run)}",
        ("layer", *(f"{name}, {when}" for name, when in found)),
        [
            (layer, *(f"{m[layer]:.4f}" if layer in m else "-" for m in found.values()))
            for layer in found["regularised", "before"]
        ],
    )
    names = [f"{name} {when}" for when in ("before", "after") for name in first]
    maps = figures.heat_maps(
        {name.replace(" ", ", "): matrices[name] for name in names if name in matrices},
        f"|cosine| between every two filters of layer {run.matrix_layer!r}, seed "
        f"{run.settings.seed}, all on one scale; the diagonal is left out. Before: trained. After: "
        "pruned and fine-tuned.",
    )
    return bars + folded("The numbers", numbers) + maps


def _scores(run: Run) -> str:
    found = {
        _titled(arm.name, number, len(arm.cuts)): (_marked(arm), cut.scores)
        for arm in run.arms
        for number, cut in enumerate(arm.cuts, start=1)
        if cut.scores is not None
    }
    if not found:
        return note(OLD)
    cuts = sum(len(arm.cuts) for arm in run.arms if arm.seed == run.settings.seed)
    idle = " A cut without a histogram removed nothing." if len(found) < cuts else ""
    below = sum(counts.below for _, counts in found.values())
    share, multiple = 100 * run.settings.max_layer_ratio, run.settings.round_to
    kept = f" and what stays of it is a multiple of {multiple}" if multiple > 1 else ""
    return figures.score_histograms(
        found,
        f"Scores of all units that could go, by the criterion that cut them, seed "
        f"{run.settings.seed}. Dashed: the largest score that was removed. No cut takes more than "
        f"{share:g} % of what a layer has left{kept}, so that units below it may have been kept."
        f"{idle}"
        + (f" {below} units score less than the axis shows, in its first bin." if below else ""),
    )


def _sensitivity(run: Run) -> str:
    arms = [arm for arm in run.arms if arm.seed == run.settings.seed]
    found = [(_marked(arm), arm.sensitivity) for arm in arms if arm.sensitivity]
    notes = "".join(
        note(f"Not measured for {arm.name}: {arm.sensitivity_note}")
        for arm in arms
        if arm.sensitivity is None and arm.sensitivity_note
    )
    if not found:
        return notes or note(OLD)
    measured = next(arm.sensitivity_note for arm in arms if arm.sensitivity)
    images = f", {measured}" if measured else ""
    caption = (
        f"Accuracy in percent{images}, against the share of one coupled group that is removed, all "
        "others whole; by the network's own criterion, before the first cut and without "
        "fine-tuning. In brackets: units of the group; + n: n more layers lose filters with it."
    )
    tables = "".join(
        table(
            f"Accuracy of {arm.name} with one group cut; {found_.baseline:.2f} % whole",
            ("layers", "units", *(f"{ratio:.0%}" for ratio in found_.ratios)),
            [
                (" + ".join(g.layers), str(g.units), *(f"{value:.2f}" for value in g.values))
                for g in found_.groups
            ],
        )
        for arm, found_ in found
    )
    return figures.sensitivities(found, caption) + folded("The numbers", tables) + notes


def _widths(run: Run) -> str:
    arms = [arm for arm in run.arms if arm.seed == run.settings.seed]
    names = [name for name, _, _ in arms[0].cuts[0].layers]
    before = {arm.name: [width for _, width, _ in arm.cuts[0].layers] for arm in arms}
    after = {arm.name: [width for _, _, width in arm.cuts[-1].layers] for arm in arms}
    rows = {
        name: [Bar(_marked(arm), after[arm.name][i], before[arm.name][i]) for arm in arms]
        for i, name in enumerate(names)
    }
    caption = (
        f"Filters of each layer before (outline) and after (solid) the last cut, seed "
        f"{run.settings.seed}."
    )
    cells = [
        (name, str(before[arms[0].name][i]), *(str(after[arm.name][i]) for arm in arms))
        for i, name in enumerate(names)
    ]
    head = ("layer", "before", *(f"{arm.name}, after" for arm in arms))
    return figures.layer_bars({"": rows}, "Filters by layer", caption) + folded(
        "The numbers", table(f"Filters of each layer, seed {run.settings.seed}", head, cells)
    )


def _seeds(run: Run) -> str:
    head = ("seed", "network", "before", "just cut", "tuned", "|corr|", "parameters", "MACs")
    rows = [
        (
            str(arm.seed),
            arm.name,
            f"{arm.cuts[0].accuracy_before:.2f}",
            f"{arm.cuts[-1].accuracy_after:.2f}",
            f"{arm.last('tune').accuracy:.2f}",
            f"{arm.last('train').correlation:.4f}",
            f"{arm.cuts[-1].after.params:,}",
            f"{arm.cuts[-1].after.macs:,}",
        )
        for arm in run.arms
    ]
    return table("Every network; accuracy in percent on the held-out images", head, rows)


def _configuration(run: Run) -> str:
    settings, data = run.settings, run.data
    shape, weights = " x ".join(map(str, data["image_shape"])), data.get("weights_checksum")
    facts = {
        "source": str(data.get("source", settings.data)),
        "images": f"{data['train']} to train on, {data['test']} held out, {shape}, "
        f"{len(data['classes'])} classes",
        "checksum of the images": str(data.get("checksum", "unknown")),
        **({"checksum of the weights": str(weights)} if weights is not None else {}),
        "network input": f"(pixel / 255 - mean) / std, mean {_numbers(data['mean'])}, "
        f"std {_numbers(data['std'])}",
    }
    checked = {
        "model.pt2": f"differs from the network by {run.export['max_difference']:.1e} of its "
        f"largest output (at most {run.export['tolerance']:g} is accepted)",
        "weights.safetensors, history.json": "the pruned network of the first seed; "
        "orthoreg_ext.pruning.replay rebuilds it bit-equal",
    }
    parts = {
        "Settings": {key.replace("_", " "): str(v) for key, v in asdict(settings).items()},
        "Data": facts,
        "Files": checked,
        "Versions": run.versions,
    }
    return (
        "<p>This command repeats the run, with the same versions on the same processor bit for bit"
        f"{' (latencies aside)' if run.latency else ''}:</p>\n"
        f'<pre tabindex="0" role="region" aria-label="Command"><code>{escape(command(run))}'
        "</code></pre>"
        + "".join(
            table(title, ("what", "value"), list(found.items()), "facts")
            for title, found in parts.items()
        )
    )


def command(run: Run) -> str:
    """Returns the command line that does a run again, with every setting spelt out."""
    given = {field.name: getattr(run.settings, field.name) for field in fields(run.settings)}
    share = given.pop("ratio")
    given["target"] = f"{given['target']}={share}"
    options = [
        f"--{name.replace('_', '-')} {shlex.quote(str(value))}"
        for name, value in given.items()
        if value is not None
    ]
    return " \\\n  ".join(["orthoreg prune", *options])


def _medians(found: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The median over the seeds of the correlation of each layer."""
    layers = found[0]
    return {
        name: statistics.median(seed[name] for seed in found)
        for name in layers
        if all(name in seed for seed in found)
    }


def _marked(arm: Arm) -> figures.Arm:
    return figures.Arm(arm.name, "own" if arm.regularised else "twin")


def _steps(arm: Arm) -> list[tuple[float, float, float, float, float]]:
    return [
        (
            cut.before.macs,
            cut.accuracy_before,
            cut.after.macs,
            cut.accuracy_after,
            _tuned(arm, number),
        )
        for number, cut in enumerate(arm.cuts, start=1)
    ]


def _tuned(arm: Arm, cut: int) -> float:
    """The accuracy at the end of the fine-tuning after a cut; of the cut itself without any."""
    found = [epoch.accuracy for epoch in arm.epochs if epoch.stage == "tune" and epoch.cut == cut]
    return found[-1] if found else arm.cuts[cut - 1].accuracy_after


def _points(arm: Arm, main: bool) -> Course:
    """Accuracies over the epochs with the drop at each cut, penalties, and where the cuts are."""
    points: list[tuple[float, float]] = []
    cuts: list[float] = []
    for number, epoch in enumerate(arm.epochs, start=1):
        if epoch.cut > len(cuts):
            cuts.append(number - 0.5)
            points.append((number - 0.5, arm.cuts[epoch.cut - 1].accuracy_after))
        points.append((float(number), epoch.accuracy))
    trained = [epoch for epoch in arm.epochs if epoch.stage == "train"]
    penalties = [(float(epoch.epoch), epoch.penalty) for epoch in trained if arm.regularised]
    return Course(_marked(arm), points, penalties, cuts, main)


def _units_stay(text: str) -> str:
    """A text that does not break between a number and its unit."""
    return re.sub(r"(\d) (?=[%kMG]\b|%)", "\\1\N{NO-BREAK SPACE}", text)


def _unbroken(cell: str) -> str:
    """A cell that only breaks behind its arrow."""
    parts = cell.split(" -> ")
    if len(parts) == 1:
        return cell
    return " → ".join(part.replace(" ", "\N{NO-BREAK SPACE}") for part in parts)


def _titled(name: str, number: int, cuts: int) -> str:
    return f"{name}, cut {number}" if cuts > 1 else name


def _others(run: Run) -> str:
    return "" if run.settings.seeds == 1 else " in bold, the other seeds thin"


def _seeds_named(run: Run) -> str:
    settings = run.settings
    if settings.seeds == 1:
        return f"those of seed {settings.seed}"
    return f"medians over seeds {', '.join(map(str, settings.seeds_used()))}"


def _numbers(values: Iterable[float]) -> str:
    return ", ".join(f"{value:.4f}" for value in values)
