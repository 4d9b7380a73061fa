"""Times calls side by side: every round runs each of them once, so that drifts meet all alike.

What other processes do meanwhile is read from /proc/stat, and rounds that they disturbed are left
out as a whole: a ratio is always one of two times of the same round.
"""

from __future__ import annotations

import contextlib
import gc
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch

WINDOW = 0.25
"""Seconds over which foreign load is judged: /proc/stat counts in hundredths."""

SHARE = 0.04
"""The part of the machine that others may use: 0.08 core of two."""


@dataclass(frozen=True)
class Spread:
    """A median, and where the middle half of the values lies."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        """Of at least one value."""
        low, middle, high = quantiles(values, n=4) if len(values) > 2 else [median(values)] * 3
        return cls(middle, low, high)

    def as_dict(self) -> dict[str, float]:
        """For JSON."""
        return asdict(self)


class ForeignLoad:
    """How many cores other processes (and other guests of the host) keep busy.

    Args:
        stat: the file to read; its first line counts the ticks of all cores.
        cores: the cores of the machine.
    """

    def __init__(self, stat: Path = Path("/proc/stat"), cores: int | None = None) -> None:
        self._stat = stat
        self._ticks = os.sysconf("SC_CLK_TCK")
        self.tolerance = SHARE * (cores or os.cpu_count() or 1)
        self._last = (0.0, 0.0)
        self.restart()

    def restart(self) -> None:
        """Begins a window."""
        self._begun, self._last = time.perf_counter(), self._busy_and_own()

    @property
    def age(self) -> float:
        """Seconds since the window began."""
        return time.perf_counter() - self._begun

    def cores(self) -> float:
        """The cores that were busy with something else in this window; begins the next one."""
        age, (busy, own) = self.age, self._last
        self.restart()
        return max(0.0, self._last[0] - busy - (self._last[1] - own)) / max(age, 1e-9)

    def disturbed(self) -> bool:
        """Whether those are too many; begins the next window."""
        return self.cores() > self.tolerance

    def _busy_and_own(self) -> tuple[float, float]:
        """Seconds: of all cores but idle and waiting for a disk, stolen ones included; our own."""
        with self._stat.open() as file:
            ticks = [int(value) for value in file.readline().split()[1:9]]
        times = os.times()
        return (sum(ticks) - ticks[3] - ticks[4]) / self._ticks, times.user + times.system


def watch(device: str) -> ForeignLoad | None:
    """A watch over calls on that device; None where nothing has to be or can be watched.

    A GPU times its own work. Elsewhere this needs Linux.
    """
    if device == "cuda":
        return None
    try:
        return ForeignLoad()
    except (OSError, ValueError, IndexError):
        return None


@dataclass(frozen=True)
class Timing:
    """What was measured.

    Attributes:
        seconds: for each call its time in every round that counts.
        rejected: rounds that were disturbed, and left out unless `state` is contended.
        state: ``"quiet"``; ``"contended"``: too few rounds were left, so that all of them count;
            ``"unwatched"``: nobody looked.
    """

    seconds: dict[str, list[float]]
    rejected: int
    state: str

    def spread(self, name: str, factor: float = 1.0) -> Spread:
        """The times of a call, in units of 1 / factor seconds."""
        return Spread.of([factor * value for value in self.seconds[name]])

    def ratio(self, name: str, base: str, factor: float = 1.0) -> Spread:
        """The time of a call over that of another one in the same round."""
        pairs = zip(self.seconds[name], self.seconds[base], strict=True)
        return Spread.of([factor * value / of for value, of in pairs])

    def about(self) -> dict[str, Any]:
        """How it was measured, for JSON."""
        rounds = len(next(iter(self.seconds.values()), []))
        return {"rounds": rounds, "rejected": self.rejected, "state": self.state}


def seconds(call: Callable[[], object], device: str, repeats: int) -> float:
    """The time of one of `repeats` calls in a row, to the end of their work."""
    if device != "cuda":
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        return (time.perf_counter() - start) / repeats
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    torch.cuda.synchronize()
    events[0].record()
    for _ in range(repeats):
        call()
    events[1].record()
    events[1].synchronize()
    return 1e-3 * float(events[0].elapsed_time(events[1])) / repeats


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """As in timeit: a collection takes tens of milliseconds, in whichever call it falls."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@_no_garbage_collection()
def measure(
    calls: Mapping[str, Callable[[], object]],
    device: str,
    budget: float,
    *,
    least: float = 4e-3,
    rounds: tuple[int, int] = (3, 40),
    load: ForeignLoad | None = None,
    warm: bool = True,
) -> Timing:
    """Times every call in every round, beginning with another one each time.

    Calls that are repeated run once more before, untimed: what the call before left in caches and
    in the allocator is not theirs. Garbage is collected between rounds only.

    Args:
        calls: by name.
        device: ``"cuda"`` waits for the GPU, anything else for the call.
        budget: seconds for all of it. At least ``rounds[0]`` rounds run whatever it says, and it is
            spent twice at most to get as many undisturbed ones.
        least: seconds that a call is repeated for in one round.
        rounds: how many at least and at most.
        load: what watches the other processes, see :func:`watch`; None: nothing does.
        warm: runs every call once before; needless where each has run already.
    """
    start = time.monotonic()
    if load is not None:  # a round must be long enough to be judged
        least = max(least, WINDOW / max(1, len(calls)))
    repeats = {}
    for name, call in calls.items():
        if warm:
            call()
        once = seconds(call, device, 1)
        repeats[name] = max(1, min(20_000, round(least / max(once, 1e-7))))
    quiet: list[dict[str, float]] = []
    every: list[dict[str, float]] = []
    names = list(calls)
    while len(quiet) < rounds[1]:
        gc.collect(1)  # what was made since the last one
        began, first, disturbed = time.monotonic(), len(every) % max(1, len(names)), False
        if load is not None:
            load.restart()
        times = {}
        for name in names[first:] + names[:first]:
            if repeats[name] > 1:  # the first one also gives back the memory of the call before
                calls[name]()
            times[name] = seconds(calls[name], device, repeats[name])
            if load is not None and load.age >= WINDOW:
                disturbed |= load.disturbed()
        if load is not None and load.age >= WINDOW / 2:  # what is left of the round
            disturbed |= load.disturbed()
        every.append(times)
        if not disturbed:
            quiet.append(times)
        now = time.monotonic()
        enough = len(quiet) >= rounds[0] or now - start > 2 * budget
        if len(every) >= rounds[0] and enough and now + (now - began) > start + budget:
            break
        if disturbed:
            time.sleep(0.05)
    state = "unwatched" if load is None else "quiet" if len(quiet) >= rounds[0] else "contended"
    counted = every if state == "contended" else quiet
    return Timing(
        seconds={name: [times[name] for times in counted] for name in names},
        rejected=len(every) - len(quiet),
        state=state,
    )


def host_seconds(
    call: Callable[[], object], device: str, *, budget: float = 0.2, least: int = 3, most: int = 50
) -> float:
    """The median time until the call returns, which on a GPU leaves the work to it.

    Args:
        call: warmed up.
        device: ``"cuda"`` is idle before each call, so that none waits for a place in its queue;
            anything else does the work in the call.
        budget: seconds for all calls; at least `least` run whatever it says.
        least: how many calls at least.
        most: how many calls at most.
    """
    times: list[float] = []
    stop = time.monotonic() + budget
    while len(times) < least or (len(times) < most and time.monotonic() < stop):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    if device == "cuda":
        torch.cuda.synchronize()
    return median(times)
