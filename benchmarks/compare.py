"""The package beside every baseline, in one run: medians, ratios, how far gradients agree.

    python -m benchmarks.compare --device cuda --budget 200 --out build/gpu-check
    python -m benchmarks.compare --device emulated --out build/gpu-check     # no figure counts

Writes comparison.json and comparison.txt (or comparison-emulated.*) after every case, so that one
that is stopped leaves what it measured. A ratio is the median over rounds of the baseline's time
over the package's in the same round, for the same penalty and torch.set_float32_matmul_precision.
`host us` is the median time until the Python call returns, without waiting for the GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import orthoreg_ext as ox
from benchmarks.baselines import OURS, REGULARISE, SCORE, Way
from benchmarks.interleaved import Spread, host_seconds, measure
from benchmarks.models import MODELS, flops_needed, random_weights, tiny
from benchmarks.pruning_groups import GROUPS

WORK: dict[str, Mapping[str, Way]] = {
    "regularise": REGULARISE,
    "score": SCORE,
    "groups": GROUPS,
}
SLOW = ("orthoreg-repo", "eager", "closed", "foreach_mm", "pyg-lib")  # not for 6 Tflop
ADALORA = (
    *("orthoreg_ext-frobenius", "orthoreg_ext", "orthoreg_ext-attached"),
    *("peft", "eager", "closed-small"),
)


@dataclass(frozen=True)
class Case:
    """One table: a model, a kind of work, torch's matmul precision, the ways to compare."""

    model: str
    work: str = "regularise"
    matmul: str = "highest"
    ways: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """For the table."""
        return f"{self.work} {self.model}, float32 matmul {self.matmul!r}"


def _regularise(model: str, matmul: str) -> Case:
    if model == "adalora_7b":
        return Case(model, matmul=matmul, ways=ADALORA)
    left_out = ("compile", "peft", "orthoreg_ext-frobenius", *(SLOW if model == "llama_1b" else ()))
    return Case(model, matmul=matmul, ways=tuple(w for w in REGULARISE if w not in left_out))


def _compile(model: str, matmul: str) -> Case:
    return Case(model, matmul=matmul, ways=("orthoreg_ext", "orthoreg_ext-graph", "compile"))


def cases(models: list[str]) -> list[Case]:
    """In order of interest: what the budget does not reach is missing at the end."""
    main = [m for m in models if m in ("resnet50", "vgg13", "resnet56", "adalora_7b", "tiny")]
    rest = [m for m in models if m not in main]
    compiled = [m for m in main if m != "adalora_7b"]
    groups = [Case(m, "groups", ways=tuple(GROUPS)) for m in ("resnet50", "tiny") if m in models]
    return [
        *(_regularise(m, "highest") for m in main),
        *(Case(m, "score", ways=tuple(SCORE)) for m in compiled),
        *groups,
        *(_regularise(m, "high") for m in main),
        *(_compile(m, "highest") for m in compiled),
        *(_regularise(m, "highest") for m in rest),
        *(_compile(m, "high") for m in compiled),
        *(_regularise(m, "high") for m in rest),
    ]


def exact_gradients(weights: list[Tensor], penalty: str) -> list[Tensor]:
    """In float64 on the same device."""
    out = []
    for weight in weights:
        leaf = weight.detach().double().requires_grad_()
        matrix = leaf.flatten(1)
        short = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.t()
        residual = short @ short.t() - torch.eye(len(short), device=weight.device)
        value = {
            "so": lambda r: r.square().sum(),
            "orthoreg": lambda r: r.abs().sum(),
            "frobenius": lambda r: r.norm(),
        }[penalty](residual)
        out.append(torch.autograd.grad(value, leaf)[0])
    return out


def relative_error(got: list[Tensor], exact: list[Tensor]) -> float:
    """|got - exact| over |exact| of all layers together."""
    wrong = sum(float((g.double() - e).square().sum()) for g, e in zip(got, exact, strict=True))
    return float((wrong / sum(float(e.square().sum()) for e in exact)) ** 0.5)


