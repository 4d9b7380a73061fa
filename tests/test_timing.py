"""Rounds are interleaved, disturbed ones are left out whole, and what is left is not hidden."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from orthoreg_ext.timing import ForeignLoad, Spread, Timing, host_seconds, measure, watch


class Planted(ForeignLoad):
    """Says of each round in turn whether it was disturbed; False once all are used."""

    def __init__(self, *disturbed: bool) -> None:
        self.tolerance = 0.08
        self._next = list(disturbed)

    def restart(self) -> None:
        """There are no windows."""

    @property
    def age(self) -> float:
        return 0.2  # long enough to be judged at the end of a round, and only there

    def disturbed(self) -> bool:
        return self._next.pop(0) if self._next else False


class Clock:
    """Calls that know their round."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def call(self, name: str) -> object:
        return lambda: self.seen.append(name)


def test_calls_are_timed_in_turn() -> None:
    clock = Clock()
    timing = measure({n: clock.call(n) for n in "ab"}, "cpu", 0.0, least=0.0, rounds=(3, 40))
    assert [len(v) for v in timing.seconds.values()] == [3, 3]
    assert (timing.rejected, timing.state) == (0, "unwatched")
    # two to warm up and to see how long they take, then rounds that begin with another one
    assert "".join(clock.seen) == "aabb" + "ab" + "ba" + "ab"
    assert Spread.of([3.0]) == Spread(3.0, 3.0, 3.0)
    assert Spread.of([1.0, 2.0, 3.0]).median == 2.0


def test_repeated_calls_run_once_untimed_in_every_round(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, timed = 0, 0

    def call() -> None:
        nonlocal calls
        calls += 1

    def seconds(call: Callable[[], object], device: str, repeats: int) -> float:
        nonlocal timed
        timed += repeats
        for _ in range(repeats):
            call()
        return 2e-3

    monkeypatch.setattr("orthoreg_ext.timing.seconds", seconds)
    measure({"a": call}, "cpu", 0.0, least=8e-3, rounds=(3, 3), warm=False)
    assert timed == 1 + 3 * 4
    assert calls == timed + 3


def test_no_garbage_is_collected_within_a_round() -> None:
    collections: list[str] = []
    inside = False

    def note(phase: str, info: dict[str, int]) -> None:
        if inside:
            collections.append(phase)

    def call() -> None:
        nonlocal inside
        inside = True
        for _ in range(20_000):  # of cycles, which only a collection frees
            cycle: list[object] = []
            cycle.append(cycle)
        inside = False

    gc.callbacks.append(note)
    try:
        call()
        assert collections, "the calls make too little garbage to show anything"
        collections.clear()
        measure({"a": call}, "cpu", 0.0, least=0.0, rounds=(3, 3))
        assert not collections
        assert gc.isenabled()
        with pytest.raises(ZeroDivisionError):
            measure({"a": lambda: 1 // 0}, "cpu", 0.0)
        assert gc.isenabled()
    finally:
        gc.callbacks.remove(note)


def test_a_disturbed_round_is_left_out_for_every_call() -> None:
    load = Planted(False, True, False, True, True)
    calls = {name: lambda: time.sleep(1e-3) for name in "ab"}
    timing = measure(calls, "cpu", 60.0, rounds=(2, 4), load=load)
    assert (timing.rejected, timing.state) == (3, "quiet")
    assert [len(v) for v in timing.seconds.values()] == [4, 4]
    assert timing.about() == {"rounds": 4, "rejected": 3, "state": "quiet"}


def test_too_few_quiet_rounds_are_said_and_all_are_kept() -> None:
    calls = {"a": lambda: time.sleep(1e-3)}
    timing = measure(calls, "cpu", 0.0, rounds=(3, 40), load=Planted(*[True] * 99))
    assert timing.state == "contended"
    assert timing.rejected == len(timing.seconds["a"]) == 3


def test_a_ratio_is_taken_within_each_round() -> None:
    timing = Timing({"fast": [1.0, 2.0, 4.0], "slow": [3.0, 6.0, 12.0]}, 0, "quiet")
    assert timing.ratio("slow", "fast") == Spread(3.0, 3.0, 3.0)  # though both vary fourfold
    assert timing.spread("slow", 1e3).median == 6000
    assert json.loads(json.dumps(timing.spread("fast").as_dict()))["median"] == 2.0


def stat(path: Path, user: int, idle: int, stolen: int) -> Path:
    path.write_text(f"cpu  {user} 0 0 {idle} 9 0 0 {stolen} 5 5\ncpu0 1 1 1 1\n")
    return path


def test_what_others_use_is_busy_time_less_our_own(tmp_path: Path) -> None:
    ticks = os.sysconf("SC_CLK_TCK")
    load = ForeignLoad(stat(tmp_path / "stat", 100, 1000, 0), cores=2)
    assert load.tolerance == pytest.approx(0.08)
    assert not load.disturbed()  # nothing was counted
    stat(tmp_path / "stat", 100, 99_000, 0)
    assert not load.disturbed()  # idle does not count
    stat(tmp_path / "stat", 100, 99_000, 1000 * ticks)
    assert load.disturbed()  # stolen by the host


@pytest.mark.skipif(watch("cpu") is None, reason="needs /proc/stat")
def test_a_busy_process_beside_is_seen() -> None:
    code = "import time\nprint('on', flush=True)\nwhile time.time() < float('inf'): pass"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True
    ) as planted:
        try:
            assert planted.stdout is not None
            planted.stdout.readline()
            load = ForeignLoad(cores=2)
            timing = measure({"wait": lambda: time.sleep(0.1)}, "cpu", 0.0, load=load)
        finally:
            planted.kill()
    assert timing.state == "contended"
    assert timing.rejected == len(timing.seconds["wait"])


def test_a_gpu_is_not_watched() -> None:
    assert watch("cuda") is None


def test_the_host_time_is_a_median_of_some_calls() -> None:
    seen: list[int] = []
    assert 0 < host_seconds(lambda: seen.append(1), "cpu", budget=0.0) < 1
    assert len(seen) == 3
    host_seconds(lambda: seen.append(1), "cpu", budget=60.0, most=10)
    assert len(seen) == 13
