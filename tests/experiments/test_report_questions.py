"""Every view of a question, with numbers that can be checked by hand."""

from __future__ import annotations

from typing import Any

import pytest

from experiments.report.figures import Figure, Line, Point
from experiments.report.page import views_of
from experiments.report.results import Result
from tests.experiments.documents import cross, cut_unit, early, net_unit, result, trainability


def text_of(document: dict[str, Any], view: str) -> str:
    parts = views_of(document["config"]["question"])[view](Result.of(document))
    return "\n\n".join(part for part in parts if isinstance(part, str))


def figures_of(document: dict[str, Any], view: str) -> list[Figure]:
    parts = views_of(document["config"]["question"])[view](Result.of(document))
    return [part for part in parts if isinstance(part, Figure)]


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
    found = {"l1": 80.0, "variety(l1)": 82.0, "variety(l1,gate)": 79.5}
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


def test_early_cuts_are_shown_by_their_moment() -> None:
    text = text_of(early(), "accuracy")
    assert "| none | 80.5 (80.0..81.0)<br>cut 20.0 (20.0..20.0) | 90.5 (90.0..91.0)<br>" in text
    assert "was cut; 0.05 is 1, 1 is 8 of 8 epochs." in text
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
    assert figure.caption.count("Distance") == 1


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
            "ratio": {
                "without": spread(1),
                "reg.attach": spread(1.0625 + 0.125 * seed),
                "reg.attach, alone": spread(0.0625),
            },
            "state": state,
        }
        units.append(({"model": "vgg", "seed": seed}, values))
    text = text_of(result("cost", units), "step")
    assert "| model | ms without | `reg.attach`, % | `reg.attach, alone`, % | busy |" in text
    cells = "10.5 (10.0..11.0) | +12.50 (+6.25..+18.75) | 6.25 (6.25..6.25)"
    assert f"| vgg | {cells} | 1 of 2 runs |" in text
