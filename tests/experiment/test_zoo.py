"""Models of torchvision and timm by name."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from orthoreg_ext import cli
from orthoreg_ext.experiment import zoo
from orthoreg_ext.experiment.models import build_model, model_factory
from orthoreg_ext.experiment.named import Request, load

try:
    zoo.load_package("torchvision")
    zoo.load_package("timm")
except ImportError as error:
    pytest.skip(str(error), allow_module_level=True)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("torchvision:squeezenet1_1", (3, 64, 64)),
        ("timm:mobilenetv3_small_050", (1, 32, 32)),
        ("timm:mobilenetv3_small_050", (3, 32, 48)),
        ("timm:test_vit", (3, 32, 32)),  # built for 160
        ("torchvision:vit_b_16", (3, 32, 32)),  # built for 224
    ],
)
def test_they_are_built_for_the_images(name: str, shape: tuple[int, ...]) -> None:
    with torch.device("meta") if "vit_b" in name else torch.device("cpu"):
        model = model_factory(name)(num_classes=3, in_channels=shape[0], image_size=shape[1])
    if "vit_b" in name:
        assert model.image_size == 32
        return
    model = build_model(name, num_classes=3, image_shape=shape, seed=0)
    assert model.input_shape == shape
    assert model(torch.zeros(2, *shape)).shape == (2, 3)


def test_the_same_seed_gives_the_same_parameters() -> None:
    name = "torchvision:squeezenet1_1"
    models = [build_model(name, num_classes=3, seed=seed) for seed in (4, 4, 5)]
    weights = [model.get_parameter("features.0.weight") for model in models]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_without_data_they_say_what_they_read() -> None:
    subject = load(Request("timm:test_resnet"), runs=True)
    assert subject.shape == (3, 160, 160)
    assert subject.model(subject.example()).shape == (1, 1000)
    assert load(Request("timm:test_resnet", image_size=64), runs=True).shape == (3, 64, 64)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("torchvision:resnet81", "no model 'resnet81' for images; did you mean 'resnet18'"),
        ("torchvision:maskrcnn_resnet50_fpn", "torchvision has no model"),
        ("timm:resnet18x", "timm has no model 'resnet18x' for images; did you mean 'resnet18"),
        ("torchvision:", "torchvision has no model ''"),
    ],
)
def test_an_unknown_name_is_named(name: str, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        build_model(name, num_classes=3, seed=0)


def test_grey_images_of_a_colour_model_say_what_to_do() -> None:
    with pytest.raises(ValueError, match="pass --channels 3, a larger --image-size"):
        build_model("torchvision:squeezenet1_1", num_classes=3, image_shape=(1, 64, 64), seed=0)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zoo, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="torchvision is not installed: pip install torchvision"):
        zoo.load_package("timm")


@pytest.mark.parametrize(
    ("name", "side", "pruned"),
    [
        ("timm:test_resnet", 32, True),
        ("timm:test_efficientnet", 32, False),
        ("torchvision:squeezenet1_1", 64, False),
    ],
)
def test_from_a_look_at_a_model_to_a_checked_onnx_file(
    name: str,
    side: int,
    pruned: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    monkeypatch.chdir(tmp_path)
    images = np.random.default_rng(0).integers(0, 256, (48, side, side, 3), dtype=np.uint8)
    np.savez("images.npz", images=images, labels=np.arange(48) % 3)
    data = ["--data=images.npz"]
    assert cli.main(["analyze", name, *data, "--samples=8", "--json"]) == 0
    layers = json.loads(capsys.readouterr().out)["layers"]
    source = [name, *data]
    if pruned:
        short = ["--seeds=1", "--epochs=1", "--finetune-epochs=1", "--batch-size=16", "--lr=0.01"]
        command = ["prune", "--model", name, *data, "--target=macs=0.3", *short, "--device=cpu"]
        assert cli.main([*command, "--out=run", "--quiet"]) == 0
        widths = json.loads(Path("run/history.json").read_text())["widths"]
        assert sum(widths.values()) < sum(layer["filters"] for layer in layers)
        source = ["run"]
    capsys.readouterr()
    assert cli.main(["export", *source, "--format=onnx", "--seconds=0", "--json"]) == 0
    row = json.loads(capsys.readouterr().out)["files"]["onnx"]
    assert row["max_difference"] <= row["tolerance"]
    assert row["same_class"] == row["inputs"]
    (y,) = onnxruntime.InferenceSession("orthoreg-export/model.onnx").run(
        None, {"input": np.zeros((2, 3, side, side), np.float32)}
    )
    assert y.shape == (2, 3)
