"""diagnose: the numbers of the weights, the forms of the result, and what it must leave alone."""

from __future__ import annotations

import copy
import json
import math
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import orthoreg_ext as ox
from orthoreg_ext.diagnosis import Diagnosis, WeightNumbers


class Net(nn.Module):
    """Every kind of layer that has filters."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.grouped = nn.Conv2d(8, 12, 3, padding=1, groups=2, bias=False)
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.up = nn.ConvTranspose2d(12, 6, 2, 2, groups=2)
        self.fc = nn.Linear(6, 40)
        self.head = nn.Linear(40, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn(self.conv(x)))
        x = self.relu(self.up(self.relu(self.depthwise(self.grouped(x)))))
        return self.head(self.relu(self.fc(x.mean((2, 3)))))


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    net = Net()
    net.bn.running_mean.normal_()
    net.bn.running_var.uniform_(0.5, 2)
    return net


def samples(count: int = 6, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, 6, 6, generator=generator), torch.arange(count) % 4


def linear(rows: list[list[float]], dtype: torch.dtype = torch.float32) -> nn.Linear:
    layer = nn.Linear(len(rows[0]), len(rows), bias=False, dtype=dtype)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(rows, dtype=dtype))
    return layer


def numbers(layer: nn.Module, **arguments: Any) -> WeightNumbers:
    (row,) = ox.diagnose(layer, **arguments)
    return row.weights


ROOT = math.sqrt(0.5)
TABLE = [  # filters, side, degree, mean and largest |cosine|, pairs, condition, dead
    ([[3, 4], [4, 3]], "rows", 50 / 98, 0.96, 0.96, 1, 7, ()),
    ([[1, 0], [0, 1], [1, 1]], "cols", 4 / 6, ROOT * 2 / 3, ROOT, 3, math.sqrt(3), ()),
    ([[0, 2], [2, 0]], "rows", 1, 0, 0, 1, 1, ()),
    ([[1, 0], [-4, 0]], "rows", 17 / 25, 1, 1, 1, math.inf, ()),
    ([[0, 0], [5, 0]], "rows", 1, 0, 0, 1, math.inf, (0,)),
    ([[0, 0], [0, 0]], "rows", 0, 0, 0, 1, math.inf, (0, 1)),
    ([[3, 4]], "rows", 1, 0, 0, 0, 1, ()),
    ([[0, 0]], "rows", 0, 0, 0, 0, math.inf, (0,)),
    ([[2], [1], [0]], "cols", 1, 1 / 3, 1, 3, 1, (2,)),
]


@pytest.mark.parametrize("row", TABLE)
def test_hand_computed(row: tuple[Any, ...]) -> None:
    filters, side, degree, mean, largest, pairs, condition, dead = row
    got = numbers(linear(filters))
    assert (got.side, got.pairs, got.dead) == (side, pairs, dead)
    floats = (got.degree, got.mean_cosine, got.max_cosine, got.condition)
    assert floats == pytest.approx((degree, mean, largest, condition), rel=1e-12, abs=1e-15)


def test_the_bias_is_one_more_entry_where_asked() -> None:
    layer = nn.Conv2d(1, 2, 1)
    with torch.no_grad():
        layer.weight.fill_(1)
        layer.bias.copy_(torch.tensor([1.0, -1.0]))
    with_bias, without = numbers(layer), numbers(layer, bias=False)
    assert (with_bias.side, with_bias.degree, with_bias.max_cosine) == ("rows", 1, 0)
    assert with_bias.condition == pytest.approx(1)
    assert (without.side, without.degree, without.max_cosine) == ("cols", 1, 1)


def test_a_filter_of_zeros_is_dead_whatever_its_bias() -> None:
    layer = nn.Conv2d(2, 3, 3)
    with torch.no_grad():
        layer.weight[1] = 0
        layer.bias.fill_(1)
    got = numbers(layer)
    assert got.dead == (1,)
    assert math.isfinite(got.condition)  # the bias is an entry of it
    assert numbers(layer, bias=False).condition == math.inf


@pytest.mark.parametrize(("n", "k"), [(27, 64), (64, 27), (16, 16), (1, 9), (9, 1)])
def test_orthonormal_filters(n: int, k: int) -> None:
    generator = torch.Generator().manual_seed(n)
    q = torch.linalg.qr(torch.randn(max(n, k), min(n, k), generator=generator).double())[0]
    layer = linear((q if n >= k else q.T).tolist(), torch.float64)
    got = numbers(layer)
    assert got.degree == pytest.approx(1, abs=1e-12)
    assert got.condition == pytest.approx(1, abs=1e-12)
    if n <= k:
        assert got.max_cosine == pytest.approx(0, abs=1e-14)


def by_numpy(weight: np.ndarray, groups: int) -> tuple[float, float, float, float]:
    """Degree, mean and largest |cosine| and condition number of [groups * n, k]."""
    diagonal = total = 0.0
    cosines, conditions = [], []
    for w in np.split(weight.astype(np.float64), groups):
        small = w @ w.T if w.shape[0] <= w.shape[1] else w.T @ w
        diagonal += np.abs(np.diag(small)).sum()
        total += np.abs(small).sum()
        for i in range(len(w)):
            for j in range(i):
                size = np.linalg.norm(w[i]) * np.linalg.norm(w[j])
                cosines.append(abs(w[i] @ w[j]) / size if size else 0.0)
        values = np.linalg.svd(w, compute_uv=False)
        conditions.append(values[0] / values[-1])
    mean, largest = (np.mean(cosines), np.max(cosines)) if cosines else (0.0, 0.0)
    return diagonal / total, float(mean), float(largest), max(conditions)


def transposed_rows(layer: nn.ConvTranspose2d) -> Tensor:
    """[out, ...] by picking each filter of each group by hand."""
    per_in, per_out = layer.in_channels // layer.groups, layer.out_channels // layer.groups
    return torch.stack(
        [
            layer.weight[g * per_in : (g + 1) * per_in, o].flatten()
            for g in range(layer.groups)
            for o in range(per_out)
        ]
    )


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_random_nets_agree_with_numpy(seed: int, dtype: torch.dtype) -> None:
    torch.manual_seed(seed)
    net = Net().to(dtype).to(memory_format=torch.channels_last)
    rows = {row.name: row for row in ox.diagnose(net)}
    assert list(rows) == ["conv", "grouped", "depthwise", "up", "fc", "head"]
    for name, row in rows.items():
        layer = getattr(net, name)
        weight = transposed_rows(layer) if name == "up" else layer.weight.flatten(1)
        if layer.bias is not None and name != "fc":
            weight = torch.cat([weight, layer.bias[:, None]], 1)
        want = by_numpy(weight.detach().double().numpy(), row.groups)
        w = row.weights
        got = (w.degree, w.mean_cosine, w.max_cosine, w.condition)
        assert got == pytest.approx(want, rel=1e-9, abs=1e-12), f"seed {seed} {name}"
        assert row.fan_in == weight.shape[1]


@pytest.mark.parametrize("condition", [1e2, 3e4, 1e7, 1e11])
def test_large_condition_numbers_are_right(condition: float) -> None:
    generator = torch.Generator().manual_seed(1)
    left, right = (
        torch.linalg.qr(torch.randn(s, 8, generator=generator).double())[0] for s in (8, 20)
    )
    values = torch.logspace(0, -math.log10(condition), 8, dtype=torch.float64)
    layer = linear(((left * values) @ right.T).tolist(), torch.float64)
    assert numbers(layer).condition == pytest.approx(condition, rel=1e-8 + 1e-15 * condition)


@pytest.mark.parametrize("seed", range(5))
def test_equal_filters_have_no_condition_number(seed: int) -> None:
    torch.manual_seed(seed)
    layer = nn.Conv2d(16, 32, 3, bias=False)
    with torch.no_grad():
        layer.weight[7] = -2 * layer.weight[3]
    got = numbers(layer)
    assert got.condition == math.inf
    assert got.max_cosine <= 1
    assert got.max_cosine == pytest.approx(1, abs=1e-15)


@pytest.mark.parametrize(
    ("scale", "dtype"),
    [(s, torch.float32) for s in (1e-30, 1e30)] + [(s, torch.float64) for s in (1e-200, 1e200)],
)
def test_the_scale_of_the_weights_does_not_matter(scale: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(9, 5, bias=False, dtype=dtype)
    want = numbers(layer)
    with torch.no_grad():
        layer.weight.mul_(scale)
    got = numbers(layer)
    for name in ("degree", "mean_cosine", "max_cosine", "condition"):
        assert getattr(got, name) == pytest.approx(getattr(want, name), rel=1e-5)


def test_silent_channels_of_normalisation(net: Net) -> None:
    with torch.no_grad():
        net.bn.weight[2:5] = 0
        net.bn.bias.fill_(1)
        net.bn.bias[3] = 0
    assert ox.diagnose(net).silent == {"bn": (3,)}


def test_layers_are_chosen_and_the_others_named(net: Net) -> None:
    net.grouped.weight.requires_grad_(False)
    got = ox.diagnose(net, exclude="head", max_dim=20)
    assert [row.name for row in got] == ["conv", "grouped", "depthwise", "up"]
    reasons = {layer.name: layer.reason for layer in got.skipped}
    assert reasons["head"] == "excluded by exclude="
    assert "40 x 40, larger than max_dim=20; name it in include=" in reasons["fc"]
    assert [row.name for row in ox.diagnose(net, include="fc", max_dim=20)] == ["fc"]


def check_finite(diagnosis: Diagnosis) -> None:
    for name, values in diagnosis.arrays().items():
        assert values.dtype.kind in "Uif", name
        if values.dtype.kind == "f":
            assert not np.isnan(values).any(), name
            if "condition" not in name:
                assert np.isfinite(values).all(), name
    json.dumps(diagnosis.to_json(), allow_nan=False)
    assert "nan" not in str(diagnosis)


@pytest.mark.parametrize("case", ["zeros", "dead filters", "orthonormal", "zero inputs"])
def test_no_nan(net: Net, case: str) -> None:
    x, y = samples()
    with torch.no_grad():
        for parameter in net.parameters():
            if case == "zeros":
                parameter.zero_()
            elif parameter.dim() > 1 and case == "dead filters":
                parameter[::2] = 0
            elif parameter.dim() > 1 and case == "orthonormal":
                nn.init.orthogonal_(parameter)
    got = ox.diagnose(net, [(x * (case != "zero inputs"), y)])
    check_finite(got)
    if case == "zeros":
        assert all(row.additivity.idle == tuple(range(row.filters)) for row in got)
        assert (got.gap, got.mean_gap, got.dead) == (0, 0, sum(row.filters for row in got))
        assert (got.spectrum.mean, got.spectrum.condition) == (0, math.inf)


def test_arrays_json_and_table_say_the_same(net: Net) -> None:
    with torch.no_grad():
        net.fc.weight[3] = 0
    got = ox.diagnose(net, [samples()], jacobian_samples=2)
    arrays, document, table = got.arrays(), got.to_json(), str(got).splitlines()
    assert arrays["name"].tolist() == [row.name for row in got]
    assert got["fc"].weights.dead == (3,)
    assert [layer["name"] for layer in document["layers"]] == arrays["name"].tolist()
    for i, row in enumerate(got):
        cells = table[1 + i].split()
        assert cells[:4] == [row.name, row.kind, str(row.filters), str(row.groups)]
        assert cells[5] == f"{row.weights.degree:.4f}"
        assert cells[9] == str(len(row.weights.dead)) == str(arrays["dead"][i])
        assert cells[10] == f"{row.additivity.gap:.4f}"
        assert arrays["gap"][i] == row.additivity.gap == document["layers"][i]["gap"]
    assert table[3].split()[6:8] == ["-", "-"]  # a depthwise layer has no pairs
    assert document["layers"][4]["dead"] == [3]
    assert arrays["singular_values"].shape == (2, 4)
    parts = [row.additivity for row in got]
    assert got.gap == pytest.approx(sum(p.off for p in parts) / sum(p.mass for p in parts))
    assert got.mean_gap == pytest.approx(np.mean([p.gap for p in parts]))
    plain = ox.diagnose(net)
    assert (plain.gap, plain.mean_gap, plain.spectrum, plain.samples) == (None, None, None, 0)
    assert "gap" not in plain.arrays()
    assert "gap" not in str(plain)
    with pytest.raises(KeyError, match="cnov"):
        got["cnov"]


def test_plots(net: Net, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = pytest.importorskip("matplotlib.figure")
    with torch.no_grad():
        net.fc.weight.zero_()
    plain, full = ox.diagnose(net), ox.diagnose(net, [samples()])
    full.plot(tmp_path / "full.svg")
    text = (tmp_path / "full.svg").read_text()
    assert text.startswith("<?xml")
    figure = figures.Figure()
    axes = figure.subplots(1, 3)
    assert plain.plot(axes) is figure
    widths = [bar.get_width() for bar in axes[0].patches]
    assert widths == pytest.approx([row.weights.degree for row in plain])
    assert len(full.plot().axes) == 5
    with pytest.raises(ValueError, match="has 3 axes, expected 5, one for each panel: degree, "):
        full.plot(axes)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install orthoreg_ext\[cli\]"):
        plain.plot()


def loader() -> Iterator[tuple[Tensor, Tensor]]:
    """Draws random numbers as a DataLoader does."""
    for seed in range(3):
        torch.rand(3)
        random.random()
        yield samples(seed=seed)


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(net: Net, fails: bool) -> None:
    net.conv.weight.requires_grad_(False)
    net.relu.eval()
    net(samples()[0]).sum().backward()
    state = copy.deepcopy(net.state_dict())
    grads = {name: p.grad for name, p in net.named_parameters()}
    copies = {name: None if g is None else g.clone() for name, g in grads.items()}
    flags = [(m.training, len(m._forward_hooks)) for m in net.modules()]
    frozen = [p.requires_grad for p in net.parameters()]
    torch.manual_seed(3)
    random.seed(3)
    want = torch.rand(1), random.random()
    torch.manual_seed(3)
    random.seed(3)

    def loss(output: Tensor, target: Tensor) -> Tensor:
        value = nn.functional.cross_entropy(output, target)
        return value * math.nan if fails else value

    if fails:
        with pytest.raises(ValueError, match="the loss of a sample is NaN or infinite"):
            ox.diagnose(net, loader(), loss=loss)
    else:
        ox.diagnose(net, loader(), loss=loss)
    assert (torch.rand(1), random.random()) == want
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    for name, parameter in net.named_parameters():
        assert parameter.grad is grads[name]
        assert parameter.grad is None or torch.equal(parameter.grad, copies[name])
    assert [(m.training, len(m._forward_hooks)) for m in net.modules()] == flags
    assert [p.requires_grad for p in net.parameters()] == frozen


X, Y = samples()
REFUSED = [
    ({"model": 3}, TypeError, "model must be a torch.nn.Module, got int"),
    ({"model": nn.ReLU()}, ValueError, "no layer is left to diagnose"),
    ({"exclude": "*"}, ValueError, "'conv': excluded by exclude="),
    ({"include": "cnov"}, ValueError, "unknown layer in include= 'cnov'; did you mean 'conv'"),
    ({"samples": 0}, ValueError, "samples is 0, expected a whole number of at least 1"),
    ({"jacobian_samples": -1}, ValueError, "jacobian_samples is -1"),
    ({"bias": "all"}, ValueError, "bias is 'all', expected True, False or 'conv'"),
    ({"data": X}, TypeError, "data is Tensor, expected an iterable of"),
    ({"data": []}, ValueError, "data is empty"),
    ({"data": iter(())}, ValueError, "data is empty"),
    ({"data": [X]}, ValueError, "batch 0 is a Tensor, expected a pair"),
    ({"data": [(X[:0], Y[:0])]}, ValueError, "batch 0 has no samples"),
    ({"data": [(X, Y)], "loss": lambda o, y: o}, ValueError, "loss returned (1, 4), expected a"),
]


@pytest.mark.parametrize(("arguments", "kind", "message"), REFUSED)
def test_bad_arguments(net: Net, arguments: dict[str, Any], kind: type, message: str) -> None:
    with pytest.raises(kind) as error:
        ox.diagnose(**{"model": net, **arguments})
    assert message in str(error.value)


def test_weights_that_are_not_finite_are_named(net: Net) -> None:
    with torch.no_grad():
        net.grouped.weight[0, 0, 0, 0] = math.inf
    with pytest.raises(ValueError, match="layer 'grouped' holds NaN or infinite weights"):
        ox.diagnose(net)
    assert len(ox.diagnose(net, exclude="grouped")) == 5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_says_the_same(net: Net) -> None:
    data = [samples(10)]  # on the host: moved batch by batch
    want = ox.diagnose(net, data).arrays()
    got = ox.diagnose(net.cuda(), data)
    assert not got.notes
    for name, values in got.arrays().items():
        if values.dtype.kind == "f":
            small = 1e-3 * want[name][np.isfinite(want[name])].max()
            np.testing.assert_allclose(values, want[name], rtol=1e-3, atol=small, err_msg=name)
        else:
            assert values.tolist() == want[name].tolist(), name
