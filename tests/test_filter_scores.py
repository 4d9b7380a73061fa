"""filter_scores: every criterion, both dimensions, layouts, precisions."""

from __future__ import annotations

import pytest
import torch

import orthoreg_ext as ox
import orthoreg_ext.functional as F
from orthoreg_ext.reference import SCORES
from tests.conftest import Target, random_layers, relative_error

ALL = tuple(SCORES)
CASES = 500

W = [[1.0, -2.0], [0.0, 3.0]]
G = [[2.0, 2.0], [5.0, -1.0]]
TABLE = {  # criterion: per filter, per input channel
    "l1": ([3.0, 3.0], [1.0, 5.0]),
    "l2": ([5**0.5, 3.0], [1.0, 13**0.5]),
    "taylor": ([2.0, 3.0], [2.0, 7.0]),
    "taylor_sq": ([20.0, 9.0], [4.0, 25.0]),
    "taylor_abs": ([6.0, 3.0], [2.0, 7.0]),
    "fisher": ([4.0, 9.0], [4.0, 49.0]),
}


@pytest.mark.parametrize("criterion", ALL)
def test_hand_computed(target: Target, criterion: str) -> None:
    weight, grad = (torch.tensor(t, device=target.device) for t in (W, G))
    for dim in (0, 1):
        (got,) = F.filter_scores([weight], [grad], (criterion,), dim=dim)[criterion]
        torch.testing.assert_close(got.cpu(), torch.tensor(TABLE[criterion][dim]))
    for dim, scores in enumerate(F.filter_scores([weight], [grad], (criterion,), dim=(0, 1))):
        torch.testing.assert_close(scores[criterion][0].cpu(), torch.tensor(TABLE[criterion][dim]))


@pytest.mark.parametrize("seed", range(CASES))
def test_random_layers_agree_with_the_reference_in_float64(target: Target, seed: int) -> None:
    layers = random_layers(seed, target.device, budget=100_000)
    dim = (0, 1, (0, 1))[seed % 3]
    oracle = layers.double()
    generator = torch.Generator().manual_seed(seed)
    grads = [torch.randn(w.shape, generator=generator) for w in layers.weights]
    arguments = {"criteria": ALL, "dim": dim, "groups": layers.groups}
    extra, oracle_extra = {}, {}
    if dim != 1:
        bias_grads = [
            None if b is None else torch.randn(b.shape, generator=generator) for b in layers.biases
        ]
        on_device = [None if b is None else b.to(target.device) for b in bias_grads]
        extra = {"biases": layers.biases, "bias_grads": on_device}
        double = [None if b is None else b.double() for b in bias_grads]
        oracle_extra = {"biases": oracle.biases, "bias_grads": double}
    got = F.filter_scores(
        layers.weights, [g.to(target.device) for g in grads], **arguments, **extra
    )
    with ox.backend("reference"):
        want = F.filter_scores(
            oracle.weights, [g.double() for g in grads], **arguments, **oracle_extra
        )
    if dim != (0, 1):
        got, want = (got,), (want,)
    for got_one, want_one in zip(got, want, strict=True):
        for criterion in ALL:
            for a, b in zip(got_one[criterion], want_one[criterion], strict=True):
                assert a.shape == b.shape
                assert a.dtype == torch.float32
                assert relative_error(a, b) <= target.tolerance, f"seed {seed} {criterion}"


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [0, 1])
def test_other_precisions_are_read_directly(target: Target, dtype, dim: int) -> None:
    layers = random_layers(3, target.device, dtype, count=8, budget=100_000, requires_grad=False)
    grads = [torch.randn_like(w) for w in layers.weights]
    oracle = [w.cpu().double().contiguous() for w in layers.weights]
    got = F.filter_scores(layers.weights, grads, ALL, dim=dim, groups=layers.groups)
    with ox.backend("reference"):
        want = F.filter_scores(
            oracle, [g.cpu().double() for g in grads], ALL, dim=dim, groups=layers.groups
        )
    tolerance = 1e-12 if dtype == torch.float64 else target.tolerance
    for criterion in ALL:
        for a, b in zip(got[criterion], want[criterion], strict=True):
            assert relative_error(a, b) <= tolerance, criterion


