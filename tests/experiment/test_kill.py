from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from orthoreg_ext.experiment import run
from orthoreg_ext.experiment.models import build_model
from orthoreg_ext.experiment.outputs import OUTPUTS
from orthoreg_ext.experiment.state import STATE_NAME


def command(tiny: dict[str, Any], out: Path) -> list[str]:
    options = [f"--{key.replace('_', '-')}={value}" for key, value in tiny.items()]
    return [sys.executable, "-m", "orthoreg_ext.cli", "prune", f"--out={out}", *options]


KILLS = 20

KILLER = """
import importlib, os, random, signal, sys, time
from orthoreg_ext import cli
for name in ("experiment.job", "report.run", "pruning.prune"):
    importlib.import_module(f"orthoreg_ext.{name}")
for name in ("torch_pruning", "sklearn.datasets", "safetensors.torch"):
    importlib.import_module(name)

seed, kills, whole, killed, state = sys.argv[1:6]
arguments = ["prune", *sys.argv[6:], "--quiet"]
draw = random.Random(int(seed))

def child(*more):  # imports once: the moments are those of the work
    pid = os.fork()
    if not pid:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os._exit(cli.main([*arguments, *more]))
    return pid

start = time.monotonic()
assert os.waitpid(child("--out", whole), 0)[1] == 0
duration = time.monotonic() - start
done = restarts = 0
while done < int(kills):
    pid = child("--out", killed, "--resume")
    end = time.monotonic() + draw.uniform(0, 0.6) * duration
    while time.monotonic() < end and os.waitpid(pid, os.WNOHANG) == (0, 0):
        time.sleep(0.002)
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:  # it was done, and is begun anew elsewhere: no kill is lost
        os.rename(killed, f"{killed}-{restarts}")
        restarts += 1
        continue
    os.waitpid(pid, 0)
    done += 1
    if os.path.exists(f"{killed}/{state}"):
        importlib.import_module("orthoreg_ext.experiment.state").load_state(
            importlib.import_module("pathlib").Path(killed, state)
        )
assert os.waitpid(child("--out", killed, "--resume"), 0)[1] == 0
print(done, "kills,", restarts, "runs that were done before the next one")
"""


@pytest.mark.slow
def test_killed_at_any_moment_it_ends_with_the_same_numbers(
    tiny: dict[str, Any], tmp_path: Path
) -> None:
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path]),
        "OMP_NUM_THREADS": "1",
    }
    model = build_model(tiny["model"], num_classes=10, image_shape=(1, 8, 8), seed=5)
    save_file(model.state_dict(), tmp_path / "start.safetensors")
    tiny |= {
        "seeds": 1,
        "target": "macs=0.5",
        "round_to": 2,
        "weights": tmp_path / "start.safetensors",
    }
    del tiny["ratio"]
    out = tmp_path / "killed"
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    script = [sys.executable, "-c", KILLER, str(seed), str(KILLS), str(tmp_path / "whole")]
    options = [option for option in command(tiny, out)[4:] if not option.startswith("--out")]
    subprocess.run([*script, str(out), STATE_NAME, *options], env=environment, check=True)

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
