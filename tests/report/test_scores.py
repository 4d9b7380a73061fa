from __future__ import annotations

import copy
import json
from dataclasses import asdict
from itertools import pairwise

import pytest
import torch
from torch import nn

import orthoreg_ext as ox
from orthoreg_ext.report import ScoreRecorder
from orthoreg_ext.report.scores import BINS

pytest.importorskip("torch_pruning")

NORMS = ([1.0, 2.0, 3.0, 4.0], [1.5, 2.5, 100.0, 200.0, 300.0])


def net() -> nn.Sequential:
    """Two layers whose filters have the L1 norms of the table above, and an output layer."""
    model = nn.Sequential(
        nn.Conv2d(1, 4, 1, bias=False),
        nn.ReLU(),
        nn.Conv2d(4, 5, 1, bias=False),
        nn.Flatten(),
        nn.Linear(5, 2),
    )
    with torch.no_grad():
        for index, norms in zip((0, 2), NORMS, strict=True):
            weight = model[index].weight
            weight.copy_(torch.tensor(norms)[:, None, None, None].expand_as(weight))
            weight.div_(weight.shape[1])
    return model


IMAGE = torch.ones(1, 1, 1, 1)


def test_the_histograms_tell_what_went_and_what_stayed() -> None:
    recorder = ScoreRecorder("l1")
    result = ox.pruning.prune(net(), IMAGE, criterion=recorder.criterion, ratio=0.4)
    (counts,) = recorder.counts(result)
    # the lowest three of nine: 1, 1.5, 2
    assert counts.criterion == "l1"
    assert counts.layers == ["0", "2"]
    assert [sum(row) for row in counts.gone] == [2, 1]
    assert [sum(row) for row in counts.kept] == [2, 4]
    assert counts.cut == pytest.approx(2.0)
    assert counts.log  # 300 is more than 30 times 1
    assert counts.below == 0
    assert (counts.edges[0], counts.edges[-1]) == pytest.approx((1, 300))
    assert len(counts.edges) == BINS + 1
    ratios = [b / a for a, b in pairwise(counts.edges)]
    assert ratios == pytest.approx([300 ** (1 / BINS)] * BINS)
    for row, norms in zip(range(2), NORMS, strict=True):
        for i in range(BINS):
            low, high = counts.edges[i] * (1 + 1e-6), counts.edges[i + 1] * (1 - 1e-6)
            inside = sum(low < norm < high for norm in norms)
            assert counts.kept[row][i] + counts.gone[row][i] >= inside
    assert counts.gone[0][0] == 1  # the 1
    assert counts.kept[1][-1] == 1  # the 300


def test_the_cut_is_the_one_without_it() -> None:
    model = net()
    other = copy.deepcopy(model)
    recorder = ScoreRecorder("l1")
    first = ox.pruning.prune(model, IMAGE, criterion=recorder.criterion, ratio=0.4, rounds=2)
    second = ox.pruning.prune(other, IMAGE, criterion="l1", ratio=0.4, rounds=2)
    assert first.document() == second.document()
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True)
    )
    counts = recorder.counts(first)
    assert len(counts) == 2
    assert sum(map(sum, counts[0].kept)) == sum(map(sum, counts[1].kept + counts[1].gone))


def test_a_linear_axis_dead_filters_and_equal_scores() -> None:
    model = net()
    with torch.no_grad():
        model[2].weight[0] = 0  # dead: below every logarithmic axis
    recorder = ScoreRecorder("l1")
    result = ox.pruning.prune(model, IMAGE, criterion=recorder.criterion, ratio=0.2)
    (counts,) = recorder.counts(result)
    assert counts.log
    assert counts.below == 1
    assert counts.gone[1][0] == 1
    assert counts.edges[0] == pytest.approx(1)

    for value in (0.5, 0.0):
        model = net()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(value)
        recorder = ScoreRecorder(ox.pruning.CRITERIA["repr"])  # negative, all alike
        result = ox.pruning.prune(model, IMAGE, criterion=recorder.criterion, ratio=0.4)
        (counts,) = recorder.counts(result)
        assert not counts.log
        assert counts.edges == sorted(set(counts.edges))
        assert sum(map(sum, counts.gone)) == 3
        assert sum(map(sum, counts.kept)) == 6


def test_many_scorings_of_a_round_make_one_histogram() -> None:
    recorder = ScoreRecorder("l1")
    result = ox.pruning.prune(
        net(), IMAGE, criterion=recorder.criterion, ratio=0.4, scope="one_at_a_time"
    )
    (counts,) = recorder.counts(result)
    assert sum(map(sum, counts.gone)) == 3
    assert sum(map(sum, counts.kept)) == 6


@pytest.mark.parametrize("name", sorted(ox.pruning.CRITERIA))
def test_every_criterion_can_be_recorded(name: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8),
        nn.ReLU(), nn.Flatten(), nn.Linear(128, 3),
    )  # fmt: skip
    data = [(torch.randn(12, 1, 8, 8), torch.randint(3, (12,)))]
    recorder = ScoreRecorder(name)
    example = data[0][0][:1]
    result = ox.pruning.prune(model, example, criterion=recorder.criterion, ratio=0.5, data=data)
    (counts,) = recorder.counts(result)
    assert counts.criterion == name
    assert sum(map(sum, counts.gone)) == sum(row.before - row.after for row in result.layers)
    assert sum(map(sum, counts.kept + counts.gone)) == 14
    assert counts.edges == sorted(counts.edges)
    assert counts.edges[0] <= counts.cut + 1e-9 or counts.below
    assert json.dumps(asdict(counts), allow_nan=False)


def test_coupled_layers_count_once() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 6, 1)
            self.branch = nn.Conv2d(6, 6, 3, padding=1)
            self.out = nn.Linear(6, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.stem(x)
            return self.out((x + self.branch(x)).mean((2, 3)))

    torch.manual_seed(0)
    recorder = ScoreRecorder("l2")
    result = ox.pruning.prune(
        Residual(), torch.randn(1, 3, 4, 4), criterion=recorder.criterion, ratio=0.5
    )
    (counts,) = recorder.counts(result)
    assert counts.layers == ["stem"]
    assert [sum(row) for row in counts.gone] == [3]
    assert [sum(row) for row in counts.kept] == [3]


def test_nothing_recorded_is_an_error() -> None:
    recorder = ScoreRecorder("l1")
    result = ox.pruning.prune(net(), IMAGE, criterion="l1", ratio=0.4)
    with pytest.raises(ValueError, match=r"nothing was scored; pass criterion=recorder\.criterion"):
        recorder.counts(result)
    with pytest.raises(ValueError, match="criterion"):
        ScoreRecorder("l7")
