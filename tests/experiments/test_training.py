from __future__ import annotations

import errno
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as nnf

from experiments import training
from experiments.lab import Lab
from experiments.training import Fit, fit, steps_an_epoch
from orthoreg_ext import OrthoRegularizer
from orthoreg_ext.experiment.train import DivergedError
from orthoreg_ext.pruning.methods import TPP, GReg1

EPOCHS = 4
MODEL = "tests.experiments.nets:tiny"

Maker = Callable[[nn.Module], Any]


def tpp(lab: Lab, net: nn.Module) -> Callable[[torch.optim.Optimizer], TPP]:
    """Of 16 steps: two growths, then two layers set to zero."""
    return lambda optimizer: TPP(
        net, lab.example, optimizer=optimizer, delta=0.5, every=3, hold=6, zero_every=2
    )


def greg1(lab: Lab, net: nn.Module) -> Callable[[torch.optim.Optimizer], GReg1]:
    return lambda optimizer: GReg1(
        net, lab.example, optimizer=optimizer, delta=0.1, every=2, ceiling=0.5, hold=3
    )


KINDS = ["plain", "flip", "orthoreg", "srip", "TPP", "GReg1"]


class StopError(Exception):
    """What interrupts a training."""


def trained(
    lab: Lab, kind: str, store: Path | None = None, stop: int = 0
) -> tuple[dict[str, Tensor], list[Any]]:
    """The weights and the notes of a training that is interrupted after so many epochs."""
    net = lab.fresh(MODEL, 3)
    how = Fit(EPOCHS, 0.05, 3, batch_size=16, weight_decay=1e-3, flip=kind == "flip")
    more: dict[str, Any] = {}
    if kind in ("orthoreg", "srip"):
        more["regularizer"] = OrthoRegularizer(net, kind, 0.1)
    if kind in ("TPP", "GReg1"):
        more["method"] = (tpp if kind == "TPP" else greg1)(lab, net)

    def note(epoch: int) -> Any:
        if epoch == stop:
            raise StopError
        return [epoch, net.state_dict()["conv1.weight"].sum().item()]

    notes = fit(net, lab.train, how, note=note, store=store, **more)
    return net.state_dict(), notes


