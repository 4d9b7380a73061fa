"""The cross: additivity, accuracy, whose the gain is, rare filters, sweeps and options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from experiments.lab import hosted
from experiments.report.cells import (
    GAINS,
    LEFT,
    RATIO,
    SHADE,
    TWICE,
    Parts,
    accuracies,
    gains,
    lines_of,
    single,
)
from experiments.report.figures import Figure, Line, Panel, Point
from experiments.report.page import View
from experiments.report.results import (
    Result,
    Row,
    having,
    lacking,
    levels,
    others,
    paired,
    split,
    varying,
)
from experiments.report.spread import Value, difference, gather, of, over_layers
from experiments.report.tables import caption, grid, listing, said

PLAIN = {"arm": "none", "criterion": "l1"}  # what a gain is a gain over
BEYOND = (
    "In points after fine-tuning: what the criterion gains over l1 with the regulariser, less what "
    "it gains without; above 0 where one helps the other."
)
HOST = "alone"  # a criterion without variety around it
SETTINGS = ("penalty", "strength", "side", "layer_weights", "weight_decay")


def nets(result: Result) -> list[Row]:
    """The networks before any cut."""
    return lacking(result.rows, "criterion")


def cuts(result: Result) -> list[Row]:
    """The networks after one."""
    return having(result.rows, "criterion")


def additivity(result: Result) -> Parts:
    """Whether importances add up, arm by arm and layer by layer."""
    rows = nets(result)
    columns = {"accuracy, %": single(result, "accuracy")}
    for name, paths in {
        "correlation": ("correlation",),
        "gap less floor": ("gap", "floor"),
        "ratio": ("ratio",),
        "group error": ("error",),
    }.items():
        columns[name] = _of_layers(result, over_layers(*paths))
    note = caption(result, rows, "Correlation, gap, ratio and error: mean over the layers.")
    return [*listing(rows, ["arm"], columns, tables=["model"]), note, *_scatter(result)]


def _of_layers(result: Result, value: Value) -> Any:
    return lambda rows: gather(rows, value, result.seeds).text(".3g")


def _scatter(result: Result) -> Parts:
    rows, panels = nets(result), []
    for model, mine in split([row for row in rows if not row.diverged], ["model"]).items():
        lines = []
        for arm, there in split(mine, ["arm"]).items():
            names = dict.fromkeys(n for row in there for n in row.values["layers"])
            points = [_layer(there, name, result.seeds) for name in names]
            lines.append(Line(arm[0], tuple(point for point in points if point)))
        panels.append(Panel(model[0], tuple(line for line in lines if line.points)))
    note = "Each point is a layer."
    figure = Figure(
        "additivity",
        caption(result, rows, note),
        "mean |correlation| of a layer's filters",
        "group-importance error",
        tuple(panels),
        scatter=True,
        log="x",
    )
    return [figure]


def _layer(rows: Sequence[Row], name: str, seeds: int) -> Point | None:
    def value(key: str) -> Value:
        return lambda row: difference(row.values["layers"].get(name, {}), key)

    x, y = gather(rows, value("correlation"), seeds), gather(rows, value("error"), seeds)
    return Point.of(x, y) if x.values and y.values else None


def accuracy(result: Result) -> Parts:
    """After fine-tuning and after the cut."""
    rows = cuts(result)
    tables = others(rows, "arm", "criterion", "ratio")
    down, across = (["ratio", "criterion"], "arm")
    if not varying(rows, "arm"):
        down, across = ["criterion"], "ratio"
    shown = grid(rows, down, [across], accuracies(result), tables=tables)
    note = caption(result, rows, TWICE, LEFT)
    return [*shown, note, *_curves(result, rows, "arm", [*tables, "criterion"])]


def _curves(result: Result, rows: Sequence[Row], name: str, panels_by: Sequence[str]) -> Parts:
    """A line for every level of a key."""
    if len(levels(rows, "ratio")) < 2 or not varying(rows, name):
        return []
    panels = [
        Panel(said(panels_by, keys), lines_of(mine, name, "ratio", of("finetuned"), result.seeds))
        for keys, mine in split(rows, panels_by).items()
    ]
    panels = [panel for panel in panels if panel.drawn]
    note = caption(result, rows, SHADE)
    y, columns = "accuracy after fine-tuning, %", min(5, len(levels(rows, panels_by[-1])))
    return [Figure("accuracy", note, RATIO, y, tuple(panels), columns=columns)]


def effects(result: Result) -> Parts:
    """Whose the gain is: the regulariser's or the scoring's."""
    rows, parts = cuts(result), list[str]()
    tables = others(rows, "arm", "criterion", "ratio")
    panels: list[Panel] = []
    for name, base in PLAIN.items():
        shown = gains(result, rows, name, base, tables=tables)
        if not shown:
            continue
        parts += shown
        for keys, mine in split(paired(rows, name, base, of("finetuned")), tables).items():
            lines = lines_of(mine, name, "ratio", of("gain"), result.seeds)
            title = ", ".join([f"over {base}", *([said(tables, keys)] if keys else [])])
            panel = Panel(title, lines)
            panels += [panel] if panel.drawn else []
    if not parts:
        return []
    note = caption(result, rows, GAINS)
    return [*parts, note, *_gain_figure(result, rows, panels)]


def _gain_figure(result: Result, rows: Sequence[Row], panels: Sequence[Panel]) -> Parts:
    if len(levels(rows, "ratio")) < 2:
        return []
    figure = Figure(
        "effects",
        caption(result, rows, "Gain after fine-tuning, all else alike.", SHADE),
        RATIO,
        "gain in accuracy, points",
        tuple(panels),
        zero=True,
        columns=max(1, len(panels) // 2),
        first=1,
    )
    return [figure]


def interaction(result: Result) -> Parts:
    """What regulariser and scoring gain together beyond the sum of what each gains alone."""
    rows = cuts(result)
    if any(base not in levels(rows, name) for name, base in PLAIN.items()):
        return []
    arms = paired(rows, "arm", PLAIN["arm"], of("finetuned"))
    both = paired(arms, "criterion", PLAIN["criterion"], of("gain"))
    if not both:
        return []

    def text(mine: Sequence[Row]) -> str:
        spread = gather(mine, of("gain"), result.seeds)
        return f"{spread.text('+.2f')}<br>{spread.signs()}" if spread.values else spread.text()

    tables = others(rows, "arm", "criterion", "ratio")
    shown = grid(both, ["arm", "criterion"], ["ratio"], text, tables=tables)
    return [*shown, caption(result, rows, BEYOND)]


def sweep(result: Result) -> Parts:
    """One line an arm: its settings, the network, and every cut."""
    rows = list(result.rows)
    arms: Mapping[str, Mapping[str, Any]] = result.config["arms"]
    told = [s for s in SETTINGS if len({str(arm.get(s)) for arm in arms.values()}) > 1]
    columns: dict[str, Any] = {name.replace("_", " "): _setting(arms, name) for name in told}
    columns["accuracy, %"] = lambda mine: single(result, "accuracy")(lacking(mine, "criterion"))
    correlation = _of_layers(result, over_layers("correlation"))
    columns["correlation"] = lambda mine: correlation(lacking(mine, "criterion"))
    names = others(cuts(result), "arm", "model")
    for keys in split(cuts(result), names):
        columns[said(names, keys) or "cut"] = _cut(result, names, keys)
    note = caption(result, cuts(result), "Cuts: after fine-tuning; below it after the cut.", LEFT)
    return [*listing(rows, ["arm"], columns, tables=["model"]), note]


def _setting(arms: Mapping[str, Mapping[str, Any]], name: str) -> Any:
    def text(rows: Sequence[Row]) -> str:
        arm = arms[rows[0].keys["arm"]]
        known = arm.get(name) is not None and (arm.get("penalty") or name == "weight_decay")
        return str(arm[name]) if known else "-"

    return text


def _cut(result: Result, names: Sequence[str], keys: tuple[Any, ...]) -> Any:
    show = accuracies(result)

    def text(rows: Sequence[Row]) -> str:
        mine = having(rows, "criterion")
        return str(show([r for r in mine if tuple(r.keys.get(n) for n in names) == keys]))

    return text


def rare(result: Result) -> Parts:
    """How many of the rarest filters are kept."""
    rows = cuts(result)
    tables = others(rows, "arm", "criterion", "ratio")
    shown = grid(
        rows,
        ["arm", "criterion"],
        ["ratio"],
        single(result, "rare_kept", ".0f", 100),
        tables=tables,
    )
    told = "Rarest quarter of each layer's filters: percent kept."
    drawn = "Filters drawn at random: about 1 less the ratio, where every layer is cut alike."
    return [*shown, caption(result, rows, told, drawn)]


def options(result: Result) -> Parts:
    """One line a combination of the cut's options."""
    names = others(cuts(result), "ratio", "model", "arm", "criterion")

    def named(row: Row) -> Row:
        told = said(names, [row.keys.get(name) for name in names])
        keys = {key: level for key, level in row.keys.items() if key not in names}
        return replace(row, keys={**keys, "options": told})

    rows = [named(row) for row in cuts(result)]
    down = ["arm", "criterion", "options"]
    shown = grid(rows, down, ["ratio"], accuracies(result), tables=["model"])
    return [*shown, caption(result, rows, TWICE, LEFT)]


def variety(result: Result) -> Parts:
    """What variety adds to the criterion that it hosts."""
    rows = [_hosted(row) for row in cuts(result)]
    tables = [*others(rows, "host", "mode", "ratio"), "host"]
    shown = gains(result, rows, "mode", HOST, tables=tables)
    if not shown:
        return []
    return [*shown, caption(result, rows, GAINS), *_curves(result, rows, "mode", tables)]


def _hosted(row: Row) -> Row:
    """With ``variety(HOST, MODE)`` taken apart."""
    keys = dict(row.keys)
    host, mode = hosted(keys.pop("criterion"))
    return replace(row, keys={**keys, "host": host, "mode": mode or HOST})


VIEWS: Mapping[str, View] = {
    "additivity": additivity,
    "accuracy": accuracy,
    "effects": effects,
    "interaction": interaction,
    "rare": rare,
    "sweep": sweep,
    "options": options,
    "variety": variety,
}
