"""Call a library's C launchers from Python: emulated on numpy arrays, or on a GPU.

A launcher is declared with the macros of harness.h: ``LAUNCHER(name)(const float* x, int n)``.
Its pointers take numpy arrays, which it may change; its other parameters are int.
"""

from __future__ import annotations

import contextlib
import ctypes
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np


class Kernels:
    """The launchers of one shared library.

    Args:
        library: its path, from `build` (emulated) or `build_for_gpu`.
        gpu: copy arrays to the GPU and back; needs torch with CUDA.
    """

    def __init__(self, library: Path, *, gpu: bool = False) -> None:
        self.library, self.gpu = ctypes.CDLL(str(library)), gpu

    def __call__(self, launcher: str, *args: np.ndarray[Any, Any] | int) -> None:
        """Launch.

        Raises:
            RuntimeError: the launch was refused or failed, with the reason.
        """
        function = getattr(self.library, launcher)
        function.restype = ctypes.c_char_p
        passed: list[ctypes.c_void_p | ctypes.c_int] = []
        copies: list[tuple[np.ndarray[Any, Any], Any]] = []
        for value in args:
            if not isinstance(value, np.ndarray):
                passed.append(ctypes.c_int(value))
            elif self.gpu:
                import torch

                copy = torch.from_numpy(value.view(np.uint8)).cuda()
                copies.append((value, copy))
                passed.append(ctypes.c_void_p(copy.data_ptr()))
            else:
                passed.append(ctypes.c_void_p(value.ctypes.data))
        if error := function(*passed):
            raise RuntimeError(error.decode())
        for value, copy in copies:
            value.view(np.uint8)[...] = copy.cpu().numpy()


class Launches:
    """The names of the kernels that an emulated library launched since this was made or reset."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        self._library.emu_launch_name.restype = ctypes.c_char_p
        self.reset()

    def reset(self) -> None:
        """Forget them."""
        self._library.emu_reset_launches()

    def names(self) -> list[str]:
        """The mangled names, in order."""
        return [
            self._library.emu_launch_name(i).decode() for i in range(self._library.emu_launches())
        ]

    @contextlib.contextmanager
    def counted(self) -> Iterator[list[str]]:
        """``with launches.counted() as names:`` fills the list when the block ends."""
        names: list[str] = []
        self.reset()
        yield names
        names += self.names()


def build_for_gpu(source: Path, out: Path, defines: Sequence[str] = ()) -> Path:
    """Compile the same source for the GPU at hand."""
    from tests.emu.build import find_nvcc

    command = [
        find_nvcc(),
        "-std=c++17",
        "-arch=native",
        "-shared",
        "-Xcompiler=-fPIC",
        f"-I{Path(__file__).parent}",
    ]
    command += [*(f"-D{d}" for d in defines), str(source), "-o", str(out)]
    subprocess.run(command, check=True)
    return out
