"""dso and gor, which another row's kernels compute, and what some penalties take beside weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.autograd import gradgradcheck

import orthoreg_ext as ox
import orthoreg_ext.functional as F
from orthoreg_ext.options import count_groups
from orthoreg_ext.penalties import PENALTIES
from tests.conftest import OTHERS

# filters, num_groups, groups
GROUPS = [
    *((1, 32, 1), (3, 32, 1), (4, 32, 1), (7, 32, 1), (8, 32, 2), (8, 1, 1), (12, 32, 3)),
    *((16, 32, 4), (64, 32, 16), (128, 32, 32), (256, 32, 32), (64, 7, 4), (60, 8, 6), (61, 32, 1)),
    (20, 4, 4),
]


@pytest.mark.parametrize(("filters", "most", "groups"), GROUPS)
def test_the_groups_of_a_layer(filters: int, most: int, groups: int) -> None:
    """At least 4 filters in each, as many as divide the filters up to what is asked for."""
    assert count_groups(filters, most) == groups


def test_gor_is_so_of_its_groups_by_the_same_kernels() -> None:
    weight = torch.randn(24, 5, 3, 3, requires_grad=True)
    value = F.gram_penalty([weight], "gor", num_groups=3)
    want = F.gram_penalty([weight], "so", groups=[3])
    assert torch.equal(value, want)
    (grad,) = torch.autograd.grad(want.sum(), weight)
    F.add_gram_penalty_grad_([weight], "gor", strength=1, num_groups=3)
    assert torch.equal(weight.grad, grad)
    assert torch.equal(
        F.gram_penalty([weight], "gor", groups=[2], num_groups=3),
        F.gram_penalty([weight], "so", groups=[6]),
    )


def test_gor_has_32_groups_where_nothing_is_said() -> None:
    weight = torch.randn(256, 6)
    want = F.gram_penalty([weight], "so", groups=[32])
    assert torch.equal(F.gram_penalty([weight], "gor"), want)


# W, value, gradient
DOUBLE = [
    ([[1.0, 2.0]], 33.0, [[32.0, 64.0]]),  # rows (5 - 1)^2, cols 0^2 + 2 * 2^2 + 3^2
    ([[1.0], [1.0]], 3.0, [[8.0], [8.0]]),
    ([[1.0, 0.0], [0.0, 1.0]], 0.0, [[0.0, 0.0], [0.0, 0.0]]),
]


@pytest.mark.parametrize(("w", "value", "grad"), DOUBLE)
@pytest.mark.parametrize("side", ["rows", "cols", "small"])
def test_dso_by_hand(w, value, grad, side: str) -> None:
    weight = torch.tensor(w, requires_grad=True)
    got = F.gram_penalty([weight], "dso", side=side)
    assert got.tolist() == [value]
    assert torch.autograd.grad(got.sum(), weight)[0].tolist() == grad
    added = F.add_gram_penalty_grad_([weight], "dso", strength=0.5, side=side)
    assert added.tolist() == [value]
    assert weight.grad.tolist() == (0.5 * torch.tensor(grad)).tolist()


@pytest.mark.parametrize("shape", [(6, 4), (4, 6)])
def test_dso_counts_the_filters_that_are_left(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    kept = weight.detach()[[0, 2, 3]]
    gone = [i for i in range(shape[0]) if i not in (0, 2, 3)]
    got = F.add_gram_penalty_grad_([weight], "dso", strength=1, pruned=[torch.tensor(gone)])
    sides = [F.gram_penalty([kept], "so", side=side) for side in ("rows", "cols")]
    torch.testing.assert_close(got, sum(sides))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("name", ["dso", "gor"])
def test_second_derivatives_on_both_implementations(name: str, backend: str) -> None:
    generator = torch.Generator().manual_seed(0)
    for shape in ((8, 3), (8, 12)):
        weight = torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
        with ox.backend(backend):
            assert gradgradcheck(lambda w: F.gram_penalty([w], name), weight)


def small_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.Conv2d(16, 24, 3, groups=2), nn.Linear(5, 40), nn.Linear(40, 4)
    )


@pytest.mark.parametrize("name", ["dso", "gor"])
def test_attached_it_is_the_term_by_the_prepared_operator(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = small_net()
    reg = ox.OrthoRegularizer(net, name, strength=0.3)
    reg().backward()
    want = [None if p.grad is None else p.grad.clone() for p in net.parameters()]
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    reg.attach(optimizer)

    def by_call(*_: object, **__: object) -> None:
        raise AssertionError("it took the call")

    monkeypatch.setattr(F, "add_gram_penalty_grad_", by_call)
    for _ in range(2):
        net.zero_grad()
        optimizer.step()
        for parameter, gradient in zip(net.parameters(), want, strict=True):
            if gradient is None:
                assert parameter.grad is None
            else:
                torch.testing.assert_close(parameter.grad, gradient)


def test_gor_of_a_regulariser_weighs_layers_by_the_size_of_their_groups() -> None:
    net = small_net()
    reg = ox.OrthoRegularizer(net, "gor", num_groups=4, layer_weights="mean", bias=False)
    # 4 groups of 4 x 27; 2 x 3 of 4 x 72; 4 of 10 x 5, on the columns
    assert [r.weight for r in reg.report()] == pytest.approx([1 / 64, 1 / 96, 1 / 100])
    assert [r.side for r in reg.report()] == ["rows", "rows", "cols"]
    with pytest.raises(ValueError, match="saved with num_groups=4, but this regulariser has 32"):
        ox.OrthoRegularizer(net, "gor", layer_weights="mean", bias=False).load_state_dict(
            reg.state_dict()
        )


@pytest.mark.parametrize("name", OTHERS)
def test_every_regulariser_reports_what_its_term_is_made_of(name: str) -> None:
    net = small_net().double()
    reg = ox.OrthoRegularizer(net, name, strength=1.0, include="*")
    report = reg.report()
    assert [row.name for row in report] == ["0", "1", "2", "3"]
    want = sum(row.weight * row.penalty for row in report)
    for _ in range(100 if name == "srip" else 1):
        value = reg().item()
    assert value == pytest.approx(want, rel=1e-3 if name == "srip" else 1e-9)


@pytest.mark.parametrize("name", OTHERS)
def test_mixed_precisions_frozen_and_shared_weights(name: str) -> None:
    torch.manual_seed(0)
    single, double = torch.randn(8, 6), torch.randn(8, 6, dtype=torch.float64)
    leaves = [w.clone().requires_grad_() for w in (single, double)]
    weights = [leaves[0], leaves[1], leaves[0], single, leaves[1].t()]
    values = F.gram_penalty(weights, name)
    assert values.dtype == torch.float64
    want = torch.autograd.grad(values.sum(), leaves)
    coefficients = [1.0, 2.0, 0.5, 1.0, 3.0]
    added = F.add_gram_penalty_grad_(weights, name, strength=0.5, coefficients=coefficients)
    torch.testing.assert_close(added, values.detach() * torch.tensor(coefficients))
    first, turned = (F.gram_penalty([w], name) for w in (leaves[1], leaves[1].t()))
    (want,) = torch.autograd.grad((2 * first + 3 * turned).sum(), leaves[1])
    torch.testing.assert_close(leaves[1].grad, 0.5 * want)
    (want,) = torch.autograd.grad(F.gram_penalty([leaves[0]], name).sum(), leaves[0])
    torch.testing.assert_close(leaves[0].grad, 0.5 * 1.5 * want)


W = torch.randn(8, 3, 2, 2)
BAD = [
    ("so", {"strides": [1]}, "penalty 'so' takes no strides=, only 'ocnn': leave it out"),
    ("mc", {"vectors": [None]}, "penalty 'mc' takes no vectors=, only 'srip'"),
    ("dso", {"num_groups": 2}, "penalty 'dso' takes no num_groups=, only 'gor'"),
    ("gor", {"num_groups": 0}, "num_groups is 0, expected a positive number of groups"),
    ("dso", {"targets": [2.0]}, "penalty 'dso' is .* it has no target for the norms of filters"),
    ("ocnn", {"side": "cols"}, "penalty 'ocnn' and side='cols' exclude each other"),
    ("ocnn", {"strides": [0]}, r"strides\[0\] is 0, expected a positive number or two"),
    ("ocnn", {"strides": [(1, 2, 3)]}, r"strides\[0\] is \(1, 2, 3\), expected a positive"),
    ("ocnn", {"strides": [1.5]}, r"strides\[0\] is 1.5, expected a positive"),
    ("ocnn", {"strides": [None]}, r"strides\[0\] is None, expected a positive"),
    ("ocnn", {"strides": [True]}, r"strides\[0\] is True, expected a positive"),
    ("ocnn", {"strides": [1, 1]}, "strides has 2 entries, expected 1"),
    ("ocnn", {"biases": [torch.ones(8)]}, r"biases\[0\]: penalty 'ocnn' is about the convolution"),
    ("ocnn", {"weights": [W[..., 0]]}, r"weights\[0\] has shape \(8, 3, 2\), but penalty 'ocnn'"),
    (
        "srip",
        {"vectors": [torch.ones(1, 7)]},
        r"vectors\[0\] is .* \(1, 7\) .*, expected .* \(1, 8\)",
    ),
    (
        "srip",
        {"vectors": [torch.ones(1, 8).double()]},
        r"vectors\[0\] is torch.float64 .*, expected",
    ),
    ("srip", {"vectors": [torch.ones(1, 8).requires_grad_()]}, r"vectors\[0\] .* detach it"),
    (
        "srip",
        {"vectors": [torch.ones(1, 1).expand(1, 8)]},
        r"vectors\[0\] has entries that share memory .*: clone it",
    ),
    ("so", {"weights": [], "strides": []}, "penalty 'so' takes no strides="),
    ("srip", {"vectors": []}, "vectors has 0 entries, expected 1"),
]


@pytest.mark.parametrize(("name", "given", "text"), BAD, ids=[f"{n} {t[:25]}" for n, _, t in BAD])
def test_what_a_penalty_does_not_take_is_refused_and_changes_nothing(name, given, text) -> None:
    weight = W.clone().requires_grad_()
    arguments = {"weights": [weight], "side": "rows", **given}
    with pytest.raises(ValueError, match=text):
        F.gram_penalty(penalty=name, **arguments)
    with pytest.raises(ValueError, match=text):
        F.add_gram_penalty_grad_(penalty=name, strength=1.0, **arguments)
    assert weight.grad is None


def test_what_is_no_sequence_is_refused() -> None:
    for name, given in (("ocnn", {"strides": 2}), ("srip", {"vectors": torch.ones(1, 8)})):
        with pytest.raises(TypeError, match="must be a sequence with one entry for each"):
            F.gram_penalty([W], name, **given)
    with pytest.raises(TypeError, match=r"vectors\[0\] must be a tensor \[1, 8\]"):
        F.gram_penalty([W], "srip", vectors=[[1.0]], side="rows")
    with pytest.raises(ValueError, match="penalty 'so' takes no num_groups=, only 'gor'"):
        ox.OrthoRegularizer(nn.Linear(3, 3), "so", num_groups=2)
    with pytest.raises(ValueError, match="num_groups is 0, expected"):
        ox.OrthoRegularizer(nn.Linear(3, 3), "gor", num_groups=0)


def test_the_page_of_the_penalties_has_all_of_them() -> None:
    text = (Path(__file__).parents[1] / "docs" / "penalties.md").read_text(encoding="utf-8")
    first = [line.split("|")[1] for line in text.splitlines() if line.startswith("| [`")]
    for name in PENALTIES:  # a row of the table of formulas, with a link to the page
        assert first.count(f" [`{name}`](penalties/{name}.md) ") == 1, name
        assert (Path(__file__).parents[1] / "docs" / "penalties" / f"{name}.md").is_file(), name


def test_every_row_says_all_of_itself() -> None:
    for name, row in PENALTIES.items():
        assert row.name == name
        assert all(len(text) > 3 for text in (row.formula, row.gradient, row.source, row.code))


def test_strides_stay_with_their_layers_where_precisions_are_mixed() -> None:
    weights, strides = [torch.randn(2, 2, 3, 3).double(), torch.randn(2, 2, 3, 3)], [1, 2]
    together = F.gram_penalty(weights, "ocnn", strides=strides)
    alone = [
        F.gram_penalty([w], "ocnn", strides=[s]).double()
        for w, s in zip(weights, strides, strict=True)
    ]
    assert torch.equal(together, torch.cat(alone))
