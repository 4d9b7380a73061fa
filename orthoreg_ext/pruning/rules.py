"""How units are scored, ranked and limited: the choices that `prune` and every method share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..errors import choose
from .evidence import DIMS, NORMALIZERS, REDUCTIONS
from .scores import Criterion, get_criterion
from .selection import SCOPES, Limits
from .targets import TARGETS


def default_cap(ratio: float) -> float:
    """The `max_layer_ratio` of :func:`~.prune.prune` where none is given, for a checked ratio."""
    return max(0.9, (1 + ratio) / 2)


@dataclass(frozen=True)
class Rules:
    """How units are scored, ranked and limited.

    Attributes:
        criterion: a name of CRITERIA, or a row like them, e.g. of :func:`~.scores.variety`; low
            scores go first.
        scope: a name of SCOPES.
        round_to: the remaining channels of each pruned group are a multiple of it.
        max_layer_ratio: the largest share of a group's units, of its original count, that may go.
        normalize: None, or divide the scores of each group by the "mean", "max" or "sum" of their
            absolute values.
        group_reduction: "mean", "sum", "max", or "first".
        bias: count a filter's bias among its entries, and a BatchNorm's shift for "bn_taylor".
        dim: "out" scores a unit by the filters that make its channels, "in" by the entries of the
            filters that read them, "both" by all of these.
        target: a name of TARGETS: what a ratio is a share of.
        rescore_every: the units that scope "one_at_a_time" removes before it scores anew; None: so
            many that about 64 scorings do for a round.

    Raises:
        ValueError: one is unknown or out of range.
    """

    criterion: str | Criterion = "fisher"
    scope: str = "global"
    round_to: int = 1
    max_layer_ratio: float = 0.95
    normalize: str | None = None
    group_reduction: str = "mean"
    bias: bool = False
    dim: str = "out"
    target: str = "filters"
    rescore_every: int | None = None

    def __post_init__(self) -> None:
        row = self.row
        choose("dim", self.dim, DIMS)
        if self.dim != "out" and not row.dims:
            raise ValueError(
                f"dim is {self.dim!r}, but criterion {row.name!r} does not score input channels: "
                "leave dim='out', or use another criterion, e.g. 'l1'"
            )
        choose("scope", self.scope, SCOPES)
        choose("target", self.target, TARGETS)
        choose("group_reduction", self.group_reduction, REDUCTIONS)
        if self.group_reduction != "mean" and not row.reduces:
            raise ValueError(
                f"group_reduction is {self.group_reduction!r}, but criterion {row.name!r} sums "
                "over the layers of a group inside the square: leave it at its default"
            )
        if not isinstance(self.bias, bool):
            raise ValueError(f"bias is {self.bias!r}, expected True or False")
        if self.normalize is not None:
            choose("normalize", self.normalize, NORMALIZERS)
        step, share = self.round_to, self.max_layer_ratio
        if not isinstance(step, int) or isinstance(step, bool) or step < 1:
            raise ValueError(f"round_to is {step!r}, expected an integer of at least 1, e.g. 8")
        if not isinstance(share, (int, float)) or isinstance(share, bool) or not 0 < share <= 1:
            raise ValueError(
                f"max_layer_ratio is {share!r}, expected a number in (0, 1]: the largest share of "
                "a layer that may be removed"
            )
        every = self.rescore_every
        if every is not None and (
            not isinstance(every, int) or isinstance(every, bool) or every < 1
        ):
            raise ValueError(
                f"rescore_every is {every!r}, expected None or an integer of at least 1"
            )
        if self.scope == "one_at_a_time" and self.target == "latency":
            raise ValueError(
                "scope='one_at_a_time' would measure anew after every few units, too often for "
                "target='latency'; use scope='global' with rounds, or target='macs'"
            )

    @property
    def row(self) -> Criterion:
        """The row of the criterion."""
        return get_criterion(self.criterion)

    def document(self) -> dict[str, Any]:
        """The fields, ready for JSON."""
        return {**vars(self), "criterion": self.row.name}

    @property
    def limits(self) -> Limits:
        """What has to stay in every group."""
        return Limits(float(self.max_layer_ratio), self.round_to)
