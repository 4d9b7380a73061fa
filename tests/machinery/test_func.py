"""torch.func: right where a function returns the term, refused where it would change tensors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import orthoreg_ext as ox
import orthoreg_ext.functional as F
from orthoreg_ext.penalties import PENALTIES
from tests.machinery import net as model

SMOOTH = [name for name in PENALTIES if PENALTIES[name].counts is None]


def weight(n: int = 3, k: int = 4) -> Tensor:
    made = torch.randn(n, k, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return made / 2


def penalty(name: str):
    return lambda w: F.gram_penalty([w], name).sum()


def by_autograd(name: str, w: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient and the second derivatives, without torch.func."""
    function = penalty(name)
    leaf = w.clone().requires_grad_()
    return torch.autograd.grad(function(leaf), leaf)[0], torch.autograd.functional.hessian(
        function, w
    )


@pytest.mark.parametrize("name", SMOOTH)
def test_transformations_are_right(name: str) -> None:
    w, f = weight(), penalty(name)
    first, second = by_autograd(name, w)
    for transformed in (grad, jacrev, jacfwd):
        torch.testing.assert_close(transformed(f)(w), first)
    torch.testing.assert_close(hessian(f)(w), second)
    torch.testing.assert_close(jvp(f, (w,), (w,))[1], (first * w).sum())
    torch.testing.assert_close(vjp(f, w)[1](torch.ones((), dtype=w.dtype))[0], first)
    both = torch.stack([w, 2 * w])
    torch.testing.assert_close(vmap(f)(both), torch.stack([f(w), f(2 * w)]))
    torch.testing.assert_close(vmap(grad(f))(both)[0], first)
    torch.testing.assert_close(grad(lambda w: vmap(f)(w).sum())(both)[0], first)


def test_gram_matrices_distances_and_scores() -> None:
    both = torch.stack([weight(), 2 * weight()])
    for function in (
        lambda w: F.gram([w])[0],
        lambda w: F.filter_distances([w])[0],
        lambda w: F.filter_correlation([w])[0],
        lambda w: F.filter_scores([w], [w], ("l1", "fisher"))["fisher"][0],
        lambda w: F.group_scores([w[0]], [[(0, None)]])[0],
    ):
        torch.testing.assert_close(vmap(function)(both), torch.stack([*map(function, both)]))


REFUSED = {
    "add_gram_penalty_grad_ changes .grad in place.*return.* gram_penalty": lambda w: (
        F.add_gram_penalty_grad_([w], strength=1).sum()
    ),
    "accumulate_fisher_ adds to fisher in place.*call it outside": lambda w: F.accumulate_fisher_(
        [w], [w], [torch.zeros_like(w)]
    )["fisher_diag"][0].sum(),
    "srip with vectors improves them in place.*without vectors=": lambda w: F.gram_penalty(
        [w], "srip", vectors=[torch.ones(1, len(w), dtype=w.dtype)]
    ).sum(),
}


@pytest.mark.parametrize("text", REFUSED)
@pytest.mark.parametrize("transformed", [grad, vmap, jacrev, jacfwd])
def test_what_changes_tensors_is_refused_with_the_remedy(text: str, transformed) -> None:
    w = weight() if transformed is not vmap else torch.stack([weight(), weight()])
    with pytest.raises(RuntimeError, match=text):
        transformed(REFUSED[text])(w)
    assert w.grad is None


class Loss(nn.Module):
    """The loss of a training step as a module, so that functional_call reaches the term."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.net = model.make()
        self.reg = ox.OrthoRegularizer(self.net, name, 1.0)

    def forward(self, x: Tensor) -> Tensor:
        return model.task(self.net, x) + self.reg()


@pytest.mark.parametrize("name", ["orthoreg", "frobenius", "mc"])
def test_a_regulariser_reads_the_parameters_of_functional_call(name: str) -> None:
    loss, x = Loss(name), model.batch()
    value = loss(x)
    value.backward()
    want = model.grads(loss)
    given = model.parameters(loss)

    def called(parameters: dict[str, Tensor], x: Tensor = x) -> Tensor:
        return functional_call(loss, parameters, (x,))

    torch.testing.assert_close(grad(called)(given), want)
    others = {key: 2 * p for key, p in given.items()}
    both = {key: torch.stack([p, others[key]]) for key, p in given.items()}
    doubled = called({key: nn.Parameter(p) for key, p in others.items()})
    assert doubled > 1.5 * value  # the term is that of what was given
    torch.testing.assert_close(vmap(called)(both), torch.stack([value, doubled]))
    for found in (vmap(grad(called))(both), grad(lambda p: vmap(called)(p).sum())(both)):
        torch.testing.assert_close({key: g[0] for key, g in found.items()}, want)
    single = vmap(grad(lambda p, x: called(p, x[None])), in_dims=(None, 0))(given, x)  # per sample
    torch.testing.assert_close({key: g.mean(0) for key, g in single.items()}, want)
    torch.testing.assert_close(loss(x), value)  # and nothing is left behind


def test_kept_eigenvectors_of_a_regulariser_are_refused() -> None:
    loss, x = Loss("srip"), model.batch()
    with pytest.raises(RuntimeError, match=r"srip with vectors.*torch\.func"):
        grad(lambda p: functional_call(loss, p, (x,)))(model.parameters(loss))
    loss(x).backward()


def test_frozen_layers_stay_frozen_in_a_transformation() -> None:
    """Those that are no argument of the function; what is one counts."""
    net = model.make()
    net.conv.requires_grad_(False)
    reg = ox.OrthoRegularizer(net, "so", 1.0, layer_weights="uniform")
    want = reg().detach()
    x = torch.ones(2, 1)
    torch.testing.assert_close(vmap(lambda x: x.sum() * 0 + reg())(x), want.expand(2))


def test_transformations_compile() -> None:
    w, f = weight(), penalty("frobenius")
    compiled = torch.compile(grad(f), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(w), by_autograd("frobenius", w)[0])
