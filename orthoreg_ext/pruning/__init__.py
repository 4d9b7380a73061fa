"""Structured pruning: whole filters leave, the model really gets smaller."""

from .checkpoint import replay
from .counts import Counts, count
from .methods import TPP
from .prune import plan, prune
from .result import LayerWidth, PrunePlan, PruneResult, RoundError
from .schedule import split_ratio
from .scores import CRITERIA, Criterion
from .sensitivity import GroupSensitivity, Sensitivity, sensitivity

__all__ = [
    "CRITERIA",
    "TPP",
    "Counts",
    "Criterion",
    "GroupSensitivity",
    "LayerWidth",
    "PrunePlan",
    "PruneResult",
    "RoundError",
    "Sensitivity",
    "count",
    "plan",
    "prune",
    "replay",
    "sensitivity",
    "split_ratio",
]
