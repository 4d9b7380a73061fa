"""The page of evidence comes from the results alone, and says what is missing in them."""

from __future__ import annotations

import json
import random
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from experiments.config import CONFIGS, load
from experiments.report import __main__ as command
from experiments.report.cells import accuracies, gains, lines_of
from experiments.report.figures import Figure, Line, Panel, Point, draw
from experiments.report.page import BEGIN, Page, stale, views_of
from experiments.report.results import Result, Row, levels, paired, split
from experiments.report.results import load as load_results
from experiments.report.spread import gather, of, over_layers
from experiments.report.tables import caption, grid, listing
from experiments.runner import RESULTS
from tests.experiments.documents import MACHINE, cross, cut_unit, early, result, rows, trainability

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


EDITED: dict[str, Any] = {
    "machine": {"name": "x"},
    "config": {"name": "cross-y"},
    "seconds": "1",
    "planned": None,
    "units": [{**cross()["units"][0], "values": "98"}],
}


@pytest.mark.parametrize("part", [*EDITED, "twice"])
def test_results_that_were_edited_are_named(
    place: Path, capsys: pytest.CaptureFixture[str], part: str
) -> None:
    whole = cross()
    changed = {"units": whole["units"] * 2} if part == "twice" else {part: EDITED[part]}
    path = place / "results" / "some-cpu" / "cross-y.json"
    path.write_text(json.dumps({**whole, **changed}))
    assert call(place) == 1
    assert re.search(r"cross-y.json' holds no results.* remove it", capsys.readouterr().err)


def test_a_question_without_a_report_is_named(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = place / "results" / "some-cpu" / "cross-x.json"
    path.write_text(path.read_text().replace('"question": "cross"', '"question": "noise"'))
    assert call(place) == 1
    assert "question 'noise' has no report: write experiments/re" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"units": [{"unit": {}}]}', "null"])
def test_damaged_results_are_named(
    place: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    (place / "results" / "some-cpu" / "cross-y.json").write_text(text)
    assert call(place) == 1
    assert re.search(
        r"cross-y.json' holds no results.* experiments cross-y", capsys.readouterr().err
    )
    assert (place / "page.md").read_text() == PAGE


def test_without_matplotlib_nothing_is_written(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert call(place) == 1
    assert "error: matplotlib is not installed; install it with" in capsys.readouterr().err
    assert (place / "page.md").read_text() == PAGE
    assert not (place / "figures").exists()


def test_the_epochs_of_a_schedule_are_told() -> None:
    document = trainability()
    document["config"]["options"] = {"epochs": 16}
    text = Page("<!-- results: runs --><!-- /results -->", [Result.of(document)]).text
    assert "| `vgg` | 1 | 8 + 16 + 8 | 7 of 7 |" in text


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


def test_what_was_cut_at_one_ratio_only_is_in_the_tables_alone() -> None:
    units = [
        cut_unit(arm, "l1", ratio, 0, 90, scope=scope)
        for arm in ("none", "so")
        for scope, ratio in (("local", 0.5), ("local", 0.9), ("global", 0.5))
    ]
    found = Result.of(result("cross", units, seeds=1, arms={"none": {}, "so": {"penalty": "so"}}))
    for view in ("accuracy", "effects"):
        parts = views_of("cross")[view](found)
        figure = next(part for part in parts if isinstance(part, Figure))
        assert ["local" in panel.title for panel in figure.panels] == [True]
        assert any("**global**" in part for part in parts if isinstance(part, str))


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


def test_a_cell_without_rows_is_a_dash() -> None:
    found = Result.of(cross())
    assert accuracies(found)([]) == "-"
    assert gains(found, [], "arm", "none") == []
    assert lines_of([], "arm", "ratio", of("x"), 2) == ()
