"""fpgm, repr, exemplar and variety: by hand, and on planted redundancy."""

from __future__ import annotations

import copy
import importlib
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from orthoreg_ext.pruning import CRITERIA, Criterion, exemplar, prune, redundancy, variety
from orthoreg_ext.pruning.evidence import Evidence
from orthoreg_ext.pruning.structure import trace
from orthoreg_ext.pruning.variety_rules import Similar, gate, pairwise, reweight, similarities

from .nets import VGG, Gated, Grouped, Separable, batches

POINTS = torch.tensor([[3.0, 0.0], [0.0, 4.0], [0.0, 0.0]])


def test_fpgm_by_hand() -> None:
    assert redundancy.fpgm(POINTS).tolist() == [8.0, 9.0, 7.0]


def test_repr_by_hand_with_a_zero_filter() -> None:
    half = 1 / math.sqrt(2)
    rows = torch.tensor([[2.0, 0.0], [-1.0, 1.0], [0.0, 0.0]])
    want = torch.tensor([-half, -half, -2.0], dtype=torch.float64)
    torch.testing.assert_close(redundancy.repr_(rows), want)


def test_exemplar_by_hand() -> None:
    rows = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [1.0, 0.1, 0.0], [0.0, 0.0, 1.0]])
    assert redundancy.exemplars(rows).tolist() in ([0, 1, 0, 3], [2, 1, 2, 3])
    scores = redundancy.exemplar(rows)
    assert sorted(scores.tolist())[1:] == [1.25, 1.25, 1.5]
    torch.testing.assert_close(
        scores.min(), torch.tensor(0.1 / (1 + math.sqrt(1.01)), dtype=torch.float64)
    )


@pytest.mark.parametrize("rows", [POINTS[:1], torch.zeros(5, 3), torch.ones(6, 9), POINTS[:2]])
def test_degenerate_matrices_have_finite_scores(rows: Tensor) -> None:
    for rule in (redundancy.fpgm, redundancy.repr_, redundancy.exemplar):
        scores = rule(rows)
        assert scores.shape == (len(rows),)
        assert bool(scores.isfinite().all())


def test_tiny_and_huge_filters_have_cosines() -> None:
    rows = torch.tensor([[1e-300, 1e-300], [1e200, 1e200], [1.0, 0.0]], dtype=torch.float64)
    want = torch.tensor([1 + 0.5**0.5, 1 + 0.5**0.5, 2 * 0.5**0.5], dtype=torch.float64)
    torch.testing.assert_close(-redundancy.repr_(rows), want)


# ---- the rules of variety

HOST = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
ALIKE = torch.zeros(4, 4, dtype=torch.float64)
ALIKE[2, 3] = ALIKE[3, 2] = 0.9
ALIKE[0, 3] = ALIKE[3, 0] = 0.6
NONE = torch.zeros(4, dtype=torch.bool)


def test_the_rules_by_hand() -> None:
    similar = Similar(ALIKE, NONE)
    # pairwise: of (2, 3) goes 2, of (0, 3) goes 0, then by host score
    assert pairwise(HOST, similar, 0.5).tolist() == [2.0, 3.0, 1.0, 4.0]
    assert gate(HOST, similar, 0.5).tolist() == [1.0, 3.0, 2.0, 4.0]
    assert gate(HOST, similar, 0.7).tolist() == [2.0, 3.0, 1.0, 4.0]
    torch.testing.assert_close(reweight(HOST, similar, 0.5), HOST * (1 - ALIKE.triu().amax(1)))
    torch.testing.assert_close(
        reweight(-HOST, similar, 0.5), -HOST * (1 + ALIKE.tril().amax(1))
    )  # of negative scores the last is the lowest


def test_without_redundancy_the_host_decides() -> None:
    host = torch.tensor([3.0, 1.0, 2.0, 1.0], dtype=torch.float64)
    similar = Similar(torch.zeros(4, 4, dtype=torch.float64), NONE)
    for rule in (pairwise, reweight, gate):
        order = rule(host, similar, 0.5).argsort(stable=True).tolist()
        assert order in ([1, 3, 2, 0], [3, 1, 2, 0])


