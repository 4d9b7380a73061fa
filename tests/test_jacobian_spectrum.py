"""Mean Jacobian singular value, and trainability accuracy."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import orthoreg_ext as ox
from orthoreg_ext.diagnosis import jacobian as module
from orthoreg_ext.diagnosis import recorded_accuracies, trainability_accuracy
from orthoreg_ext.diagnosis.jacobian import Spectrum
from tests.test_diagnostics import linear, samples


def spectrum(model: nn.Module, x: Any, loss: Any = None, **arguments: Any) -> Spectrum:
    zeros = torch.zeros(next(len(t) for t in _tensors(x)), dtype=torch.long)
    loss = loss or (lambda output, target: _tensors(output)[0].double().square().mean())
    got = ox.diagnose(model, [(x, zeros)], loss=loss, samples=1, **arguments)
    assert got.spectrum is not None, got.notes
    return got.spectrum


def _tensors(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else list(getattr(value, "values", lambda: value)())


def test_hand_computed() -> None:
    got = spectrum(linear([[3, 0], [0, 4], [0, 0]]), torch.ones(2, 2))
    assert got.values.tolist() == [[4, 3], [4, 3]]
    assert (got.mean, got.std, got.largest, got.smallest) == (3.5, 0.5, 4, 3)
    assert (got.condition, got.deficient) == (pytest.approx(4 / 3), 0)
    assert got.distance == pytest.approx((9 + 4) / 2)


def test_a_linear_mlp_has_those_of_the_product() -> None:
    torch.manual_seed(0)
    widths = (20, 15, 18, 6)
    layers = [nn.Linear(a, b) for a, b in pairwise(widths)]
    product = np.eye(20)
    for layer in layers:
        product = layer.weight.detach().double().numpy() @ product
    want = np.linalg.svd(product, compute_uv=False)
    got = spectrum(nn.Sequential(*layers), torch.randn(5, 20))
    assert got.values.shape == (5, 6)
    assert np.allclose(got.values, want, rtol=1e-5)
    assert got.mean == pytest.approx(want.mean(), rel=1e-5)
    assert got.condition == pytest.approx(want[0] / want[-1], rel=1e-4)


def test_orthogonal_layers_are_an_isometry() -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(12, 12).double() for _ in range(3)]
    for layer in layers:
        nn.init.orthogonal_(layer.weight)
    got = spectrum(nn.Sequential(*layers), torch.randn(4, 12).double())
    values = (got.mean, got.std, got.condition, got.distance)
    assert values == pytest.approx((1, 0, 1, 0), abs=1e-7)


@pytest.mark.parametrize("budget", [1, 1 << 25])
def test_a_network_agrees_with_torchs_jacobian(
    monkeypatch: pytest.MonkeyPatch, budget: int
) -> None:
    monkeypatch.setattr(module, "_BUDGET", budget)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Flatten())
    net.append(nn.Linear(128, 4))
    x, y = samples(7)
    got = ox.diagnose(net, [(x[:4], y[:4]), (x[4:], y[4:])]).spectrum
    net.eval()
    want = []
    for i in range(7):
        j = torch.autograd.functional.jacobian(net, x[i : i + 1]).reshape(4, -1)
        want.append(np.linalg.svd(j.double().numpy(), compute_uv=False))
    assert np.allclose(got.values, np.stack(want), rtol=1e-4)
    conditions = [w[0] / w[-1] for w in want]
    assert np.allclose(got.conditions, conditions, rtol=1e-3)


def test_coupled_samples_run_alone() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.Flatten()
    )
    model.append(nn.Linear(64, 3))
    x, y = torch.randn(3, 3, 6, 6), torch.arange(3)
    got = ox.diagnose(model, [(x, y)]).spectrum
    for i in range(3):
        j = torch.autograd.functional.jacobian(model, x[i : i + 1]).reshape(3, -1)
        want = np.linalg.svd(j.numpy(), compute_uv=False)
        assert np.allclose(got.values[i], want, rtol=1e-4)


def test_outputs_of_a_constant_sum_have_no_condition_number() -> None:
    torch.manual_seed(0)
    got = spectrum(nn.Sequential(nn.Linear(6, 4), nn.Softmax(1)), torch.randn(3, 6))
    assert (got.values[:, -1] < 1e-6 * got.values[:, 0]).all()
    assert (got.condition, got.deficient) == (math.inf, 3)


@pytest.mark.parametrize("seed", range(4))
def test_no_full_rank_is_seen_in_double_precision_too(seed: int) -> None:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 5)).double()
    with torch.no_grad():
        model[2].weight[4] = -model[2].weight[:4].sum(0)
    got = spectrum(model, torch.randn(8, 12, dtype=torch.float64))
    assert (got.condition, got.deficient) == (math.inf, 8)
    assert (got.values[:, -1] < 1e-14 * got.values[:, 0]).all()


def test_a_large_condition_number_is_right() -> None:
    model = nn.Linear(3, 3, bias=False).double()
    torch.manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64))[0] for _ in range(2))
    model.weight.data = u @ torch.diag(torch.tensor([1e-11, 1.0, 2.0], dtype=torch.float64)) @ v
    got = spectrum(model, torch.randn(2, 3, dtype=torch.float64))
    assert got.deficient == 0
    assert np.allclose(got.conditions, 2e11, rtol=1e-4)


def test_a_network_that_ignores_its_input() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        model[0].weight.zero_()
    got = spectrum(model, torch.randn(3, 3))
    assert (got.mean, got.std, got.largest, got.condition) == (0, 0, 0, math.inf)


class Pair(nn.Module):
    """Two inputs, one of them of whole numbers; the outputs in a dict; writes to its input."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 3)
        self.fc = nn.Linear(3, 2, bias=False)

    def forward(self, index: Tensor, x: Tensor) -> dict[str, Tensor]:
        x += self.table(index)
        return {"loss": x.mean(), "logits": self.fc(x)}


