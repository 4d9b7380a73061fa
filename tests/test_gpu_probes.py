"""The hardware probes count what they do, and compile: they first run on the day a GPU is there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.emu import build as emu_build
from tests.test_compile_gate import ROOT, script

if reason := emu_build.why_not():
    pytest.skip(reason, allow_module_level=True)

probes = script("scripts/gpu_probes.py")


@pytest.fixture(scope="module")
def emulated() -> object:
    library = probes.compiled(emulated=True, folder=Path())
    return probes.Probes(library, emulated=True, sizes=probes.EMULATED)


def test_every_probe_runs_and_its_count_is_what_was_done(emulated: object) -> None:
    results = probes.measure(emulated)
    assert {"mma.sync TF32", "mma.sync bf16", "fp32 FMA", "memory copy"} <= set(results)
    assert all(value > 0 for value, _ in results.values())


@pytest.mark.parametrize("form", ["tf32", "bf16", "fma"])
def test_flops_counted_wrong_are_noticed(
    emulated: object, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, flops = emulated.arithmetic(form)  # type: ignore[attr-defined]
    assert flops == 4 * 256 * 8 * 3 * {"tf32": 64, "bf16": 128, "fma": 2}[form]
    monkeypatch.setattr(probes, "CHAINS", 4)
    with pytest.raises(RuntimeError, match=f"flops of {form}: {flops // 2} counted, {flops} done"):
        emulated.arithmetic(form)  # type: ignore[attr-defined]


@pytest.mark.parametrize(("size", "rounds"), [(16, 1), (4096, 3), (4096 * 7 + 16, 40)])
def test_every_byte_is_read_in_every_round(emulated: object, size: int, rounds: int) -> None:
    assert emulated.reading(size, rounds)[1] == size * rounds  # type: ignore[attr-defined]


def test_they_compile_for_every_architecture_with_tensor_cores_of_these_formats() -> None:
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in (80, 86, 89, 90)]
    done = subprocess.run(
        [
            *(emu_build.find_nvcc(), "-std=c++17", *targets, "-fatbin", "-o", "/dev/null"),
            *("-Werror", "all-warnings", "-Xptxas=-warn-spills,-Werror", str(probes.SOURCE)),
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_the_record_says_that_it_is_emulated(tmp_path: Path) -> None:
    out = tmp_path / "probes.json"
    command = [sys.executable, str(ROOT / "scripts" / "gpu_probes.py"), "--emulated"]
    done = subprocess.run([*command, "--out", str(out)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("emulated on the CPU")
    record = json.loads(out.read_text())
    assert record["emulated"] is True
    assert record["device"] == "emulated on the CPU"
