"""The page of evidence comes from the results alone, and says what is missing in them."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from experiments.config import CONFIGS, Config, load
from experiments.report import __main__ as command
from experiments.report.cells import accuracies, gains, lines_of
from experiments.report.figures import Figure, Line, Panel, Point, draw
from experiments.report.page import BEGIN, Page, stale, views_of
from experiments.report.results import Result, Row, levels, paired, split
from experiments.report.results import load as load_results
from experiments.report.spread import gather, of, over_layers
from experiments.report.tables import caption, grid, listing
from experiments.runner import RESULTS

MACHINE = {"name": "Some CPU", "slug": "some-cpu", "device": "cpu", "threads": 1, "torch": "2.13"}
GONE = {"filters": 0.5, "params": 0.7, "macs": 0.75}


def result(
    question: str,
    units: Sequence[tuple[dict[str, Any], dict[str, Any]]],
    *,
    seeds: int = 2,
    planned: int | None = None,
    **config: Any,
) -> dict[str, Any]:
    """A document as the runner writes it."""
    whole = {"name": f"{question}-x", "title": "?", "question": question, **config}
    return {
        "config": Config.of({**whole, "seeds": list(range(seeds))}).document(),
        "machine": MACHINE,
        "data": "01234567",
        "planned": len(units) if planned is None else planned,
        "seconds": 7200.0,
        "units": [{"unit": u, "values": v, "seconds": 1.0} for u, v in units],
    }


def cut_unit(
    arm: str, criterion: str, ratio: float, seed: int, tuned: float, cut: float = 10.0, **more: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
    where = {"scope": "local", "criterion": criterion, "ratio": ratio, **more}
    unit = {"model": "vgg", "arm": arm, "seed": seed, "cut": where}
    values = {"cut": cut, "finetuned": tuned, "saved": GONE, "rare_kept": tuned / 100}
    return unit, values


def net_unit(
    arm: str, seed: int, correlation: float, error: float
) -> tuple[dict[str, Any], dict[str, Any]]:
    layers = {
        "conv1": {
            "correlation": correlation,
            "gap": 0.75,
            "floor": 0.5,
            "ratio": 2,
            "error": error,
        },
        "conv2": {"correlation": 3 * correlation, "gap": 0.5, "floor": 0.5, "ratio": 4, "error": 0},
    }
    return {"model": "vgg", "arm": arm, "seed": seed}, {"accuracy": 98.0 + seed, "layers": layers}


TUNED = {  # (arm, criterion, ratio) -> one accuracy a seed
    ("none", "l1", 0.5): (90.0, 92.0),
    ("none", "fisher", 0.5): (93.0, 93.0),
    ("none", "l1", 0.75): (80.0, 80.0),
    ("none", "fisher", 0.75): (85.0, 79.0),
    ("so", "l1", 0.5): (91.0, 94.0),
    ("so", "fisher", 0.5): (92.0, 95.0),
    ("so", "l1", 0.75): (70.0, 90.0),
    ("so", "fisher", 0.75): (75.0, 85.0),
}


def cross() -> dict[str, Any]:
    nets = [net_unit(arm, s, 0.1 * (s + 1), 0.4) for s in (0, 1) for arm in ("none", "so")]
    cuts = [
        cut_unit(*key, seed, tuned[seed], cut=tuned[seed] - 50)
        for seed in (0, 1)
        for key, tuned in TUNED.items()
    ]
    return result("cross", [*nets, *cuts], arms={"none": {}, "so": {"penalty": "so"}})


def text_of(document: dict[str, Any], view: str) -> str:
    parts = views_of(document["config"]["question"])[view](Result.of(document))
    return "\n\n".join(part for part in parts if isinstance(part, str))


def figures_of(document: dict[str, Any], view: str) -> list[Figure]:
    parts = views_of(document["config"]["question"])[view](Result.of(document))
    return [part for part in parts if isinstance(part, Figure)]


def rows(*found: tuple[dict[str, Any], int, dict[str, Any]]) -> list[Row]:
    return [Row(keys, seed, values) for keys, seed, values in found]


# ---- numbers -------------------------------------------------------------------------------------


def test_a_cell_is_the_mean_and_the_range_over_seeds() -> None:
    spread = gather(rows(({}, 0, {"x": 1.0}), ({}, 1, {"x": 2.0}), ({}, 2, {"x": 6.0})), of("x"), 3)
    assert spread.text() == "3.0 (1.0..6.0)"
    assert spread.text("+.2f") == "+3.00 (+1.00..+6.00)"
    assert gather(rows(({}, 0, {"a": {"b": 0.25}})), of("a.b", 100), 1).text(".0f") == "25"
    assert (
        gather(rows(({}, 0, {"x": -1.0}), ({}, 1, {"x": 2.0})), of("x"), 2).signs() == "+ in 1 of 2"
    )


def test_a_gain_that_is_only_rounding_is_none() -> None:
    spread = gather(rows(({}, 0, {"x": 0.1 + 0.2 - 0.3}), ({}, 1, {"x": -1e-16})), of("x"), 2)
    assert spread.low < 0 < spread.high
    assert spread.signs() == "+ in 0 of 2"
    assert spread.text("+.2f") == "+0.00 (+0.00..+0.00)"


def test_units_of_a_seed_are_averaged_first() -> None:
    found = rows(*(({}, seed, {"x": x}) for seed, x in ((0, 1.0), (0, 3.0), (1, 10.0), (1, 20.0))))
    assert gather(found, of("x"), 2).text() == "8.5 (2.0..15.0)"


@pytest.mark.parametrize(
    ("values", "seeds", "text"),
    [
        ([{"x": 1.0}, {"x": 3.0}], 5, "2.0 (1.0..3.0), 2 of 5 seeds"),
        ([{"x": 1.0}, {"diverged": "in epoch 1"}], 2, "1.0, 1 diverged"),
        ([{"x": 1.0}, {"diverged": "in epoch 1"}], 3, "1.0, 2 of 3 seeds, 1 diverged"),
        ([{"diverged": "."}, {"diverged": "."}], 2, "2 diverged"),
        ([{"x": float("nan")}, {"x": 3.0}], 2, "3.0, 1 of 2 seeds"),
        ([], 5, "-"),
    ],
)
def test_what_is_missing_is_said_in_the_cell(
    values: list[dict[str, Any]], seeds: int, text: str
) -> None:
    found = rows(*(({}, seed, value) for seed, value in enumerate(values)))
    assert gather(found, of("x"), seeds).text() == text


def test_of_several_units_a_seed_the_missing_ones_are_counted() -> None:
    found = rows(({}, 0, {"x": 1.0}), ({}, 0, {"x": 3.0}), ({}, 1, {"x": 4.0}))
    assert gather(found, of("x"), 2).text() == "3.0 (2.0..4.0), 3 of 4 runs"


def test_layers_are_averaged_where_they_have_the_value() -> None:
    layers = {"a": {"gap": 0.75, "floor": 0.5}, "b": {"gap": 0.5, "floor": 0.5}, "c": {"error": 1}}
    row = Row({}, 0, {"layers": layers})
    assert over_layers("gap")(row) == 0.625
    assert over_layers("gap", "floor")(row) == 0.125
    assert over_layers("error")(row) == 1
    assert over_layers("none")(row) is None


def test_gains_are_paired_by_everything_else_and_the_seed() -> None:
    found = rows(
        ({"arm": "none", "ratio": 0.5}, 0, {"x": 1.0}),
        ({"arm": "none", "ratio": 0.9}, 0, {"x": 10.0}),
        ({"arm": "none", "ratio": 0.5}, 1, {"diverged": "."}),
        ({"arm": "so", "ratio": 0.5}, 0, {"x": 3.0}),
        ({"arm": "so", "ratio": 0.9}, 0, {"x": 9.0}),
        ({"arm": "so", "ratio": 0.5}, 1, {"x": 3.0}),
        ({"arm": "so", "ratio": 0.9}, 1, {"x": 3.0}),
    )
    pairs = paired(found, "arm", "none", of("x"))
    assert [(p.keys["ratio"], p.seed, p.value("gain"), p.diverged) for p in pairs] == [
        (0.5, 0, 2.0, False),
        (0.9, 0, -1.0, False),
        (0.5, 1, None, True),
        (0.9, 1, None, False),
    ]


def test_numbers_are_sorted_and_names_stay_in_their_order() -> None:
    found = rows(*(({"r": r, "n": n}, 0, {}) for r, n in ((0.9, "b"), (0.5, "a"), (0.5, None))))
    assert levels(found, "r") == [0.5, 0.9]
    assert levels(found, "n") == ["b", "a"]
    assert list(split(found, ["r", "n"])) == [(0.5, None), (0.5, "a"), (0.9, "b")]
    nested = {"unit": {"seed": 3, "cut": {"weights": [1, 2]}, "at": 1.0}, "values": {}}
    assert Row.of(nested) == Row({"weights": "[1, 2]", "at": 1.0}, 3, {})


# ---- tables --------------------------------------------------------------------------------------


def test_a_grid_leaves_out_what_does_not_vary_and_splits_by_the_rest() -> None:
    places = (("local", "a", 0.5), ("local", "b", 0.9), ("global", "a", 0.5))
    found = [
        Row({"model": "vgg", "scope": scope, "arm": arm, "ratio": ratio}, 0, {"x": x})
        for x, (scope, arm, ratio) in enumerate(places, start=1)
    ]

    def cell(mine: Sequence[Row]) -> str:
        return gather(mine, of("x"), 1).text()

    assert grid(found, ["model", "arm"], ["ratio"], cell, tables=["model", "scope"]) == [
        "**local**",
        "| arm | ratio 0.5 | ratio 0.9 |\n| --- | --- | --- |\n| a | 1.0 | - |\n| b | - | 2.0 |",
        "**global**",
        "| model | ratio 0.5 |\n| --- | --- |\n| vgg | 3.0 |",
    ]
    assert listing(found[:2], ["arm"], {"x": cell}) == [
        "| arm | x |\n| --- | --- |\n| a | 1.0 |\n| b | 2.0 |"
    ]


def test_the_caption_says_what_is_alike_and_what_diverged() -> None:
    document = result("cross", [cut_unit("none", "l1", r, 0, 90) for r in (0.5, 0.9)], seeds=3)
    found = Result.of(document)
    assert caption(found, found.rows, "Told.") == (
        "Told. Mean (min..max) over 3 seeds; digits, vgg, none, local, l1."
    )
    document["units"][0]["values"] = {"diverged": "."}
    found = Result.of(document)
    assert caption(found, found.rows).endswith("1 of 2 runs diverged and are in no mean.")


# ---- the cross -----------------------------------------------------------------------------------


def test_the_cross_shows_both_accuracies_and_what_is_left() -> None:
    lines = text_of(cross(), "accuracy").splitlines()
    assert lines[0] == "| ratio | criterion | none | so |"
    assert lines[2] == (
        "| 0.5 | l1 | 91.0 (90.0..92.0)<br>cut 41.0 (40.0..42.0)<br>25 % MACs "
        "| 92.5 (91.0..94.0)<br>cut 42.5 (41.0..44.0)<br>25 % MACs |"
    )
    assert len(lines) == 2 + 4 + 2
    (figure,) = figures_of(cross(), "accuracy")
    assert [panel.title for panel in figure.panels] == ["l1", "fisher"]
    assert figure.panels[0].lines[1] == Line(
        "so", (Point(0.5, 92.5, 91.0, 94.0), Point(0.75, 80.0, 70.0, 90.0))
    )


def test_the_gain_is_told_apart_by_arm_and_by_criterion() -> None:
    lines = text_of(cross(), "effects").splitlines()
    # so less none at 0.5: seed 0 (+1, -1) -> 0, seed 1 (+2, +2) -> 2; at 0.75: -10 and (+10, +6)
    assert (
        "| so | +1.00 (+0.00..+2.00)<br>+ in 1 of 2<br>cut +1.00 (+0.00..+2.00) "
        "| -1.00 (-10.00..+8.00)<br>+ in 1 of 2<br>cut -1.00 (-10.00..+8.00) |"
    ) in lines
    # fisher less l1 at 0.5: seed 0 (+3, +1) -> 2, seed 1 (+1, +1) -> 1; 0.75: (5, 5), (-1, -5)
    assert (
        "| fisher | +1.50 (+1.00..+2.00)<br>+ in 2 of 2<br>cut +1.50 (+1.00..+2.00) "
        "| +1.00 (-3.00..+5.00)<br>+ in 1 of 2<br>cut +1.00 (-3.00..+5.00) |"
    ) in lines
    (figure,) = figures_of(cross(), "effects")
    assert [(p.title, [line.name for line in p.lines]) for p in figure.panels] == [
        ("over none", ["so"]),
        ("over l1", ["fisher"]),
    ]
    assert figure.panels[0].lines[0].points[0] == Point(0.5, 1.0, 0.0, 2.0)


def test_the_interaction_is_what_the_scoring_gains_more_with_the_regulariser() -> None:
    lines = text_of(cross(), "interaction").splitlines()
    # at 0.5: seed 0 (92 - 91) - (93 - 90) = -2, seed 1 (95 - 94) - (93 - 92) = 0
    # at 0.75: seed 0 (75 - 70) - (85 - 80) = 0, seed 1 (85 - 90) - (79 - 80) = -4
    assert lines[2] == (
        "| so | -1.00 (-2.00..+0.00)<br>+ in 0 of 2 | -2.00 (-4.00..+0.00)<br>+ in 0 of 2 |"
    )


def test_additivity_is_averaged_over_layers_and_drawn_by_layer() -> None:
    lines = text_of(cross(), "additivity").splitlines()
    assert lines[2] == (  # correlation: (0.1 + 0.3) / 2 and twice that
        "| none | 98.5 (98.0..99.0) | 0.3 (0.2..0.4) | 0.125 (0.125..0.125) | 3 (3..3) "
        "| 0.2 (0.2..0.2) |"
    )
    (figure,) = figures_of(cross(), "additivity")
    point = figure.panels[0].lines[0].points[0]
    assert (point.x, point.left, point.right) == pytest.approx((0.15, 0.1, 0.2))
    assert (point.y, point.low, point.high) == pytest.approx((0.4, 0.4, 0.4))


def test_a_sweep_has_a_line_an_arm_with_its_settings() -> None:
    arms = {"none": {}, "a": {"penalty": "so", "strength": 0.1}, "b": {"penalty": "so"}}
    units = [net_unit(arm, 0, 0.1, 0.4) for arm in ("none", "a", "b")]
    units += [cut_unit(arm, "l1", 0.5, 0, 90) for arm in ("none", "a")]
    units.append(({**cut_unit("b", "l1", 0.5, 0, 0)[0]}, {"diverged": "."}))
    lines = text_of(result("cross", units, seeds=1, arms=arms), "sweep").splitlines()
    assert lines[0] == "| arm | penalty | strength | accuracy, % | correlation | cut |"
    assert lines[2:5] == [
        "| none | - | - | 98.0 | 0.2 | 90.0<br>cut 10.0<br>25 % MACs |",
        "| a | so | 0.1 | 98.0 | 0.2 | 90.0<br>cut 10.0<br>25 % MACs |",
        "| b | so | 0.01 | 98.0 | 0.2 | 1 diverged |",
    ]


def test_options_that_a_cut_does_not_name_are_its_defaults() -> None:
    units = [
        cut_unit("none", "l1", 0.5, 0, 90),
        cut_unit("none", "l1", 0.5, 0, 91, normalize="max"),
        cut_unit("none", "l1", 0.5, 0, 92, max_layer_ratio=0.8),
    ]
    lines = text_of(result("cross", units, seeds=1), "options").splitlines()
    assert [line.split("<br>")[0] for line in lines[2:5]] == [
        "| default | 90.0",
        "| normalize max | 91.0",
        "| max layer ratio 0.8 | 92.0",
    ]


def test_variety_is_compared_with_the_criterion_that_it_hosts() -> None:
    found = {"l1": 80.0, "variety(l1)": 82.0, "variety(l1, gate)": 79.5}
    found |= {"fisher": 90.0, "variety(fisher)": 91.0}
    units = [cut_unit("none", name, r, 0, x) for name, x in found.items() for r in (0.5, 0.75)]
    text = text_of(result("cross", units, seeds=1), "variety")
    assert text.index("**l1**") < text.index("**fisher**")
    assert "| pairwise | +2.00<br>+ in 1 of 1<br>cut +0.00 | +2.00<br>" in text
    assert "| gate | -0.50<br>+ in 0 of 1<br>cut +0.00 |" in text
    assert "| pairwise | +1.00<br>+ in 1 of 1<br>cut +0.00 | +1.00<br>" in text


def test_rare_filters_are_shown_in_percent() -> None:
    assert "| none | fisher | 93 (93..93) | 82 (79..85) |" in text_of(cross(), "rare")


# ---- the other questions -------------------------------------------------------------------------


def early() -> dict[str, Any]:
    base = {"model": "vgg", "criterion": "l1", "ratio": 0.5}
    tuned = {("none", 0.05): 80, ("none", 1.0): 90, ("so", 0.05): 85, ("so", 1.0): 91}
    units = [
        ({**base, "arm": arm, "seed": seed, "at": at}, {"cut": 20, "finetuned": x + seed})
        for (arm, at), x in tuned.items()
        for seed in (0, 1)
    ]
    masks = [
        (
            {"model": "vgg", "arm": "none", "seed": seed, "masks": "bn_scale"},
            {"distance": [None, 0.5 - 0.1 * seed, 0.25], "to_last": [0.75, 0.25, 0.0]},
        )
        for seed in (0, 1)
    ]
    return result("early", [*masks, *units], arms={"none": {}, "so": {"penalty": "so"}})


def test_early_cuts_are_shown_by_their_moment() -> None:
    text = text_of(early(), "accuracy")
    assert "| none | 80.5 (80.0..81.0)<br>cut 20.0 (20.0..20.0) | 90.5 (90.0..91.0)<br>" in text
    effects = text_of(early(), "effects")
    assert "Gain over at 1.0" in effects
    assert "| 0.05 | -10.00 (-10.00..-10.00)<br>+ in 0 of 2" in effects
    assert "| so | +5.00 (+5.00..+5.00)<br>+ in 2 of 2" in effects


def test_masks_are_drawn_by_epoch_from_the_first_that_has_a_window() -> None:
    (figure,) = figures_of(early(), "masks")
    window, last = figure.panels[0].lines
    assert (window.name, last.name) == ("bn_scale, in its window", "bn_scale, to the last")
    assert window.points == (Point(2, 0.45, 0.4, 0.5), Point(3, 0.25, 0.25, 0.25))
    assert [point.y for point in last.points] == [0.75, 0.25, 0.0]


def trainability() -> dict[str, Any]:
    net = {"model": "mlp", "arm": "none", "seed": 0}
    units = [(net, {"accuracy": 95.0, "jsv": 2.0, "jsv_distance": 4.0})]
    for method, jsv, tuned in (("l1", 0.5, 80), ("tpp", 0.75, 84)):
        cut = {**net, "method": method, "ratio": 0.5}
        about = {"cut": 30.0, "jsv": jsv, "jsv_distance": 1.0}
        units.append((cut, about))  # what a schedule leaves, before any learning rate
        units += [
            ({**cut, "lr": lr}, {**about, "finetuned": tuned + 100 * lr}) for lr in (0.01, 0.001)
        ]
    return result("trainability", units, seeds=1)


def test_trainability_is_shown_by_method_ratio_and_learning_rate() -> None:
    text = text_of(trainability(), "accuracy")
    assert text.index("**lr 0.001**") < text.index("**lr 0.01**")
    assert "| tpp | 84.1<br>cut 30.0 |" in text
    assert "| tpp | +4.00<br>+ in 1 of 1<br>cut +0.00 |" in text_of(trainability(), "effects")
    text = text_of(trainability(), "isometry")
    assert "| mlp | 2 | 4 | 95.0 |" in text
    assert "| tpp | 0.75 | 1 | 30.0 | 84.1 | 85.0 |" in text


def test_duplicates_are_shown_by_criterion() -> None:
    net = {"model": "vgg", "arm": "none", "seed": 0}
    values = {"found": 0.875, "lost": 0.0625, "cut": 60.0, "finetuned": 97.0}
    units = [(net, {"accuracy": 98.0, "wide": 97.5}), ({**net, "criterion": "repr"}, values)]
    text = text_of(result("duplicates", units, seeds=1), "found")
    assert "| vgg | 98.0 | 97.5 |" in text
    assert "| repr | 87.5 | 6.2 | 60.0 | 97.0 |" in text


def test_cost_is_what_a_step_takes_longer() -> None:
    def spread(median: float) -> dict[str, float]:
        return {"median": median, "low": 0.0, "high": 9.0}

    units = []
    for seed, state in ((0, "quiet"), (1, "contended")):
        values = {
            "ms": {"without": spread(10 + seed), "reg.attach": spread(11)},
            "ratio": {"without": spread(1), "reg.attach": spread(1.0625 + 0.125 * seed)},
            "state": state,
        }
        units.append(({"model": "vgg", "seed": seed}, values))
    text = text_of(result("cost", units), "step")
    assert "| model | ms without | `reg.attach`, % | busy |" in text
    assert "| vgg | 10.5 (10.0..11.0) | +12.50 (+6.25..+18.75) | 1 of 2 runs |" in text


# ---- the page ------------------------------------------------------------------------------------

PAGE = """before
<!-- results: runs -->
<!-- /results -->
between
<!-- results: cross-x:accuracy -->
old
<!-- /results -->
after
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    folder = tmp_path / "results" / "some-cpu"
    folder.mkdir(parents=True)
    (folder / "cross-x.json").write_text(json.dumps(cross()))
    (tmp_path / "page.md").write_text(PAGE)
    return tmp_path


