from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as f

from orthoreg_ext.pruning import CRITERIA, Criterion, prune, variety
from orthoreg_ext.pruning.calibration import mean_gradients
from orthoreg_ext.pruning.evidence import Evidence
from orthoreg_ext.pruning.structure import trace

from .nets import MLP, VGG, Concat, Grouped, ResNet, Separable, Transposed, batches, randomised

FORMULAS = {
    "l1": lambda w, g: w.abs().sum(1),
    "l2": lambda w, g: w.pow(2).sum(1).sqrt(),
    "taylor": lambda w, g: (w * g).sum(1).abs(),
    "taylor_sq": lambda w, g: (w * g).pow(2).sum(1),
    "taylor_abs": lambda w, g: (w * g).abs().sum(1),
    "fisher": lambda w, g: (w * g).sum(1).pow(2),
}


def gradients_of(model: nn.Module, data: list, loss: Any = f.cross_entropy) -> dict[str, Tensor]:
    """The definition: all samples in one batch, in float64 and eval mode."""
    double = copy.deepcopy(model).double().eval()
    x = torch.cat([a for a, _ in data]).double()
    y = torch.cat([b for _, b in data])
    loss(double(x), y).backward()
    return {name: p.grad for name, p in double.named_parameters()}


def filter_rows(module: nn.Module, tensor: Tensor) -> Tensor:
    if getattr(module, "transposed", False):
        return torch.cat([t.transpose(0, 1) for t in tensor.chunk(module.groups)]).flatten(1)
    return tensor.flatten(1)


class Slots(Evidence):
    """Keeps the scores of the channels of every layer, before they become those of units."""

    def units(self, scored: list, rows: list[Tensor]) -> list[Tensor]:
        self.found.update(
            {
                (entry.slot.layer, "in" if entry.dim else "out"): row.double().cpu()
                for entry, row in zip(scored, rows, strict=True)
            }
        )
        return super().units(scored, rows)


def scores(
    model: nn.Module, x: Tensor, name: str, data: list | None = None, **options: Any
) -> dict[tuple[str, str], Tensor]:
    evidence = Slots(name, model, trace(model, x), data, **options)
    object.__setattr__(evidence, "found", {})
    CRITERIA[name].score(evidence)
    return evidence.found


@pytest.mark.parametrize("name", sorted(FORMULAS))
@pytest.mark.parametrize("net", [VGG, Grouped, Separable, Transposed])
@pytest.mark.parametrize("bias", [False, True])
def test_scores_are_the_formulas_in_float64(name: str, net: Any, bias: bool, x: Tensor) -> None:
    model = randomised(net())
    loss = (lambda out, y: out.pow(2).mean()) if net is Transposed else f.cross_entropy
    data = [(a, b) for a, b in batches(count=3)]
    if net is Transposed:
        data = [(a, b) for a, b in data[:1]]
    got = scores(model, x, name, data, bias=bias, loss=loss)
    grads = gradients_of(model, data, loss)
    assert len(got) >= 3
    for (layer, _), values in got.items():
        module: Any = model.get_submodule(layer)
        w = filter_rows(module, module.weight.detach().double())
        g = filter_rows(module, grads[f"{layer}.weight"])
        if bias and module.bias is not None:
            w = torch.cat([w, module.bias.detach().double()[:, None]], 1)
            g = torch.cat([g, grads[f"{layer}.bias"][:, None]], 1)
        expected = FORMULAS[name](w, g)
        torch.testing.assert_close(
            values, expected, rtol=1e-3, atol=1e-5 * float(expected.max()), msg=f"{layer} {name}"
        )


def test_the_gradient_is_the_mean_over_samples_not_over_batches() -> None:
    model = MLP()
    data = batches((12,), count=3)  # 6, 8 and 10 samples
    weights = {"fc1.weight": model.fc1.weight}
    expected = gradients_of(model, data)["fc1.weight"]
    got = mean_gradients(model, weights, data)["fc1.weight"]
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-6)


