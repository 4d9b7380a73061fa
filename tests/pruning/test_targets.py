from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from orthoreg_ext import timing
from orthoreg_ext.pruning import Counts, count, latency, prune
from orthoreg_ext.pruning.engine import Engine
from orthoreg_ext.pruning.ledger import Ledger
from orthoreg_ext.pruning.rules import Rules
from orthoreg_ext.pruning.selection import SCOPES
from orthoreg_ext.pruning.structure import trace
from orthoreg_ext.pruning.targets import fewest

from .nets import IMAGE, MLP, VGG, TwoInputs, randomised

COSTS = ("params", "macs", "memory")


def random_units(engine: Engine, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    scores = [torch.rand(len(g.units), generator=generator) for g in engine.structure.prunable]
    share = 0.2 + 0.5 * float(torch.rand((), generator=generator))
    return engine.select([s.double() for s in scores], share)


@pytest.mark.parametrize("name", sorted(IMAGE))
@pytest.mark.parametrize("seed", range(3))
def test_the_ledger_predicts_what_is_counted_after_the_cut(name: str, seed: int, x: Tensor) -> None:
    model = IMAGE[name]()
    engine = Engine(model, x, Rules("l1"), verify=False)
    assert (
        engine.ledger.after(torch.empty(0, dtype=torch.int64)) == engine.before == count(model, x)
    )
    for step in range(2):  # the second on what the first left
        units = random_units(engine, 10 * seed + step)
        predicted = engine.ledger.after(units)
        engine.remove(units)
        assert predicted == count(model, x), f"seed {seed}, step {step}"
    assert predicted.macs < engine.before.macs


def test_the_ledger_counts_by_hand() -> None:
    # a 12 -> 20 -> 16 -> 4 network without five of 20 and one of 16 units
    model, x = MLP(), torch.randn(3, 12)
    structure = trace(model, x)
    units = {group.name: group.units for group in structure.prunable}
    removed = torch.cat([units["fc1"][:5], units["fc2"][-1:]])
    entries = 15 * 12 + 15 * 15 + 4 * 15
    params = entries + 15 + 15 + 4
    expected = Counts(15 + 15 + 4, params, 3 * entries, 4 * params + 4 * 3 * (15 + 15 + 4))
    assert Ledger(model, structure, x).after(removed) == expected


def test_the_ledger_knows_half_precision_and_several_inputs() -> None:
    inputs = {"image": torch.randn(1, 3, 4, 4), "vector": torch.randn(1, 5)}
    inputs = {name: t.bfloat16() for name, t in inputs.items()}
    model = TwoInputs().bfloat16()
    engine = Engine(model, inputs, Rules("l1"), verify=False)
    units = random_units(engine, 0)
    predicted = engine.ledger.after(units)
    engine.remove(units)
    assert predicted == count(model, inputs)


@pytest.mark.parametrize("name", sorted(IMAGE))
@pytest.mark.parametrize("target", COSTS)
def test_a_target_is_reached_within_one_block(name: str, target: str, x: Tensor) -> None:
    model = randomised(IMAGE[name]())
    ratio, scopes = 0.3, itertools.cycle(sorted(SCOPES))
    for _, scope in zip(COSTS, scopes, strict=False):
        engine = Engine(copy.deepcopy(model), x, Rules("l1", scope, target=target))
        blocks = engine._blocks(engine.score(), ratio)
        gone = [1 - vars(size)[target] / vars(engine.before)[target] for size in (
            engine.ledger.after(engine._units(blocks)),
            engine.ledger.after(engine._units(blocks[:-1])),
        )]  # fmt: skip
        assert gone[1] < ratio <= gone[0], scope


@pytest.mark.parametrize("target", COSTS)
@pytest.mark.parametrize("scope", sorted(SCOPES))
def test_prune_reaches_the_target_by_real_counts(scope: str, target: str, x: Tensor) -> None:
    model = randomised(VGG())
    result = prune(model, x, criterion="l1", ratio=0.5, scope=scope, target=target)
    assert result.after == count(model, x)
    gone = 1 - vars(result.after)[target] / vars(result.before)[target]
    assert gone == result.saved[target]
    assert 0.5 <= gone < 0.57  # the largest unit, a filter of conv3, is a few per cent
    assert result.settings["target"] == target


@pytest.mark.parametrize("target", COSTS)
def test_rounds_share_the_target_out(target: str, x: Tensor) -> None:
    sizes: list[Counts] = []
    model = VGG()
    result = prune(
        model,
        x,
        criterion="l1",
        ratio=0.6,
        rounds=3,
        target=target,
        between_rounds=lambda m, _: sizes.append(count(m, x)),
    )
    shares = [1 - vars(s)[target] / vars(result.before)[target] for s in (*sizes, result.after)]
    # r = p / (k p + N (1 - p)), telescoped: k p / (k p + ...) of the whole, by hand for p = .6
    for share, wanted in zip(shares, (1 / 3, 0.5, 0.6), strict=True):
        assert wanted <= share < wanted + 0.08


def test_local_scope_gives_about_the_same_share_of_every_layer(x: Tensor) -> None:
    result = prune(VGG(), x, criterion="l1", ratio=0.5, scope="local", target="macs")
    shares = [1 - row.after / row.before for row in result.layers if not row.reason]
    assert max(shares) - min(shares) < 1 / 8 + 1e-9  # one filter of the smallest layer


def test_round_to_holds_with_a_target(x: Tensor) -> None:
    result = prune(VGG(), x, criterion="l1", ratio=0.4, target="params", round_to=4)
    assert result.saved["params"] >= 0.4
    assert all(row.after == row.before or row.after % 4 == 0 for row in result.layers)


@pytest.mark.parametrize("target", COSTS)
@pytest.mark.parametrize("scope", ["global", "one_at_a_time", "isomorphic"])
def test_what_cannot_be_reached_is_refused_with_what_can(
    target: str, scope: str, x: Tensor
) -> None:
    model = VGG()
    state = {name: t.clone() for name, t in model.state_dict().items()}
    ids = [id(p) for p in model.parameters()]
    engine = Engine(copy.deepcopy(model), x, Rules("l1", scope, max_layer_ratio=0.5, target=target))
    all_units = torch.cat([g.units[: len(g.units) // 2] for g in engine.structure.prunable])
    room = engine.saved(all_units)
    message = rf"target='{target}' cannot be reached.* {room:.3f} of .*'conv1' \(8 -> 4 units\)"
    with pytest.raises(ValueError, match=message):
        prune(model, x, ratio=0.9, scope=scope, max_layer_ratio=0.5, target=target)
    assert [id(p) for p in model.parameters()] == ids
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    prune(model, x, criterion="l1", ratio=room - 1e-6, max_layer_ratio=0.5, target=target)


def test_methods_take_targets_too(x: Tensor) -> None:
    engine = Engine(VGG(), x, Rules("l1", target="macs"))
    engine.check_ratio(0.5)
    engine.remove(engine.select(engine.score(), 0.5))
    assert engine.result().saved["macs"] >= 0.5


@pytest.mark.parametrize(
    ("share", "points", "expected", "calls"),
    [
        (0.0, None, 0, 1),
        (0.3, None, 4, 5),  # 0, 5, 2, 3, 4
        (0.95, None, 10, 5),  # 0, 5, 7, 8, 9
        (0.3, 1, 5, 2),
        (0.3, 0, 10, 1),
    ],
)
def test_the_fewest_blocks_are_found_by_bisection(
    share: float, points: int | None, expected: int, calls: int
) -> None:
    seen: list[int] = []

    def saved(n: int) -> float:
        seen.append(n)
        return 0.09 * n + (0.05 if n == 10 else 0)

    assert fewest(saved, 10, share, points) == expected
    assert len(seen) == len(set(seen)) == calls


# Latency: a clock that only advances with the work that is done.


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def __deepcopy__(self, memo: dict[int, Any]) -> Clock:
        return self  # copies of a model share it


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(timing, "time", made)
    monkeypatch.setattr(latency, "watch", lambda device: None)
    return made


class Timed(MLP):
    """Takes a millisecond for each filter of its first two layers, and 40 for the rest."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock = clock

    def forward(self, x: Tensor) -> Tensor:
        if self.training or torch.is_grad_enabled():
            self.clock.now += 1  # not what is to be timed
        self.clock.now += 1e-3 * (40 + self.fc1.out_features + self.fc2.out_features)
        return super().forward(x)


def test_a_time_is_compared_with_that_of_the_unpruned_model(clock: Clock) -> None:
    before, after, x = Timed(clock), Timed(clock), torch.randn(2, 12)
    after.fc1, after.fc2 = nn.Linear(12, 1), nn.Linear(1, 16)
    ratio, state = latency.time_ratio(before, after, x)
    assert ratio == pytest.approx((40 + 17) / (40 + 36))
    assert state == "unwatched"
    assert before.training
    assert after.training


@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.4])
def test_latency_is_measured_until_it_is_reached(clock: Clock, ratio: float) -> None:
    model, x = Timed(clock), torch.randn(2, 12)
    result = prune(model, x, criterion="l1", ratio=ratio, target="latency")
    gone = 36 - model.fc1.out_features - model.fc2.out_features
    assert gone == pytest.approx(76 * ratio, abs=1)
    assert gone >= 76 * ratio - 1e-6
    assert result.saved["latency"] == pytest.approx(gone / 76)
    assert result.latency["filters"] == result.after.filters == 40 - gone
    assert result.latency["state"] == "unwatched"
    assert result.document()["latency"] == result.latency
    assert "latency" in result.table()
    # can it be reached, twice; the search; the result
    assert len(result.latency["readings"]) <= 2 + latency.POINTS + 1


def test_latency_in_rounds_is_compared_with_the_first_model(clock: Clock) -> None:
    model, x = Timed(clock), torch.randn(2, 12)
    result = prune(model, x, criterion="l1", ratio=0.3, target="latency", rounds=2)
    assert 0.3 <= result.saved["latency"] < 0.3 + 1 / 76
    assert {entry["round"] for entry in result.history} == {1, 2}


def test_a_latency_that_cannot_be_reached_is_refused(clock: Clock) -> None:
    model, x = Timed(clock), torch.randn(2, 12)
    parameters = list(model.parameters())
    # 32 of 36 filters may go: 32 / 76
    with pytest.raises(
        ValueError, match=r"target='latency' cannot be reached.* 0\.421 of the meas"
    ):
        prune(model, x, criterion="l1", ratio=0.5, target="latency")
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert model.fc1.out_features == 20


def test_a_model_that_cannot_be_copied_is_named() -> None:
    class Uncopied(MLP):
        def __deepcopy__(self, memo: dict[int, Any]) -> Uncopied:
            raise TypeError("it holds a socket")

    with pytest.raises(ValueError, match=r"copy.deepcopy fails \(TypeError: it holds a socket\)"):
        prune(Uncopied(), torch.randn(2, 12), criterion="l1", target="latency")


def test_latency_runs_on_the_real_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "SECONDS", 1e-3)
    monkeypatch.setattr(latency, "watch", lambda device: None)
    x = torch.randn(2, 12)
    ratio, state = latency.time_ratio(MLP(), MLP(), x)  # how long it takes no test can say
    assert ratio > 0
    assert state == "unwatched"
