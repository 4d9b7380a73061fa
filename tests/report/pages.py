"""Pages to check, from made-up numbers, and a parser that checks that a page is whole."""

from __future__ import annotations

import math
import re
from html.parser import HTMLParser
from importlib.resources import files

import torch

from orthoreg_ext.experiment.record import Arm, Cut, Epoch, Run, Size
from orthoreg_ext.experiment.settings import Settings
from orthoreg_ext.pruning import GroupSensitivity, Sensitivity
from orthoreg_ext.report.scores import ScoreCounts

VOID = {"meta", "br", "img", "link", "hr", "input"}


class Page(HTMLParser):
    """Checks that tags nest, and collects texts, ids, references, headings and tables."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.ids: list[str] = []
        self.named_by: list[str] = []
        self.references: list[str] = []
        self.headings: list[str] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        found = {key: value or "" for key, value in attrs}
        assert len(found) == len(attrs), f"an attribute twice: {attrs}"
        self.tags.append((tag, found))
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(tag)
        for key, value in found.items():
            if key == "id":
                self.ids.append(value)
            if key == "aria-labelledby":
                self.named_by += value.split()
            if key in ("src", "href", "xlink:href", "data", "action", "srcset"):
                self.references.append(value)
            self.references += re.findall(r"url\(([^)]*)\)", value)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attrs for name, attrs in self.tags if name == tag]


def colours(dark: bool) -> dict[str, str]:
    """The custom properties of one scheme."""
    style = files("orthoreg_ext.report").joinpath("report.css").read_text()
    light, _, rest = style.partition("@media (prefers-color-scheme: dark)")
    part = rest.split("}")[0] if dark else light.split("}")[0]
    return dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", part))


def contrast(first: str, second: str) -> float:
    """The ratio of WCAG 2.2 between two colours, #rrggbb."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return math.fsum(w * p for w, p in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    dark, light = sorted((luminance(first), luminance(second)))
    return (light + 0.05) / (dark + 0.05)


LONG = "backbone.stages.3.blocks.11.branch<1>.downsample.0"
LAYERS = ("conv<1>", "conv2", LONG, "fc")


def scores(criterion: str, log: bool = True) -> ScoreCounts:
    edges = [1e-9 * 10 ** (i / 4) for i in range(37)] if log else [i / 36 for i in range(37)]
    kept = [[0] * 18 + [2] * 18, [1] * 36, [0] * 30 + [5] * 6]
    gone = [[1] * 18 + [0] * 18, [3] * 10 + [0] * 26, [0] * 36]
    return ScoreCounts(criterion, log, edges, list(LAYERS[:3]), kept, gone, edges[18], 3)


def sensitivity(drop: float) -> Sensitivity:
    groups = [
        GroupSensitivity(name, (name, "more") if i == 1 else (name,), 40, [10, 30], [97 - drop, 12])
        for i, name in enumerate(LAYERS[:3])
    ]
    return Sensitivity("accuracy", 97.5, (0.25, 0.75), groups)


def arm(
    seed: int, regularised: bool, tuned: float, correlation: float, rounds: int, old: bool
) -> Arm:
    def epoch(stage: str, cut: int, number: int, accuracy: float) -> Epoch:
        penalty = 0.25 / number if regularised and stage == "train" else 0.0
        return Epoch(stage, cut, number, 0.5, penalty, accuracy, correlation)

    def cut(number: int) -> Cut:
        left = 2**number
        return Cut(
            ratio=0.75,
            accuracy_before=97.25,
            accuracy_after=11.5,
            before=Size(90 // left, 12345 // left, 987654 // left),
            after=Size(30 // left, 2345 // left, 87654 // left),
            prunable=(80, 20),
            layers=[(LAYERS[0], 40, 12), (LAYERS[1], 40, 8), (LONG, 2048, 17), ("fc", 10, 10)],
            scores=None if old else scores("fisher" if regularised else "l1", log=regularised),
        )

    correlations = {"conv<1>": correlation, "conv2": correlation / 2, LONG: correlation / 3e4}
    return Arm(
        seed,
        regularised,
        "fisher" if regularised else "l1",
        done=4,
        epochs=[
            epoch("train", 0, 1, 90.0),
            epoch("train", 0, 2, 97.25),
            *(epoch("tune", number, 1, tuned) for number in range(1, rounds + 1)),
        ],
        cuts=[cut(number) for number in range(rounds)],
        layer_correlations=correlations,
        final_correlations={} if old else {name: 2 * v for name, v in correlations.items()},
        sensitivity=None if old else sensitivity(3.0 if regularised else 9.0),
        sensitivity_note="" if old else "on 321 of the held-out images",
    )


def finished(
    own: list[float], twin: list[float], times: float = 4.0, rounds: int = 1, old: bool = False
) -> Run:
    arms = [
        arm(seed, side, values[seed], 0.02 if side else 0.02 * times, rounds, old)
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
        Settings(seeds=len(own), rounds=rounds, data="a & <b>").resolved(),
        {"torch": "9.9.9"},
        data,
        arms,
        matrix_layer="conv<1>",
        latency={"1": {"dense": 3.125, "regularised": 1.5, "twin": 1.25}},
        export={"max_difference": 2e-7, "tolerance": 1e-5},
        finished=True,
    )


def matrices(size: int = 5) -> dict[str, torch.Tensor]:
    names = [f"{name} {when}" for name in ("regularised", "twin") for when in ("before", "after")]
    return {name: torch.eye(size) * 0.7 + 0.3 for name in names}
