from __future__ import annotations

import copy
import os
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import orthoreg_ext as ox
from orthoreg_ext.report import ScoreRecorder, write_report
from orthoreg_ext.report.svg import number

from .pages import Page

pytest.importorskip("torch_pruning")


def pruned(rounds: int = 1) -> tuple[ox.pruning.PruneResult, nn.Module, ScoreRecorder]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 12, 3), nn.Flatten(), nn.Linear(192, 4)
    )
    before = copy.deepcopy(model)
    recorder = ScoreRecorder("l2")
    image = torch.randn(1, 3, 8, 8)
    result = ox.pruning.prune(model, image, criterion=recorder.criterion, ratio=0.5, rounds=rounds)
    return result, before, recorder


def shown(path: Path) -> tuple[Page, str, str]:
    text = path.read_text("utf-8")
    page = Page(text)
    assert len(set(page.ids)) == len(page.ids)
    assert {r for r in page.references if not r.startswith("data:")} <= {f"#{i}" for i in page.ids}
    return page, text, re.sub(r"\s+", " ", " ".join(page.text))


def test_a_result_alone_gives_a_page(tmp_path: Path) -> None:
    result, _, _ = pruned()
    path = write_report(result, tmp_path / "r.html", title="My <net>", accuracy={"top 1, %": 93.25})
    page, text, words = shown(path)
    assert [s["id"] for s in page.all("section")] == ["result", "widths", "configuration"]
    assert "<title>My &lt;net&gt;</title>" in text
    assert "93.25" in words
    sizes = vars(result.before) | {"macs": result.after.macs}
    assert all(f"{size:,}" in words for size in sizes.values())
    for row in result.layers:
        assert f"{row.before} → {row.after}" in words
    assert "l2" in words
    assert torch.__version__ in words


def test_everything_that_is_given_is_drawn(tmp_path: Path) -> None:
    result, before, recorder = pruned(rounds=2)
    image = torch.randn(4, 3, 8, 8)
    table = ox.pruning.sensitivity(
        before, image[:1], [(image, torch.arange(4))], ratios=(0.5,), criterion="l2"
    )
    path = write_report(
        result, tmp_path / "r.html", scores=recorder, sensitivity=table, unpruned=before
    )
    page, text, words = shown(path)
    keys = ["result", "correlation", "scores", "sensitivity", "widths", "configuration"]
    assert [s["id"] for s in page.all("section")] == keys
    # correlation, 2 heat maps, 2 rounds of 2 histograms, 2 groups, widths
    assert text.count("<svg") == 1 + 2 + 4 + 2 + 1
    assert "layer '2'" in words  # the later of the two that were cut
    (rounds,) = [t for t in re.findall(r"<table.*?</table>", text, re.DOTALL) if ">Rounds<" in t]
    removed = [sum(len(e["removed"]) for e in result.history if e["round"] == n) for n in (1, 2)]
    assert re.findall(r'"row">(\d)</th><td>(\d+)<', rounds) == [
        ("1", str(removed[0])),
        ("2", str(removed[1])),
    ]


def test_the_correlations_are_those_of_the_two_models(tmp_path: Path) -> None:
    result, before, _ = pruned()
    path = write_report(result, tmp_path / "r.html", unpruned=before, heat_map_of="0")
    _, text, _ = shown(path)
    with torch.no_grad():
        rows = torch.nn.functional.normalize(before[0].weight.flatten(1))
        cosines = (rows @ rows.T).abs()
        mean = float((cosines.sum() - cosines.trace()) / (8 * 7))
    assert f"before: 8 filters, mean {mean:.4f}" in text
    assert f"Mean correlation by layer: 0 before: {number(mean, 2)}; 0 after: " in text
    with pytest.raises(ValueError, match="heat_map_of is 'no'"):
        write_report(result, tmp_path / "s.html", unpruned=before, heat_map_of="no")
    assert not (tmp_path / "s.html").exists()


def test_depthwise_layers_have_no_pairs(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=8), nn.Flatten(), nn.Linear(288, 4)
    )
    before = copy.deepcopy(model)
    result = ox.pruning.prune(model, torch.randn(1, 3, 8, 8), criterion="l1", ratio=0.5)
    _, text, words = shown(write_report(result, tmp_path / "r.html", unpruned=before))
    assert "nan" not in words.split()
    assert "of layer '0'" in words
    assert text.count("<svg") == 1 + 2 + 1


def test_a_page_that_cannot_be_written_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result, _, recorder = pruned()
    path = write_report(result, tmp_path / "r.html", scores=recorder)
    old = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="cannot write"):
            write_report(result, path, title="new")
    assert path.read_bytes() == old
    assert [p.name for p in tmp_path.iterdir()] == ["r.html"]
