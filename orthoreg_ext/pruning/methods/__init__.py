"""Methods with a schedule: objects that any training loop can drive, one a file."""

from .greg1 import GReg1
from .greg2 import GReg2
from .increg import IncReg
from .orthp import OrthP, orthogonalise
from .slimming import Slimming
from .soft_filter import SoftFilter
from .tpp import TPP

__all__ = ["TPP", "GReg1", "GReg2", "IncReg", "OrthP", "Slimming", "SoftFilter", "orthogonalise"]
