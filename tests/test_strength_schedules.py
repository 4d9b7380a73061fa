"""Schedules of the strength: hand-computed tables, bad arguments, resuming."""

from __future__ import annotations

import json
import math

import pytest
from torch import nn

import orthoreg_ext as ox
from orthoreg_ext.schedules import BansalSteps, Constant, Cosine, Growing, Linear

HALF = 0.5 * (1 + math.cos(math.pi / 4))

# schedule, {step: factor}
TABLE = [
    (Constant(), {0: 1.0, 10**6: 1.0}),
    (Constant(0.25), {0: 0.25, 7: 0.25}),
    (Linear(4), {0: 1.0, 1: 0.75, 2: 0.5, 4: 0.0, 100: 0.0}),
    (Linear(10, start=0.0, end=2.0), {0: 0.0, 5: 1.0, 9: 1.8, 10: 2.0, 11: 2.0}),
    (Cosine(4), {0: 1.0, 1: HALF, 2: 0.5, 3: 1 - HALF, 4: 0.0, 5: 0.0}),
    (Cosine(4, start=3.0, end=1.0), {0: 3.0, 1: 1 + 2 * HALF, 2: 2.0, 4: 1.0, 9: 1.0}),
    (Growing(), {0: 0.0, 9: 0.0, 10: 1e-4, 99_990: 0.9999, 100_000: 1.0, 10**7: 1.0}),
    (Growing(0.5, every=3, ceiling=1.2, start=0.1), {0: 0.1, 2: 0.1, 3: 0.6, 6: 1.1, 9: 1.2}),
    # two steps an epoch: epoch 20 has the steps 38 and 39
    (BansalSteps(2), {0: 1.0, 39: 1.0, 40: 1e-3, 99: 1e-3, 100: 1e-4, 139: 1e-4, 140: 1e-6}),
    (BansalSteps(2), {239: 1e-6, 240: 0.0, 10**6: 0.0}),
    # strength 0.1 in all: 0.1, 1e-3, 1e-4, 1e-6, 0
    (BansalSteps(2, "set"), {39: 1.0, 40: 1e-2, 100: 1e-3, 140: 1e-5, 240: 0.0}),
    (BansalSteps(1, "set", strength=2.0), {0: 1.0, 19: 1.0, 20: 5e-4, 120: 0.0}),
    (BansalSteps(1, epochs=(30, 50, 70, 120)), {29: 1.0, 30: 1e-3, 49: 1e-3, 50: 1e-4}),
]


@pytest.mark.parametrize(("schedule", "factors"), TABLE, ids=[repr(s) for s, _ in TABLE])
def test_factors_computed_by_hand(schedule, factors: dict[int, float]) -> None:
    for step, factor in factors.items():
        assert schedule(step) == pytest.approx(factor, rel=1e-12, abs=0), step


BAD = [
    (lambda: Constant(-1.0), "factor is -1.0, expected a finite number of at least 0"),
    (lambda: Constant("1"), "factor is '1', expected a finite number"),
    (lambda: Linear(0), "steps is 0, expected a positive number of steps"),
    (lambda: Linear(2.5), "steps is 2.5, expected a positive number of steps"),
    (lambda: Linear(5, end=math.nan), "end is nan, expected a finite number"),
    (lambda: Cosine(True), "steps is True, expected a positive number"),
    (lambda: Cosine(5, start=math.inf), "start is inf, expected a finite number"),
    (lambda: Growing(every=0), "every is 0, expected a positive number of steps"),
    (lambda: Growing(delta=-1e-4), "delta is -0.0001, expected a finite number"),
    (lambda: Growing(start=2.0), "start is 2.0, expected at most the ceiling 1.0"),
    (lambda: BansalSteps(0), "steps_per_epoch is 0, expected a positive number"),
    (lambda: BansalSteps(1, "multipy"), "unknown reading 'multipy'; did you mean 'multiply'"),
    (lambda: BansalSteps(1, epochs=(20, 50, 50, 120)), "epochs is .* four growing numbers"),
    (lambda: BansalSteps(1, epochs=(20, 50, 120)), "epochs is .* four growing numbers"),
    (lambda: BansalSteps(1, epochs=120), "epochs is 120, expected four growing numbers"),
    (lambda: BansalSteps(1, epochs=None), "epochs is None, expected four growing numbers"),
    (lambda: BansalSteps(1, "set", strength=0.0), "strength is 0, expected"),
]


@pytest.mark.parametrize(("make", "text"), BAD, ids=[text[:30] for _, text in BAD])
def test_bad_arguments_are_named(make, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        make()


@pytest.mark.parametrize("schedule", [s for s, _ in TABLE], ids=repr)
def test_the_state_goes_through_json_and_fits_its_own_schedule_only(schedule) -> None:
    state = json.loads(json.dumps(schedule.state_dict()))
    schedule.load_state_dict(state)
    with pytest.raises(ValueError, match=r"the state is of the schedule .*, but this one is"):
        Constant(0.125).load_state_dict(state)
    with pytest.raises(ValueError, match=r"unknown\(\), but this one is"):
        schedule.load_state_dict({})


def test_a_regulariser_takes_a_schedule_and_refuses_the_state_of_another() -> None:
    net = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    reg = ox.OrthoRegularizer(net, schedule=Linear(4))
    full = ox.OrthoRegularizer(net)().item()
    assert [reg().item() for _ in range(3)] == pytest.approx([full, 0.75 * full, 0.5 * full])
    state = json.loads(json.dumps(reg.state_dict()))
    resumed = ox.OrthoRegularizer(net, schedule=Linear(4))
    resumed.load_state_dict(state)
    assert resumed().item() == pytest.approx(0.25 * full)
    other = ox.OrthoRegularizer(net, schedule=Linear(5))
    with pytest.raises(
        ValueError, match=r"schedule Linear\(steps=4, .*but this one is Linear\(steps=5"
    ):
        other.load_state_dict(state)
    assert other.step == 0
    with pytest.raises(ValueError, match=r"state was saved with the schedule .* give it schedule="):
        ox.OrthoRegularizer(net).load_state_dict(state)
    with pytest.raises(ValueError, match="state has no schedule"):
        reg.load_state_dict(ox.OrthoRegularizer(net).state_dict())


def test_strengths_that_a_schedule_sets_are_those_of_the_regulariser() -> None:
    net = nn.Linear(3, 3)
    for reading, strength in (("set", 0.1), ("multiply", 0.01)):
        ox.OrthoRegularizer(net, strength=strength, schedule=BansalSteps(1, reading))
    with pytest.raises(ValueError, match=r"sets the strength 0.1 .*, but strength is 0.01: give"):
        ox.OrthoRegularizer(net, strength=0.01, schedule=BansalSteps(1, "set"))


def test_a_schedule_with_a_state_of_its_own_is_saved_and_restored() -> None:
    class Counting:
        calls = 0

        def __call__(self, step: int) -> float:
            self.calls += 1
            return float(self.calls)

        def state_dict(self) -> dict[str, int]:
            return {"calls": self.calls}

        def load_state_dict(self, state: dict[str, int]) -> None:
            self.calls = state["calls"]

    net = nn.Linear(3, 3)
    reg = ox.OrthoRegularizer(net, schedule=Counting())
    reg()
    reg()
    fresh = Counting()
    ox.OrthoRegularizer(net, schedule=fresh).load_state_dict(reg.state_dict())
    assert fresh.calls == 2


def test_a_plain_function_serves_and_has_no_state() -> None:
    reg = ox.OrthoRegularizer(nn.Linear(3, 3), schedule=lambda step: 0.5**step)
    assert "schedule" not in reg.state_dict()
