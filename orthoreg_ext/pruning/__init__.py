"""Structured pruning: whole filters leave, the model really gets smaller."""

from .checkpoint import replay
from .counts import Counts, count
from .methods import TPP, GReg1, GReg2, IncReg, OrthP, Slimming, SoftFilter, orthogonalise
from .prune import plan, prune
from .result import LayerWidth, PrunePlan, PruneResult, RoundError
from .schedule import split_ratio
from .scores import CRITERIA, Criterion, exemplar, variety
from .sensitivity import GroupSensitivity, Sensitivity, sensitivity

__all__ = [
    "CRITERIA",
    "TPP",
    "Counts",
    "Criterion",
    "GReg1",
    "GReg2",
    "GroupSensitivity",
    "IncReg",
    "LayerWidth",
    "OrthP",
    "PrunePlan",
    "PruneResult",
    "RoundError",
    "Sensitivity",
    "Slimming",
    "SoftFilter",
    "count",
    "exemplar",
    "orthogonalise",
    "plan",
    "prune",
    "replay",
    "sensitivity",
    "split_ratio",
    "variety",
]
