"""Fast orthonormality regularisation and filter pruning for PyTorch."""

from . import functional, pruning
from .backend import backend
from .build_info import build_info
from .regularizer import OrthoRegularizer

__all__ = ["OrthoRegularizer", "backend", "build_info", "functional", "pruning"]
