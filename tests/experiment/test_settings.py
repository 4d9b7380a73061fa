from __future__ import annotations

from typing import Any

import pytest
import torch

from orthoreg_ext.experiment.settings import STRENGTHS, Settings
from orthoreg_ext.penalties import PENALTIES


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"ratio": 0.0}, "--ratio is 0.0; expected a number between 0 and 1"),
        ({"ratio": 1.0}, "--ratio is 1.0"),
        ({"ratio": float("nan")}, "--ratio is nan"),
        ({"rounds": 0}, "--rounds is 0; expected a number of at least 1"),
        ({"rounds": 4, "finetune_epochs": 3}, "--rounds is 4; .* --finetune-epochs"),
        ({"seed": 2**63 - 2}, "--seed is 9223372036854775806; expected a number from 0"),
        ({"seeds": 0}, "--seeds is 0"),
        ({"epochs": 0}, "--epochs is 0"),
        ({"batch_size": 1}, "--batch-size is 1"),
        ({"lr": 0.0}, "--lr is 0.0"),
        ({"strength": float("inf")}, "--strength is inf"),
        ({"strength": -1.0}, "--strength is -1.0"),
        ({"criterion": "fischer"}, "unknown --criterion 'fischer'; did you mean 'fisher'"),
        ({"penalty": "orthreg"}, "unknown --penalty 'orthreg'; did you mean 'orthoreg'"),
        ({"device": "gpu"}, "unknown --device 'gpu'"),
    ],
)
def test_bad_settings_are_named(given: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Settings(**given).resolved()


def test_cuda_without_cuda_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"--device cuda cannot be used \(.+\); use --device cpu"):
        Settings(device="cuda").resolved()


def test_nothing_is_left_to_choose() -> None:
    settings = Settings(device="auto").resolved()
    assert settings.device in ("cpu", "cuda")
    assert settings.threads >= 1
    assert settings.strength == STRENGTHS["orthoreg"]
    assert settings.resolved() == settings


def test_every_penalty_has_a_strength() -> None:
    assert STRENGTHS.keys() == {name for name, p in PENALTIES.items() if p.counts is None}


def test_settings_given_again_must_be_the_same() -> None:
    stored = Settings(epochs=3, strength=0.5).resolved()
    stored.check_same({})
    stored.check_same({"epochs": 3, "strength": 0.5})
    with pytest.raises(ValueError, match="--finetune-epochs is 1, but the run to continue has"):
        stored.check_same({"epochs": 3, "finetune_epochs": 1})


def test_a_device_left_open_is_the_one_the_run_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    stored = Settings(device="cuda", strength=0.5)
    stored.check_same({})
    stored.check_same({"device": "auto"})
    with pytest.raises(ValueError, match="--device is 'cpu', but the run to continue has 'cuda'"):
        stored.check_same({"device": "cpu"})
    with pytest.raises(ValueError, match=r"--ratio is 2\.0; expected"):
        stored.check_same({"ratio": 2.0})
