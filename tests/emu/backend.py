"""Makes the emulated kernels a backend of the package, for the tests and for scripts."""

from __future__ import annotations

import torch

from orthoreg_ext import ops
from orthoreg_ext.backend import BACKENDS, Backend
from tests.emu.build import build_project


def register_emulated() -> str:
    """Builds csrc/cuda for the CPU and registers it once; returns the backend's name.

    Raises:
        NvccMissingError: there is no nvcc.
    """
    if "emulated" not in BACKENDS:
        torch.ops.load_library(str(build_project()))
        ops.register("orthoreg_emu")
        BACKENDS["emulated"] = Backend("orthoreg_emu", ("cpu",))
    return "emulated"
