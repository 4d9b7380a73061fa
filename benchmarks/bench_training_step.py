"""What part of a training step is the regulariser? Batches of 128 random 32 x 32 images."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.engine import Case
from benchmarks.steps import STEP

QUICK_WAYS = ("plain", "orthoreg_ext-attached", "eager", "orthoreg_ext-alone", "eager-alone")


def step_cases(full: bool, device: str) -> list[Case]:
    models = ("resnet56", "resnet18") if full else ("resnet56",)
    ways = tuple(STEP) if full else QUICK_WAYS
    return [Case(m, "step", ways=ways, base="plain", question="step") for m in models]


CASES: dict[str, Callable[[bool, str], list[Case]]] = {"bench_training_step": step_cases}


def bench_training_step(case: Case, record: Callable[[Case], None]) -> None:
    record(case)
