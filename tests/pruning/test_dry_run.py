from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from orthoreg_ext.pruning import PrunePlan, count, latency, plan, prune
from orthoreg_ext.pruning.engine import Engine
from orthoreg_ext.pruning.rules import Rules

from .nets import IMAGE, VGG, ResNet, Shuffled, batches, randomised


def everything(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> dict[str, Any]:
    """The objects a model is made of, and what they hold."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {
        "objects": tensors,
        "values": {name: t.detach().clone() for name, t in tensors.items()},
        "versions": {name: t._version for name, t in tensors.items()},
        "grads": {name: p.grad for name, p in model.named_parameters()},
        "flags": {name: p.requires_grad for name, p in model.named_parameters()},
        "modes": [m.training for m in model.modules()],
        "sizes": [
            {k: v for k, v in vars(m).items() if isinstance(v, (int, tuple))}
            for m in model.modules()
        ],
        "random": (random.getstate(), torch.get_rng_state()),
        "state": {p: dict(s) for p, s in optimizer.state.items()} if optimizer else {},
        "groups": [list(g["params"]) for g in optimizer.param_groups] if optimizer else [],
    }


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    for key in ("objects", "grads"):
        assert before[key].keys() == after[key].keys()
        assert all(after[key][name] is t for name, t in before[key].items()), key
    for name, value in before["values"].items():
        assert torch.equal(value, after["values"][name]), name
    for key in ("versions", "flags", "modes", "sizes"):
        assert before[key] == after[key], key
    assert before["random"][0] == after["random"][0]
    assert torch.equal(before["random"][1], after["random"][1])
    assert before["state"].keys() == after["state"].keys()
    for parameter, state in before["state"].items():
        assert all(after["state"][parameter][k] is v for k, v in state.items())
    for one, other in zip(before["groups"], after["groups"], strict=True):
        assert all(a is b for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("name", sorted(IMAGE))
def test_a_plan_leaves_the_model_and_says_what_prune_then_does(name: str, x: Tensor) -> None:
    model = randomised(IMAGE[name]()).train()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    model(x).pow(2).mean().backward()
    optimizer.step()
    options: dict[str, Any] = {"ratio": 0.4, "data": batches(), "optimizer": optimizer}
    if name == "transposed":
        options["loss"] = lambda output, target: output.pow(2).mean()
    before = everything(model, optimizer)
    planned = plan(model, x, **options)
    assert_same(before, everything(model, optimizer))
    done = prune(model, x, **options)
    assert isinstance(planned, PrunePlan)
    assert not isinstance(done, PrunePlan)
    assert planned.history == done.history
    assert planned.layers == done.layers
    assert (planned.before, planned.after) == (done.before, done.after)
    assert planned.after == count(model, x)
    assert planned.saved == done.saved
    assert planned.settings == done.settings
    assert planned.table() == done.table()
    assert planned.model is model


@pytest.mark.parametrize(
    "options",
    [
        {"rounds": 3},
        {"scope": "one_at_a_time", "rescore_every": 2},
        {"target": "macs", "scope": "isomorphic"},
        {"target": "memory", "rounds": 2, "round_to": 2},
    ],
)
def test_every_kind_of_run_can_be_planned(options: dict[str, Any], x: Tensor) -> None:
    model = randomised(ResNet())
    before = everything(model)
    planned = plan(model, x, data=batches(), ratio=0.5, **options)
    assert_same(before, everything(model))
    done = prune(model, x, data=batches(), ratio=0.5, **options)
    assert (planned.history, planned.after) == (done.history, done.after)


def test_a_latency_can_be_planned(x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    model = randomised(VGG())
    work = lambda m: count(m, x).macs  # noqa: E731
    monkeypatch.setattr(
        latency, "time_ratio", lambda before, after, _: (work(after) / work(before), "quiet")
    )
    options: dict[str, Any] = {"criterion": "l1", "target": "latency", "ratio": 0.4, "rounds": 2}
    before = everything(model)
    planned = plan(model, x, **options)
    assert_same(before, everything(model))
    done = prune(model, x, **options)
    assert (planned.history, planned.latency) == (done.history, done.latency)
    assert done.saved["latency"] == pytest.approx(done.saved["macs"])
    assert 0.4 <= done.saved["macs"] < 0.5


def test_a_copy_that_follows_is_left_alone(x: Tensor) -> None:
    model = VGG()
    ema = copy.deepcopy(model)
    before = everything(ema)
    plan(model, x, criterion="l1", ema=ema)
    assert_same(before, everything(ema))


def test_dry_run_is_an_argument_of_prune(x: Tensor) -> None:
    model = VGG()
    before = everything(model)
    called: list[int] = []
    result = prune(
        model,
        x,
        criterion="l1",
        rounds=2,
        dry_run=True,
        between_rounds=lambda m, k: called.append(k),
    )
    assert isinstance(result, PrunePlan)
    assert not called
    assert_same(before, everything(model))


def test_a_plan_says_what_goes_and_what_it_saves(x: Tensor) -> None:
    planned = plan(VGG(), x, criterion="l1", ratio=0.5, scope="local")
    lines = planned.table().splitlines()
    assert lines[1].split() == ["conv1", "8", "4", "50.0%"]
    assert [line.split()[0] for line in lines[-4:]] == ["filters", "params", "macs", "memory"]
    assert planned.saved["filters"] == pytest.approx(23 / 50)
    assert 0 < planned.saved["memory"] < planned.saved["macs"] < 1


def test_a_plan_cannot_be_saved(x: Tensor, tmp_path: Any) -> None:
    with pytest.raises(ValueError, match="a plan cannot be saved, the model is not pruned"):
        plan(VGG(), x, criterion="l1").save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_prune_refuses_a_plan_refuses(x: Tensor) -> None:
    stranger = torch.optim.SGD([nn.Parameter(torch.ones(1))], 0.1)
    for options, message in (
        ({"ratio": 0.95}, "would empty a layer"),
        ({"optimizer": stranger}, "holds no parameter of the model"),
    ):
        with pytest.raises(ValueError, match=message):
            plan(VGG(), x, criterion="l1", **options)


class Fixed(VGG):
    def forward(self, x: Tensor) -> Tensor:
        assert self.conv1.out_channels == 8, "eight channels"
        return super().forward(x)


@pytest.mark.parametrize("net", [Shuffled, Fixed])
def test_a_plan_checks_the_cut_too(net: type[nn.Module], x: Tensor) -> None:
    model = net()
    before = everything(model)
    with pytest.raises(RuntimeError, match="the model does not compute what it did"):
        plan(model, x, criterion="l1", ratio=0.5, scope="local")
    assert_same(before, everything(model))


def test_a_plan_that_fails_later_takes_all_back(x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    model, score = VGG(), Engine.score
    before = everything(model)

    def fail(engine: Engine, *arguments: Any) -> Any:
        if engine.rounds:
            raise ValueError("no gradient")
        return score(engine, *arguments)

    monkeypatch.setattr(Engine, "score", fail)
    with pytest.raises(RuntimeError, match="rehearsal failed, nothing was changed: round 2 of 3"):
        plan(model, x, criterion="l1", rounds=3)
    assert_same(before, everything(model))


def test_a_rehearsal_leaves_the_engine_ready_for_the_performance(x: Tensor) -> None:
    model = VGG()
    engine = Engine(model, x, Rules("l1"))
    units = engine.select(engine.score(), 0.4)
    for _ in range(2):
        with engine.rehearsal():
            engine.remove(units)
            assert engine.rounds == 1
            assert engine.history
        assert (engine.rounds, engine.history) == (0, [])
    engine.remove(units)
    assert {entry["round"] for entry in engine.history} == {1}


def test_an_interrupt_takes_all_back(x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    model = VGG()
    before = everything(model)

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Engine, "result", stop)
    with pytest.raises(KeyboardInterrupt):
        plan(model, x, criterion="l1")
    assert_same(before, everything(model))
