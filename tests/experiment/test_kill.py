from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from orthoreg_ext.experiment import run
from orthoreg_ext.experiment.outputs import OUTPUTS
from orthoreg_ext.experiment.state import STATE_NAME, load_state


def command(tiny: dict[str, Any], out: Path) -> list[str]:
    options = [f"--{key.replace('_', '-')}={value}" for key, value in tiny.items()]
    return [sys.executable, "-m", "orthoreg_ext.cli", "prune", f"--out={out}", *options]


@pytest.mark.slow
def test_killed_at_any_moment_it_ends_with_the_same_numbers(
    tiny: dict[str, Any], tmp_path: Path
) -> None:
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path]),
        "OMP_NUM_THREADS": "1",
    }
    start = time.monotonic()
    subprocess.run(command(tiny, tmp_path / "whole"), env=environment, check=True)
    duration = time.monotonic() - start

    seed = random.randrange(10**6)
    print(f"seed {seed}")
    draw = random.Random(seed)
    out = tmp_path / "killed"
    for _ in range(4):
        process = subprocess.Popen([*command(tiny, out), "--resume", "--quiet"], env=environment)
        try:
            process.wait(draw.uniform(0.3, 0.9) * duration)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
        process.wait()
        if (out / STATE_NAME).exists():
            load_state(out / STATE_NAME)  # is whole
    subprocess.run([*command(tiny, out), "--resume"], env=environment, check=True)

    records = []
    for name in ("whole", "killed"):
        record = json.loads((tmp_path / name / "history.json").read_text())["run"]
        record.pop("latency")
        records.append(record)
    assert records[0] == records[1]
    weights = [(tmp_path / n / "weights.safetensors").read_bytes() for n in ("whole", "killed")]
    assert weights[0] == weights[1]
    assert {path.name for path in out.iterdir()} == {*OUTPUTS, STATE_NAME}


DYING = """
import os, signal, sys
from orthoreg_ext import cli

replace = os.replace

def dying(source, target):
    if str(target).endswith("weights.safetensors"):
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)

os.replace = dying
cli.main(sys.argv[1:])
"""


def test_killed_while_it_writes_the_weights_it_can_be_continued(
    tiny: dict[str, Any], tmp_path: Path
) -> None:
    tiny |= {"seeds": 1, "rounds": 1, "epochs": 1, "finetune_epochs": 1}
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path]),
        "OMP_NUM_THREADS": "1",
    }
    out = tmp_path / "killed"
    arguments = command(tiny, out)[3:]
    killed = subprocess.run([sys.executable, "-c", DYING, *arguments], env=environment)
    assert killed.returncode == -signal.SIGKILL
    assert [path for path in out.iterdir() if path.is_dir()], "nothing was left half-written"
    run(tiny, out, resume=True)
    assert {path.name for path in out.iterdir()} == {*OUTPUTS, STATE_NAME}

    run(tiny, tmp_path / "whole")
    weights = [(tmp_path / n / "weights.safetensors").read_bytes() for n in ("whole", "killed")]
    assert weights[0] == weights[1]
