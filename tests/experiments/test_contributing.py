"""What CONTRIBUTING.md writes as a new question works."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from experiments import runner
from experiments.config import Config
from experiments.report.page import Page
from experiments.report.results import load
from experiments.runner import Place, run

GUIDE = Path(__file__).parents[2] / "CONTRIBUTING.md"


def written(path: str) -> str:
    """The lines that the guide adds to a file."""
    text = GUIDE.read_text().partition(f"\n # {path}\n")[2].partition("```")[0]
    lines = [line[1:] for line in text.partition("\n # ")[0].splitlines() if line.startswith("+")]
    assert 0 < len(lines) <= 10
    return "\n".join(lines)


def test_the_question_is_measured_and_shown(
    tiny: Callable[..., Config], place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind in ("questions", "report"):
        module = ModuleType(f"experiments.{kind}.noise")
        exec(written(f"experiments/{kind}/noise.py"), vars(module))
        monkeypatch.setitem(sys.modules, module.__name__, module)
    question = sys.modules["experiments.questions.noise"]
    monkeypatch.setattr(runner, "question_of", lambda config: question)
    document = {**tiny().document(), "question": "noise"}
    run(Config.of({**document, "options": {}}), place)
    text = written("docs/evidence.md").replace("NAME", "tiny")
    page = Page(text, load(place.results)).text
    assert "| model | accuracy, % |" in page
    assert "Mean (min..max) over 2 seeds" in page
    assert "Not finished" not in page
    with pytest.raises(ValueError, match=r"unknown key in .options. 'cuts'"):
        run(Config.of(document), place)
