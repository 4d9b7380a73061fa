"""What does scoring cost? Five scores of every filter, and the importance of coupled groups."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.engine import Case
from benchmarks.models import NINE
from benchmarks.scoring import IMPORTANCE, SCORE

QUICK = ("resnet50", "resnet56")
QUICK_WAYS = tuple(name for name in SCORE if not name.startswith("compile"))


def score_cases(full: bool, device: str) -> list[Case]:
    models = (*NINE[:-1], "mobilenet_v2") if full else QUICK  # Llama's gradients take much memory
    ways = tuple(SCORE) if full else QUICK_WAYS
    return [Case(m, "score", ways=ways, question="scores") for m in models]


def importance_cases(full: bool, device: str) -> list[Case]:
    models = ("resnet50", "resnet56") if full else ("resnet50",)
    return [Case(m, "groups", ways=tuple(IMPORTANCE), question="importance") for m in models]


CASES: dict[str, Callable[[bool, str], list[Case]]] = {
    "bench_five_scores": score_cases,
    "bench_group_importance": importance_cases,
}


def bench_five_scores(case: Case, record: Callable[[Case], None]) -> None:
    record(case)


def bench_group_importance(case: Case, record: Callable[[Case], None]) -> None:
    record(case)
