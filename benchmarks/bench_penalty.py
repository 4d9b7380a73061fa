"""What does the regulariser cost? A penalty and its gradient for all layers of a model.

Each model with every baseline of baselines.py; then the other penalties and masks beside `so`.
"""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.baselines import REGULARISE
from benchmarks.compare import ADALORA
from benchmarks.engine import Case
from benchmarks.models import NINE

QUICK = ("vgg13", "resnet56", "resnet50", "mobilenet_v1")
QUICK_WAYS = ("orthoreg_ext", "orthoreg_ext-attached", "eager", "closed-small", "orthoreg-repo")
VARIANTS = (
    *("orthoreg_ext", "orthoreg_ext-masked", "orthoreg_ext-l1", "orthoreg_ext-l1-masked"),
    *("orthoreg_ext-offdiag", "orthoreg_ext-cosine", "orthoreg_ext-tpp"),
)
HEAVY = ("orthoreg_ext", "orthoreg_ext-attached", "closed-small")  # 6 Tflop each
GROUPED = ("orthoreg_ext", "eager", "closed-small")
# The L1 of the package is there for orthoreg-repo, which computes that.
EVERY = tuple(
    name
    for name in REGULARISE
    if name not in (*VARIANTS[1:], "peft", "orthoreg_ext-frobenius") or name == "orthoreg_ext-l1"
)


def _ways(model: str, full: bool) -> tuple[str, ...]:
    if model == "adalora_7b":
        return ADALORA
    if model == "llama_1b":
        return HEAVY
    if full:
        return EVERY
    ways = (*QUICK_WAYS, "orthoreg_ext-l1")
    return (*ways, "compile") if model == "vgg13" else ways


def penalty_cases(full: bool, device: str) -> list[Case]:
    last = "llama_1b"  # takes longest
    models = ("vgg13", *(m for m in NINE if m not in ("vgg13", last))) if full else QUICK
    more = ("adalora_7b", "mobilenet_v2") if full else ("adalora_7b",)
    plain = [
        Case(m, matmul=matmul, ways=_ways(m, full), question="penalty")
        for matmul in (("highest", "high") if device == "cuda" else ("highest",))
        for m in (*models, *more)
    ]
    grouped = [Case("resnext50", "grouped", ways=GROUPED, question="penalty")]
    heavy = [Case(last, ways=_ways(last, full), question="penalty")]
    return [*plain, *grouped, *heavy] if full else plain


def variant_cases(full: bool, device: str) -> list[Case]:
    models = ("vgg13", "resnet50", "resnet56", "mobilenet_v1") if full else ("vgg13", "resnet56")
    return [Case(m, ways=VARIANTS, base="orthoreg_ext", question="penalties") for m in models]


CASES: dict[str, Callable[[bool, str], list[Case]]] = {
    "bench_penalty_and_gradient": penalty_cases,
    "bench_penalties_and_masks": variant_cases,
}


def bench_penalty_and_gradient(case: Case, record: Callable[[Case], None]) -> None:
    record(case)


def bench_penalties_and_masks(case: Case, record: Callable[[Case], None]) -> None:
    record(case)
