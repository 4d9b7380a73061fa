"""The package beside every baseline, in one run: medians, ratios, how far results agree.

    python -m benchmarks.compare --device cuda --budget 200 --out build/gpu-check
    python -m benchmarks.compare --device emulated --out build/gpu-check     # no figure counts

Writes comparison.json and comparison.txt (or comparison-emulated.*) after every case, so that one
that is stopped leaves what it measured; `python -m benchmarks.report comparison.json` puts it
under results/. A ratio is the median over rounds of the baseline's time over the package's in the
same round, for the same penalty and torch.set_float32_matmul_precision. `host us` is the median
time until the Python call returns, without waiting for the GPU.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from benchmarks.baselines import REGULARISE
from benchmarks.engine import Case, implementation, run_case
from benchmarks.models import MODELS
from benchmarks.recording import Recorder
from benchmarks.scoring import IMPORTANCE, SCORE
from orthoreg_ext.machine import describe

SLOW = ("orthoreg-repo", "eager", "closed", "foreach_mm", "pyg-lib")  # not for 6 Tflop
ADALORA = (
    *("orthoreg_ext-frobenius", "orthoreg_ext", "orthoreg_ext-attached"),
    *("peft", "eager", "closed-small"),
)
MAIN = ("resnet50", "vgg13", "resnet56", "adalora_7b", "tiny")
SCORES = tuple(name for name in SCORE if name != "compile")
# Of a case of their own, or of bench_penalty.py.
APART = ("compile", "peft", *(f"orthoreg_ext-{p}" for p in ("frobenius", "cosine", "tpp")))


def regularise(model: str, matmul: str) -> Case:
    """Every way but those that compile."""
    if model == "adalora_7b":
        return Case(model, matmul=matmul, ways=ADALORA, question="penalty")
    left_out = (*APART, *(SLOW if model == "llama_1b" else ()))
    ways = tuple(w for w in REGULARISE if w not in left_out and "masked" not in w)
    return Case(model, matmul=matmul, ways=ways, question="penalty")


def compiled(model: str, matmul: str) -> Case:
    """What torch.compile makes of eager."""
    ways = ("orthoreg_ext", "orthoreg_ext-graph", "compile")
    return Case(model, matmul=matmul, ways=ways, question="penalty")


def cases(models: list[str]) -> list[Case]:
    """In order of interest: what the budget does not reach is missing at the end."""
    main = [m for m in models if m in MAIN]
    rest = [m for m in models if m not in main and m != "resnext50"]
    nets = [m for m in main if m != "adalora_7b"]
    groups = [m for m in ("resnet50", "tiny") if m in models]
    return [
        *(regularise(m, "highest") for m in main),
        *(Case(m, "score", ways=SCORES, question="scores") for m in nets),
        *(Case(m, "groups", ways=tuple(IMPORTANCE), question="importance") for m in groups),
        *(regularise(m, "high") for m in main),
        *(compiled(m, "highest") for m in nets),
        *(regularise(m, "highest") for m in rest),
        *(compiled(m, "high") for m in nets),
        *(regularise(m, "high") for m in rest),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu", "emulated"), default="cuda")
    parser.add_argument("--models", nargs="*", choices=[*MODELS, "tiny"])
    parser.add_argument("--budget", type=float, default=200, help="seconds for all cases")
    parser.add_argument("--out", type=Path, default=Path("build/comparison"))
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("compare: torch sees no GPU; --device emulated runs the code without one")
        return 1
    emulated = options.device == "emulated"
    planned = cases(options.models or (["tiny"] if emulated else list(MODELS)))
    stem = options.out / f"comparison{'-emulated' if emulated else ''}"
    machine = describe(options.device)
    print(machine["name"] + (", EMULATED: no time counts" if emulated else ""))
    with implementation(options.device):  # the emulator is compiled first where it is not yet
        recorder = Recorder(machine, stem, len(planned), options.budget)
        for case in planned:
            share = recorder.share()
            if share is None:
                recorder.skip(case.title)
            else:
                print(f"\n{recorder.add(run_case(case, options.device, share))}", flush=True)
    if recorder.record["not_reached"]:
        print("\nnot reached: " + "; ".join(recorder.record["not_reached"]))
    failed = [
        f"{name} in {c['work']} {c['model']}"
        for c in recorder.record["cases"]
        for name in c["failed"]
    ]
    for line in failed:
        print(f"compare: FAILED: {line}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
