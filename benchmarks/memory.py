"""The extra memory of one step, each way in a process of its own.

    python -m benchmarks.memory --model resnet50 --way eager --device cpu

On the CPU it is the peak of the resident set (VmHWM, which Linux lets a process reset) over what
was resident before, weights and gradients included; on a GPU that of torch's allocator.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.baselines import REGULARISE
from benchmarks.engine import Case, implementation
from benchmarks.models import Shape, random_weights, shapes_of, tiny, weight_bytes

MARGIN = 2e9  # bytes that a machine keeps free


def gram_bytes(shapes: list[Shape]) -> int:
    """Of the smaller Gram matrix of every layer, in float32."""
    return 4 * sum(min(n, torch.Size(rest).numel()) ** 2 for n, *rest in shapes)


def eager_bytes(shapes: list[Shape]) -> int:
    """At least what autograd keeps on the filters' side: the residual, and the product before."""
    return 8 * sum(n * n for n, *_ in shapes)


def _status(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024.0 * next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def extra_bytes(model: str, way: str, device: str) -> float:
    """Of one call, in this process; everything that is loaded once was loaded before."""
    small = random_weights(tiny(), device)
    weights = random_weights(shapes_of(model), device)
    for weight in (*small, *weights):
        weight.grad = torch.zeros_like(weight).add_(1e-6)  # touched
    REGULARISE[way].prepare(small)()
    call = REGULARISE[way].prepare(weights)
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return float(torch.cuda.max_memory_allocated() - before)
    Path("/proc/self/clear_refs").write_text("5")
    resident = _status("VmRSS")
    call()
    return max(0.0, _status("VmHWM") - resident)


def why_not(model: str, way: str, device: str) -> str:
    """Why a way does not fit; empty where it does."""
    if device == "cuda":
        return ""
    if not Path("/proc/self/clear_refs").exists():
        return "needs Linux"
    shapes = shapes_of(model)
    needed = 2 * weight_bytes(shapes) + (eager_bytes(shapes) if way == "eager" else 0) + MARGIN
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = 1024.0 * next(int(x.split()[1]) for x in lines if x.startswith("MemAvailable:"))
    if needed <= free:
        return ""
    return f"it needs more than {needed / 1e9:.0f} GB, {free / 1e9:.0f} GB are free"


def run_case(case: Case, device: str, timeout: float = 600) -> dict[str, Any]:
    """The record of a model: extra bytes of each way."""
    shapes = shapes_of(case.model)
    rows, left_out, failed = {}, {}, []
    for name in case.ways:
        way = REGULARISE[name]
        if reason := way.why_not(device) or why_not(case.model, name, device):
            left_out[name] = reason
            continue
        command = [sys.executable, "-m", "benchmarks.memory"]
        command += ["--model", case.model, "--way", name, "--device", device]
        command += ["--threads", str(torch.get_num_threads())]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
        except subprocess.TimeoutExpired:
            left_out[name] = f"took more than {timeout:.0f} s"
            continue
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["killed"])[-1][:120]
            left_out[name] = f"exit {done.returncode}: {last}"
            failed += [name] if name.startswith("orthoreg_ext") else []
            continue
        rows[name] = {
            "computes": way.computes,
            "meaning": way.meaning,
            "extra_mb": json.loads(done.stdout.splitlines()[-1])["extra_bytes"] / 1e6,
        }
    found = {"layers": len(shapes), "weights_mb": weight_bytes(shapes) / 1e6}
    found["gram_mb"] = gram_bytes(shapes) / 1e6
    outcome = {"rows": rows, "left_out": left_out, "failed": failed}
    return {**asdict(case), "ways": list(case.ways), **found, **outcome}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--way", required=True, choices=list(REGULARISE))
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with implementation(options.device):
        found = extra_bytes(options.model, options.way, options.device)
    print(json.dumps({"extra_bytes": found}))


if __name__ == "__main__":
    main()
