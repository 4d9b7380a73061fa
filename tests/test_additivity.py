"""The additivity gap: hand-computed moments, contributions by autograd alone, orthoreg's effect."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as nnf

import orthoreg_ext as ox
from orthoreg_ext.diagnosis import additivity as module
from orthoreg_ext.diagnosis.additivity import additivity
from tests.test_diagnostics import Net, linear, samples

TABLE = [  # contributions [samples, n], gap, ratio, idle
    ([[1, 1], [1, -1]], 0, 1, ()),
    ([[1, 1], [2, 2]], 1 / 2, 2, ()),
    ([[1, -1]], 1 / 2, 0, ()),
    ([[1, 2], [3, 0]], 2 / 9, 9 / 7, ()),
    ([[3, 0], [0, 4]], 0, 1, ()),
    ([[2, 2, 2]], 2 / 3, 3, ()),
    ([[2, 0, 2]], 1 / 2, 2, (1,)),
    ([[5], [-1]], 0, 1, ()),
    ([[0, 0], [0, 0]], 0, 1, (0, 1)),
]


@pytest.mark.parametrize(("contributions", "gap", "ratio", "idle"), TABLE)
def test_hand_computed(
    contributions: list[list[float]], gap: float, ratio: float, idle: tuple[int, ...]
) -> None:
    got = additivity(torch.tensor(contributions, dtype=torch.float64))
    assert (got.gap, got.ratio, got.idle) == (pytest.approx(gap), pytest.approx(ratio), idle)


@pytest.mark.parametrize("seed", range(5))
def test_random_contributions_agree_with_numpy(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    c = torch.randn(30 + seed, 7, generator=generator, dtype=torch.float64)
    moment = np.einsum("si,sj->ij", c.numpy(), c.numpy()) / len(c)
    off = np.abs(moment - np.diag(np.diag(moment))).sum()
    got = additivity(c)
    assert got.mass == pytest.approx(np.abs(moment).sum())
    assert got.gap == pytest.approx(off / np.abs(moment).sum())
    assert got.ratio == pytest.approx(np.mean(c.numpy().sum(1) ** 2) / np.trace(moment))


def test_the_floor_is_the_gap_of_uncorrelated_contributions() -> None:
    generator = torch.Generator().manual_seed(0)
    alone = torch.randn(500, 20, generator=generator, dtype=torch.float64).pow(3)
    got = additivity(alone)
    assert 0.3 < got.floor < 0.7  # by chance alone
    assert got.gap == pytest.approx(got.floor, abs=0.05)
    twice = additivity(torch.cat([alone, alone], 1))
    assert twice.gap > twice.floor + 0.05
    assert twice.ratio == pytest.approx(2 * got.ratio)


def test_filters_that_see_different_samples_add_up() -> None:
    model = linear([[2, 0, 0], [0, 3, 0], [0, 0, 4]])
    data = [(torch.eye(3), torch.zeros(3, 3))]
    got = ox.diagnose(model, data, loss=nnf.mse_loss, jacobian_samples=0)[0].additivity
    assert (got.gap, got.ratio, got.idle) == (0, pytest.approx(1), ())


def test_equal_filters_with_equal_consumers_count_twice() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 2), nn.Tanh(), nn.Linear(2, 3))
    with torch.no_grad():
        model[0].weight[1] = model[0].weight[0]
        model[0].bias[1] = model[0].bias[0]
        model[2].weight[:, 1] = model[2].weight[:, 0]
    got = ox.diagnose(model, [(torch.randn(50, 5), torch.arange(50) % 3)])
    assert got["0"].additivity.gap == pytest.approx(0.5)
    assert got["0"].additivity.ratio == pytest.approx(2)


Loss = Callable[[Any, Any], Tensor]


def by_autograd(
    model: nn.Module, x: Tensor, y: Tensor, loss: Loss, bias: bool | str
) -> dict[str, np.ndarray]:
    """[samples, n] of each layer: one backward pass a sample, entries by NumPy."""
    model = model.eval().requires_grad_()
    kinds = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, kinds)}
    found: dict[str, list[np.ndarray]] = {}
    for s in range(len(x)):
        model.zero_grad()
        with nn.utils.parametrize.cached():
            for layer in layers.values():
                layer.weight.retain_grad()
            loss(model(x[s : s + 1]), y[s : s + 1]).backward()
            weights = {name: layer.weight for name, layer in layers.items()}
        for name, layer in layers.items():
            weight = weights[name]
            g = torch.zeros_like(weight) if weight.grad is None else weight.grad
            product = (weight * g).detach().double().numpy()
            if isinstance(layer, nn.ConvTranspose2d):  # [in, out / groups, ...]
                product = product.reshape(layer.groups, -1, *product.shape[1:])
                c = product.sum((1, 3, 4)).reshape(-1)
            else:
                c = product.reshape(len(product), -1).sum(1)
            counts = bias is True or (bias == "conv" and not isinstance(layer, nn.Linear))
            if layer.bias is not None and layer.bias.grad is not None and counts:
                c = c + (layer.bias * layer.bias.grad).detach().double().numpy()
            found.setdefault(name, []).append(c)
    model.zero_grad(set_to_none=True)
    return {name: np.stack(rows) for name, rows in found.items()}


def check(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    apart: bool,
    loss: Loss = nnf.cross_entropy,
    bias: bool | str = "conv",
    batch: int = 4,
) -> ox.diagnosis.Diagnosis:
    given = None if loss is nnf.cross_entropy else loss
    data = list(zip(x.split(batch), y.split(batch), strict=True))
    got = ox.diagnose(model, data, loss=given, bias=bias, jacobian_samples=0)
    want = by_autograd(model, x, y, loss, bias)
    noted = any("each one ran alone" in note for note in got.notes)
    assert noted is not apart
    assert got.samples == len(x)
    for row in got:
        c = want[row.name]
        moment = c.T @ c / len(c)
        mass = np.abs(moment).sum()
        assert row.additivity.mass == pytest.approx(mass, rel=1e-3), row.name
        gap = 1 - np.trace(moment) / mass if mass else 0
        assert row.additivity.gap == pytest.approx(gap, abs=1e-4), row.name
        ratio = (c.sum(1) ** 2).mean() / np.trace(moment) if mass else 1
        assert row.additivity.ratio == pytest.approx(ratio, rel=1e-3), row.name
    return got


@pytest.mark.parametrize("bias", [True, False, "conv"])
@pytest.mark.parametrize("route", ["outputs", "weights"])
def test_both_routes_agree_with_autograd(
    monkeypatch: pytest.MonkeyPatch, bias: bool | str, route: str
) -> None:
    torch.manual_seed(1)
    net = Net()
    net.bn.running_mean.normal_()
    net.conv.weight.requires_grad_(False)
    if route == "weights":
        monkeypatch.setattr(module, "_together", lambda *arguments: None)
    got = check(net, *samples(10), apart=route == "outputs", bias=bias)
    assert [row.name for row in got] == ["conv", "grouped", "depthwise", "up", "fc", "head"]


class Twice(nn.Module):
    """A layer that is called twice, on tokens, with a parametrized one behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)
        self.head = nn.utils.parametrizations.weight_norm(nn.Linear(6, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.fc(self.fc(x.unflatten(1, (2, 6))).tanh()).tanh().mean(1))


class Functional(nn.Module):
    """A weight that is also used outside of its layer."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(12, 12)
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(nnf.linear(self.fc(x).tanh(), self.fc.weight).tanh())


class SequenceFirst(nn.Module):
    """Puts the samples into the second dimension of what its layer sees."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.unflatten(1, (4, 3)).transpose(0, 1)  # [4, samples, 3], of 4 samples as well
        return self.head(self.fc(tokens).tanh().mean(0))


class Attention(nn.Module):
    """torch's attention calls no module for its projections."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.TransformerEncoderLayer(6, 2, 8, dropout=0, batch_first=True)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(x.unflatten(1, (2, 6))).mean(1))


class Coupled(nn.Module):
    """Normalises by the batch, in eval mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.norm = nn.BatchNorm2d(4, track_running_stats=False)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x.unflatten(1, (1, 3, 4)))).relu()
        return self.head(x.flatten(2).amax(2))


