"""Autocast rounds neither the term nor its gradient, also where the backward pass is inside."""

from __future__ import annotations

import pytest
import torch

import orthoreg_ext as ox
import orthoreg_ext.functional as F
from orthoreg_ext.build_info import compiled
from orthoreg_ext.penalties import PENALTIES
from tests.machinery import net as model

BACKENDS = [
    pytest.param(
        "cpu", marks=pytest.mark.skipif(not compiled, reason="needs the compiled modules")
    ),
    "reference",
]


def derivatives(name: str, dtype: torch.dtype | None) -> list[torch.Tensor]:
    """The value, its gradient and the gradient of that one's norm; all of it inside autocast."""
    weight = torch.randn(8, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    weight.requires_grad_()
    marked = {"pruned": [torch.tensor([1, 2])]} if PENALTIES[name].counts is not None else {}
    with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        value = F.gram_penalty([weight], name, **marked)
        (first,) = torch.autograd.grad(value.sum(), weight, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), weight)
    return [value.detach(), first.detach(), second]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", PENALTIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_derivatives_inside_autocast_are_those_outside(backend: str, name: str, dtype) -> None:
    with ox.backend(backend):
        for got, want in zip(derivatives(name, dtype), derivatives(name, None), strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gram_matrices_distances_and_correlations_too(backend: str) -> None:
    def run(enabled: bool) -> list[torch.Tensor]:
        weight = torch.randn(6, 20, generator=torch.Generator().manual_seed(0)).requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            found = [F.gram([weight])[0], F.filter_distances([weight])[0]]
            found.append(F.filter_correlation([weight])[0])
            return [*found, *torch.autograd.grad(sum(f.square().sum() for f in found), weight)]

    with ox.backend(backend):
        for got, want in zip(run(True), run(False), strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("name", ["orthoreg", "mc", "srip", "ocnn"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_training_step_inside_autocast_gets_the_exact_term(name: str, dtype) -> None:
    net = model.make()
    reg = ox.OrthoRegularizer(net, name, 1.0)
    state = reg.state_dict()  # eigenvectors
    reg().backward()
    term = model.grads(net)
    net.zero_grad()
    reg.load_state_dict(state)
    with torch.autocast("cpu", dtype=dtype):
        (model.task(net, model.batch()) * 0 + reg()).backward()
    for key, want in term.items():
        assert torch.equal(model.grads(net)[key], want), key


def test_products_of_the_reference_are_not_rounded_by_chance() -> None:
    """The tests above can fail: a plain product is rounded in a backward pass inside autocast."""
    weight = torch.randn(8, 36, generator=torch.Generator().manual_seed(0)).requires_grad_()
    (want,) = torch.autograd.grad((weight @ weight.mT).square().sum(), weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with torch.autocast("cpu", enabled=False):
            value = (weight @ weight.mT).square().sum()
        (got,) = torch.autograd.grad(value, weight)
    assert not torch.allclose(got, want, rtol=1e-4)