def test_dead_units_go_first_whatever_their_host_score() -> None:
    dead = torch.tensor([False, False, False, True])
    for rule in (pairwise, reweight, gate):
        assert int(rule(HOST, Similar(torch.zeros_like(ALIKE), dead), 0.5).argmin()) == 3


def test_equal_host_scores_keep_the_order_of_variety() -> None:
    host = torch.ones(4, dtype=torch.float64)
    scores = pairwise(host, Similar(ALIKE, NONE), 0.5)
    assert scores.argsort(stable=True).tolist() == [3, 2, 1, 0]
    assert len(scores.unique()) == 4


# ---- planted


def planted(kind: str, seed: int) -> tuple[nn.Module, set[tuple[int, int]]]:
    """A network whose conv2 has 12 nearly orthogonal filters, but for two pairs."""
    generator = torch.Generator().manual_seed(seed)
    model = VGG()
    rows = torch.linalg.qr(torch.randn(72, 12, generator=generator))[0].T
    rows = rows + 0.01 * torch.randn(12, 72, generator=generator)
    pairs = {(3, 7), (2, 9)}
    for kept, other in pairs:
        if kind == "duplicate":
            rows[other] = rows[kept]
        elif kind == "rotated":  # by ten degrees
            a = math.radians(10)
            rows[other] = math.cos(a) * rows[kept] + math.sin(a) * rows[other]
        else:
            rows[other] = {"flipped": -1.0, "scaled": 0.5}[kind] * rows[kept]
    model.conv2.weight.data = rows.view(12, 8, 3, 3).contiguous()
    return model, pairs


def removed(model: nn.Module, criterion: str | Criterion, count: int, x: Tensor) -> set[int]:
    others = ["conv1", "conv3", "fc1"]
    result = prune(model, x, criterion=criterion, ratio=(count + 0.5) / 12, ignored=others)
    return {i for entry in result.history for i in entry["removed"]}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("criterion", "kinds"),
    [
        ("variety", ["duplicate", "rotated", "flipped", "scaled"]),
        (variety("l2", "reweight"), ["duplicate", "rotated", "flipped", "scaled"]),
        (variety("l2", "gate"), ["duplicate", "rotated", "flipped", "scaled"]),
        ("exemplar", ["duplicate", "rotated"]),
    ],
    ids=lambda value: getattr(value, "name", value) if not isinstance(value, list) else "",
)
def test_one_of_each_planted_pair_goes_first(
    criterion: str | Criterion, kinds: list[str], seed: int, x: Tensor
) -> None:
    for kind in kinds:
        model, pairs = planted(kind, seed)
        gone = removed(model, criterion, 2, x)
        assert [len(gone & set(pair)) for pair in pairs] == [1, 1], kind


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("criterion", "kinds"),
    [("fpgm", ["duplicate", "rotated"]), ("repr", ["duplicate", "rotated", "flipped", "scaled"])],
)
def test_planted_pairs_go_first(criterion: str, kinds: list[str], seed: int, x: Tensor) -> None:
    for kind in kinds:
        model, pairs = planted(kind, seed)
        assert removed(model, criterion, 4, x) == {i for pair in pairs for i in pair}, kind


# ---- which filters are compared


def alike_of(model: nn.Module, x: Tensor, layer: str) -> Tensor:
    structure = trace(model, x)
    found = similarities(model, structure)
    return next(
        similar.cosines
        for group, similar in zip(structure.prunable, found, strict=True)
        if layer in group.layers
    )


def units_of(model: nn.Module, x: Tensor, name: str, **options: Any) -> list[Tensor]:
    return CRITERIA[name].score(Evidence(name, model, trace(model, x), **options))


