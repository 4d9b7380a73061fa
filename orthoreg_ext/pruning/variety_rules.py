"""Filter variety: a host criterion that looks at redundant units first.

Hubens et al. (arXiv 2203.05807) wrap any criterion so that it focuses on redundant filters and
keeps the rare ones. Neither their rule nor code is public: the three rules here are ours. They work
on units, whose filters leave together, within each group of coupled layers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from .evidence import positions_in, scored_slots
from .redundancy import cosines, is_zero
from .units import Structure

THRESHOLD = 0.5
_DIGITS = 12


@dataclass(frozen=True)
class Similar:
    """How alike the units of a group are."""

    cosines: Tensor  # [u, u] float64, CPU, in [0, 1]; 0 on the diagonal and for dead units
    dead: Tensor  # bool [u]: all of its filters are zeros, multiples of any other


def similarities(model: nn.Module, structure: Structure) -> list[Similar]:
    """How alike the units of each prunable group are.

    Of two units it is the mean |cosine| of their filters over all filter matrices in which both
    have one (where both have several, of the first with the first and so on); 0 where there is no
    such matrix, as in groups of depthwise layers alone. Rounded, so that copies are equally similar
    on every machine.
    """
    groups = structure.prunable
    sizes = [len(group.units) for group in groups]
    ends = np.cumsum(sizes)
    sums = [torch.zeros(u, u, dtype=torch.float64) for u in sizes]
    counts = [torch.zeros(u, u, dtype=torch.float64) for u in sizes]
    alive = torch.zeros(sum(sizes), dtype=torch.bool)
    for entry in scored_slots(model, structure, "matrices"):
        where = positions_in(groups, entry.slot.units).chunk(entry.groups)
        for matrix, places in zip(entry.matrices(), where, strict=True):
            alike, zero = cosines(matrix).cpu(), is_zero(matrix).cpu()
            for rows in _by_occurrence(places, sum(sizes)):
                alive[places[rows]] |= ~zero[rows]
                group_of = torch.from_numpy(np.searchsorted(ends, places[rows].numpy(), "right"))
                for i in group_of.unique().tolist():
                    held = rows[group_of == i]
                    at = places[held] - int(ends[i] - sizes[i])
                    sums[i][at.unsqueeze(1), at] += alike[held.unsqueeze(1), held]
                    counts[i][at.unsqueeze(1), at] += 1
    return [
        Similar(
            (total / count.clamp(min=1)).round(decimals=_DIGITS), ~awake & (count.diagonal() > 0)
        )
        for total, count, awake in zip(sums, counts, alive.split(sizes), strict=True)
    ]


def _by_occurrence(places: Tensor, end: int) -> list[Tensor]:  # [rows] -> each [r] int64
    """Rows by how often their place occurs before them; those at `end` are left out."""
    order = torch.argsort(places, stable=True)
    order = order[places[order] < end]
    _, counts = torch.unique_consecutive(places[order], return_counts=True)
    starts = torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    turn = torch.arange(len(order)) - starts
    return [order[turn == t] for t in range(int(counts.max()) if len(counts) else 0)]


def pairwise(host: Tensor, similar: Similar, threshold: float) -> Tensor:  # [u] -> [u] float64
    """Takes the most similar remaining pair and drops the lower host score, until one is left.

    Dead units go before, by host score. Of equal similarities the pair with the lowest host score
    counts, of equal host scores the later unit goes. The unit that is dropped k-th gets the k-th
    lowest host score of the group: the host decides how much each group loses, variety which units.
    """
    scores, alive = host.numpy(), ~similar.dead.numpy()
    order = [int(i) for i in np.argsort(scores, kind="stable") if not alive[i]]
    alike = similar.cosines.numpy().copy()
    np.fill_diagonal(alike, -1)
    alike[~alive], alike[:, ~alive] = -1, -1
    nearest = alike.max(1) if len(alike) else np.empty(0)
    while alive.sum() > 1:
        candidates = np.flatnonzero(alive & (nearest == nearest[alive].max()))
        low = candidates[scores[candidates] == scores[candidates].min()]
        gone = int(low[-1])
        order.append(gone)
        alive[gone] = False
        stale = np.flatnonzero(alive & (alike[:, gone] == nearest))
        alike[gone], alike[:, gone] = -1, -1
        nearest[stale] = alike[stale].max(1)
    order += np.flatnonzero(alive).tolist()
    return _in_order(host, torch.tensor(order, dtype=torch.int64))


def reweight(host: Tensor, similar: Similar, threshold: float) -> Tensor:  # [u] -> [u] float64
    """Host - |host| * redundancy, with the largest similarity to a unit that the host ranks higher.

    So the copy with the lower host score goes first, and the best of all copies keeps its score.
    The redundancy of a dead unit is 1.
    """
    return host - host.abs() * _redundancy(host, similar)


def gate(host: Tensor, similar: Similar, threshold: float) -> Tensor:  # [u] -> [u] float64
    """Only units whose redundancy is at least the threshold can go; when they are gone, the others.

    Both by host score; the redundancy is that of :func:`reweight`. The k-th unit in this order gets
    the k-th lowest host score of the group.
    """
    redundant = _redundancy(host, similar) >= threshold
    by_host = torch.argsort(host, stable=True)
    order = torch.cat([by_host[redundant[by_host]], by_host[~redundant[by_host]]])
    return _in_order(host, order)


RULES: dict[str, Callable[[Tensor, Similar, float], Tensor]] = {
    "pairwise": pairwise,
    "reweight": reweight,
    "gate": gate,
}


def _redundancy(host: Tensor, similar: Similar) -> Tensor:  # [u] -> [u] float64
    """The largest similarity to a unit that ranks higher; of equal scores the earlier does."""
    position = torch.arange(len(host))
    higher = host > host.unsqueeze(1)  # [i, j]: j ranks above i
    higher |= (host == host.unsqueeze(1)) & (position < position.unsqueeze(1))
    found = torch.where(higher, similar.cosines, 0).amax(1)
    return torch.where(similar.dead, 1.0, found)


def _in_order(host: Tensor, order: Tensor) -> Tensor:  # [u], int64 [u] -> [u] float64
    """The host scores in rising order, given to the units in this order; no two are equal."""
    values = host.sort().values.numpy().copy()
    for k in range(1, len(values)):
        values[k] = max(values[k], np.nextafter(values[k - 1], np.inf))
    scores = torch.empty_like(host)
    scores[order] = torch.from_numpy(values)
    return scores
