from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("safetensors")
pytest.importorskip("torch_pruning")

TINY_NET = """
from torch import nn

def build(num_classes, in_channels):
    return nn.Sequential(
        nn.Conv2d(in_channels, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.MaxPool2d(2), nn.Dropout(0.1),
        nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, num_classes),
    )
"""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Settings of a whole job that takes a second, with dropout in its network."""
    (tmp_path / "tiny_net.py").write_text(TINY_NET)
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("tiny_net", None)
    return {
        "model": "tiny_net:build",
        "ratio": 0.5,
        "rounds": 2,
        "seeds": 2,
        "epochs": 2,
        "finetune_epochs": 3,
        "batch_size": 128,
        "threads": 1,
        "device": "cpu",
    }
