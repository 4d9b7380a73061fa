"""Structured pruning: whole filters leave, the model really gets smaller."""

from .checkpoint import replay
from .counts import Counts, count
from .methods import TPP
from .prune import prune
from .result import LayerWidth, PruneResult, RoundError
from .schedule import split_ratio
from .scores import CRITERIA, Criterion

__all__ = [
    "CRITERIA",
    "TPP",
    "Counts",
    "Criterion",
    "LayerWidth",
    "PruneResult",
    "RoundError",
    "count",
    "prune",
    "replay",
    "split_ratio",
]
