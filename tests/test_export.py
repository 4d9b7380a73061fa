"""`orthoreg export` and `orthoreg replay`: files that do what the network does, or none."""

from __future__ import annotations

import errno
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from orthoreg_ext import cli, export, pruning
from orthoreg_ext.experiment import run
from orthoreg_ext.experiment.models import build_model
from tests.test_cli import one_line

pytest.importorskip("sklearn")
pytest.importorskip("safetensors")
pytest.importorskip("torch_pruning")

NETS = """
import torch
from torch import nn

class Net(nn.Sequential):
    input_shape = (1, 8, 8)

def build(num_classes=10, in_channels=1):
    return Net(
        nn.Conv2d(in_channels, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 12, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, num_classes),
    )

def silent():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 3))

class Choosy(nn.Module):
    input_shape = (1, 8, 8)
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(64, 3)
    def forward(self, x):
        y = self.linear(x.flatten(1))
        return y if float(y.sum()) > 0 else -y

def broken():
    net = build()
    with torch.no_grad():
        net[0].weight.fill_(float("nan"))
    return net
"""


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run in runs/own, and a saved result in runs/saved, of a model in runs/nets.py."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "exported_nets.py").write_text(NETS)
    sys.path.insert(0, str(folder))
    settings = {"model": "exported_nets:build", "ratio": 0.5, "seeds": 1, "epochs": 1}
    run(settings | {"finetune_epochs": 1, "batch_size": 256, "device": "cpu"}, folder / "own")
    model = build_model("exported_nets:build", num_classes=4, image_shape=(3, 8, 8), seed=1)
    pruning.prune(model, torch.zeros(1, 3, 8, 8), criterion="l1").save(folder / "saved")
    yield folder
    sys.path.remove(str(folder))


