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


@pytest.mark.parametrize("seed", range(CASES))
def test_random_layers_agree_with_the_reference_in_float64(target: Target, seed: int) -> None:
    layers = random_layers(seed, target.device, budget=100_000)
    dim = seed % 2
    oracle = layers.double()
    generator = torch.Generator().manual_seed(seed)
    grads = [torch.randn(w.shape, generator=generator) for w in layers.weights]
    arguments = {"criteria": ALL, "dim": dim, "groups": layers.groups}
    extra, oracle_extra = {}, {}
    if dim == 0:
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
    for criterion in ALL:
        for a, b in zip(got[criterion], want[criterion], strict=True):
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
    scores = F.filter_scores(weights)["l1"]
    assert [s.item() for s in scores] == list(range(700))