def test_calibration_is_in_eval_mode_where_fisher_is_not_zero(x: Tensor) -> None:
    model = randomised(VGG()).train()
    values = scores(model, x, "fisher", batches())["conv1", "out"]
    f.cross_entropy(model(batches()[0][0]), batches()[0][1]).backward()
    train = (
        (model.conv1.weight.detach() * model.conv1.weight.grad).flatten(1).sum(1).pow(2).double()
    )
    # behind a BatchNorm in train mode it vanishes (up to rounding)
    assert float(train.max()) < 1e-6 * float(values.max())


def test_half_precision_is_scored_in_float32(x: Tensor) -> None:
    model = randomised(VGG()).bfloat16()
    data = [(a.bfloat16(), b) for a, b in batches()]
    got = scores(model, x.bfloat16(), "l2", data)["conv1", "out"]
    expected = model.conv1.weight.detach().double().flatten(1).norm(dim=1)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)
    assert float(scores(model, x.bfloat16(), "fisher", data)["conv1", "out"].max()) > 0


class Misleading(nn.Module):
    """BatchNorms registered in another order than they run in."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_of_second = nn.BatchNorm2d(8)
        self.first = nn.Conv2d(3, 8, 1)
        self.second = nn.Conv2d(8, 8, 1)
        self.norm_of_first = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = f.relu(self.norm_of_first(self.first(x)))
        return self.fc(f.relu(self.norm_of_second(self.second(x))).mean((2, 3)))


def test_bn_scale_reads_the_batchnorm_that_follows_in_the_graph(x: Tensor) -> None:
    model = Misleading()
    low, high = torch.tensor([0.1, 9.0] * 4), torch.tensor([9.0, -0.1] * 4)
    model.norm_of_first.weight.data, model.norm_of_second.weight.data = low, high
    result = prune(model, x, criterion="bn_scale", ratio=0.5, scope="local")
    removed = {entry["layer"]: entry["removed"] for entry in result.history}
    assert removed == {"first": [0, 2, 4, 6], "second": [1, 3, 5, 7]}
    assert model.norm_of_first.weight.tolist() == [9.0] * 4
    assert model.norm_of_second.weight.tolist() == [9.0] * 4


def test_bn_scale_without_a_batchnorm_names_the_layer(x: Tensor) -> None:
    with pytest.raises(ValueError, match=r"'bn_scale' needs a BatchNorm .* behind layer 'fc1'"):
        prune(VGG(), x, criterion="bn_scale", ratio=0.5)
    prune(VGG(), x, criterion="bn_scale", ratio=0.5, ignored=["fc1"])


@pytest.mark.parametrize("reduction", ["mean", "sum", "max", "first"])
def test_a_unit_combines_the_filters_of_all_its_layers(reduction: str, x: Tensor) -> None:
    model = ResNet()
    structure = trace(model, x)
    values = CRITERIA["l1"].score(Evidence("l1", model, structure, reduction=reduction))
    index = next(i for i, g in enumerate(structure.prunable) if g.name == "layer2.conv2")
    assert structure.prunable[index].layers == ("layer2.conv2", "layer2.short.0", "layer3.conv2")
    rows = torch.stack(
        [
            model.get_submodule(name).weight.detach().double().abs().flatten(1).sum(1)
            for name in structure.prunable[index].layers
        ]
    )
    expected = {"mean": rows.mean(0), "sum": rows.sum(0), "max": rows.amax(0), "first": rows[0]}
    torch.testing.assert_close(values[index], expected[reduction], rtol=1e-6, atol=0)


@pytest.mark.parametrize("how", ["mean", "max", "sum"])
def test_normalize_divides_the_scores_of_each_group(how: str, x: Tensor) -> None:
    model = VGG()
    structure = trace(model, x)
    raw = CRITERIA["l1"].score(Evidence("l1", model, structure))
    scaled = CRITERIA["l1"].score(Evidence("l1", model, structure, normalize=how))
    for before, after in zip(raw, scaled, strict=True):
        torch.testing.assert_close(after, before / getattr(before, how)())


def test_existing_gradients_are_used_without_data(x: Tensor) -> None:
    model = randomised(VGG()).eval()
    x, y = batches()[0]
    f.cross_entropy(model(x), y).backward()
    other = copy.deepcopy(model)
    a = prune(model, x, criterion="fisher", ratio=0.5)
    b = prune(other, x, criterion="fisher", ratio=0.5, data=[(x, y)])
    assert a.history == b.history


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("criterion", ["l1", "fisher"])
def test_scores_that_are_not_finite_stop_the_cut(value: float, criterion: str, x: Tensor) -> None:
    model = VGG().eval()
    f.cross_entropy(model(x), torch.tensor([0, 1])).backward()
    tensor = model.conv2.weight if criterion == "l1" else model.conv2.weight.grad
    tensor.data[3, 0, 0, 0] = value
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=rf"'{criterion}' gives .* for filter 3 of layer 'conv2'"):
        prune(model, x, criterion=criterion, ratio=0.5)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], equal_nan=True)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "data is empty"),
        (iter([]), "data is empty"),
        ([torch.zeros(2, 3, 8, 8)], r"batch 0 is a Tensor, expected a pair"),
        ([(torch.zeros(2, 3, 8, 8), torch.zeros(0, dtype=torch.int64))], "batch 0 has no samples"),
        (
            [(torch.zeros(4, 3, 8, 8), torch.full((4,), 3))],
            r"one class only \(class 3, 4 samples\)",
        ),
        ([(torch.full((2, 3, 8, 8), torch.nan), torch.tensor([0, 1]))], "loss of batch 0 is nan"),
    ],
)
def test_unusable_data_is_refused_before_anything_changes(
    data: Any, message: str, x: Tensor
) -> None:
    model = VGG()
    state = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        prune(model, x, data=data)
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())


def test_data_that_can_be_read_once_does_not_serve_several_rounds(x: Tensor) -> None:
    with pytest.raises(ValueError, match="data is a generator, which can be read once, but 2"):
        prune(VGG(), x, data=(b for b in batches()), rounds=2)
    with pytest.raises(TypeError, match="data is int"):
        prune(VGG(), x, data=3)  # type: ignore[arg-type]


def test_a_missing_gradient_names_layer_and_remedy(x: Tensor) -> None:
    with pytest.raises(
        ValueError, match=r"'conv1.weight' \(and 3 more\) has no gradient: pass data"
    ):
        prune(VGG(), x, criterion="taylor")


def test_a_loss_that_ignores_a_layer_or_is_no_scalar_is_refused(x: Tensor) -> None:
    with pytest.raises(ValueError, match="no gradient reaches"):
        prune(VGG(), x, data=batches(), loss=lambda out, y: torch.zeros((), requires_grad=True) * 1)
    with pytest.raises(ValueError, match=r"loss returned \(6,\) for batch 0, expected a scalar"):
        prune(
            VGG(), x, data=batches(), loss=lambda out, y: f.cross_entropy(out, y, reduction="none")
        )


@pytest.mark.parametrize("lowest", [range(3), range(3, 6)])
def test_channels_that_cannot_go_do_not_count(lowest: range, x: Tensor) -> None:
    model = Concat()  # its BatchNorm sees b (5), the raw input (3) and a (6)
    gamma = torch.cat([torch.ones(5), torch.full((3,), 100.0), torch.ones(6)])
    gamma[[8 + i for i in lowest]] = 0.1
    gamma[[0, 4]] = 0.1
    model.bn.weight.data = gamma
    result = prune(model, x, criterion="bn_scale", ratio=0.5, scope="local", ignored=["c"])
    removed = {entry["layer"]: entry["removed"] for entry in result.history}
    assert removed == {"a": list(lowest), "b": [0, 4]}


# ---- input channels


def reads(module: Any, tensor: Tensor) -> Tensor:
    """The entries of every input channel, [inputs, ...], group by group."""
    if getattr(module, "transposed", False):
        return tensor.flatten(1)
    groups = getattr(module, "groups", 1)
    parts = [part.transpose(0, 1).flatten(1) for part in tensor.chunk(groups)]
    return torch.cat(parts)


@pytest.mark.parametrize("name", sorted(FORMULAS))
@pytest.mark.parametrize("net", [VGG, Grouped, Separable, Transposed])
def test_input_channels_are_scored_by_the_entries_that_read_them(
    name: str, net: Any, x: Tensor
) -> None:
    model = randomised(net())
    loss = (lambda out, y: out.pow(2).mean()) if net is Transposed else f.cross_entropy
    data = batches(count=1)
    got = scores(model, x, name, data, loss=loss, dim="in")
    both = scores(model, x, name, data, loss=loss, dim="both")
    grads = gradients_of(model, data, loss)
    assert len(got) >= 3
    assert {side for _, side in both} == {"in", "out"}
    for (layer, side), values in got.items():
        module = model.get_submodule(layer)
        assert side == "in"
        w, g = (
            reads(module, t) for t in (module.weight.detach().double(), grads[f"{layer}.weight"])
        )
        expected = FORMULAS[name](w, g)
        assert len(expected) == getattr(module, "in_channels", getattr(module, "in_features", 0))
        torch.testing.assert_close(
            values, expected, rtol=1e-3, atol=1e-5 * float(expected.max()), msg=f"{layer} {name}"
        )
        assert torch.equal(both[layer, "in"], values)


def test_prune_by_input_channels_takes_those_that_nothing_reads(x: Tensor) -> None:
    model = VGG()
    with torch.no_grad():
        model.conv2.weight[:, [1, 5]] *= 1e-3
        model.fc1.weight.unflatten(1, (16, 4))[:, 7] *= 1e-3
    result = prune(model, x, criterion="l1", dim="in", ratio=3 / 46 + 1e-6)
    removed = {entry["layer"]: entry["removed"] for entry in result.history}
    assert removed == {"conv1": [1, 5], "conv3": [7]}
    assert result.settings["dim"] == "in"


# ---- every criterion


@pytest.mark.parametrize("scope", ["global", "local"])
@pytest.mark.parametrize("name", sorted(CRITERIA))
def test_every_criterion_prunes(name: str, scope: str, x: Tensor) -> None:
    model = randomised(ResNet()).train()
    result = prune(model, x, criterion=name, scope=scope, ratio=0.4, data=batches(), rounds=2)
    assert result.after.filters < result.before.filters
    assert json.loads(json.dumps(result.settings))["criterion"] == name
    assert bool(model(x).isfinite().all())


@pytest.mark.parametrize("reduction", ["mean", "sum", "max", "first"])
@pytest.mark.parametrize("name", ["fpgm", "repr", "exemplar", "grasp", "rdt", "bn_taylor"])
def test_units_reduce_every_criterion(name: str, reduction: str, x: Tensor) -> None:
    model = randomised(ResNet())
    structure = trace(model, x)
    evidence = Slots(name, model, structure, batches(), reduction=reduction)
    object.__setattr__(evidence, "found", {})
    values = CRITERIA[name].score(evidence)
    index = next(i for i, g in enumerate(structure.prunable) if g.name == "layer2.conv2")
    layers = (
        ("layer2.bn2", "layer2.short.1", "layer3.bn2")
        if name == "bn_taylor"
        else ("layer2.conv2", "layer2.short.0", "layer3.conv2")
    )
    rows = torch.stack([evidence.found[layer, "out"] for layer in layers])
    expected = {"mean": rows.mean(0), "sum": rows.sum(0), "max": rows.amax(0), "first": rows[0]}
    torch.testing.assert_close(values[index], expected[reduction], rtol=1e-6, atol=0)


@pytest.mark.parametrize("how", ["mean", "max", "sum"])
def test_normalize_divides_by_the_size_of_negative_scores(how: str, x: Tensor) -> None:
    model = VGG()
    structure = trace(model, x)
    raw = CRITERIA["repr"].score(Evidence("repr", model, structure))
    scaled = CRITERIA["repr"].score(Evidence("repr", model, structure, normalize=how))
    for before, after in zip(raw, scaled, strict=True):
        torch.testing.assert_close(after, before / getattr(before.abs(), how)())


def test_zero_filters_and_zero_gradients_have_scores(x: Tensor) -> None:
    for name in CRITERIA:
        model = randomised(ResNet())
        with torch.no_grad():
            model.layer1.conv1.weight[:3] = 0
            model.layer3.conv1.weight.zero_()
        structure = trace(model, x)
        values = CRITERIA[name].score(Evidence(name, model, structure, batches()))
        assert all(bool(v.isfinite().all()) for v in values), name


def test_a_row_of_ones_own_is_a_criterion(x: Tensor) -> None:
    def last(evidence: Evidence) -> list[Tensor]:
        return [-g.units.double() for g in evidence.structure.prunable]

    result = prune(VGG(), x, criterion=Criterion("last", "-i", last), ratio=0.25, scope="local")
    assert result.history[0] == {"round": 1, "layer": "conv1", "removed": [6, 7], "filters": 6}
    assert result.settings["criterion"] == "last"


def test_the_host_decides_how_much_each_group_loses(x: Tensor) -> None:
    model, other = VGG(), VGG()
    other.load_state_dict(model.state_dict())
    widths = [
        {row.name: row.after for row in prune(net, x, criterion=c, ratio=0.5).layers}
        for net, c in ((model, "l2"), (other, variety("l2")))
    ]
    assert widths[0] == widths[1]


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"criterion": "fpgm", "dim": "in"}, "criterion 'fpgm' does not score input channels"),
    ({"criterion": variety("repr"), "dim": "both"}, r"'variety\(repr, pairwise\)' does not score"),
    ({"criterion": "l1", "dim": 1}, "unknown dim 1"),
    ({"criterion": "group_fisher", "group_reduction": "sum"}, "sums over the layers of a group"),
    ({"criterion": "grasp"}, "'grasp' is computed on samples, not from .grad: pass data"),
    ({"criterion": "rdt"}, "'rdt' is computed on samples"),
    ({"criterion": "group_fisher"}, "'group_fisher' is computed on samples"),
    ({"criterion": variety("grasp")}, "'variety.grasp, pairwise.' is computed on samples"),
    ({"criterion": "grasp", "data": iter(batches())}, "is a list_iterator, .* reads it twice"),
    ({"criterion": "rdt", "data": []}, "data is empty"),
    ({"criterion": "group_fisher", "data": []}, "data is empty"),
    ({"criterion": "bn_taylor"}, "'bn_taylor' needs a BatchNorm .* behind layer 'fc1'"),
    ({"criterion": "vareity"}, "did you mean 'variety'"),
]


@pytest.mark.parametrize(("options", "message"), WRONG)
def test_what_cannot_be_scored_is_refused_before_anything_changes(
    options: dict[str, Any], message: str, x: Tensor
) -> None:
    model = VGG()
    state = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        prune(model, x, ratio=0.3, **options)
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())


def test_rdt_needs_logits(x: Tensor) -> None:
    with pytest.raises(ValueError, match=r"output is \(6, 3, 8, 8\), but 'rdt' needs logits"):
        prune(Transposed(), x, criterion="rdt", ratio=0.3, data=batches())


def test_grasp_has_its_temperature_for_cross_entropy_only(x: Tensor) -> None:
    model = randomised(VGG())
    structure = trace(model, x)

    def values(loss: Any) -> Tensor:
        evidence = Evidence("grasp", model, structure, batches(), loss)
        return torch.cat(CRITERIA["grasp"].score(evidence))

    assert torch.equal(values(None), values(f.cross_entropy))
    assert torch.equal(values(None), values(lambda out, y: f.cross_entropy(out / 200, y)))
    own = values(lambda out, y: f.cross_entropy(out, y))
    assert float(own.abs().max()) > 1e3 * float(values(None).abs().max())