class Leaning(nn.Module):
    """Every sample but the first leans on the one before, which no gradient says."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(12, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(x).tanh()
        return self.head(torch.cat([x[:1], x[1:] * x[:-1].detach()]))


class Hooked(nn.Module):
    """A hook of the user's changes what a layer puts out."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(12, 5)
        self.head = nn.Linear(5, 3)
        self.fc.register_forward_hook(lambda module, arguments, output: (2 * output).tanh())

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.fc(x))


@pytest.mark.parametrize(
    ("build", "apart"),
    [
        (Leaning, False),
        (Hooked, True),
        (Twice, True),
        (Functional, False),
        (SequenceFirst, False),
        (Attention, False),
        (Coupled, False),
    ],
)
def test_models_whose_samples_or_weights_go_other_ways(
    build: Callable[[], nn.Module], apart: bool
) -> None:
    torch.manual_seed(2)
    check(build(), torch.randn(8, 12), torch.arange(8) % 3, apart=apart)


def summed(output: Tensor, target: Tensor) -> Tensor:
    return nnf.cross_entropy(output, target, reduction="sum")


@pytest.mark.parametrize(("loss", "apart"), [(summed, False), (nnf.multi_margin_loss, True)])
def test_losses(loss: Loss, apart: bool) -> None:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(12, 6), nn.ReLU(inplace=True), nn.Linear(6, 3))
    check(model, torch.randn(9, 12), torch.arange(9) % 3, apart=apart, loss=loss)


