from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from orthoreg_ext import cli, pruning
from orthoreg_ext.experiment import sensitivity
from orthoreg_ext.experiment.data import load_dataset
from orthoreg_ext.experiment.models import build_model

SHAPE = (1, 8, 8)
COMMAND = ["sensitivity", "vgg", "--ratios=0.5,0.9", "--samples=64", "--device=cpu", "--quiet"]


def vgg() -> torch.nn.Module:
    return build_model("vgg", num_classes=10, image_shape=SHAPE, seed=3)


def test_accuracy_and_loss_are_those_of_the_held_out_images() -> None:
    test = load_dataset("digits").test
    model = vgg().eval()
    with torch.no_grad():
        output, labels = model(test.batch(slice(None))[0]), test.labels
    right = sum(int(row.argmax()) == int(y) for row, y in zip(output, labels, strict=True))
    with torch.no_grad():
        assert sensitivity.accuracy(model, test) == pytest.approx(100 * right / len(labels))
        logs = torch.log_softmax(output.double(), 1)
        expected = -sum(float(row[y]) for row, y in zip(logs, labels, strict=True)) / len(labels)
        assert sensitivity.loss(model, test) == pytest.approx(expected, rel=1e-5)


def test_the_command_measures_the_weights_it_is_given(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = vgg()
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    out = tmp_path / "s.json"
    options = [f"--weights={tmp_path / 'w.safetensors'}", f"--json={out}", "--metric=loss"]
    assert cli.main([*COMMAND, *options]) == 0
    shown, errors = capsys.readouterr()
    assert not errors
    table = json.loads(out.read_text())
    assert table["metric"] == "loss"
    test = load_dataset("digits").test
    with torch.no_grad():
        assert table["baseline"] == pytest.approx(sensitivity.loss(model.eval(), test), rel=1e-5)
    assert [group["name"] for group in table["groups"]] == [f"conv{i}" for i in range(1, 7)]
    assert shown.startswith(f"loss {table['baseline']:.5g}; with one group cut:")
    assert len(shown.splitlines()) == 2 + 6


def test_a_pruned_checkpoint_can_be_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = vgg()
    pruning.prune(model, torch.zeros(1, *SHAPE), criterion="l1", scope="local").save(tmp_path / "p")
    assert cli.main([*COMMAND, f"--weights={tmp_path / 'p'}", "--criterion=l1"]) == 0
    rows = capsys.readouterr().out.splitlines()[2:]
    assert [int(row.split()[1]) for row in rows] == [8, 16, 32, 32, 64, 64]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--ratios=half"], "--ratios is 'half'; expected numbers"),
        (["--ratios=0.5,1"], "ratio is 1.0, expected a number in"),
        (["--samples=0"], "--samples is 0"),
        (["--weights=none.safetensors"], "--weights: there is no file 'none.safetensors'"),
        (["--weights=pyproject.toml"], "--weights is 'pyproject.toml'; expected a state dict"),
        (["--criterion=l3"], "unknown criterion 'l3'"),
        (["--data=nothing"], "unknown data 'nothing'"),
        (["--json=no/such/folder.json"], "--json: there is no folder 'no/such'"),
    ],
)
def test_bad_input_is_one_line(
    options: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*COMMAND, *options]) == cli.BAD_INPUT
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert re.search(re.escape(text), line)
