from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as f

from orthoreg_ext.pruning import prune, sensitivity

from .nets import MLP, VGG, Normed, ResNet, batches, randomised
from .test_dry_run import assert_same, everything


def loss_of(model: nn.Module, data: list[tuple[Tensor, Tensor]]) -> float:
    """The mean over all samples in eval mode."""
    model = copy.deepcopy(model).eval()
    with torch.no_grad():
        losses = [f.cross_entropy(model(x), y, reduction="none") for x, y in data]
    return float(torch.cat(losses).mean())


class Stack(nn.Module):
    """Outputs its second layer's sum; a unit of the first is worth its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(1, 4, bias=False)
        self.second = nn.Linear(4, 2, bias=False)
        self.last = nn.Linear(2, 1, bias=False)
        self.first.weight.data = torch.tensor([[4.0], [1.0], [8.0], [2.0]])
        self.second.weight.data = torch.tensor([[1.0, 1, 1, 1], [2.0, 2, 2, 2]])
        self.last.weight.data = torch.ones(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.second(self.first(x)))


def total(model: nn.Module) -> float:
    return float(model(torch.ones(1, 1)))


def test_a_table_by_hand() -> None:
    # 15 of the first, times 1 and 2 of the second; l1 of the first: 1, 2, 4, 8; of the second: 4, 8
    table = sensitivity(
        Stack(), torch.ones(1, 1), evaluate=total, ratios=(0.75, 0.25, 0.5), criterion="l1"
    )
    assert table.baseline == 45
    assert table.ratios == (0.25, 0.5, 0.75)
    first, second = table.groups
    assert (first.name, first.layers, first.units) == ("first", ("first",), 4)
    assert first.removed == [1, 2, 3]
    assert first.values == [3 * 14, 3 * 12, 3 * 8]
    assert second.removed == [0, 1, 1]
    assert second.values == [45, 30, 30]
    assert torch.equal(table.change, torch.tensor([[-3.0, -9, -21], [0, -15, -15]]).double())
    assert table.metric == "total"
    lines = str(table).splitlines()
    assert lines[0] == "total 45; with one group cut:"
    assert lines[1].split() == ["layers", "units", "25%", "50%", "75%"]
    assert lines[2].split() == ["first", "4", "42", "36", "24"]
    json.dumps(table.as_dict())


def test_a_residual_stage_is_cut_as_a_whole(x: Tensor) -> None:
    model, data = randomised(ResNet()), batches()
    before = everything(model)
    table = sensitivity(model, x, data, ratios=(0.25, 0.5))
    assert_same(before, everything(model))
    assert table.metric == "loss"
    assert table.baseline == pytest.approx(loss_of(model, data), rel=1e-6)
    stage = next(g for g in table.groups if "layer2.conv2" in g.layers)
    assert set(stage.layers) == {"layer2.conv2", "layer2.short.0", "layer3.conv2"}
    names = [name for name, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    for group in table.groups:
        for ratio, value in zip(table.ratios, group.values, strict=True):
            cut = copy.deepcopy(model)
            others = [name for name in names if name not in group.layers]
            prune(cut, x, data=data, scope="local", ratio=ratio, ignored=others)
            assert value == pytest.approx(loss_of(cut, data), rel=1e-5), (group.name, ratio)
        assert abs(group.values[-1] - table.baseline) > 1e-6


def test_group_norms_are_really_cut_and_not_zeroed(x: Tensor) -> None:
    model, data = randomised(Normed()), batches()
    table = sensitivity(model, x, data, ratios=(0.5,), criterion="l1")
    for group in table.groups:
        cut = copy.deepcopy(model)
        layers = [n for n, m in cut.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
        others = [name for name in layers if name not in group.layers]
        prune(cut, x, criterion="l1", scope="local", ratio=0.5, ignored=others)
        assert group.values == [pytest.approx(loss_of(cut, data), rel=1e-5)]


def test_progress_counts_the_measurements_and_ignored_groups_are_left_out(x: Tensor) -> None:
    seen: list[tuple[int, int]] = []
    calls: list[nn.Module] = []
    table = sensitivity(
        VGG(),
        x,
        evaluate=lambda m: len(calls) if calls.append(m) is None else 0.0,
        ratios=(0.01, 0.5, 0.52),  # none of a layer; half of it, twice
        criterion="l1",
        ignored=["conv3"],
        progress=lambda done, total: seen.append((done, total)),
    )
    assert [group.name for group in table.groups] == ["conv1", "conv2", "fc1"]
    assert len(calls) == 4
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert [group.values for group in table.groups] == [[1, k, k] for k in (2, 3, 4)]


def test_round_to_holds(x: Tensor) -> None:
    table = sensitivity(VGG(), x, batches(), ratios=(0.3, 0.9), criterion="l1", round_to=4)
    left = {group.name: [group.units - n for n in group.removed] for group in table.groups}
    assert left == {"conv1": [4, 4], "conv2": [8, 4], "conv3": [12, 4], "fc1": [8, 4]}


@pytest.mark.parametrize("training", [True, False])
def test_the_metric_is_taken_in_eval_mode_and_leaves_no_trace(training: bool, x: Tensor) -> None:
    model = randomised(VGG()).train(training)
    before = everything(model)
    modes: list[bool] = []

    def evaluate(m: nn.Module) -> float:
        modes.append(m.training or torch.is_grad_enabled())
        m.train()
        m(x)  # moves the statistics
        return 0.0

    sensitivity(model, x, evaluate=evaluate, ratios=(0.5,), criterion="l1")
    assert not any(modes)
    after = everything(model)
    before.pop("versions"), after.pop("versions")  # statistics were written, and restored
    before["versions"] = after["versions"] = {}
    assert_same(before, after)


def test_a_failing_metric_takes_the_cut_back(x: Tensor) -> None:
    model = VGG()
    before = everything(model)
    calls: list[int] = []

    def evaluate(m: nn.Module) -> float:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return 0.0

    with pytest.raises(KeyboardInterrupt):
        sensitivity(model, x, evaluate=evaluate, ratios=(0.5,), criterion="l1")
    assert_same(before, everything(model))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, ValueError, "neither data nor evaluate was given"),
        ({"evaluate": 3}, TypeError, r"evaluate is 3, expected a function evaluate\(model\)"),
        ({"data": batches(), "ratios": (0.5, 1.0)}, ValueError, "ratio is 1.0, expected a number"),
        ({"data": batches(), "ratios": ()}, ValueError, r"ratios is \(\), expected numbers"),
        ({"data": batches(), "ratios": 0.5}, ValueError, "ratios is 0.5, expected numbers"),
        ({"data": iter(batches())}, ValueError, "can be read once"),
        ({"data": []}, ValueError, "data is empty"),
        ({"data": [torch.ones(2, 3, 8, 8)]}, ValueError, "batch 0 is a Tensor, expected a pair"),
        (
            {"data": [(torch.ones(0, 3, 8, 8), torch.ones(0).long())]},
            ValueError,
            "batch 0 has no samples",
        ),
        ({"evaluate": lambda m: float("nan")}, ValueError, r"NaN \(the model as it is\)"),
        ({"data": batches(), "criterion": "l3"}, ValueError, "unknown criterion 'l3'"),
    ],
)
def test_bad_arguments_are_named(
    options: dict[str, Any], error: type[Exception], message: str, x: Tensor
) -> None:
    with pytest.raises(error, match=message):
        sensitivity(VGG(), x, **{"criterion": "l1", **options})


def test_a_metric_that_becomes_nan_names_the_cut() -> None:
    def evaluate(model: nn.Module) -> float:
        return float("nan") if model.fc1.out_features < 20 else 0.0

    with pytest.raises(ValueError, match=r"NaN \(10 of 20 units of 'fc1' cut\)"):
        sensitivity(MLP(), torch.ones(1, 12), evaluate=evaluate, ratios=(0.5,), criterion="l1")


def test_a_loader_of_a_stream_has_no_length_and_is_read(x: Tensor) -> None:
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return (
                pair for images, labels in batches() for pair in zip(images, labels, strict=True)
            )

    model, loader = randomised(VGG()), torch.utils.data.DataLoader(Stream(), batch_size=4)
    table = sensitivity(model, x, loader, ratios=(0.5,), criterion="l1")
    assert table.baseline == pytest.approx(loss_of(model, batches()), rel=1e-6)
    streamed, listed = (
        prune(copy.deepcopy(model), x, data=data, ratio=0.5) for data in (loader, batches())
    )
    assert streamed.history == listed.history
