"""Fast orthonormality regularisation and filter pruning for PyTorch."""

from . import distributed, functional, integrations, pruning, schedules
from .backend import backend
from .build_info import VERSION, build_info
from .diagnosis import diagnose
from .precision import precision
from .regularizer import OrthoRegularizer

__version__ = VERSION

__all__ = [
    "OrthoRegularizer",
    "__version__",
    "backend",
    "build_info",
    "diagnose",
    "distributed",
    "functional",
    "integrations",
    "precision",
    "pruning",
    "schedules",
]