@pytest.mark.parametrize("dim", [0, 1])
def test_channels_last_and_a_contiguous_gradient(target: Target, dim: int) -> None:
    weight = torch.randn(6, 4, 3, 5, device=target.device)
    grad = torch.randn(6, 4, 3, 5, device=target.device)
    want = F.filter_scores([weight], [grad], ALL, dim=dim)
    moved = weight.contiguous(memory_format=torch.channels_last)
    got = F.filter_scores([moved], [grad], ALL, dim=dim)
    for criterion in ALL:
        torch.testing.assert_close(got[criterion], want[criterion])


DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
PIECES = {  # shape, groups: every way to cut a layer into pieces, and its edges
    "several row and column blocks": ((300, 33, 3, 3), 1),
    "one long filter": ((1, 5000), 1),
    "input channels without entries": ((4, 9, 0), 1),
    "groups without filters": ((0, 9), 1),
    "few long filters": ((3, 1024), 1),
    "many short filters": ((1500, 3), 1),
    "one entry a filter": ((700, 1), 1),
    "whole 16-byte loads": ((40, 64, 3, 3), 1),
    "one column more": ((70, 257), 1),
    "one column less": ((70, 255), 1),
    "depthwise": ((300, 1, 3, 3), 300),
    "small groups": ((96, 4, 3, 3), 32),
    "large groups": ((402, 8, 1, 1), 3),
    "groups of odd size": ((35, 6, 3, 1), 7),
    "no filters": ((0, 4), 1),
    "no entries": ((4, 0), 1),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", PIECES)
def test_pieces_of_every_kind(target: Target, name: str, dtype: torch.dtype) -> None:
    shape, groups = PIECES[name]
    generator = torch.Generator().manual_seed(0)
    weight, grad = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    layouts = [torch.contiguous_format]
    if len(shape) == 4:
        layouts.append(torch.channels_last)
    with ox.backend("reference"):
        want = F.filter_scores([weight.double()], [grad.double()], ALL, dim=(0, 1), groups=[groups])
    tolerance = 1e-13 if dtype == torch.float64 else target.tolerance
    for layout in layouts:
        w, g = (t.to(target.device).contiguous(memory_format=layout) for t in (weight, grad))
        both = F.filter_scores([w], [g], ALL, dim=(0, 1), groups=[groups])
        each = [F.filter_scores([w], [g], ALL, dim=dim, groups=[groups]) for dim in (0, 1)]
        alone = F.filter_scores([w], criteria=("l1", "l2"), dim=(0, 1), groups=[groups])
        for dim in (0, 1):
            for criterion in ALL:
                (got,) = both[dim][criterion]
                assert relative_error(got, want[dim][criterion][0]) <= tolerance, criterion
                assert torch.equal(each[dim][criterion][0], got), criterion
            for criterion, (got,) in alone[dim].items():
                assert relative_error(got, want[dim][criterion][0]) <= tolerance, criterion


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("offset", "stride"), [(0, 32), (16, 48), (1, 32), (0, 33), (2, 40)])
def test_views_aligned_or_not(target: Target, dtype: torch.dtype, offset: int, stride: int) -> None:
    values = torch.randn(offset + 20 * stride, generator=torch.Generator().manual_seed(0))
    values = values.to(target.device, dtype)
    weight = values[offset:].as_strided((20, 32), (stride, 1), offset)
    grad = weight.cos().contiguous()
    got = F.filter_scores([weight], [grad], ALL, dim=(0, 1))
    want = F.filter_scores([weight.contiguous()], [grad], ALL, dim=(0, 1))
    for dim in (0, 1):
        for criterion in ALL:
            assert relative_error(got[dim][criterion][0], want[dim][criterion][0]) <= 1e-6


def test_biases_count_for_filters_only(target: Target) -> None:
    weight, bias = torch.ones(3, 2, device=target.device), torch.ones(3, device=target.device)
    filters, inputs = F.filter_scores([weight], dim=(0, 1), biases=[bias])
    assert filters["l1"][0].tolist() == [3.0, 3.0, 3.0]
    assert inputs["l1"][0].tolist() == [3.0, 3.0]


