"""The operators as PyTorch sees them: opcheck, gradcheck, torch.compile, launches, plans."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import orthoreg_ext as ox
import orthoreg_ext.functional as F
from orthoreg_ext.build_info import compiled
from tests.conftest import MARKING, NAMES, Target


def layers(target: Target, dtype: torch.dtype = torch.float64, requires_grad: bool = True):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        made = torch.randn(shape, generator=generator, dtype=torch.float64)
        return made.to(target.device, dtype)

    weights = [
        normal(3, 4),
        normal(4, 2, 3, 1).contiguous(memory_format=torch.channels_last),
        normal(6, 2),
    ]
    biases = [normal(3), normal(0), normal(6)]
    for tensor in (*weights, biases[0], biases[2]):
        tensor.requires_grad_(requires_grad)
    return weights, biases, [1, 1, 3]


def masks(target: Target) -> list[torch.Tensor]:
    """Pruned filters of those layers: some, none, and all of one group."""
    first = torch.tensor([False, True, False], device=target.device)
    last = torch.tensor([True, True, False, True, False, False], device=target.device)
    return [first, first.new_empty(0), last]


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_opcheck(target: Target, requires_grad: bool, masked: bool) -> None:
    weights, biases, groups = layers(target, torch.float32, requires_grad)
    columns, offsets = [0, 1, 0], [0.0, 1.0, 2.0]
    pruned = masks(target) if masked else []
    targets = [torch.ones(len(w), device=target.device) for w in weights] if masked else []
    targets[1:2] = [t.new_empty(0) for t in targets[1:2]]  # of the layer with columns
    ops = target.namespace
    check = torch.library.opcheck
    check(ops.gram.default, (weights, biases, groups, columns, "ieee"))
    plain = (weights, biases, pruned, targets, groups, columns, offsets)
    for name in NAMES:
        sides = plain if name not in MARKING else (*plain[:5], [0, 0, 0], offsets)
        check(ops.gram_penalty.default, (*sides, name, "3xtf32"))
    slopes = ops.gram_penalty(*plain, "so", "3xtf32")[1].detach()
    coefficients = torch.ones(3, device=target.device, requires_grad=requires_grad)
    check(
        ops.gram_penalty_grad.default,
        (*plain[:4], slopes, coefficients, groups, columns, "so", "mixed"),
    )
    plain = [w.detach() for w in weights], [b.detach() for b in biases]
    grads = [torch.zeros_like(t) for t in plain[0]], [torch.zeros_like(t) for t in plain[1]]
    check(
        ops.add_gram_penalty_grad_.default,
        (
            *(*plain, pruned, targets, *grads, coefficients.detach()),
            *(groups, columns, offsets, "so", "mixed-bf16"),
        ),
    )
    check(
        ops.filter_scores.default,
        (*(plain[0], grads[0], plain[1], grads[1]), groups, 0, ["l1", "fisher"]),
    )


def cases() -> list[tuple[str, str, bool, bool]]:
    """Name, side, with masks, with targets."""
    some = [(n, s, m, False) for n in NAMES for s in ("rows", "cols") for m in (False, True)]
    aimed = [(n, "rows", m, True) for n in ("so", "frobenius") for m in (False, True)]
    return [c for c in [*some, *aimed] if c[0] not in MARKING or c[1:3] == ("rows", True)]


@pytest.mark.parametrize(("name", "side", "masked", "aimed"), cases())
def test_gradients_of_first_and_second_order(
    target: Target, name: str, side: str, masked: bool, aimed: bool
) -> None:
    weights, biases, groups = layers(target)
    pruned = masks(target) if masked else None
    if pruned is not None:
        pruned[1] = None
    targets = [0.5, None, torch.arange(6.0, device=target.device)] if aimed else None
    inputs = [*weights, biases[0], biases[2]]
    factors = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64, device=target.device)

    def value(a, b, c, bias_a, bias_c, coefficients):
        return F.gram_penalty(
            [a, b, c],
            name,
            side=side,
            biases=[bias_a, None, bias_c],
            groups=groups,
            pruned=pruned,
            targets=targets,
            coefficients=coefficients,
        )

    arguments = (*inputs, factors.requires_grad_())
    assert gradcheck(value, arguments)
    assert gradgradcheck(value, arguments)


@pytest.mark.parametrize("side", ["rows", "cols"])
def test_gradients_of_the_gram_matrix(target: Target, side: str) -> None:
    weights, biases, groups = layers(target)

    def value(a, b, c, bias):
        return tuple(F.gram([a, b, c], side, biases=[bias, None, None], groups=groups))

    assert gradcheck(value, (*weights, biases[0]))
    assert gradgradcheck(value, (*weights, biases[0]))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("masked", [False, True])
def test_second_order_gradients_equal_the_reference(target: Target, name: str, masked) -> None:
    found = []
    pruned = masks(target) if masked or name in MARKING else [None] * 3
    pruned[1] = None
    for backend in (target.name, "reference"):
        weights, _, groups = layers(target)
        with ox.backend(backend):
            value = F.gram_penalty(weights, name, groups=groups, pruned=pruned).sum()
            first = torch.autograd.grad(value, weights, create_graph=True)
            norm = sum(g.square().sum() for g in first)
            second = torch.autograd.grad(norm, weights, create_graph=True)
            third = torch.autograd.grad(sum(g.square().sum() for g in second), weights)
        found.append((*first, *second, *third))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("engine", ["aot_eager", "inductor"])
def test_compiles_into_one_graph(target: Target, engine: str) -> None:
    if engine == "inductor" and target.name != "cpu":
        pytest.skip("one target is enough: inductor treats the operators as opaque")
    weights, biases, groups = layers(target, torch.float32)

    def term(weights, bias):
        values = F.gram_penalty(weights, "so", biases=[bias, None, None], groups=groups)
        return values.sum() * 0.5

    torch._dynamo.reset()
    graph = torch.compile(term, fullgraph=True, backend=engine)
    inputs = [*weights, biases[0]]
    got = graph(weights, biases[0])
    want = term(weights, biases[0])
    torch.testing.assert_close(got, want)
    for a, b in zip(
        torch.autograd.grad(got, inputs), torch.autograd.grad(want, inputs), strict=True
    ):
        torch.testing.assert_close(a, b)
    scores = torch.compile(
        lambda w: F.filter_scores(w, criteria=("l1", "l2"))["l2"], fullgraph=True, backend=engine
    )
    torch.testing.assert_close(
        scores([w.detach() for w in weights]), [w.detach().flatten(1).norm(dim=1) for w in weights]
    )


@pytest.mark.parametrize("name", NAMES)
def test_forward_mode_derivatives_are_right(target: Target, name: str) -> None:
    weight = torch.randn(4, 5, dtype=torch.float64, device=target.device)
    along = torch.randn_like(weight)
    pruned = [torch.tensor([1, 2])] if name in MARKING else None
    for function in (
        lambda w: F.gram_penalty([w], name, pruned=pruned).sum(),
        lambda w: F.gram([w])[0].square().sum(),
    ):
        _, tangent = torch.func.jvp(function, (weight,), (along,))
        moved = weight.clone().requires_grad_()
        (grad,) = torch.autograd.grad(function(moved), moved)
        torch.testing.assert_close(tangent, (grad * along).sum())


def resnet_like(device: torch.device) -> list[torch.Tensor]:
    """The weights of 54 layers, small."""
    shapes = [(8, 3, 3, 3)] + [(8, 8, 3, 3), (8, 8, 1, 1)] * 26 + [(10, 8)]
    return [torch.randn(s, device=device, requires_grad=True) for s in shapes]


@pytest.fixture
def launches(emulator: str):
    """Counts the emulator's kernel launches."""
    from tests.emu.build import build_project
    from tests.emu.kernels import Launches

    with ox.backend(emulator):
        yield Launches(build_project())


