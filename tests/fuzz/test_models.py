"""OrthoRegularizer, diagnose and prune for models with odd weights and odd arguments."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import orthoreg_ext as ox
from orthoreg_ext.penalties import PENALTIES

from .odd import VALUES, fill, fuzz, junk
from .outcome import Refused, call


class Net(nn.Module):
    """Two convolutions, one depthwise, that meet in an addition, and a classifier."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.depth = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)
        self.second = nn.Conv2d(width, width, 1)
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.first(x)))
        x = x + self.second(torch.relu(self.depth(x)))
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


@st.composite
def nets(draw: st.DrawFn) -> nn.Module:
    torch.manual_seed(draw(st.integers(0, 99)))
    net: nn.Module = Net(draw(st.sampled_from((1, 2, 5, 8))))
    for parameter in net.parameters():
        if draw(st.integers(0, 7)) == 0:
            values = draw(st.sampled_from(VALUES))
            parameter.data = fill(tuple(parameter.shape), parameter.dtype, values, 1)
        if draw(st.integers(0, 9)) == 0:
            parameter.requires_grad_(False)
    kind = draw(st.integers(0, 11))
    if kind == 0:
        net.double()
    if kind == 1:
        net.to(memory_format=torch.channels_last)
    if kind == 2:
        net.bfloat16()
    if kind == 3:
        net.to("meta")
    if kind == 4:
        return draw(
            st.sampled_from((nn.Sequential(), nn.ReLU(), nn.LazyConv2d(4, 3), nn.Linear(3, 0)))
        )
    return net


ODD = st.one_of(
    st.sampled_from(
        (-1, 0, 1, 3, 0.5, 1.5, float("nan"), float("inf"), None, "x", True, [], {}, ())
    ),
    junk((2, 3)),
)


def odd_options(right: dict[str, st.SearchStrategy[Any]]) -> st.SearchStrategy[dict[str, Any]]:
    """Some of the options with right values, in one of three draws one of them with an odd one."""

    @st.composite
    def chosen(draw: st.DrawFn) -> dict[str, Any]:
        found = {name: draw(values) for name, values in right.items() if draw(st.booleans())}
        if draw(st.integers(0, 2)) == 0:
            found[draw(st.sampled_from(tuple(right)))] = draw(ODD)
        return found

    return chosen()


DOCUMENTED = (TypeError, ValueError, RuntimeError)


def state(model: nn.Module) -> dict[str, Any]:
    return {name: (t, None if t.is_meta else t.clone()) for name, t in _tensors(model).items()}


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    is_lazy = torch.nn.parameter.is_lazy
    return {name: t for name, t in model.state_dict().items() if not is_lazy(t)}


def assert_same(model: nn.Module, before: dict[str, Any]) -> None:
    now = _tensors(model)
    assert now.keys() == before.keys()
    for name, (tensor, values) in before.items():
        assert now[name].shape == tensor.shape, name
        if values is not None:
            torch.testing.assert_close(now[name], values, rtol=0, atol=0, equal_nan=True)


REGULARISED = odd_options(
    {
        "penalty": st.sampled_from(tuple(PENALTIES)),
        "strength": st.sampled_from((0, 1e-2, 1.0, 1e30)),
        "side": st.sampled_from(("rows", "cols", "small")),
        "layer_weights": st.sampled_from(("sqrt", "uniform", "mean", {"first": 2.0})),
        "include": st.sampled_from((["first"], ["*"], lambda name, module: True)),
        "exclude": st.sampled_from((["second"], "dep*", lambda name, module: False)),
        "bias": st.sampled_from((True, False, "conv")),
        "every": st.sampled_from((1, 2)),
        "max_dim": st.sampled_from((1, 4, 2048)),
    }
)


@fuzz(0.02, least=8)
@given(nets(), REGULARISED, st.booleans())
def test_regularizer(net: nn.Module, options: dict[str, Any], attached: bool) -> None:
    before = state(net)
    made = call(ox.OrthoRegularizer, net, **options)
    assert_same(net, before)
    if isinstance(made, Refused) or any(p.is_meta for p in net.parameters()):
        return
    trained = [p for p in net.parameters() if p.requires_grad]
    if attached and trained:
        optimizer = torch.optim.SGD(trained, lr=0.0)
        made.attach(optimizer)
        optimizer.step()
        grads = [p.grad for p in trained]
    else:
        term = made()
        assert term.shape == ()
        grads = (
            list(torch.autograd.grad(term, trained, allow_unused=True))
            if term.requires_grad
            else []
        )
    finite = all(
        bool(p.isfinite().all()) and float(p.abs().max()) < 1e4
        for p in net.parameters()
        if p.numel()
    )
    if finite and options.get("strength", 1e-2) != 1e30:
        assert all(g is None or bool(g.isfinite().all()) for g in grads)
    assert len(made.report()) > 0


@fuzz(0.01, least=6)
@given(
    nets(),
    odd_options(
        {
            "samples": st.sampled_from((1, 3)),
            "jacobian_samples": st.sampled_from((0, 1)),
            "bias": st.sampled_from((True, False, "conv")),
            "include": st.sampled_from((["first"], "*")),
            "data": st.just([(torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 3]))]),
        }
    ),
)
def test_diagnose(net: nn.Module, options: dict[str, Any]) -> None:
    before = state(net)
    call(ox.diagnose, net, documented=DOCUMENTED, **options)
    assert_same(net, before)


@fuzz(0.01, least=6)
@given(
    nets(),
    odd_options(
        {
            "ratio": st.sampled_from((0.0, 0.3, 0.5, 0.9)),
            "criterion": st.sampled_from(("l1", "l2", "fpgm", "bn_scale", "exemplar")),
            "scope": st.sampled_from(("global", "local", "isomorphic", "one_at_a_time")),
            "round_to": st.sampled_from((1, 2)),
            "ignored": st.sampled_from(([], ["first"])),
            "rounds": st.sampled_from((1, 2)),
            "normalize": st.sampled_from((None, "mean")),
            "group_reduction": st.sampled_from(("mean", "max", "first")),
            "dim": st.sampled_from(("out", "in", "both")),
            "target": st.sampled_from(("filters", "params", "macs")),
        }
    ),
    st.sampled_from((4, 4, 4, 0)).flatmap(lambda right: st.just("right") if right else ODD),
)
def test_prune(net: nn.Module, options: dict[str, Any], inputs: Any) -> None:
    before = state(net)
    options = {"criterion": "l1", **options}
    inputs = torch.zeros(2, 3, 8, 8) if isinstance(inputs, str) else inputs
    result = call(ox.pruning.prune, net, inputs, documented=DOCUMENTED, **options)
    if isinstance(result, Refused):
        if not isinstance(result.error, ox.pruning.RoundError):  # the rounds before are done
            assert_same(net, before)
        return
    with torch.no_grad():
        like = next(net.parameters())
        output = net(torch.randn(2, 3, 8, 8, dtype=like.dtype, device=like.device))
    assert output.shape == (2, 4)
