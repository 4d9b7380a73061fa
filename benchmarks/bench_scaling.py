"""How does the cost grow? Sweeps of the filters n, of their length k, of the number of layers.

With the models of bench_penalty.py they are the figure of cost against flops.
"""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.engine import Case
from benchmarks.models import SWEEPS

WAYS = ("orthoreg_ext", "eager", "closed-small")
QUICK = ("n=16", "n=64", "n=256", "n=128 k=128", "n=128 k=8192", "16 of 64 x 576")


def scaling_cases(full: bool, device: str) -> list[Case]:
    return [Case(m, ways=WAYS, question="scaling") for m in (SWEEPS if full else QUICK)]


CASES: dict[str, Callable[[bool, str], list[Case]]] = {"bench_cost_by_shape": scaling_cases}


def bench_cost_by_shape(case: Case, record: Callable[[Case], None]) -> None:
    record(case)