def call(place: Path, *options: str) -> int:
    where = ["--page", str(place / "page.md"), "--results", str(place / "results")]
    return command.main([*where, *options])


def test_the_command_writes_what_its_check_wants(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(place, "--check") == 1
    assert "page.md: not what" in capsys.readouterr().out
    (place / "figures").mkdir()
    (place / "figures" / "evidence-cross-old-accuracy.svg").write_text("<svg/>")
    assert call(place) == 0
    assert call(place, "--check") == 0
    assert capsys.readouterr().out == ""
    text = (place / "page.md").read_text()
    assert re.sub(r"(?s)(<!-- results: \S+ -->).*?(<!-- /)", r"\1\n\2", text) == PAGE.replace(
        "old\n", ""
    )
    assert "![accuracy after fine-tuning, % against ratio of filters removed](figures/evid" in text
    assert (
        "| `cross-x` | digits, all, checksum 01234567 | `vgg` | 2 | 8 + 8 | 20 of 20 | 2.0 |"
        in text
    )
    (figure,) = (place / "figures").iterdir()
    first = figure.read_text()
    assert len(first) < 150_000
    assert call(place) == 0
    assert figure.read_text() == first
    assert (place / "page.md").read_text() == text


def test_a_figure_of_other_numbers_is_stale(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(place) == 0
    (figure,) = (place / "figures").iterdir()
    figure.write_text(figure.read_text().replace("drawn of ", "drawn of 0"))
    (place / "figures" / "evidence-x.svg").write_text("")
    assert call(place, "--check") == 1
    said = capsys.readouterr().out
    assert f"{figure.name}: not" in said
    assert "evidence-x.svg (of no results)" in said


def test_results_that_no_block_shows_are_named(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = {**cross(), "config": {**cross()["config"], "name": "hidden"}}
    (place / "results" / "some-cpu" / "hidden.json").write_text(json.dumps(other))
    assert call(place) == 1
    assert "no block shows hidden" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("<!-- results: cross-x -->\n", "has no <!-- /results -->"),
        ("<!-- results: cross-x -->\n<!-- results: runs --><!-- /results -->", "has no <!--"),
        ("<!-- results: cros-x --><!-- /results -->", "experiment"),
        ("<!-- results: cross-x:acuracy --><!-- /results -->", "accuracy"),
    ],
)
def test_a_wrong_marker_is_an_error_and_changes_nothing(
    place: Path, capsys: pytest.CaptureFixture[str], text: str, error: str
) -> None:
    (place / "page.md").write_text(text)
    assert call(place) == 1
    assert error in capsys.readouterr().err
    assert (place / "page.md").read_text() == text


def test_units_that_are_left_and_several_machines_are_said(place: Path) -> None:
    part = {**cross(), "planned": 30}
    text = Page(PAGE, [Result.of(part)]).text
    assert "**Not finished: 20 of 30 units are done.**" in text
    assert "| 20 of 30 |" in text
    other = {**cross(), "machine": {**MACHINE, "name": "Other", "slug": "other"}}
    made = Page(PAGE, [Result.of(cross()), Result.of(other)])
    assert made.text.index("**On Some CPU:**") < made.text.index("**On Other:**")
    assert sorted(made.figures) == [
        "evidence-cross-x-accuracy-other.svg",
        "evidence-cross-x-accuracy-some-cpu.svg",
    ]


def test_an_experiment_without_results_says_how_to_get_them() -> None:
    text = Page("<!-- results: cross-digits:accuracy --><!-- /results -->", []).text
    assert "No results yet: `python -m experiments cross-digits` writes them." in text


def test_a_figure_draws_every_series_once_in_the_legend() -> None:
    point = Point(0.5, 1, 0, 2)
    panels = tuple(Panel(t, (Line("a", (point,)), Line("b", (point,)))) for t in ("one", "two"))
    figure = Figure("x", "c", "along", "up", panels)
    text = draw(figure)
    assert [text.count(f">{name}<") for name in ("one", "two", "along", "up")] == [1] * 4
    assert (text.count(">a<"), text.count(">b<")) == (1, 1)
    assert text.endswith(f"{figure.mark}\n")
    assert "<dc:date>" not in text
    other = Figure("x", "c", "along", "up", panels[:1])
    assert other.mark != figure.mark


def _parts(document: dict[str, Any], seed: int) -> dict[str, Any]:
    """Some of the units, some of them diverged; of seed 0 none at all."""
    draw_of = random.Random(seed)
    units = [unit for unit in document["units"] if seed and draw_of.random() < 0.6]
    diverged = {"values": {"diverged": "the loss is nan in epoch 1"}}
    mixed = [{**unit, **diverged} if draw_of.random() < 0.3 else unit for unit in units]
    return {**document, "units": mixed}


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("make", [cross, early, trainability], ids=lambda make: make.__name__)
def test_every_view_shows_what_there_is(make: Callable[[], dict[str, Any]], seed: int) -> None:
    document = _parts(make(), seed)
    name = document["config"]["name"]
    made = Page(f"<!-- results: {name} --><!-- /results -->", [Result.of(document)])
    assert "nan" not in made.text
    for figure in made.figures.values():
        assert all(line.points for panel in figure.panels for line in panel.lines)
    if make is early and made.figures:
        draw(next(iter(made.figures.values())))


# ---- what is committed ---------------------------------------------------------------------------


def test_the_committed_page_is_what_the_command_makes_of_the_results() -> None:
    made = Page(command.PAGE.read_text(), load_results(RESULTS))
    assert stale(command.PAGE, made) == [], "run python -m experiments.report"


def test_every_experiment_has_its_block_and_every_view_exists() -> None:
    blocks = BEGIN.findall(command.PAGE.read_text())
    names = {name for name, _ in blocks} - {"runs"}
    known = {path.stem for path in CONFIGS.glob("*.toml")}
    assert not known - names, f"docs/evidence.md has no <!-- results: NAME --> of {known - names}"
    for name, view in blocks:
        if view:
            assert view in views_of(load(name).question), f"{name}:{view}"


def test_the_cells_of_the_page_are_the_ones_that_are_tested() -> None:
    found = Result.of(cross())
    assert accuracies(found)(list(found.rows[:0])) == "-"
    assert gains(found, found.rows[:0], "arm", "none") == []
    assert lines_of([], "arm", "ratio", of("x"), 2) == ()
