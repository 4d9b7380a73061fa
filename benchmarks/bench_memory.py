"""How much memory does a step take beside weights and gradients? Each way in its own process."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.engine import Case

WAYS = ("orthoreg_ext", "orthoreg_ext-attached", "orthoreg_ext-autograd", "closed-small", "eager")
QUICK_WAYS = ("orthoreg_ext", "eager")


def memory_cases(full: bool, device: str) -> list[Case]:
    cases = [Case("resnet50", "memory", ways=WAYS if full else QUICK_WAYS, question="memory")]
    if full:  # eager keeps Gram matrices of 8192 x 8192, see memory.why_not
        ways = ("orthoreg_ext", "closed-small", "eager")
        cases.append(Case("llama_1b", "memory", ways=ways, question="memory"))
    return cases


CASES: dict[str, Callable[[bool, str], list[Case]]] = {"bench_extra_memory": memory_cases}


def bench_extra_memory(case: Case, record: Callable[[Case], None]) -> None:
    record(case)
