"""`orthoreg analyze`: the diagnosis of one's own model, and one line for bad input."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import orthoreg_ext as ox
from orthoreg_ext import cli
from orthoreg_ext.experiment.data import load_dataset
from orthoreg_ext.experiment.models import build_model, resnet, vgg
from tests.test_cli import one_line

MODELS = """
from torch import nn

def net():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 4))

def argument(width):
    return nn.Linear(width, width)

def empty():
    return nn.ReLU()

def huge():
    raise MemoryError
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module of the user's and some files, in the folder where the command is called."""
    (tmp_path / "own_nets.py").write_text(MODELS)
    torch.save(resnet().state_dict(), tmp_path / "resnet.pt")
    torch.save(vgg(), tmp_path / "object.pt")
    (tmp_path / "text.pth").write_text("no tensors")
    (tmp_path / "text.safetensors").write_text("no tensors")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "own_nets", raising=False)
    return tmp_path


def test_digits_from_the_command_line(mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    command = ["analyze", "resnet", "--data", "digits", "--samples", "96", "--seed", "3"]
    command += ["--device", "cpu", "--json", "out.json", "--plot", "out.svg"]
    assert cli.main(command) == 0
    text = capsys.readouterr().out
    assert "of 96 samples" in text
    assert (mine / "out.svg").stat().st_size > 0
    document = json.loads((mine / "out.json").read_text())
    data = load_dataset("digits")
    model = build_model("resnet", num_classes=10, image_shape=data.image_shape, seed=3)
    index = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(3))[:96]
    want = ox.diagnose(model, [data.train.batch(index)])
    assert [layer["name"] for layer in document["layers"]] == [row.name for row in want]
    assert document["gap"] == pytest.approx(want.gap, rel=1e-4)
    assert document["samples"] == 96
    assert document["jacobian"]["mean"] == pytest.approx(want.spectrum.mean, rel=1e-4)
    for row in want:
        assert row.name in text


def test_an_npz_file_and_weights_of_ones_own(
    mine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (12, 9, 9, 3), dtype=np.uint8)
    np.savez("data.npz", images=images, labels=np.arange(12) % 3)
    model = vgg(num_classes=3, in_channels=3)
    with torch.no_grad():
        model.conv1.weight[4] = 0
    torch.save(model.state_dict(), "own.pt")
    command = ["analyze", "vgg", "--data", "data.npz", "--weights", "own.pt", "--json", "o.json"]
    assert cli.main([*command, "--device", "cpu"]) == 0
    document = json.loads(Path("o.json").read_text())
    first = document["layers"][0]
    assert (first["name"], first["dead"], first["condition"]) == ("conv1", [4], None)
    assert document["jacobian"]["samples"] == 9
    capsys.readouterr()


def test_without_data_the_weights_alone(mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["analyze", "own_nets:net", "--threads", "1"]) == 0
    text = capsys.readouterr().out
    assert [line.split()[0] for line in text.splitlines()] == ["layer", "0", "2"]
    assert "gap" not in text
    pytest.importorskip("safetensors.torch").save_file(resnet().state_dict(), "resnet.safetensors")
    assert cli.main(["analyze", "resnet", "--weights", "resnet.safetensors"]) == 0
    assert "block3_1.shortcut.0" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["resnt"], "unknown model 'resnt'; did you mean 'resnet'"),
        (["own_nets:argument"], "(missing a required argument: 'width'); its factory is called"),
        (["own_nets:empty"], "no layer is left to diagnose (the model has no filters)"),
        (["own_nets:net", "--data", "digits"], "cannot read images of 1 x 8 x 8"),
        (["vgg", "--data", "digitss"], "unknown data 'digitss'; did you mean 'digits'"),
        (["vgg", "--samples", "0"], "--samples is 0; expected a positive number"),
        (["vgg", "--threads", "0"], "--threads is 0; expected a positive number"),
        (["vgg", "--device", "tpu"], "argument --device: invalid choice: 'tpu'"),
        (["vgg", "--json", "none/b.json"], "--json: there is no folder 'none'; make it first"),
        (["vgg", "--plot", "none/b.svg"], "--plot: there is no folder 'none'; make it first"),
        (["vgg", "--plot", "b.txt"], "--plot is 'b.txt'; expected a file *.svg, *.png, *.pdf"),
        (["vgg", "--weights", "none.pt"], "--weights: there is no file 'none.pt'"),
        (["vgg", "--weights", "own_nets.py"], "expected a state dict in a file *.safetensors"),
        (["vgg", "--weights", "resnet.pt"], 'Missing key(s) in state_dict: "conv1.weight"'),
        (["vgg", "--weights", "object.pt"], "torch.load reads nothing but tensors from it"),
        (["vgg", "--weights", "text.pth"], "torch.load reads nothing but tensors from it"),
        (["vgg", "--weights", "text.safetensors"], "is no state dict of this MODEL"),
        ([], "the following arguments are required: MODEL"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], text: str, mine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if "digits" in arguments:
        pytest.importorskip("sklearn")
    try:
        code = cli.main(["analyze", *arguments])
    except SystemExit as stop:
        code = stop.code
    error = one_line(capsys.readouterr().err)
    assert (code, text in error) == (2, True), error


def test_too_little_memory_is_a_failure(mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["analyze", "own_nets:huge"]) == 1
    error = one_line(capsys.readouterr().err)
    assert "the memory does not suffice for MODEL; take fewer --samples" in error
