from __future__ import annotations

import json
import re
import shlex
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from orthoreg_ext import cli
from orthoreg_ext.experiment.record import Run, table, verdicts
from orthoreg_ext.experiment.settings import Settings
from orthoreg_ext.report import report_html
from orthoreg_ext.report.run import OLD, command

from .pages import LONG, Page, colours, contrast, finished, matrices

SECTIONS = [
    "result",
    "tradeoff",
    "course",
    "correlation",
    "scores",
    "sensitivity",
    "widths",
    "seeds",
    "configuration",
]


def test_verdicts_follow_the_medians() -> None:
    good = verdicts(finished([98.0, 91.0, 97.0], [96.0, 97.0, 90.0]))
    assert [v.holds for v in good] == [True, True, True]
    assert "0.0200, 4.0x below its twin's 0.0800 on the median of 3 seeds" in good[0].text
    assert "accuracy 97.00 % is at least its twin's 96.00 %" in good[2].text
    bad = verdicts(finished([95.0, 98.0, 95.0], [96.0, 97.0, 90.0], times=2.0))
    assert [v.holds for v in bad] == [False, True, False]
    assert "2.0x below" in bad[0].text
    assert "95.00 % is NOT at least its twin's 96.00 %" in bad[2].text
    assert "is ABOVE its twin's" in verdicts(finished([1.0], [1.0], times=0.5))[0].text


def test_the_table_holds_the_medians() -> None:
    rows = {row[0]: row[1:] for row in table(finished([98.0, 91.0, 97.0], [96.0, 97.0, 90.0]))}
    assert rows["accuracy fine-tuned, %"] == ("97.00", "96.00")
    assert rows["filters"] == ("90 -> 30", "90 -> 30")
    assert rows["parameters"] == ("12.3 k -> 2345",) * 2
    assert rows["latency, batch 1, ms"] == ("3.125 -> 1.500", "3.125 -> 1.250")


@pytest.mark.parametrize(("seeds", "rounds"), [(1, 1), (3, 2)])
def test_the_report_is_one_whole_page(seeds: int, rounds: int) -> None:
    run = finished([98.0, 91.0, 97.0][:seeds], [96.0, 97.0, 90.0][:seeds], rounds=rounds)
    text = report_html(run, matrices())
    page = Page(text)
    # figures: 2 trade-offs, accuracy and penalty, 2 correlations, 4 heat maps, scores of each arm
    # and cut as a whole and by layer, 3 groups, widths
    assert text.count("<svg") == 2 + 2 + 2 + 4 + 2 * 2 * rounds + 3 + 1
    shown = re.sub(r"[\s\N{NO-BREAK SPACE}]+", " ", " ".join(page.text))
    for row in table(run):
        assert all(cell.replace("->", "→") in shown for cell in row), row
    for verdict in verdicts(run):
        assert verdict.text in shown
    for fact in (
        "finetune epochs",
        "9.9.9",
        "2.0e-07",
        "conv<1>",
        "0.3000",
        "a & <b>",
        "on 321 of",
        LONG,
    ):
        assert fact in shown
    assert OLD not in shown
    assert "nan" not in shown.lower().split()


def test_nothing_is_asked_for_from_outside() -> None:
    text = report_html(finished([98.0], [96.0]), matrices())
    page = Page(text)
    assert len(set(page.ids)) == len(page.ids)
    inside = {f"#{name}" for name in page.ids}
    for reference in page.references:
        assert reference in inside or reference.startswith("data:"), reference
    assert set(page.named_by) <= set(page.ids)
    code = re.sub(r'"data:[^"]*"', "", text)
    for outside in ("http:", "https:", "//", "@import", "@font-face", "<script", "javascript:"):
        assert outside not in code, outside
    assert not re.findall(r"\son\w+=", code)
    (policy,) = [m["content"] for m in page.all("meta") if m.get("http-equiv")]
    assert policy.startswith("default-src 'none';")


def test_headings_contents_tables_and_pictures_have_names() -> None:
    text = report_html(finished([98.0], [96.0]), matrices())
    page = Page(text)
    assert page.all("html") == [{"lang": "en"}]
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.all(
        "meta"
    )
    levels = [int(heading[1]) for heading in page.headings]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    contents = [a["href"] for a in page.all("a")]
    assert contents == [f"#{key}" for key in SECTIONS]
    assert [s["id"] for s in page.all("section")] == SECTIONS
    assert {th["scope"] for th in page.all("th")} == {"row", "col"}
    assert len(page.all("caption")) == len(page.all("table")) > 8
    assert '<th scope="col"></th>' not in text
    boxes = [div for div in page.all("div") if div.get("class") == "scroll"]
    assert len(boxes) == len(page.all("table"))
    assert all(box["tabindex"] == "0" and box["aria-label"] for box in boxes)
    assert len(page.all("figcaption")) == len(page.all("figure")) == 7
    for svg in page.all("svg"):
        assert svg["role"] == "img"
        assert len(svg["aria-label"]) > 20, svg