def run_case(case: Case, device: str, budget: float) -> dict[str, Any]:
    """Times the ways of a case and compares their gradients with float64."""
    torch.set_float32_matmul_precision(case.matmul)
    where = "cuda" if device == "cuda" else "cpu"
    shapes = tiny() if case.model == "tiny" else MODELS[case.model]()
    weights = random_weights(shapes, where)
    ways, calls, left_out, errors, failed = WORK[case.work], {}, {}, {}, []
    checked = case.work == "regularise" and flops_needed(shapes) < 1e12
    for weight in weights:  # once: CUDA graphs go on writing to these
        weight.grad = torch.randn_like(weight)
    for name in case.ways:
        if reason := ways[name].why_not(where):
            left_out[name] = reason
            continue
        try:
            call = ways[name].prepare(weights)
            for weight in weights if checked else []:
                weight.grad.zero_()  # preparing may have run it
            returned = call()
        except Exception as error:  # noqa: BLE001  (a baseline that cannot run is a result)
            left_out[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:120]}"
            failed += [name] if name.startswith("orthoreg_ext") else []
            continue
        calls[name] = call
        if checked:
            got = list(returned) if returned else [w.grad.clone() for w in weights]
            errors[name] = relative_error(got, exact_gradients(weights, ways[name].computes))
    times = measure(calls, where, budget)
    rows = {}
    for name, values in times.items():
        row: dict[str, Any] = {
            "computes": ways[name].computes,
            "meaning": ways[name].meaning,
            "ms": asdict(Spread.of([1e3 * v for v in values])),
            "host_us": 1e6 * host_seconds(calls[name], where),
            "rounds": len(values),
            "gradient_error": errors.get(name),
        }
        ours = OURS.get(ways[name].computes, "orthoreg_ext")
        if ours in times and name != ours:
            ratios = [theirs / own for theirs, own in zip(values, times[ours], strict=True)]
            row["times_ours"] = asdict(Spread.of(ratios))
        rows[name] = row
    flops = flops_needed(shapes) if case.work == "regularise" else None
    found = {"rows": rows, "left_out": left_out, "failed": failed}
    return {**asdict(case), "layers": len(shapes), "flops_needed": flops, **found}


def table(result: dict[str, Any]) -> str:
    """One case as text."""
    title = Case(result["model"], result["work"], result["matmul"]).title
    lines = [f"{title}, {result['layers']} layers"]
    head = ("way", "computes", "ms", "middle half", "host us", "x ours", "middle half")
    lines.append("  {:23} {:10} {:>9} {:>19} {:>9} {:>8} {:>15} {:>9}".format(*head, "grad error"))
    for name, row in result["rows"].items():
        ms, ratio, error = row["ms"], row.get("times_ours"), row["gradient_error"]
        lines.append(
            f"  {name:23} {row['computes']:10} {ms['median']:9.4f} "
            f"{ms['low']:9.4f}-{ms['high']:<9.4f} {row['host_us']:9.1f} "
            + (
                f"{ratio['median']:8.2f} {ratio['low']:7.2f}-{ratio['high']:<7.2f} "
                if ratio
                else 25 * " "
            )
            + (f"{error:9.1e}" if error is not None else "")
        )
    lines += [f"  {name:23} left out: {why}" for name, why in result["left_out"].items()]
    return "\n".join(line.rstrip() for line in lines)


def machine(device: str) -> dict[str, Any]:
    """What the figures belong to."""
    gpu = torch.cuda.get_device_name() if device == "cuda" else None
    return {
        "device": device,
        "name": gpu or platform.processor() or platform.machine(),
        "emulated": device == "emulated",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "orthoreg_ext": ox.__version__,
    }


@contextlib.contextmanager
def implementation(device: str) -> Iterator[None]:
    """The package's kernels for `device`; never its plain-PyTorch reference."""
    name = device
    if device == "emulated":
        from tests.emu.backend import register_emulated

        name = register_emulated()
    with ox.backend(name):
        yield


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu", "emulated"), default="cuda")
    parser.add_argument("--models", nargs="*", choices=[*MODELS, "tiny"])
    parser.add_argument("--budget", type=float, default=200, help="seconds for all cases")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("compare: torch sees no GPU; --device emulated runs the code without one")
        return 1
    emulated = options.device == "emulated"
    models = options.models or (["tiny"] if emulated else list(MODELS))
    options.out.mkdir(parents=True, exist_ok=True)
    stem = options.out / f"comparison{'-emulated' if emulated else ''}"
    record: dict[str, Any] = {"machine": machine(options.device), "cases": [], "not_reached": []}
    planned = cases(models)
    texts = [f"{record['machine']['name']}{', EMULATED: no time here counts' if emulated else ''}"]
    with implementation(options.device):
        stop = time.monotonic() + options.budget
        for number, case in enumerate(planned):
            left = stop - time.monotonic()
            if left <= 0:
                record["not_reached"] = [c.title for c in planned[number:]]
                texts.append("not reached: " + "; ".join(record["not_reached"]))
            else:
                share = max(1.0, left / (len(planned) - number))
                record["cases"].append(run_case(case, options.device, share))
                texts.append(table(record["cases"][-1]))
            print(texts[-1], flush=True)
            stem.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
            stem.with_suffix(".txt").write_text("\n\n".join(texts) + "\n")
            if left <= 0:
                break
    failed = [
        f"{name} in {c['work']} {c['model']}" for c in record["cases"] for name in c["failed"]
    ]
    for line in failed:
        print(f"compare: FAILED: {line}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
