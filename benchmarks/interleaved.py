"""Times calls side by side: every round runs each of them once, so that drifts meet all alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median, quantiles

import torch


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
    return 1e-3 * events[0].elapsed_time(events[1]) / repeats


def measure(
    calls: Mapping[str, Callable[[], object]],
    device: str,
    budget: float,
    *,
    least: float = 4e-3,
    rounds: tuple[int, int] = (3, 40),
) -> dict[str, list[float]]:
    """Seconds of each call in each round.

    Args:
        calls: by name.
        device: ``"cuda"`` waits for the GPU, anything else for the call.
        budget: seconds for all of it; at least ``rounds[0]`` rounds run whatever it says.
        least: seconds that a call is repeated for in one round.
        rounds: how many at least and at most.
    """
    start = time.monotonic()
    repeats = {}
    for name, call in calls.items():
        call()
        once = seconds(call, device, 1)
        repeats[name] = max(1, min(200, round(least / max(once, 1e-7))))
    times: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for number in range(rounds[1]):
        began = time.monotonic()
        for name in names[number % len(names) :] + names[: number % len(names)]:
            times[name].append(seconds(calls[name], device, repeats[name]))
        now = time.monotonic()
        if number + 1 >= rounds[0] and now + (now - began) > start + budget:
            break
    return times


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
