"""Methods with a schedule: objects that any training loop can drive, one a file."""

from .early_bird import EarlyBird
from .epruner import EPruner
from .fpgm import FPGM
from .greg1 import GReg1
from .greg2 import GReg2
from .group_fisher import GroupFisher
from .increg import IncReg
from .orthoreg import OrthoReg, Phase
from .orthp import OrthP, orthogonalise
from .repr import RePr
from .slimming import Slimming
from .soft_filter import SoftFilter
from .tpp import TPP

__all__ = [
    "FPGM",
    "TPP",
    "EPruner",
    "EarlyBird",
    "GReg1",
    "GReg2",
    "GroupFisher",
    "IncReg",
    "OrthP",
    "OrthoReg",
    "Phase",
    "RePr",
    "Slimming",
    "SoftFilter",
    "orthogonalise",
]
