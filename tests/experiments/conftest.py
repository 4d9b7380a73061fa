"""Experiments that take a second: 64 digits, a net of two layers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("safetensors")
pytest.importorskip("torch_pruning")

from experiments import data
from experiments.config import Config
from experiments.lab import Lab
from experiments.runner import Place

DOCUMENT: dict[str, Any] = {
    "name": "tiny",
    "title": "Does it run?",
    "question": "cross",
    "models": ["tests.experiments.nets:tiny"],
    "seeds": [0, 1],
    "data": {"train": 64, "test": 32},
    "recipe": {"epochs": 1, "finetune_epochs": 1, "batch_size": 16, "calibration": 32},
    "arms": {"none": {}},
    "options": {"cuts": [{"criterion": ["l1"], "ratio": [0.5]}]},
}


@pytest.fixture
def tiny() -> Callable[..., Config]:
    """Makes a configuration of two networks and two cuts, with other values for some keys."""

    def make(**changes: Any) -> Config:
        tables = {
            key: {**DOCUMENT[key], **changes.pop(key)}
            for key in ("data", "recipe", "options")
            if key in changes
        }
        return Config.of({**DOCUMENT, **tables, **changes})

    return make


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path / "data", tmp_path / "work", tmp_path / "results")


@pytest.fixture
def lab(tiny: Callable[..., Config], place: Place) -> Lab:
    config = tiny()
    return Lab(config, data.load(config.data, place.images, place.work), place.work)
