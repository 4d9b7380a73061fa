"""Structured pruning: whole filters leave, the model really gets smaller."""

from .checkpoint import replay
from .counts import Counts, count
from .methods import (
    FPGM,
    TPP,
    EarlyBird,
    EPruner,
    GReg1,
    GReg2,
    GroupFisher,
    IncReg,
    OrthoReg,
    OrthP,
    Phase,
    RePr,
    Slimming,
    SoftFilter,
    orthogonalise,
)
from .prune import plan, prune
from .result import LayerWidth, PrunePlan, PruneResult, RoundError
from .schedule import split_ratio
from .scores import CRITERIA, Criterion, exemplar, variety
from .sensitivity import GroupSensitivity, Sensitivity, sensitivity

__all__ = [
    "CRITERIA",
    "FPGM",
    "TPP",
    "Counts",
    "Criterion",
    "EPruner",
    "EarlyBird",
    "GReg1",
    "GReg2",
    "GroupFisher",
    "GroupSensitivity",
    "IncReg",
    "LayerWidth",
    "OrthP",
    "OrthoReg",
    "Phase",
    "PrunePlan",
    "PruneResult",
    "RePr",
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