def test_inputs_and_outputs_of_several_tensors() -> None:
    torch.manual_seed(0)
    model = Pair()
    want = np.linalg.svd(model.fc.weight.detach().numpy(), compute_uv=False)
    index, x = torch.arange(3), torch.randn(3, 3)

    def loss(output: dict[str, Tensor], target: Tensor) -> Tensor:
        return output["logits"].square().mean()

    for inputs in ((index, x), {"index": index, "x": x}):
        got = spectrum(model, inputs, loss)
        assert np.allclose(got.values, want, rtol=1e-5)


@pytest.mark.parametrize(
    ("model", "x", "text"),
    [
        (nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 2)), torch.arange(4), "hold no floating"),
        (nn.Linear(3, 1025), torch.randn(2, 3), "it has 1025 outputs"),
        (nn.Sequential(nn.Linear(3, 2), nn.Flatten(0)), torch.randn(2, 3), "returns no tensor"),
    ],
)
def test_what_has_no_jacobian_is_noted(model: nn.Module, x: Tensor, text: str) -> None:
    target = torch.zeros(len(x))
    got = ox.diagnose(model, [(x, target)], loss=lambda output, target: output.square().mean())
    assert got.spectrum is None
    (note,) = [note for note in got.notes if note.startswith("no Jacobian: ")]
    assert text in note
    off = ox.diagnose(model, [(x, target)], loss=lambda o, t: o.mean(), jacobian_samples=0)
    assert off.spectrum is None
    assert not [note for note in off.notes if "Jacobian" in note]


def test_trainability_accuracy_is_the_mean_of_the_first_stage() -> None:
    assert trainability_accuracy([10, 20, 60, 90], 3) == 30
    assert trainability_accuracy((50.0,), 1) == 50
    for wrong in (0, 5, 2.0):
        with pytest.raises(ValueError, match=r"first_stage_epochs is .*, expected 1 to 4"):
            trainability_accuracy([1, 2, 3, 4], wrong)
    with pytest.raises(ValueError, match=r"accuracies\[1\] is nan"):
        trainability_accuracy([1, math.nan, 3], 2)
    assert trainability_accuracy([1, math.nan], 1) == 1


def test_accuracies_of_a_recorded_run(tmp_path: Path) -> None:
    record = pytest.importorskip("orthoreg_ext.experiment.record")

    def arm(seed: int, regularised: bool) -> Any:
        epochs = [
            record.Epoch(stage, 0, e, 0.1, 0.0, 10.0 * e + seed + 0.5 * regularised, 0.0)
            for stage in ("train", "tune")
            for e in (1, 2, 3)
        ]
        return record.Arm(seed, regularised, "l1", epochs=epochs[:5])

    arms = [arm(seed, regularised) for seed in (4, 5) for regularised in (True, False)]
    run = record.Run(record.Settings(), {}, {}, arms)
    (tmp_path / "history.json").write_text(json.dumps({"history": [], "run": run.to_json()}))
    assert recorded_accuracies(tmp_path) == [14.5, 24.5]
    assert recorded_accuracies(tmp_path / "history.json", regularised=False) == [14, 24]
    document = json.loads((tmp_path / "history.json").read_text())
    assert recorded_accuracies(document, seed=5, stage="train") == [15.5, 25.5, 35.5]
    assert trainability_accuracy(recorded_accuracies(document), 2) == 19.5
    with pytest.raises(ValueError, match=r"no epochs of stage 'tune', seed 7; it has seeds \[4, 5"):
        recorded_accuracies(document, seed=7)
    with pytest.raises(ValueError, match="holds no run of `orthoreg prune`"):
        recorded_accuracies({"history": []})
