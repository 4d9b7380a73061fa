from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest

pytest.importorskip("sklearn", reason="the digits come with scikit-learn")

EXAMPLE = Path(__file__).parents[3] / "examples" / "prune_while_training.py"


def test_the_example_prunes_while_it_trains(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), "--epochs", "4"])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    printed = capsys.readouterr().out
    assert re.search(r"filters +58 +34 +41\.4%", printed)  # 24 of 48, and the classes
    trained, _, tuned = (float(x) for x in re.findall(r": ([\d.]+) %", printed))
    assert trained > 90
    assert tuned > trained - 4
