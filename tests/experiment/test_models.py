from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from orthoreg_ext.experiment.models import build_model, resnet, vgg


@pytest.mark.parametrize("factory", [vgg, resnet])
@pytest.mark.parametrize(("channels", "side"), [(1, 8), (3, 32)])
def test_networks_read_any_size(factory, channels: int, side: int) -> None:
    model = factory(num_classes=5, in_channels=channels)
    assert model(torch.zeros(2, channels, side, side)).shape == (2, 5)


def test_the_same_seed_gives_the_same_parameters() -> None:
    models = [build_model("vgg", num_classes=3, image_shape=(1, 8, 8), seed=s) for s in (4, 4, 5)]
    weights = [model.conv1.weight for model in models]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("vg", "unknown model 'vg'; did you mean 'vgg'"),
        ("no_such_module:build", "cannot import 'no_such_module'"),
        ("factories:biuld", "unknown factory in factories 'biuld'; did you mean 'build'"),
        ("factories:number", "returned int; expected a torch.nn.Module"),
        ("factories:two_outputs", r"returned \[1, 2\] for one image; expected \[1, 3\]"),
        ("factories:picky", r"cannot be built \(missing a required argument: 'depth'\)"),
        ("factories:broken", r"cannot be built \(.*NoneType.*\)"),
        ("factories:two_inputs", "cannot read images of 1 x 8 x 8 .*missing 1 required"),
        ("torn:build", r"cannot import 'torn' \(.*torn\.py, line 1"),
        ("factories:failing", r"cannot be built \(KeyError: 'layers'\).*num_classes=3"),
        ("factories:leaving", r"cannot be built \(SystemExit: 3\)"),
        ("failing:build", r"cannot import 'failing' \(ZeroDivisionError"),
        (":build", "cannot import ''"),
        ("factories:big", "cannot read images of 1 x 8 x 8 .*; pass a larger --image-size"),
    ],
)
def test_bad_models_are_named(
    name: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "factories.py").write_text(
        "from torch import nn\n"
        "def build(num_classes): return nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes))\n"
        "def number(): return 3\n"
        "def two_outputs(): return nn.Sequential(nn.Flatten(), nn.Linear(64, 2))\n"
        "def picky(depth, num_classes): return nn.Linear(depth, num_classes)\n"
        "def broken(): return nn.Linear(None, 3)\n"
        "class Two(nn.Module):\n"
        "    def forward(self, x, y): return x\n"
        "def two_inputs(): return Two()\n"
        "def failing(num_classes): raise KeyError('layers')\n"
        "def leaving(): raise SystemExit(3)\n"
        "def big(**_): return nn.Conv2d(1, 3, 11)\n"
    )
    (tmp_path / "torn.py").write_text("def build(:\n")
    (tmp_path / "failing.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("factories", None)
    assert build_model("factories:build", num_classes=3, image_shape=(1, 8, 8), seed=0)
    with pytest.raises(ValueError, match=text):
        build_model(name, num_classes=3, image_shape=(1, 8, 8), seed=0)
