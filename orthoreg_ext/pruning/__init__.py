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
from .prune import prune
from .result import LayerWidth, PruneResult, RoundError
from .schedule import split_ratio
from .scores import CRITERIA, Criterion, exemplar, variety

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
    "IncReg",
    "LayerWidth",
    "OrthP",
    "OrthoReg",
    "Phase",
    "PruneResult",
    "RePr",
    "RoundError",
    "Slimming",
    "SoftFilter",
    "count",
    "exemplar",
    "orthogonalise",
    "prune",
    "replay",
    "split_ratio",
    "variety",
]
