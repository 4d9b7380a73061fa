"""The table of criteria."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import functional as F
from ..errors import choose
from ..reference import filter_entries
from . import redundancy
from . import variety_rules as rules
from .activations import FREED, check_read, group_fisher
from .calibration import divergences, hessian_gradients
from .evidence import Evidence, Scored, parameters_of

NEEDS = ("weights", "gradients", "data")


@dataclass(frozen=True)
class Criterion:
    """A way to rank units; low scores go first. Accepted wherever the name of one is.

    Attributes:
        name: what it is called in settings and messages.
        formula: with w, g the entries of one filter and of its mean gradient.
        score: evidence -> the scores of the units of every prunable group, [u] float64 on the CPU.
        needs: "weights"; "gradients" (computed on data, or those that are there); or "data".
        dims: whether input channels can be scored too.
        reduces: whether the scores of a unit's filters are reduced to one by `group_reduction`.
    """

    name: str
    formula: str
    score: Callable[[Evidence], list[Tensor]] = field(repr=False)
    needs: str = "weights"
    dims: bool = False
    reduces: bool = True

    @property
    def needs_grad(self) -> bool:
        """Whether it differentiates the loss or the output of the model."""
        return self.needs != "weights"


Entries = Callable[[Evidence, list[Scored]], dict[str, Tensor]]
"""Computes one number for each entry of each parameter, by name."""


def kernel(
    evidence: Evidence,
    sums: str,
    of: str = "filters",
    shift: bool = False,
    entries: Entries | None = None,
) -> list[Tensor]:  # each [u] float64
    """A criterion of ``functional.filter_scores``, all slots in one launch for each dimension.

    Args:
        evidence: what it reads.
        sums: which one.
        of: "filters", or "gamma" for the scales of BatchNorms.
        shift: count the shift of a BatchNorm where biases count.
        entries: what stands for the gradient; by default none.
    """
    scored = evidence.slots(of)
    if of == "gamma" and not shift:
        scored = [Scored(entry.slot, entry.weight, None) for entry in scored]
    grads = None if entries is None else entries(evidence, scored)
    rows: dict[int, Tensor] = {}
    for dim in (0, 1):
        part = [i for i, entry in enumerate(scored) if entry.dim == dim]
        if part:
            found = _kernel_rows([scored[i] for i in part], sums, dim, grads)
            rows.update(zip(part, found, strict=True))
    return evidence.units(scored, [rows[i] for i in range(len(scored))])


def _kernel_rows(
    scored: list[Scored], name: str, dim: int, grads: dict[str, Tensor] | None
) -> list[Tensor]:  # each [channels]
    own = [entry.of(dict(entry.parameters)) for entry in scored]
    slopes = None if grads is None else [entry.of(grads) for entry in scored]
    has_bias = any(bias is not None for _, bias in own)
    with torch.no_grad():
        return F.filter_scores(
            [weight for weight, _ in own],
            None if slopes is None else [weight for weight, _ in slopes],
            (name,),
            dim=dim,
            biases=[bias for _, bias in own] if has_bias else None,
            bias_grads=[bias for _, bias in slopes] if has_bias and slopes is not None else None,
            groups=[entry.groups for entry in scored],
        )[name]


def summed(evidence: Evidence, entries: Entries) -> list[Tensor]:  # each [u] float64
    """The sum of numbers that `entries` gives to the entries of each filter or input channel."""
    scored = evidence.slots()
    found = entries(evidence, scored)
    rows = []
    for entry in scored:
        weight, bias = entry.of(found)
        extra = weight.new_empty(0) if bias is None else bias
        rows.append(filter_entries(weight, extra, entry.groups, entry.dim).sum(1))
    return evidence.units(scored, rows)


def compared(
    evidence: Evidence, rule: Callable[[Tensor], Tensor]
) -> list[Tensor]:  # each [u] float64
    """A rule on every filter matrix, [n, k] -> [n]; groups of a convolution are apart.

    Layers with one filter a matrix (depthwise) have nothing to compare and do not count: the unit
    is scored by its other layers.
    """
    scored = evidence.slots("matrices")
    return evidence.units(scored, [_ruled(entry, rule) for entry in scored])


def _ruled(entry: Scored, rule: Callable[[Tensor], Tensor]) -> Tensor:  # [n]
    try:
        return torch.cat([rule(matrix) for matrix in entry.matrices()])
    except ValueError as error:
        raise ValueError(f"layer {entry.slot.layer!r}: {error}") from error


def _gradients(evidence: Evidence, scored: list[Scored]) -> dict[str, Tensor]:
    return evidence.gradients(scored)


def _curvature(evidence: Evidence, scored: list[Scored]) -> dict[str, Tensor]:
    """The entries w (H g)."""
    parameters = parameters_of(scored)
    bent = hessian_gradients(evidence.model, parameters, evidence.batches(), evidence.loss)
    return {name: p.detach().to(bent[name].dtype) * bent[name] for name, p in parameters.items()}


def _divergence(evidence: Evidence, scored: list[Scored]) -> dict[str, Tensor]:
    return divergences(evidence.model, parameters_of(scored), evidence.batches())


def _joint(evidence: Evidence, freed: str) -> list[Tensor]:  # each [u] float64
    groups = evidence.structure.prunable
    check_read(evidence.structure)
    scores = group_fisher(
        evidence.model, evidence.structure, evidence.batches(), evidence.loss, freed
    )
    for group in groups:
        if not bool(torch.isfinite(scores[group.units]).all()):
            raise ValueError(
                f"criterion {evidence.name!r} is not finite for layer {group.name!r}: the cut "
                "would be arbitrary. Look for NaN or infinity in the data or the loss"
            )
    return evidence.normalized([scores[group.units] for group in groups])


def exemplar(beta: float = redundancy.BETA) -> Criterion:
    """Keeps the exemplars of affinity propagation, as EPruner does.

    See :func:`~.redundancy.exemplars` for the formula and :func:`~.redundancy.exemplar` for the
    scores. How many exemplars there are is not asked: the ratio is that of the call.

    Args:
        beta: of the preference; EPruner has 0.6 to 0.76, more for deep layers. Larger: fewer.

    Raises:
        ValueError: beta is not above 0.
    """
    if not isinstance(beta, (int, float)) or not beta > 0:
        raise ValueError(f"beta is {beta!r}, expected a number above 0, e.g. {redundancy.BETA}")
    name = "exemplar" if beta == redundancy.BETA else f"exemplar(beta={beta})"
    formula = "affinity propagation on -|w_i - w_j|^2, preference beta * median; exemplars stay"
    rule = partial(redundancy.exemplar, beta=beta)
    return Criterion(name, formula, partial(compared, rule=rule))


def variety(
    host: str | Criterion = "l1", mode: str = "pairwise", threshold: float = rules.THRESHOLD
) -> Criterion:
    """Makes any criterion look at redundant units first (Hubens et al., arXiv 2203.05807).

    The paper's rule is not public, the three here are ours: ``pairwise`` takes the most similar
    remaining pair by |cosine| and drops the one with the lower host score, again and again;
    ``reweight`` lowers each host score by the share of the largest similarity to a unit that ranks
    higher; ``gate`` lets only units go that have such a similarity of at least the threshold, as
    long as there are any. See `variety_rules.py` for each.

    Args:
        host: the criterion that is wrapped.
        mode: "pairwise", "reweight" or "gate".
        threshold: of "gate", in [0, 1].

    Raises:
        ValueError: an unknown host or mode, or a threshold out of range.
    """
    row = get_criterion(host)
    rule = rules.RULES[choose("mode", mode, rules.RULES)]
    if not isinstance(threshold, (int, float)) or not 0 <= threshold <= 1:
        raise ValueError(f"threshold is {threshold!r}, expected a number in [0, 1]")
    options = f"{row.name}, {mode}" + (f", {threshold}" if mode == "gate" else "")
    name = "variety" if options == "l1, pairwise" else f"variety({options})"

    def score(evidence: Evidence) -> list[Tensor]:
        scores = row.score(evidence)
        alike = rules.similarities(evidence.model, evidence.structure)
        return [rule(*pair, threshold) for pair in zip(scores, alike, strict=True)]

    formula = f"{mode} on |cos(w_i, w_j)| with {row.name}: {row.formula}"
    return Criterion(name, formula, score, row.needs, row.dims, row.reduces)


def _group_fisher(freed: str) -> Criterion:
    name = "group_fisher" if freed == "memory" else f"group_fisher_{freed}"
    per = "" if freed == "nothing" else f" / {freed} freed"
    formula = f"sum_n (sum_layers sum_hw a da)^2{per}"
    return Criterion(name, formula, partial(_joint, freed=freed), "data", reduces=False)


def _plain(name: str, formula: str) -> Criterion:
    return Criterion(name, formula, partial(kernel, sums=name), dims=True)


def _sloped(name: str, formula: str) -> Criterion:
    score = partial(kernel, sums=name, entries=_gradients)
    return Criterion(name, formula, score, "gradients", dims=True)


def _of_gamma(name: str, formula: str, **options: Any) -> Criterion:
    needs = "gradients" if "entries" in options else "weights"
    return Criterion(name, formula, partial(kernel, of="gamma", **options), needs)


def _summed(name: str, formula: str, entries: Entries) -> Criterion:
    return Criterion(name, formula, partial(summed, entries=entries), "data", dims=True)


def _compared(name: str, formula: str, rule: Callable[[Tensor], Tensor]) -> Criterion:
    return Criterion(name, formula, partial(compared, rule=rule))


_ROWS = (
    _plain("l1", "sum |w|"),
    _plain("l2", "sqrt(sum w^2)"),
    _sloped("taylor", "|sum w g|"),
    _sloped("taylor_sq", "sum (w g)^2"),
    _sloped("taylor_abs", "sum |w g|"),
    _sloped("fisher", "(sum w g)^2"),
    _of_gamma("bn_scale", "|gamma|", sums="l1"),
    _of_gamma("bn_taylor", "(gamma g)^2", sums="fisher", shift=True, entries=_gradients),
    _summed("grasp", "sum w (H g)", _curvature),
    _summed("rdt", "sum of sum_c p_c (d log p_c / dw)^2, over its mean", _divergence),
    _compared("fpgm", "sum_j |w_i - w_j|", redundancy.fpgm),
    _compared("repr", "-sum_j |cos(w_i, w_j)|", redundancy.repr_),
    exemplar(),
    *(_group_fisher(freed) for freed in FREED),
)

CRITERIA: dict[str, Criterion] = {row.name: row for row in _ROWS}


def get_criterion(criterion: str | Criterion) -> Criterion:
    """The row of a name, or the row itself.

    Raises:
        ValueError: an unknown name.
    """
    if isinstance(criterion, Criterion):
        return criterion
    return CRITERIA[choose("criterion", criterion, CRITERIA)]


CRITERIA["variety"] = variety()
