"""Measures what the performance model assumes of a GPU; prints a table and writes JSON.

    python scripts/gpu_probes.py [--out probes.json]
    python scripts/gpu_probes.py --emulated     # runs every line without a GPU; times mean nothing

Each probe counts its work from its arguments and compares that with what the kernel did. Needs nvcc
and torch with CUDA; gpu_probes.cu is compiled for the GPU at hand.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "scripts" / "gpu_probes.cu"
THREADS, CHAINS = 256, 8  # as in gpu_probes.cu
DEPTH = {"tf32": 8, "bf16": 16}  # of an m16n8k instruction


@dataclass(frozen=True)
class Sizes:
    """How much each probe does."""

    blocks_a_multiprocessor: int = 8
    steps: int = 16_384
    l2_bytes: tuple[int, ...] = (16 << 20, 30 << 20)
    l2_rounds: int = 50
    memory_bytes: int = 2 << 30
    launches: int = 1_000
    repetitions: int = 7


EMULATED = Sizes(1, 3, (1 << 12, 3 << 12), 2, 1 << 14, 5, 2)


class Probes:
    """The launchers of gpu_probes.cu on one device.

    Args:
        library: gpu_probes.cu, compiled.
        emulated: run on the CPU, on the emulator's kernels.
        sizes: how much each probe does.
    """

    def __init__(self, library: Path, *, emulated: bool, sizes: Sizes) -> None:
        self.library, self.emulated, self.sizes = ctypes.CDLL(str(library)), emulated, sizes
        self.device = torch.device("cpu" if emulated else "cuda")
        properties = None if emulated else torch.cuda.get_device_properties(0)
        self.multiprocessors = 4 if properties is None else properties.multi_processor_count
        self.name = "emulated on the CPU" if properties is None else properties.name
        self.blocks = self.multiprocessors * sizes.blocks_a_multiprocessor

    def launch(self, name: str, *arguments: Tensor | int) -> None:
        """Launches on torch's current stream.

        Raises:
            RuntimeError: the launch was refused.
        """
        passed: list[Any] = [
            ctypes.c_void_p(a.data_ptr()) if isinstance(a, Tensor) else ctypes.c_int(a)
            for a in arguments
        ]
        stream = 0 if self.emulated else torch.cuda.current_stream().cuda_stream
        if code := getattr(self.library, f"probe_{name}")(*passed, ctypes.c_void_p(stream)):
            raise RuntimeError(f"probe_{name}: CUDA error {code}")

    def seconds(self, call: Callable[[], object]) -> float:
        """The median time of a call on the device, after one that does not count."""
        times = []
        for _ in range(self.sizes.repetitions + 1):
            if self.emulated:
                start = time.perf_counter()
                call()
                times.append(time.perf_counter() - start)
            else:
                events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
                events[0].record()
                call()
                events[1].record()
                events[1].synchronize()
                times.append(1e-3 * events[0].elapsed_time(events[1]))
        return median(times[1:])

    def empty(self, count: int, dtype: torch.dtype) -> Tensor:  # [count]
        """A tensor on the device."""
        return torch.empty(count, dtype=dtype, device=self.device)

    def arithmetic(self, form: str) -> tuple[float, int]:
        """Seconds and flops of a launch of mma.sync (tf32, bf16) or of fused multiply-adds."""
        out = self.empty(self.blocks * THREADS, torch.float32)
        steps = self.sizes.steps
        taken = self.seconds(lambda: self.launch(form, out, self.blocks, steps))
        if form == "fma":
            flops = 2 * self.blocks * THREADS * CHAINS * steps
        else:
            flops = 2 * self.blocks * (THREADS // 32) * CHAINS * steps * 16 * 8 * DEPTH[form]
        _same(f"flops of {form}", flops, 2 * int(out.double().sum()))
        return taken, flops

    def reading(self, size: int, rounds: int) -> tuple[float, int]:
        """Seconds and bytes of a launch that reads `size` bytes `rounds` times."""
        x = torch.ones(size // 4, dtype=torch.int32, device=self.device)
        out = self.empty(self.blocks * THREADS, torch.int32)
        taken = self.seconds(lambda: self.launch("read", x, out, self.blocks, size // 16, rounds))
        _same("bytes read", size * rounds, 4 * int(out.long().sum()))
        return taken, size * rounds

    def copying(self, size: int) -> tuple[float, int]:
        """Seconds and bytes (read and written) of a launch that copies `size` bytes."""
        x = torch.arange(size // 4, dtype=torch.int32, device=self.device)
        y = torch.zeros_like(x)
        taken = self.seconds(lambda: self.launch("copy", x, y, self.blocks, size // 16))
        _same("bytes copied", size, 4 * int((x == y).sum()))
        return taken, 2 * size

    def torch_copying(self, size: int) -> tuple[float, int]:
        """The same by torch."""
        x = torch.ones(size // 4, dtype=torch.int32, device=self.device)
        y = torch.zeros_like(x)
        return self.seconds(lambda: y.copy_(x)), 2 * size

    def launching(self) -> float:
        """Seconds an empty kernel takes of a stream, one after the other."""
        return self.seconds(lambda: self.launch("empty", self.sizes.launches)) / self.sizes.launches

    def replaying(self) -> float:
        """The same in a CUDA graph."""
        if self.emulated:
            return self.launching()  # the emulator has no graphs
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            self.launch("empty", self.sizes.launches)
        return self.seconds(graph.replay) / self.sizes.launches


def _same(what: str, counted: int, done: int) -> None:
    if counted != done:
        raise RuntimeError(f"{what}: {counted} counted, {done} done")


def measure(probes: Probes) -> dict[str, tuple[float, str]]:
    """Every probe: name -> (value, unit)."""
    results: dict[str, tuple[float, str]] = {}
    for name, form in (("mma.sync TF32", "tf32"), ("mma.sync bf16", "bf16"), ("fp32 FMA", "fma")):
        taken, flops = probes.arithmetic(form)
        results[name] = (flops / taken / 1e12, "TFLOP/s")
    for size in probes.sizes.l2_bytes:
        taken, read = probes.reading(size, probes.sizes.l2_rounds)
        name = f"L2 read, {size / 2**20:g} MiB"
        results[name] = (read / taken / 1e12, "TB/s")
    for name, (taken, moved) in (
        ("memory read", probes.reading(probes.sizes.memory_bytes, 1)),
        ("memory copy", probes.copying(probes.sizes.memory_bytes)),
        ("memory copy, torch", probes.torch_copying(probes.sizes.memory_bytes)),
    ):
        results[name] = (moved / taken / 1e12, "TB/s")
    results["launch, empty kernel"] = (1e6 * probes.launching(), "us")
    results["launch in a CUDA graph"] = (1e6 * probes.replaying(), "us")
    return results


def compiled(*, emulated: bool, folder: Path) -> Path:
    """gpu_probes.cu as a shared library."""
    sys.path.insert(0, str(ROOT))
    from tests.emu.build import build, find_nvcc

    if emulated:
        return build([SOURCE])
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / "gpu_probes.so"
    command = [find_nvcc(), "-std=c++17", "-O3", "-arch=native", "-shared", "-Xcompiler=-fPIC"]
    subprocess.run([*command, str(SOURCE), "-o", str(library)], check=True)
    return library


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--emulated", action="store_true", help="without a GPU: no figure counts")
    parser.add_argument("--out", type=Path, help="where to write the results as JSON")
    options = parser.parse_args()
    if not options.emulated and not torch.cuda.is_available():
        print("gpu_probes: torch sees no GPU; --emulated runs the code without one")
        return 1
    library = compiled(emulated=options.emulated, folder=ROOT / "build" / "probes")
    sizes = EMULATED if options.emulated else Sizes()
    probes = Probes(library, emulated=options.emulated, sizes=sizes)
    results = measure(probes)
    print(f"{probes.name}, {probes.multiprocessors} multiprocessors")
    for name, (value, unit) in results.items():
        print(f"  {name:24} {value:10.3f} {unit}")
    if options.out:
        record = {
            "device": probes.name,
            "emulated": options.emulated,
            "multiprocessors": probes.multiprocessors,
            "torch": torch.__version__,
            "results": {name: {"value": v, "unit": u} for name, (v, u) in results.items()},
        }
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
