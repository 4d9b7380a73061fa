"""What does a pruning method add to a training step? Batches of 128 random 32 x 32 images."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.engine import Case
from benchmarks.methods import METHODS


def method_cases(full: bool, device: str) -> list[Case]:
    models = ("resnet56", "resnet18") if full else ("resnet56",)
    return [
        Case(m, "method", ways=tuple(METHODS), base="plain", question="methods") for m in models
    ]


CASES: dict[str, Callable[[bool, str], list[Case]]] = {"bench_methods": method_cases}


def bench_methods(case: Case, record: Callable[[Case], None]) -> None:
    record(case)
