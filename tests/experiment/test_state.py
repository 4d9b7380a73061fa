from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from orthoreg_ext.experiment.files import write_atomic
from orthoreg_ext.experiment.state import (
    load_state,
    restore_training,
    save_state,
    training_tensors,
)


def training(width: int = 4) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.randn(8, 3)).square().sum().backward()
    optimizer.step()
    return model, optimizer


def test_training_comes_back_bit_for_bit(tmp_path: Path) -> None:
    model, optimizer = training()
    tensors = training_tensors(model, optimizer)
    assert any("momentum_buffer" in key for key in tensors)
    save_state(tmp_path / "s", {"a": 0.1 + 0.2}, tensors)
    record, loaded = load_state(tmp_path / "s")
    assert record == {"a": 0.1 + 0.2}
    other_model, other_optimizer = training()
    restore_training(other_model, other_optimizer, loaded)
    again = training_tensors(other_model, other_optimizer)
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[key], tensors[key]) for key in tensors)


def test_a_state_of_another_architecture_is_refused() -> None:
    tensors = training_tensors(*training(4))
    with pytest.raises(ValueError, match="another architecture"):
        restore_training(*training(5), tensors)


@pytest.mark.parametrize("damage", ["torn", "flipped", "foreign", "noise", "empty"])
def test_a_damaged_state_is_refused(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "s"
    save_state(path, {}, {"t": torch.ones(100)})
    content = path.read_bytes()
    if damage == "torn":
        path.write_bytes(content[:-7])
    elif damage == "flipped":
        path.write_bytes(content[:-7] + b"\x01" + content[-6:])
    elif damage == "foreign":
        safetensors.torch.save_file({"t": torch.ones(3)}, path)
    else:
        path.write_bytes(b"" if damage == "empty" else b"noise" * 100)
    with pytest.raises(ValueError, match=r"(damaged|no state).*another --out"):
        load_state(path)


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    path = tmp_path / "s"
    write_atomic(path, b"old")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, full)
    with pytest.raises(OSError, match=r"cannot write .*No space left .* is intact") as error:
        write_atomic(path, b"new")
    assert error.value.errno == errno.ENOSPC
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["s"]
