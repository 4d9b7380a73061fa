"""accumulate_fisher_: accumulated squares of gradients, and the scores with them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import orthoreg_ext as ox
import orthoreg_ext.functional as F
from orthoreg_ext.reference import FISHER_DIAG, SCORES, compute_dtype
from tests.conftest import Target, random_layers, relative_error

ALL = (*SCORES, FISHER_DIAG)
W = [[1.0, -2.0], [0.0, 3.0]]
G = [[2.0, 2.0], [5.0, -1.0]]
FISHER = [[1.0, 0.0], [2.0, 0.5]]


def zeros(weights: list[Tensor]) -> list[Tensor]:
    return [torch.zeros_like(w, dtype=compute_dtype(w.dtype)) for w in weights]


def test_hand_computed(target: Target) -> None:
    weight, grad, fisher = (torch.tensor(t, device=target.device) for t in (W, G, FISHER))
    filters, inputs = F.accumulate_fisher_([weight], [grad], [fisher], dim=(0, 1))
    assert fisher.tolist() == [[5.0, 4.0], [27.0, 1.5]]
    assert filters[FISHER_DIAG][0].tolist() == [21.0, 13.5]
    assert inputs[FISHER_DIAG][0].tolist() == [5.0, 29.5]


@pytest.mark.parametrize("seed", range(60))
def test_random_layers_agree_with_the_reference_in_float64(target: Target, seed: int) -> None:
    dtype = (torch.float32, torch.float64, torch.bfloat16, torch.float16, None)[seed % 5]
    layers = random_layers(seed, target.device, dtype, budget=50_000, requires_grad=False)
    dim = (0, 1, (0, 1))[seed % 3]
    fisher = zeros(layers.weights)
    oracle = [w.double().cpu().contiguous() for w in layers.weights]
    oracle_fisher = zeros(oracle)
    for step in range(2):
        grads = [(w * (2 + step)).cos() for w in layers.weights]
        got = F.accumulate_fisher_(
            layers.weights, grads, fisher, ALL, dim=dim, groups=layers.groups
        )
        with ox.backend("reference"):
            want = F.accumulate_fisher_(
                oracle,
                [g.double().cpu() for g in grads],
                oracle_fisher,
                ALL,
                dim=dim,
                groups=layers.groups,
            )
    for a, b in zip(fisher, oracle_fisher, strict=True):
        assert relative_error(a, b) <= target.tolerance, f"seed {seed}"
    if dim != (0, 1):
        got, want = (got,), (want,)
    for got_one, want_one in zip(got, want, strict=True):
        for criterion in ALL:
            for a, b in zip(got_one[criterion], want_one[criterion], strict=True):
                assert relative_error(a, b) <= target.tolerance, f"seed {seed} {criterion}"


@pytest.mark.parametrize("dim", [0, 1, (0, 1)])
def test_the_other_criteria_are_those_of_filter_scores(target: Target, dim) -> None:
    weight = torch.randn(70, 6, 3, 3, device=target.device)
    grad = weight.cos()
    got = F.accumulate_fisher_([weight], [grad], zeros([weight]), tuple(SCORES), dim=dim)
    want = F.filter_scores([weight], [grad], tuple(SCORES), dim=dim)
    if dim != (0, 1):
        got, want = (got,), (want,)
    for got_one, want_one in zip(got, want, strict=True):
        for criterion in SCORES:
            assert torch.equal(got_one[criterion][0], want_one[criterion][0])


@pytest.mark.parametrize("dim", [0, 1])
def test_accumulators_in_any_memory_order(target: Target, dim: int) -> None:
    weight = torch.randn(4, 3, 2, 5, device=target.device)
    grad = weight.cos()
    want = zeros([weight])
    scores = F.accumulate_fisher_([weight], [grad], want, dim=dim)[FISHER_DIAG][0]
    moved = zeros([weight.contiguous(memory_format=torch.channels_last)])
    got = F.accumulate_fisher_([weight], [grad], moved, dim=dim)[FISHER_DIAG][0]
    torch.testing.assert_close(moved, want)
    torch.testing.assert_close(got, scores)
    turned = [weight.transpose(2, 3)]  # a copy is scored where the kernel dimensions are turned
    fisher = zeros(turned)
    F.accumulate_fisher_(turned, [grad.transpose(2, 3)], fisher, dim=dim)
    torch.testing.assert_close(fisher[0].transpose(2, 3), want[0])


def test_a_row_of_a_larger_buffer(target: Target) -> None:
    buffer = torch.zeros(3, 7, device=target.device)
    weight = torch.full((3, 5), 2.0, device=target.device)
    F.accumulate_fisher_([weight], [weight], [buffer[:, 1:6]])
    assert buffer[:, 1:6].eq(4).all()
    assert buffer.sum() == 60


def test_no_layers() -> None:
    assert F.accumulate_fisher_([], [], []) == {FISHER_DIAG: []}


W1 = torch.ones(2, 3)
HALF = torch.ones(2, 3, dtype=torch.float16)
REFUSED = [
    (lambda f: F.accumulate_fisher_([W1], [W1, W1], [f]), ValueError, "grads has 2 entries"),
    (lambda f: F.accumulate_fisher_([W1], [None], [f]), ValueError, r"grads\[0\] is None"),
    (lambda f: F.accumulate_fisher_([W1, W1], [W1, W1], [f]), ValueError, "fisher has 1 entr"),
    (lambda f: F.accumulate_fisher_([W1], [W1], f), TypeError, "fisher must be a sequence"),
    (
        lambda f: F.accumulate_fisher_([W1, W1], [W1, W1], [f, f]),
        ValueError,
        r"fisher\[1\] is the tensor of fisher\[0\]",
    ),
    (
        lambda f: F.accumulate_fisher_([W1, HALF], [W1, HALF], [f, HALF]),
        TypeError,
        r"fisher\[1\] has dtype torch.float16, expected torch.float32: use torch.zeros_like",
    ),
    (
        lambda f: F.accumulate_fisher_([W1, W1], [W1, W1], [f, W1[:1]]),
        ValueError,
        r"fisher\[1\] has shape \(1, 3\) on cpu, expected \(2, 3\)",
    ),
    (lambda f: F.accumulate_fisher_([W1], [W1], [f], ("fischer",)), ValueError, "did you mean"),
    (lambda f: F.accumulate_fisher_([W1], [W1], [f], dim=3), ValueError, "dim is 3"),
]


@pytest.mark.parametrize(("call", "kind", "message"), REFUSED)
def test_nothing_is_accumulated_where_a_call_is_refused(call, kind, message) -> None:
    fisher = torch.zeros(2, 3)
    with pytest.raises(kind, match=message):
        call(fisher)
    assert fisher.eq(0).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"names": ["fisher_diag", "none"]}, "no compiled criterion"),
        ({"dim": 3}, "dim must be"),
        ({"fisher": []}, "one accumulator for each weight"),
        ({"fisher": "twice"}, "the same accumulator"),
        ({"fisher": "half"}, "the computing precision"),
        ({"fisher": "turned"}, "memory order"),
        ({"grads": []}, "need one gradient"),
    ],
)
def test_the_operator_refuses_before_it_writes(target: Target, change, message: str) -> None:
    weights = [torch.ones(4, 4, device=target.device) for _ in range(2)]
    fisher = [torch.zeros(4, 4, device=target.device) for _ in range(2)]
    wrong = {
        "twice": [fisher[0], fisher[0]],
        "half": [fisher[0], fisher[1].half()],
        "turned": [fisher[0], torch.zeros(4, 8, device=target.device)[:, ::2]],
    }
    arguments = {"grads": weights, "fisher": fisher, "dim": 0, "names": ["fisher_diag"]} | change
    passed = arguments["fisher"]
    passed = wrong[passed] if isinstance(passed, str) else passed
    with pytest.raises(RuntimeError, match=message):
        target.namespace.accumulate_fisher_(
            weights, arguments["grads"], passed, [1, 1], arguments["dim"], arguments["names"]
        )
    assert all(f.eq(0).all() for f in fisher)


def test_opcheck(target: Target) -> None:
    weights = [torch.randn(3, 4, device=target.device), torch.randn(2, 2, 3, device=target.device)]
    grads = [w.cos() for w in weights]
    torch.library.opcheck(
        target.namespace.accumulate_fisher_.default,
        (weights, grads, zeros(weights), [1, 1], 2, ["fisher_diag", "l1"]),
    )


def test_compiles_into_one_graph(target: Target) -> None:
    weight = torch.randn(3, 4, device=target.device)

    def step(fisher: Tensor) -> Tensor:
        return F.accumulate_fisher_([weight], [weight.cos()], [fisher])[FISHER_DIAG][0]

    compiled, eager = zeros([weight])[0], zeros([weight])[0]
    got = torch.compile(step, fullgraph=True, backend="aot_eager")(compiled)
    torch.testing.assert_close(got, step(eager))
    torch.testing.assert_close(compiled, eager)


def test_accumulators_that_share_memory_are_refused_before_anything_is_added(
    target: Target,
) -> None:
    weights = [torch.ones(4, 3, device=target.device) for _ in range(2)]
    fisher = [torch.zeros(4, 3, device=target.device)]
    fisher.append(torch.zeros(1, 3, device=target.device).expand(4, 3))
    with pytest.raises(ValueError, match=r"fisher\[1\] has entries that share memory"):
        F.accumulate_fisher_(weights, weights, fisher)
    assert not fisher[0].any()
