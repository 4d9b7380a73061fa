"""torch.compile(fullgraph=True): the term, the functional calls, models and optimizers.

Inductor takes long, so one test is for it and holds much; the others stop at AOTAutograd, which
traces the same graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import orthoreg_ext as ox
import orthoreg_ext.functional as F
from orthoreg_ext.penalties import PENALTIES
from tests.machinery import net as model


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(function: Callable[..., object], backend: str = "aot_eager", **options: bool):
    return torch.compile(function, fullgraph=True, backend=backend, **options)


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


# --- the training step


def test_a_training_step_by_inductor() -> None:
    """A convolution in channels_last, a parametrized layer; operators and plain PyTorch."""
    found = []
    for through in (lambda f: f, lambda f: compiled(f, "inductor")):
        torch.manual_seed(0)
        conv, fc = nn.Conv2d(3, 6, 2), nn.Linear(6, 5)
        net = nn.Sequential(conv, nn.Flatten(2), nn.AdaptiveAvgPool1d(1), nn.Flatten(), fc)
        net.append(nn.Linear(5, 4)).to(memory_format=torch.channels_last)
        nn.utils.parametrizations.weight_norm(fc)
        reg = ox.OrthoRegularizer(net, "orthoreg", 1.0)

        def loss(x: Tensor, net=net, reg=reg, conv=conv, fc=fc) -> Tensor:
            more = F.gram_penalty([fc.weight, conv.weight], "frobenius").sum()
            return model.task(net, x) + reg() + more + F.gram_penalty([conv.weight], "mc").sum()

        step = through(loss)
        for seed in range(2):
            value = step(model.batch(seed=seed))
            value.backward()
        found.append((value.detach(), model.grads(net)))
        assert conv.weight.grad.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_batches_of_any_size_share_a_graph() -> None:
    found = []
    counter = CompileCounterWithBackend("aot_eager")
    for through in (lambda f: f, lambda f: torch.compile(f, fullgraph=True, backend=counter)):
        net = model.make()
        reg = ox.OrthoRegularizer(net, "so", 1.0)
        step = through(lambda x, net=net, reg=reg: model.task(net, x) + reg())
        for size in (2, 3, 4, 5):
            step(model.batch(size)).backward()
        found.append(model.grads(net))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
    assert counter.frame_count <= 2  # one for the first size, one for all others


@pytest.mark.parametrize("name", ["orthoreg", "mc", "ocnn"])
def test_autocast_rounds_no_gradient_of_a_compiled_term(name: str) -> None:
    """The graph of its backward pass is traced with the forward one, inside autocast."""
    found = []
    for dtype in (None, torch.bfloat16):
        torch._dynamo.reset()
        conv = nn.Conv2d(3, 6, (1, 2))
        conv.weight = nn.Parameter(random(6, 3, 1, 2))
        term = compiled(ox.OrthoRegularizer(conv, name, 1.0, bias=False))
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            value = term()
        value.backward()
        found.append((value.detach(), conv.weight.grad))
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-7)


def test_schedules_and_left_out_steps_are_followed() -> None:
    net = model.make()
    settings = {"strength": 1.0, "every": 2, "schedule": lambda step: 1.0 + step}
    reg, plain = (ox.OrthoRegularizer(net, "so", **settings) for _ in range(2))
    term = compiled(reg)
    for _ in range(12):
        torch.testing.assert_close(term(), plain())
    assert reg.step == 12


@pytest.mark.parametrize("fullgraph", [False, True])
def test_layers_that_change_after_the_compilation_are_seen(fullgraph: bool) -> None:
    """Frozen, replaced and pruned; one graph alone cannot find them anew and says so."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 2), nn.Flatten())
    net.append(nn.Linear(54, 5))
    x = random(2, 3, 6, 6)
    reg = ox.OrthoRegularizer(net, strength=1.0)
    term = torch.compile(lambda: reg(), fullgraph=fullgraph, backend="eager")
    for change in (
        lambda: net[2].weight.requires_grad_(False),
        lambda: net[2].weight.requires_grad_(True),
        lambda: net.__setitem__(0, nn.Conv2d(3, 8, 3)),
        lambda: ox.pruning.prune(net, x, criterion="l1", ratio=0.3),
    ):
        term()
        change()
        if fullgraph:
            with pytest.raises(Exception, match=r"the layers have changed .* once outside"):
                term()
            reg()
        torch.testing.assert_close(term(), ox.OrthoRegularizer(net, strength=1.0)())


# --- the functional calls


def every_penalty(weights: list[Tensor], vectors: list[Tensor]) -> list[Tensor]:
    marks = [torch.tensor([True, False] * 4), None]
    found = [
        F.gram_penalty(weights, name, pruned=marks if PENALTIES[name].counts else None)
        for name in PENALTIES
    ]
    targets = [0.5, torch.ones(6)]
    found.append(F.gram_penalty(weights, "so", side="rows", pruned=marks, targets=targets))
    found.append(F.gram_penalty(weights, "srip", vectors=vectors, coefficients=[1.0, 2.0]))
    found += F.gram(weights, "small")
    return found + F.filter_correlation(weights) + F.filter_distances(weights)


