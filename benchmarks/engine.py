"""One case: ways of the same work, timed in turns, their results compared with float64.

compare.py and the bench_*.py files all come here; a case becomes a record, and tables, plots and
the README are made of records alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

import orthoreg_ext as ox
from benchmarks import grouped
from benchmarks.baselines import OURS, PRUNED, REGULARISE, Way
from benchmarks.ceilings import Ceiling, read, sgemm
from benchmarks.methods import METHODS
from benchmarks.models import (
    flops_needed,
    groups_of,
    random_weights,
    shapes_of,
    weight_bytes,
)
from benchmarks.scoring import IMPORTANCE, SCORE, exact_scores, network
from benchmarks.steps import STEP, training
from orthoreg_ext.timing import ForeignLoad, host_seconds, measure, watch

CHECKED = 1e12  # flops needed; the products of more take too long in float64


@dataclass(frozen=True)
class Case:
    """One table: a model, a kind of work, torch's matmul precision, the ways to compare.

    Attributes:
        model: a name of models.py or nets.py.
        work: a key of `WORK`.
        matmul: for torch.set_float32_matmul_precision.
        ways: of that work.
        base: the way that the others are divided by; empty: the package's way of the same.
        question: what it is measured for, a key of `tables.QUESTIONS`.
    """

    model: str
    work: str = "regularise"
    matmul: str = "highest"
    ways: tuple[str, ...] = ()
    base: str = ""
    question: str = ""

    @property
    def title(self) -> str:
        """For the table."""
        return f"{self.work} {self.model}, float32 matmul {self.matmul!r}"


@dataclass(frozen=True)
class Work:
    """A kind of work.

    Attributes:
        ways: model -> every way by name.
        subject: model and device -> what the ways are prepared for.
        exact: model, subject and what is computed -> the result in float64; None: not compared.
        gradients: whether the result is what is added to ``.grad``.
        ceiling: what limits it, of ceilings.py; None: nothing simple.
    """

    ways: Callable[[str], Mapping[str, Way]]
    subject: Callable[[str, str], Any]
    exact: Callable[[str, Any, str], list[Tensor]] | None = None
    gradients: bool = False
    ceiling: str | None = None


def _weights(model: str, device: str) -> list[Tensor]:
    weights = random_weights(shapes_of(model), device)
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    return weights


WORK = {
    "regularise": Work(
        lambda model: REGULARISE,
        _weights,
        lambda model, weights, computes: exact_gradients(weights, computes),
        gradients=True,
        ceiling="sgemm",
    ),
    "grouped": Work(
        lambda model: grouped.ways(groups_of(model, shapes_of(model))),
        _weights,
        lambda model, weights, computes: grouped.exact_gradients(
            weights, groups_of(model, shapes_of(model))
        ),
        gradients=True,
        ceiling="sgemm",
    ),
    "score": Work(
        lambda model: SCORE,
        _weights,
        lambda model, weights, computes: exact_scores(weights, computes),
        ceiling="read",
    ),
    "groups": Work(lambda model: IMPORTANCE, network),
    "step": Work(lambda model: STEP, training),
    "method": Work(lambda model: METHODS, training),
}


def _so(gram: Tensor) -> Tensor:
    return (gram - torch.eye(len(gram), device=gram.device)).square().sum()


def _l1(gram: Tensor) -> Tensor:
    return (gram - torch.eye(len(gram), device=gram.device)).abs().sum()


def _offdiag(gram: Tensor) -> Tensor:
    return gram.square().sum() - gram.diagonal().square().sum()


def _cosine(gram: Tensor) -> Tensor:
    norms = gram.diagonal().sqrt()
    return (gram / norms.unsqueeze(0) / norms.unsqueeze(1)).square().sum() - len(gram)


def _frobenius(gram: Tensor) -> Tensor:
    return (gram - torch.eye(len(gram), device=gram.device)).norm()


def _tpp(gram: Tensor) -> Tensor:
    kept = torch.arange(len(gram), device=gram.device) % PRUNED != PRUNED - 1
    return gram.square().sum() - gram[kept][:, kept].square().sum()


EXACT = {
    "so": _so,
    "orthoreg": _l1,
    "offdiag": _offdiag,
    "cosine": _cosine,
    "frobenius": _frobenius,
    "tpp": _tpp,
}


def exact_gradients(weights: list[Tensor], computes: str) -> list[Tensor]:
    """Of a penalty, or of one with filters masked, in float64 on the same device."""
    penalty, _, masked = computes.partition(" ")
    out = []
    for weight in weights:
        leaf = weight.detach().double().requires_grad_()
        matrix = leaf.flatten(1)
        columns = matrix.shape[0] > matrix.shape[1] and penalty != "tpp"
        if masked and penalty != "tpp":
            matrix = matrix[torch.arange(len(matrix), device=weight.device) % PRUNED != PRUNED - 1]
        short = matrix.t() if columns else matrix
        out.append(torch.autograd.grad(EXACT[penalty](short @ short.t()), leaf)[0])
    return out


def relative_error(got: list[Tensor], exact: list[Tensor]) -> float:
    """|got - exact| over |exact| of all tensors together."""
    wrong = sum(float((g.double() - e).square().sum()) for g, e in zip(got, exact, strict=True))
    return float((wrong / sum(float(e.square().sum()) for e in exact)) ** 0.5)


@dataclass
class Prepared:
    """A case whose calls are ready."""

    case: Case
    device: str  # of the tensors
    ways: Mapping[str, Way]
    calls: dict[str, Callable[[], Any]]
    ceiling: Ceiling | None
    needed: float | None  # flops or bytes, as the ceiling counts
    about: dict[str, Any]
    errors: dict[str, float]
    left_out: dict[str, str]
    failed: list[str]
    emulated: bool

    @property
    def own(self) -> str | None:
        """The package's first way."""
        return next((name for name in self.calls if name.startswith("orthoreg_ext")), None)