@pytest.fixture(autouse=True)
def here(pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")


def test_a_pruned_run_becomes_checked_files(
    pruned: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    command = ["export", str(pruned / "own"), "--out", "out", "--seconds", "0.1", "--threads", "1"]
    assert cli.main([*command, "--json", "export.json"]) == 0
    text = capsys.readouterr().out
    result = json.loads(Path("export.json").read_text())
    assert text.strip() == export.table(result).strip()
    assert sorted(os.listdir("out")) == ["model.onnx", "model.pt2"]
    assert list(result["latency"]["rows"]) == [
        "unpruned, PyTorch", "pruned, PyTorch", "model.pt2", "model.onnx"
    ]  # fmt: skip
    for name in ("pt2", "onnx"):
        row = result["files"][name]
        assert row["inputs"] == row["same_class"] == 1 + 2 + 7 + 64
        assert row["max_difference"] <= row["tolerance"]

    # it is the run's pruned network, for any batch
    model = build_model("exported_nets:build", num_classes=10, image_shape=(1, 8, 8), seed=9)
    x = torch.randn(5, 1, 8, 8)
    pruning.replay(model, x, pruned / "own").eval()
    session = onnxruntime.InferenceSession("out/model.onnx")
    if hasattr(torch.onnx.ONNXProgram, "rename_axes"):
        assert session.get_inputs()[0].shape == ["batch", 1, 8, 8]
        assert session.get_outputs()[0].shape == ["batch", 10]
    (y,) = session.run(None, {"input": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), model(x).detach(), rtol=1e-4, atol=1e-5)
    program = torch.export.load("out/model.pt2").module()
    torch.testing.assert_close(program(x), model(x), rtol=1e-5, atol=1e-6)

    assert cli.main(command) == 2  # what is there stays
    assert "has a model.pt2 already; pass --overwrite" in one_line(capsys.readouterr().err)
    assert cli.main([*command, "--overwrite", "--format=pt2", "--seconds=0", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["latency"] is None


def test_a_file_that_differs_is_not_written(
    pruned: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = export._make_pt2

    def wrong(program: Any) -> Any:
        content, forward = real(program)
        return content, lambda x: forward(x) * (1 + 2e-5)

    monkeypatch.setitem(export._MAKERS, "pt2", wrong)
    command = ["export", "exported_nets:build", "--format=pt2", "--out=out"]
    assert cli.main(command) == 1
    error = one_line(capsys.readouterr().err)
    assert "model.pt2 differs from the network by 2.0" in error
    assert not Path("out").exists()


def test_a_full_disk_leaves_the_old_file(
    pruned: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("out").mkdir()
    Path("out/model.pt2").write_text("old")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    command = ["export", "exported_nets:build", "--format=pt2", "--out=out", "--overwrite"]
    assert cli.main(command) == 1
    assert "no file is half-written" in one_line(capsys.readouterr().err)
    assert os.listdir("out") == ["model.pt2"]
    assert Path("out/model.pt2").read_text() == "old"


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["exported_nets:silent"], 2, "does not say what it reads; pass --input-shape"),
        (["exported_nets:silent", "--input-shape=8,8"], 2, "expected channels, height and width"),
        (["exported_nets:silent", "--input-shape=a"], 2, "'a' is no shape; expected e.g. 3,224"),
        (["exported_nets:build", "--input-shape=1,8,8", "--data=digits"], 2, "leave --input-shape"),
        (["exported_nets:build", "--num-classes=2", "--data=digits"], 2, "has 10 classes; leave"),
        (["exported_nets:Choosy"], 1, "cannot be exported by torch.export ("),
        (["exported_nets:broken"], 1, "the network itself returns NaN or inf"),
        (["RUNS"], 2, "is a folder without history.json: no finished run"),
        (["RUNS/saved"], 2, "not the name of its factory; name the model, too"),
        (["exported_nets:build", "--weights=RUNS"], 2, "history.json is missing"),
        (["RUNS/own", "--weights=x.pt"], 2, "is a folder with weights; leave --weights out"),
        (["RUNS/own", "--input-shape=3,8,8"], 2, "is a checkpoint of another architecture"),
        (["vgg", "--image-size=0"], 2, "--image-size is 0; expected a number of at least 1"),
        (["vgg", "--num-classes=0"], 2, "--num-classes is 0; expected a number of at least 1"),
        (["vgg", "--out=/proc/orthoreg"], 2, "--out '/proc/orthoreg' cannot be created"),
        (["vgg", "--batch=0"], 2, "--batch is 0; expected a number of at least 1"),
        (["vgg", "--seconds=-1"], 2, "--seconds is -1.0; expected 0 or a positive number"),
        (["--json", "vgg"], 2, "'vgg' is no file; write --json last, or --json=-"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str],
    code: int,
    text: str,
    pruned: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = [argument.replace("RUNS", str(pruned)) for argument in arguments]
    try:
        got = cli.main(["export", "--format=pt2", *arguments])
    except SystemExit as stop:
        got = stop.code
    error = one_line(capsys.readouterr().err)
    assert (got, text in error) == (code, True), error
    assert not Path("orthoreg-export").exists()


def test_a_missing_onnx_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from importlib import util

    real = util.find_spec
    monkeypatch.setattr(util, "find_spec", lambda name: None if name == "onnx" else real(name))
    assert cli.main(["export", "vgg"]) == 2
    error = one_line(capsys.readouterr().err)
    assert "onnx is not installed" in error
    assert "pip install orthoreg_ext[export]; or choose --format pt2" in error


def test_replay_says_that_the_network_does_what_it_did(
    pruned: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["replay", str(pruned / "own")]) == 0
    text = capsys.readouterr().out
    history = json.loads((pruned / "own" / "history.json").read_text())
    arm = next(arm for arm in history["run"]["arms"] if arm["regularised"])
    accuracy = f"{arm['epochs'][-1]['accuracy']:.2f}"
    assert f"accuracy on the held-out images: {accuracy} % (recorded: {accuracy} %)" in text
    assert "model.pt2 beside it: differs by 0" in text
    rows = {line.split()[0]: line.split()[1:3] for line in text.splitlines() if line}
    assert rows["macs"] == [str(history["sizes"][when]["macs"]) for when in ("before", "after")]
    for name, width in history["widths"].items():
        assert rows[name][1] == str(width)

    saved = [str(pruned / "saved"), "--model=exported_nets:build"]
    assert cli.main(["replay", *saved, "--num-classes=4", "--input-shape=3,8,8", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    widths = json.loads((pruned / "saved" / "history.json").read_text())["widths"]
    assert {row["name"]: row["after"] for row in document["layers"]} == widths
    assert document["accuracy"] is None


@pytest.mark.parametrize(
    ("change", "code", "text"),
    [
        ("weights", 2, "is damaged or belongs to another history"),
        ("program", 1, "the files do not belong together"),
        ("torn", 2, "model.pt2' is damaged, or of another torch"),
        ("accuracy", 1, "but its run recorded"),
        ("factory", 2, "is a checkpoint of another architecture"),
        ("data", 0, ""),
    ],
)
def test_replay_notices_what_is_not_as_it_was(
    change: str, code: int, text: str, pruned: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path("copy")
    folder.mkdir()
    for file in (pruned / "own").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    history = json.loads((folder / "history.json").read_text())
    more: list[str] = []
    if change == "weights":
        (folder / "weights.safetensors").write_bytes(b"other")
    elif change == "program":
        cli.main(["export", "exported_nets:build", "--format=pt2", "--out=new", "--seconds=0"])
        (folder / "model.pt2").write_bytes(Path("new/model.pt2").read_bytes())
    elif change == "torn":
        (folder / "model.pt2").write_bytes(b"PK")
    elif change == "accuracy":
        arm = next(arm for arm in history["run"]["arms"] if arm["regularised"])
        arm["epochs"][-1]["accuracy"] += 1.0
    elif change == "factory":
        more = ["--model=vgg"]
    elif change == "data":
        history["run"]["settings"]["data"] = "gone.npz"
    (folder / "history.json").write_text(json.dumps(history))
    assert cli.main(["replay", str(folder), *more]) == code
    captured = capsys.readouterr()
    if code:
        assert text in one_line(captured.err)
    else:
        assert "accuracy: not measured, unknown data 'gone.npz'" in captured.out


def test_the_other_commands_take_the_folder_of_a_run(
    pruned: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(pruned / "own")
    assert cli.main(["analyze", folder, "--json"]) == 0
    widths = json.loads((pruned / "own" / "history.json").read_text())["widths"]
    rows = json.loads(capsys.readouterr().out)["layers"]
    assert {row["name"]: row["filters"] for row in rows} == widths
    assert cli.main(["bench", folder, "--seconds=0.01", "--json=-"]) == 0
    assert json.loads(capsys.readouterr().out)["scored"] == 3
    more = ["--ratios=0.3", "--criterion=l1", "--quiet", "--json", "--device=cpu"]
    assert cli.main(["sensitivity", folder, *more]) == 0
    assert json.loads(capsys.readouterr().out)["baseline"] > 0