def test_every_penalty_in_one_graph() -> None:
    found = []
    for function in (every_penalty, compiled(every_penalty)):
        conv = random(8, 4, 1, 2).contiguous(memory_format=torch.channels_last)
        weights = [w.requires_grad_() for w in (conv, random(6, 5))]
        vectors = [torch.full((1, m), m**-0.5) for m in (8, 5)]
        values = function(weights, vectors)
        grads = torch.autograd.grad(sum(v.square().sum() for v in values), weights)
        found.append(([v.detach() for v in values], grads, vectors))
    torch.testing.assert_close(*found, rtol=2e-5, atol=2e-5)


def test_one_graph_for_shapes_of_a_kind() -> None:
    """More filters than entries, or fewer: two kinds, since another Gram matrix is smaller."""

    def function(w: Tensor) -> tuple[Tensor, ...]:
        scores = F.filter_scores([w], criteria=("l1", "l2"))["l2"][0]
        return F.gram_penalty([w]), F.gram_penalty([w], "mc", side="rows"), scores

    counter = CompileCounterWithBackend("aot_eager")
    call = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    for shape in ((4, 7), (5, 9), (3, 40), (9, 6), (12, 4)):
        w = random(*shape).requires_grad_()
        got, want = call(w), function(w)
        torch.testing.assert_close(got, want)
        first, second = (torch.autograd.grad(f[0].sum() + f[1].sum(), w)[0] for f in (got, want))
        torch.testing.assert_close(first, second)
    assert counter.frame_count <= 3  # of five shapes


def test_sides_that_differ_by_a_number_keep_it_with_dynamic_shapes() -> None:
    def function(w: Tensor) -> tuple[Tensor, ...]:
        return F.gram_penalty([w], "so", side="cols"), F.gram_penalty([w], "dso")

    call = compiled(function, dynamic=True)
    for shape in ((4, 7), (5, 9), (9, 6)):
        torch.testing.assert_close(call(random(*shape)), function(random(*shape)))


def test_scores_and_gradients_in_place_in_one_graph() -> None:
    members = F.group_members([[(0, None)], [(1, None)]], [8, 6])

    def function(weights: list[Tensor], fisher: list[Tensor]) -> list[Tensor]:
        values = F.add_gram_penalty_grad_(weights, "so", strength=2.0)
        grads = [w.grad for w in weights]
        scores = F.filter_scores(weights, grads, ("l1", "taylor", "fisher"), dim=(0, 1))
        diagonal = F.accumulate_fisher_(weights, grads, fisher)["fisher_diag"]
        grouped = F.group_scores(scores[0]["l1"], members)
        return [values, *scores[0]["fisher"], *scores[1]["taylor"], *diagonal, *grouped]

    found = []
    for call in (function, compiled(function)):
        weights = [random(8, 4, 3, 3).requires_grad_(), random(6, 12).requires_grad_()]
        for w in weights:
            w.grad = torch.ones_like(w)
        fisher = [torch.zeros_like(w) for w in weights]
        found.append((call(weights, fisher), [w.grad for w in weights], fisher))
    torch.testing.assert_close(*found)


# --- models and optimizers that are compiled


def test_a_compiled_model_keeps_the_names_of_its_layers() -> None:
    net = model.make()
    want = ox.OrthoRegularizer(net, "so", include=["conv", "fc"])
    whole = torch.compile(net, backend="aot_eager")
    part = model.make()
    part.conv = torch.compile(part.conv, backend="aot_eager")
    for given in (whole, part):
        reg = ox.OrthoRegularizer(given, "so", include=["conv", "fc"])
        assert [row.name for row in reg.report()] == ["conv", "fc"]
        reg.load_state_dict(want.state_dict())
        torch.testing.assert_close(reg(), want())
    model.task(whole, model.batch()).backward()
    optimizer = torch.optim.SGD(whole.parameters(), lr=0.0)
    before = net.conv.weight.grad.clone()
    reg.attach(torch.optim.SGD(part.parameters(), lr=0.0))
    ox.OrthoRegularizer(whole, "so", 1.0).attach(optimizer)
    optimizer.step()
    assert not torch.equal(net.conv.weight.grad, before)


def test_a_compiled_model_is_pruned_before_it_is_compiled() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 2), nn.Flatten())
    whole = torch.compile(net, backend="aot_eager")
    x = model.batch()
    whole(x)
    with pytest.raises(TypeError, match=r"model is compiled: pass the module you compiled"):
        ox.pruning.prune(whole, x, criterion="l1", ratio=0.5)
    assert net[0].out_channels == 8
    ox.pruning.prune(net, x, criterion="l1", ratio=0.5)
    assert net[0].out_channels < 8
    again = torch.compile(net, backend="aot_eager")
    torch.testing.assert_close(again(x), net(x))


def test_a_compiled_optimizer_step_carries_the_attached_term() -> None:
    found = []
    for through in (lambda f: f, lambda f: torch.compile(f, backend="aot_eager")):
        net = nn.Linear(5, 4, bias=False)
        net.weight = nn.Parameter(random(4, 5))
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        attached = ox.OrthoRegularizer(net, "so", 1.0).attach(optimizer)
        step = through(optimizer.step)
        for _ in range(3):
            optimizer.zero_grad()
            net(random(2, 5)).sum().backward()
            step()
        found.append(model.parameters(net))
        assert attached.step == 3
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)
