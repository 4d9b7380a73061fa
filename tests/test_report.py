from __future__ import annotations

from html.parser import HTMLParser

import pytest
import torch

pytest.importorskip("matplotlib")

from orthoreg_ext.experiment.record import Arm, Cut, Epoch, Run, Size, table, verdicts
from orthoreg_ext.experiment.settings import Settings
from orthoreg_ext.report import report_html

VOID = {"meta", "br", "img", "link", "hr", "input"}


class Page(HTMLParser):
    """Checks that tags nest, and collects texts, ids and references."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        for key, value in attrs:
            if key == "id":
                self.ids.append(value or "")
            if key in ("src", "href", "xlink:href", "data", "action"):
                self.references.append(value or "")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def arm(seed: int, regularised: bool, tuned: float, correlation: float) -> Arm:
    def epoch(stage: str, number: int, accuracy: float) -> Epoch:
        penalty = 0.25 / number if regularised and stage == "train" else 0.0
        return Epoch(stage, int(stage == "tune"), number, 0.5, penalty, accuracy, correlation)

    cut = Cut(
        ratio=0.75,
        accuracy_before=97.25,
        accuracy_after=11.5,
        before=Size(90, 12345, 987654),
        after=Size(30, 2345, 87654),
        prunable=(80, 20),
        layers=[("conv<1>", 40, 12), ("conv2", 40, 8), ("fc", 10, 10)],
    )
    return Arm(
        seed,
        regularised,
        "fisher" if regularised else "l1",
        done=4,
        epochs=[epoch("train", 1, 90.0), epoch("train", 2, 97.25), epoch("tune", 1, tuned)],
        cuts=[cut],
        layer_correlations={"conv<1>": correlation, "conv2": correlation / 2},
    )


def finished(own: list[float], twin: list[float], times: float = 4.0) -> Run:
    arms = [
        arm(seed, side, values[seed], 0.02 if side else 0.02 * times)
        for seed in range(len(own))
        for side, values in ((True, own), (False, twin))
    ]
    data = {
        "train": 100,
        "test": 50,
        "image_shape": [1, 8, 8],
        "classes": ["a", "b"],
        "mean": [0.3],
        "std": [0.4],
    }
    return Run(
        Settings(seeds=len(own)).resolved(),
        {"torch": "9.9.9"},
        data,
        arms,
        matrix_layer="conv<1>",
        latency={"1": {"dense": 3.125, "regularised": 1.5, "twin": 1.25}},
        export={"max_difference": 2e-7, "tolerance": 1e-5},
        finished=True,
    )


def matrices() -> dict[str, torch.Tensor]:
    names = [f"{name} {when}" for name in ("regularised", "twin") for when in ("before", "after")]
    return {name: torch.eye(5) * 0.7 + 0.3 for name in names}


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


@pytest.mark.parametrize("seeds", [1, 3])
def test_the_report_is_one_whole_page(seeds: int) -> None:
    run = finished([98.0, 91.0, 97.0][:seeds], [96.0, 97.0, 90.0][:seeds])
    text = report_html(run, matrices())
    page = Page()
    page.feed(text)
    page.close()
    assert page.open == []
    assert len(set(page.ids)) == len(page.ids)
    # figures inside, nothing from outside
    assert text.count("<svg") == 4
    assert all(r.startswith(("#", "data:image/png;base64,")) for r in page.references)
    assert {r[1:] for r in page.references if r.startswith("#")} <= set(page.ids)
    for outside in ("http:", "https:", "//", "@import", "<script", "<link"):
        body = "".join(part for part in text.split('"') if not part.startswith("data:image"))
        assert outside not in body, outside
    # numbers, verdicts, configuration, versions
    shown = " ".join(page.text)
    for row in table(run):
        assert all(cell in shown for cell in row)
    for verdict in verdicts(run):
        assert verdict.text in shown
    for fact in ("finetune epochs", "9.9.9", "2.0e-07", "conv<1>", "0.3000"):
        assert fact in shown
    # phones and dark mode
    assert 'name="viewport"' in text
    assert "prefers-color-scheme: dark" in text
    assert "currentColor" in text
    assert "#0a0b0c" not in text


def test_the_same_run_gives_the_same_page() -> None:
    run = finished([98.0], [96.0])
    assert report_html(run, matrices()) == report_html(run, matrices())


def test_a_run_survives_json() -> None:
    import json

    run = finished([98.0, 97.0], [96.0, 95.0])
    assert Run.from_json(json.loads(json.dumps(run.to_json()))) == run