def test_54_layers_take_a_handful_of_launches(launches) -> None:
    weights = resnet_like(torch.device("cpu"))
    assert len(weights) == 54
    with launches.counted() as names:
        values = F.gram_penalty(weights, "orthoreg")
        torch.autograd.grad(values.sum(), weights)
    assert len(names) == 3, names  # Gram matrices, their penalties, gradients
    with launches.counted() as names:
        F.add_gram_penalty_grad_(weights, "so", strength=1)
    assert len(names) == 1, names  # small layers: everything at once
    weights[0] = torch.randn(70, 700, requires_grad=True)
    with launches.counted() as names:
        F.add_gram_penalty_grad_(weights, "so", strength=1)
    assert len(names) == 4, names  # Gram matrices, the slices of the long one, penalties, gradients


def test_54_layers_take_at_most_two_launches_for_all_scores(launches) -> None:
    weights = [w.detach() for w in resnet_like(torch.device("cpu"))]
    for dim in (0, 1):
        with launches.counted() as names:
            F.filter_scores(
                weights, weights, ("l1", "l2", "taylor", "fisher", "taylor_sq"), dim=dim
            )
        assert len(names) == 2, names  # sums of pieces in one read, and their totals


LEVELS = """
import torch, orthoreg_ext as ox, orthoreg_ext.functional as F
torch.manual_seed(0)
for n, k in ((1, 1), (5, 300), (33, 70), (97, 41), (130, 9)):
    w = torch.randn(n, k, dtype=torch.float64)
    for name in ("orthoreg", "so", "offdiag"):
        for weight, tolerance in ((w, 1e-12), (w.float(), 1e-6)):
            weight = weight.clone().requires_grad_()
            oracle = weight.detach().double().requires_grad_()
            value = F.gram_penalty([weight], name).sum()
            with ox.backend("reference"):
                want = F.gram_penalty([oracle], name).sum()
            value.backward(), want.backward()
            assert abs(value - want) <= tolerance * want, (n, k, name)
            error = (weight.grad - oracle.grad).norm()
            assert error <= tolerance * oracle.grad.norm(), (n, k, name)
print(torch.ops.orthoreg._cpu_level())
"""


@pytest.mark.skipif(not compiled, reason="needs the compiled modules")
@pytest.mark.parametrize("level", ["generic", "avx2", "avx512"])
def test_every_instruction_set_agrees(level: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LEVELS],
        env={**os.environ, "ORTHOREG_EXT_CPU": level},
        capture_output=True,
        text=True,
        check=False,
    )
    if "does not have these instructions" in done.stderr:
        pytest.skip(f"this processor has no {level}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == level


@pytest.mark.skipif(not compiled, reason="needs the compiled modules")
def test_unknown_instruction_set_names_the_valid_ones() -> None:
    done = subprocess.run(
        [sys.executable, "-c", LEVELS],
        env={**os.environ, "ORTHOREG_EXT_CPU": "mmx"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "ORTHOREG_EXT_CPU=mmx is unknown; valid:" in done.stderr