@pytest.mark.parametrize("name", ["fpgm", "repr", "exemplar", "variety"])
def test_groups_of_a_convolution_are_apart(name: str, x: Tensor) -> None:
    model = Grouped()
    before = units_of(model, x, name)
    with torch.no_grad():  # filter 0 of group 0, the same as filter 7 = 1 of group 1
        model.conv2.weight[7] = model.conv2.weight[0]
    own = [redundancy.fpgm(m) for m in model.conv2.weight.detach().flatten(1).chunk(4)]
    after = units_of(model, x, name)
    if name == "fpgm":
        torch.testing.assert_close(after[1], torch.stack(own).mean(0))
    with torch.no_grad():  # now filter 1 of group 0 too
        model.conv2.weight[1] = model.conv2.weight[0]
    assert not torch.equal(units_of(model, x, name)[1], after[1])
    assert len(before[1]) == 6


@pytest.mark.parametrize("name", ["fpgm", "repr", "exemplar", "variety"])
def test_depthwise_filters_are_never_compared(name: str, x: Tensor) -> None:
    model = Separable()
    before = units_of(model, x, name)
    with torch.no_grad():
        model.depth.weight[:] = model.depth.weight[0] * (2 if name != "variety" else 1)
    after = units_of(model, x, name)
    if name != "variety":  # its host, l1, does read them
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        rule = {"fpgm": redundancy.fpgm, "repr": redundancy.repr_, "exemplar": redundancy.exemplar}
        stem = rule[name](model.stem.weight.detach().flatten(1))
        assert any(a.shape == stem.shape and torch.allclose(a, stem) for a in after)
    alike = alike_of(model, x, "stem")
    cosines = redundancy.cosines(model.stem.weight.detach().flatten(1))
    torch.testing.assert_close(alike, cosines, rtol=0, atol=1e-11)


def test_the_halves_of_a_gate_are_compared_each_with_its_own(x: Tensor) -> None:
    model = Gated()
    rows = model.conv.weight.detach().flatten(1)
    halves = [redundancy.cosines(half) for half in rows.chunk(2)]
    alike = alike_of(model, x, "conv")
    assert alike.shape == (6, 6)
    # the excitation and its input are coupled with them
    rest = [model.excite.weight.detach().flatten(1)]
    want = sum(halves + [redundancy.cosines(m) for m in rest]) / 3
    torch.testing.assert_close(alike, want, rtol=0, atol=1e-11)


# ---- affinity propagation


def test_no_convergence_is_an_error_and_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, x: Tensor
) -> None:
    monkeypatch.setattr(redundancy, "_ATTEMPTS", ((0.5, 2),))
    model = VGG()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"layer 'conv1': affinity propagation on 8 filters did"):
        prune(model, x, criterion="exemplar", ratio=0.3)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_it_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.randn(20, 9)
    want = redundancy.exemplars(rows)
    monkeypatch.setattr(redundancy, "_ATTEMPTS", ((0.5, 2), (0.5, 200)))
    assert torch.equal(redundancy.exemplars(rows), want)
    assert 1 < len(want.unique()) < 20


def test_a_larger_beta_keeps_fewer() -> None:
    rows = torch.randn(30, 27)
    counts = [len(redundancy.exemplars(rows, beta).unique()) for beta in (0.3, 0.9, 3.0)]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > counts[-1]


def test_without_scikit_learn_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def missing(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ImportError, match="pip install scikit-learn"):
        redundancy.exemplars(torch.randn(3, 3))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: exemplar(0), "beta is 0, expected a number above 0"),
        (lambda: variety("l3"), "unknown criterion 'l3'"),
        (lambda: variety(mode="pair"), "unknown mode 'pair'; did you mean 'pairwise'"),
        (lambda: variety(mode="gate", threshold=2), "threshold is 2, expected a number in"),
    ],
)
def test_wrong_options(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_options_are_in_the_settings(x: Tensor) -> None:
    row = variety("fisher", "gate", 0.4)
    result = prune(VGG(), x, criterion=row, ratio=0.3, data=batches())
    assert result.settings["criterion"] == "variety(fisher, gate, 0.4)"
    assert exemplar(0.9).name == "exemplar(beta=0.9)"
    assert exemplar().name == "exemplar"
    assert variety().name == "variety"