def test_results_do_not_depend_on_the_other_layers(target: Target) -> None:
    generator = torch.Generator().manual_seed(0)
    weights = [
        torch.randn(shape, generator=generator).to(target.device)
        for shape in ((200, 77), (5, 5), (64, 640))
    ]
    grads = [w.sin() for w in weights]
    together = F.filter_scores(weights, grads, ALL, dim=(0, 1))
    for i in range(3):
        alone = F.filter_scores([weights[i]], [grads[i]], ALL, dim=(0, 1))
        for dim in (0, 1):
            for criterion in ALL:
                assert torch.equal(together[dim][criterion][i], alone[dim][criterion][0])


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_what_is_not_finite_stays_so_and_where_it_is(target: Target, value: float) -> None:
    weight = torch.ones(3, 40, device=target.device)
    weight[1, 7] = value
    for dim, place in ((0, 1), (1, 7)):
        for criterion, (scores,) in F.filter_scores(
            [weight], [weight.sign()], ALL, dim=dim
        ).items():
            assert (~scores.isfinite()).nonzero().flatten().tolist() == [place], criterion
            assert scores[place].isnan() == (value != value), criterion


def test_kernel_dimensions_in_any_order(target: Target) -> None:
    weight = torch.randn(4, 3, 2, 5, device=target.device).transpose(2, 3)
    (scores,) = F.filter_scores([weight], dim=1)["l1"]
    torch.testing.assert_close(scores, weight.abs().sum((0, 2, 3)))


def test_float32_gradients_of_half_weights_are_not_rounded(target: Target) -> None:
    weight = torch.ones(2, 8, dtype=torch.float16, device=target.device)
    grad = torch.full((2, 8), 1e-9, device=target.device)
    (scores,) = F.filter_scores([weight], [grad], ("taylor",))["taylor"]
    torch.testing.assert_close(scores.cpu(), torch.full((2,), 8e-9))


def test_bias_gradient_in_any_layout(target: Target) -> None:
    weight, bias = torch.zeros(3, 2, device=target.device), torch.ones(3, device=target.device)
    grads = torch.arange(6.0, device=target.device).view(3, 2)[:, 1]
    (scores,) = F.filter_scores([weight], [weight], ("taylor",), biases=[bias], bias_grads=[grads])[
        "taylor"
    ]
    assert scores.tolist() == [1.0, 3.0, 5.0]


def test_one_dimensional_weights_score_each_entry(target: Target) -> None:
    gamma = torch.tensor([1.0, -2.0, 0.0], device=target.device)
    (scores,) = F.filter_scores([gamma], criteria=("l1",))["l1"]
    assert scores.tolist() == [1.0, 2.0, 0.0]


def test_grouped_layers_score_every_input_of_every_group(target: Target) -> None:
    weight = torch.randn(6, 2, 3, 3, device=target.device)
    (scores,) = F.filter_scores([weight], criteria=("l1",), dim=1, groups=[3])["l1"]
    want = weight.unflatten(0, (3, 2)).abs().sum((1, 3, 4)).flatten()
    torch.testing.assert_close(scores, want)


def test_signed_sum_that_cancels_keeps_its_digits(target: Target) -> None:
    weight = torch.full((1, 4096), 1.0, device=target.device)
    grad = torch.full((1, 4096), 1.0, device=target.device)
    grad[0, ::2] = -1.0
    grad[0, 0] = -1.0 + 2**-20
    (score,) = F.filter_scores([weight], [grad], ("taylor",))["taylor"]
    assert score.item() == 2**-20


def test_empty_list_and_single_criterion(target: Target) -> None:
    assert F.filter_scores([], criteria=("l1", "l2")) == {"l1": [], "l2": []}


def test_layers_beyond_one_launch(target: Target) -> None:
    weights = [torch.full((1,), float(i), device=target.device) for i in range(700)]
    for scores in F.filter_scores(weights, dim=(0, 1)):
        assert [s.item() for s in scores["l1"]] == list(range(700))