def test_layers_that_the_loss_does_not_reach_are_noted() -> None:
    model = Functional()
    model.spare = nn.Linear(3, 2)
    got = ox.diagnose(model, [(torch.randn(4, 12), torch.zeros(4).long())])
    assert "the loss does not depend on 'spare': its filters count as idle" in got.notes
    assert got["spare"].additivity.idle == (0, 1)
    assert len(got.notes) == 2


def test_filters_behind_a_scale_of_zero_are_idle() -> None:
    torch.manual_seed(0)
    net = Net()
    with torch.no_grad():
        net.bn.weight[5] = 0
    assert ox.diagnose(net, [samples()])["conv"].additivity.idle == (5,)


def test_as_many_samples_are_read_as_asked() -> None:
    torch.manual_seed(0)
    net, (x, y) = Net(), samples(10)
    read = []

    def batches() -> Any:
        for i in range(3):
            read.append(i)
            yield (x[i * 4 : i * 4 + 4],), {"y": y[i * 4 : i * 4 + 4]}

    def loss(output: Tensor, target: dict[str, Tensor]) -> Tensor:
        return nnf.cross_entropy(output, target["y"])

    got = ox.diagnose(net, batches(), loss=loss, samples=6, jacobian_samples=3)
    want = ox.diagnose(net, [(x[:6], y[:6])], jacobian_samples=3)
    assert read == [0, 1]
    assert (got.samples, len(got.spectrum.values)) == (6, 3)
    assert got.gap == pytest.approx(want.gap, rel=1e-5)
    assert np.allclose(got.spectrum.values, want.spectrum.values, rtol=1e-5)


def test_the_gaps_are_of_no_more_samples_than_asked() -> None:
    torch.manual_seed(0)
    net, (x, y) = Net(), samples(10)
    got = ox.diagnose(net, [(x, y)], samples=3, jacobian_samples=5)
    assert (got.samples, len(got.spectrum.values)) == (3, 5)
    assert got.gap == pytest.approx(ox.diagnose(net, [(x[:3], y[:3])]).gap, rel=1e-5)


class Scaled(nn.Module):
    """Takes one more tensor that all samples share."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return self.head(x * scale)


def test_tensors_that_all_samples_share() -> None:
    torch.manual_seed(0)
    model, x, y, scale = Scaled(), torch.randn(6, 12), torch.arange(6) % 3, torch.rand(12)
    got = ox.diagnose(model, [((x, scale), y)])
    want = ox.diagnose(nn.Sequential(model.head), [(x * scale, y)])
    assert not got.notes
    assert got.gap == pytest.approx(want.gap, rel=1e-6)


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's digits with uncorrelated entries of variance 1."""
    data = pytest.importorskip("sklearn.datasets").load_digits()
    x = torch.from_numpy(data.data).double()
    directions = torch.linalg.svd(x - x.mean(0), full_matrices=False)[0]
    return (directions[:, :32] * len(x) ** 0.5).float(), torch.from_numpy(data.target).long()


def planted(seed: int) -> nn.Sequential:
    """Hidden layers whose second half of filters nearly repeats the first."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        *(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 10))
    )
    with torch.no_grad():
        for weight in (model[0].weight, model[2].weight):
            weight[8:] = weight[:8] + 0.01 * torch.randn_like(weight[:8])
    return model


def hidden_gap(model: nn.Module, digits: tuple[Tensor, Tensor]) -> float:
    got = ox.diagnose(model, [digits], samples=2000, include=["0", "2"], jacobian_samples=0)
    return got.mean_gap


@pytest.mark.parametrize("seed", range(3))
def test_the_gap_of_planted_redundancy_falls_under_orthoreg(
    digits: tuple[Tensor, Tensor], seed: int
) -> None:
    x, y = digits
    gaps, accuracies = {}, {}
    for strength in (0.1, 0.0):
        model = planted(seed)
        gaps["start"] = hidden_gap(model, digits)
        reg = ox.OrthoRegularizer(model, strength=strength)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        for _ in range(5):
            for index in torch.randperm(len(x)).split(64):
                optimizer.zero_grad()
                (nnf.cross_entropy(model(x[index]), y[index]) + reg()).backward()
                optimizer.step()
        gaps[strength] = hidden_gap(model, digits)
        accuracies[strength] = float((model(x).argmax(1) == y).double().mean())
    assert accuracies[0.1] > 0.9  # it has learnt
    assert gaps[0.1] < gaps[0.0] - 0.04, gaps
    assert gaps[0.1] < gaps["start"] - 0.04, gaps