def prepare(case: Case, device: str) -> Prepared:
    """Runs every way once; those that cannot run are left out with the reason."""
    torch.set_float32_matmul_precision(case.matmul)
    if any("compile" in name for name in case.ways):
        torch._dynamo.reset()  # after eight models a function is silently compiled no more
    where = "cuda" if device == "cuda" else "cpu"
    work = WORK[case.work]
    ways, subject = work.ways(case.model), work.subject(case.model, where)
    emulated = device == "emulated"
    about, needed, ceiling, checked = _about(case, where, work, emulated=emulated)
    prepared = Prepared(case, where, ways, {}, ceiling, needed, about, {}, {}, [], emulated)
    exact: dict[str, list[Tensor]] = {}
    for name in case.ways:
        way = ways[name]
        if reason := way.why_not(where):
            prepared.left_out[name] = reason
            continue
        try:
            call = way.prepare(subject)
            for weight in subject if checked and work.gradients else []:
                weight.grad.zero_()  # preparing may have run it
            returned = call()
        except Exception as error:  # noqa: BLE001  (a baseline that cannot run is a result)
            line = (str(error).strip().splitlines() or [""])[0][:120]
            prepared.left_out[name] = f"{type(error).__name__}: {line}"
            prepared.failed += [name] if name.startswith("orthoreg_ext") else []
            continue
        prepared.calls[name] = call
        if checked and work.exact is not None:
            if way.computes not in exact:
                exact[way.computes] = work.exact(case.model, subject, way.computes)
            got = way.tidy(returned)
            if work.gradients and not got:
                got = [w.grad for w in subject]
            prepared.errors[name] = relative_error(got, exact[way.computes])
    return prepared


def _about(
    case: Case, where: str, work: Work, *, emulated: bool
) -> tuple[dict[str, Any], float | None, Ceiling | None, bool]:
    if case.work in ("groups", "step", "method"):
        return {"layers": None, "flops_needed": None, "bytes": None}, None, None, False
    shapes = shapes_of(case.model)
    flops = flops_needed(shapes, groups_of(case.model, shapes) if case.work == "grouped" else ())
    size = weight_bytes(shapes)
    regularises = case.work != "score"
    about = {
        "layers": len(shapes),
        "flops_needed": flops if regularises else None,
        # read w; read and write g, or read g
        "bytes": 3 * size if regularises else 2 * size,
    }
    ceiling, needed = None, None
    if work.ceiling is not None and not emulated:
        needed = float(flops if regularises else 2 * size)
        ceiling = sgemm(where, case.matmul) if regularises else read(where, 2 * size)
    return about, needed, ceiling, flops < CHECKED


def timed(
    prepared: Prepared,
    budget: float,
    *,
    rounds: tuple[int, int] = (3, 40),
    load: ForeignLoad | None = None,
) -> dict[str, Any]:
    """Times a case in turns: its record."""
    case, device = prepared.case, prepared.device
    torch.set_float32_matmul_precision(case.matmul)
    calls: dict[str, Callable[[], Any]] = dict(prepared.calls)
    ceiling = prepared.ceiling
    if ceiling is not None:
        calls[ceiling.name] = ceiling.call
    if load is None and not prepared.emulated:  # whose times do not count anyway
        load = watch(device)
    timing = measure(calls, device, budget, rounds=rounds, load=load, warm=False)
    rows = {}
    for name in prepared.calls:
        way = prepared.ways[name]
        row: dict[str, Any] = {
            "computes": way.computes,
            "meaning": way.meaning,
            "ms": timing.spread(name, 1e3).as_dict(),
            "host_us": 1e6 * host_seconds(prepared.calls[name], device)
            if device == "cuda"
            else None,
            "error": prepared.errors.get(name),
            "ratio": None,
            "share": None,
        }
        base = case.base or OURS.get(way.computes, "")
        if base in prepared.calls and name != base:
            row["ratio"] = {"to": base, **timing.ratio(name, base).as_dict()}
        if ceiling is not None and prepared.needed is not None and "masked" not in way.computes:
            part = prepared.needed / ceiling.amount
            row["share"] = timing.ratio(ceiling.name, name, part).as_dict()
        rows[name] = row
    found: dict[str, Any] = {**asdict(case), "ways": list(case.ways), **prepared.about}
    found |= {"rows": rows, "left_out": prepared.left_out, "failed": prepared.failed}
    found["ceiling"] = None
    if ceiling is not None:
        rate = ceiling.amount / timing.spread(ceiling.name).median
        found["ceiling"] = {"name": ceiling.name, "meaning": ceiling.meaning, "rate": rate}
    return {**found, **timing.about()}


def run_case(case: Case, device: str, budget: float) -> dict[str, Any]:
    """Times the ways of a case and compares their results with float64."""
    return timed(prepare(case, device), budget)


@contextlib.contextmanager
def implementation(device: str) -> Iterator[None]:
    """The package's kernels for `device`; never its plain-PyTorch reference."""
    name = device
    if device == "emulated":
        from tests.emu.backend import register_emulated

        name = register_emulated()
    with ox.backend(name):
        yield