@pytest.mark.parametrize("kind", KINDS)
def test_interrupted_after_any_epoch_it_ends_bit_equal(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(training, "PAUSE", 0.0)
    weights, notes = trained(lab, kind)
    assert [epoch for epoch, _ in notes] == [1, 2, 3, 4]
    store = tmp_path / "state"
    for stop in (2, 3, 4):  # each goes on from the one before
        with pytest.raises(StopError):
            trained(lab, kind, store, stop)
    again, noted = trained(lab, kind, store)
    assert noted == notes
    assert again.keys() == weights.keys()
    assert [key for key in weights if not torch.equal(weights[key], again[key])] == []
    if kind in ("TPP", "GReg1"):
        assert (weights["conv1.weight"].shape[0], weights["conv2.weight"].shape[0]) == (4, 6)


def test_it_is_the_interruption_that_is_tested(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "PAUSE", 0.0)
    epochs: list[int] = []
    do = training._epoch
    monkeypatch.setattr(training, "_epoch", lambda *a: (epochs.append(a[4]), do(*a)))
    with pytest.raises(StopError):
        trained(lab, "plain", tmp_path / "s", 3)
    trained(lab, "plain", tmp_path / "s")
    assert epochs == [0, 1, 2, 2, 3]


@pytest.mark.parametrize("kind", ["plain", "srip", "TPP"])
def test_a_training_that_is_done_is_read(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    weights, notes = trained(lab, kind, tmp_path / "s")
    monkeypatch.setattr(training, "_epoch", None)
    again, noted = trained(lab, kind, tmp_path / "s")
    assert noted == notes
    assert all(torch.equal(weights[key], again[key]) for key in weights)


def test_a_state_is_kept_now_and_then_and_at_the_end(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[int] = []
    save = training._save
    monkeypatch.setattr(training, "_save", lambda *a: (saved.append(a[4].epoch), save(*a)))
    trained(lab, "plain", tmp_path / "s")
    assert saved == [EPOCHS]


def test_three_steps_are_those_of_the_formula(lab: Lab) -> None:
    """SGD with Nesterov's momentum, decay of all parameters, half a cosine, written out."""
    lab.train.images[:] = lab.train.images.float().mean((2, 3), keepdim=True).byte()  # no shift
    net, twin = lab.fresh(MODEL, 0), lab.fresh(MODEL, 0)
    fit(net, lab.train, Fit(1, 0.1, 5, batch_size=20, weight_decay=1e-2))
    order = torch.randperm(64, generator=torch.Generator().manual_seed(5 * 1_000_003))
    momenta: dict[str, Tensor] = {}
    twin.train()
    for step in range(3):  # the last four images are left out
        images, labels = lab.train.batch(order[20 * step : 20 * step + 20])
        twin.zero_grad()
        nnf.cross_entropy(twin(images), labels).backward()
        lr = 0.1 * 0.5 * (1 + math.cos(math.pi * step / 3))
        with torch.no_grad():
            for name, weight in twin.named_parameters():
                assert weight.grad is not None
                slope = weight.grad + 1e-2 * weight
                momenta[name] = 0.9 * momenta[name] + slope if step else slope
                weight -= lr * (slope + 0.9 * momenta[name])
    for name, value in twin.state_dict().items():
        torch.testing.assert_close(net.state_dict()[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("count", "size", "steps"), [(64, 16, 4), (64, 20, 3), (64, 64, 1), (64, 100, 1)]
)
def test_a_last_batch_that_is_not_full_is_left_out(
    lab: Lab, count: int, size: int, steps: int
) -> None:
    assert len(lab.train) == count
    assert steps_an_epoch(lab.train, size) == steps


@pytest.mark.parametrize("damage", ["torn", "empty", "flipped"])
def test_a_damaged_state_is_refused_by_name(lab: Lab, tmp_path: Path, damage: str) -> None:
    store = tmp_path / "net-1.safetensors"
    trained(lab, "plain", store)
    content = store.read_bytes()
    flipped = content[:-1] + bytes([content[-1] ^ 1])
    store.write_bytes({"torn": content[:-9], "empty": b"", "flipped": flipped}[damage])
    with pytest.raises(ValueError, match=r"net-1.*damaged.*; remove it, then run th") as error:
        trained(lab, "plain", store)
    assert "--out" not in str(error.value)


def test_a_state_of_another_network_is_refused_by_name(lab: Lab, tmp_path: Path) -> None:
    store = tmp_path / "net.safetensors"
    fit(lab.fresh("vgg", 0), lab.train, Fit(1, 0.1, 0, 32), store=store)
    with pytest.raises(ValueError, match=r"net.safetensors' is the state of another .*remove '"):
        fit(lab.fresh("resnet", 0), lab.train, Fit(1, 0.1, 0, 32), store=store)


def test_a_full_disk_leaves_the_state_before(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "PAUSE", 0.0)
    store, replace = tmp_path / "s", os.replace
    left = [2]

    def full(*names: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(*names)

    weights, notes = trained(lab, "plain")
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(OSError, match=r"No space left.*intact.*run the same command again"):
            trained(lab, "plain", store)
    assert [path.name for path in tmp_path.iterdir()] == ["s"]
    again, noted = trained(lab, "plain", store)
    assert noted == notes
    assert all(torch.equal(weights[key], again[key]) for key in weights)


@pytest.mark.parametrize(("batch", "says"), [(16, "the loss is"), (64, "a weight is not finite")])
def test_a_diverged_training_says_so(lab: Lab, batch: int, says: str) -> None:
    """Of one step, the loss is that of the weights before it."""
    net = lab.fresh(MODEL, 0)
    with torch.no_grad():
        net.get_submodule("classifier").get_parameter("weight").mul_(1000)
    with pytest.raises(DivergedError, match=rf"{says}.* epoch 1"):
        fit(net, lab.train, Fit(1, 3e38, 0, batch))