@pytest.mark.parametrize("dark", [False, True])
def test_colours_have_the_contrast_of_wcag_aa(dark: bool) -> None:
    found = colours(dark)
    assert found.keys() == colours(not dark).keys()
    texts = [("ink", "paper"), ("ink", "card"), ("faint", "paper"), ("link", "paper")]
    texts += [("link", "card"), ("yes", "card"), ("no", "card")]
    marks = [("own", "paper"), ("twin", "paper"), ("axis", "paper"), ("heat", "paper")]
    for first, second in texts:
        assert contrast(found[first], found[second]) >= 4.5, (first, second)
    for first, second in marks:  # "graphical objects", 1.4.11
        assert contrast(found[first], found[second]) >= 3, (first, second)


def test_the_contrast_is_the_one_of_wcag() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)  # known: just too low


def test_no_colour_but_those_of_the_style() -> None:
    text = report_html(finished([98.0], [96.0]), matrices())
    body = text[text.index("<body>") :]
    assert not re.findall(r'(?:fill|stroke|color|style)="', body)


def test_a_run_of_an_older_version_says_what_it_lacks() -> None:
    run = finished([98.0, 97.0], [96.0, 95.0], old=True)
    record = json.loads(json.dumps(run.to_json()))
    for arm in record["arms"]:
        for key in ("final_correlations", "sensitivity", "sensitivity_note"):
            del arm[key]
        for cut in arm["cuts"]:
            del cut["scores"]
    text = report_html(Run.from_json(record), matrices())
    page = Page(text)
    assert text.count(OLD) == 2
    assert f"After the cut: {OLD[0].lower()}{OLD[1:]}" in text
    assert [s["id"] for s in page.all("section")] == SECTIONS


def test_a_sensitivity_that_could_not_be_measured_says_why() -> None:
    run = finished([98.0], [96.0])
    run.arms[0].sensitivity, run.arms[0].sensitivity_note = None, "the <layer> cannot be followed"
    run.arms[1].sensitivity_note = "on 5 images"
    text = report_html(run, matrices())
    assert "Not measured for regularised: the &lt;layer&gt; cannot be followed" in text
    assert "in percent, on 5 images, against" in text
    assert text.count("<svg") == 2 + 2 + 2 + 4 + 4 + 3 + 1


@pytest.mark.parametrize("changes", [{}, {"target": "macs", "ratio": 0.3, "image_size": 32}])
def test_the_command_gives_the_settings_back(
    changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = finished([98.0], [96.0])
    run.settings = replace(run.settings, data="a folder", **changes)
    text = command(run).replace("\\\n", "")
    assert shlex.split(text)[:6] == ["orthoreg", "prune", "--model", "vgg", "--data", "a folder"]
    found: list[dict[str, Any]] = []

    def noted(given: dict[str, Any], *_: object, **__: object) -> None:
        found.append(given)
        raise KeyboardInterrupt

    monkeypatch.setattr("orthoreg_ext.experiment.run", noted)
    cli.main(shlex.split(text)[1:])
    assert Settings(**found[0]).resolved() == run.settings


def test_a_cut_that_removed_nothing_has_no_histogram() -> None:
    run = finished([98.0], [96.0], rounds=2)
    whole = report_html(run, matrices())
    cut = run.arms[0].cuts[1]
    run.arms[0].cuts[1] = replace(cut, scores=None)
    text = report_html(run, matrices())
    assert "A cut without a histogram removed nothing." in text
    assert "removed nothing" not in whole
    assert whole.count("<svg") - text.count("<svg") == 2
    assert "regularised, cut 1" in text
    assert "regularised, cut 2" not in text


def test_many_layers_are_folded_away() -> None:
    few = report_html(finished([98.0], [96.0], rounds=4), matrices())  # 3 layers, 8 cuts
    many = report_html(finished([98.0], [96.0], rounds=5), matrices())
    assert "Layer by layer</summary>" not in few
    assert "Layer by layer</summary>" in many
    assert many.count("<svg") - few.count("<svg") == 4
    Page(many)


def test_the_same_run_gives_the_same_page() -> None:
    run = finished([98.0], [96.0])
    assert report_html(run, matrices()) == report_html(run, matrices())


def test_a_run_survives_json() -> None:
    run = finished([98.0, 97.0], [96.0, 95.0], rounds=2)
    assert Run.from_json(json.loads(json.dumps(run.to_json()))) == run
