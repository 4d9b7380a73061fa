from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

CONFIG = """
title = "Does it go on?"
question = "cross"
models = ["tests.experiments.nets:tiny"]
seeds = [0, 1]

[data]
source = "noise.npz"
train = 64
test = 32

[recipe]
epochs = 3
finetune_epochs = 5
batch_size = 16
calibration = 32
flip = true

[arms.none]

[arms.srip]
penalty = "srip"

[options]
ablate = 16

[[options.cuts]]
criterion = ["l1"]
ratio = [0.25, 0.5]
"""


def found(path: Path) -> dict[str, Any]:
    """What a run wrote, but for the seconds it took."""
    (file,) = path.glob("*/kill.json")
    document: dict[str, Any] = json.loads(file.read_text())
    for part in (document, *document["units"]):
        assert part.pop("seconds") >= 0
    return document


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="it looks for processes in /proc")
def test_killed_at_any_moment_it_ends_with_the_same_numbers(tmp_path: Path) -> None:
    (tmp_path / "kill.toml").write_text(CONFIG)
    images = np.random.default_rng(0).integers(0, 256, (120, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "noise.npz", images=images, labels=np.arange(120) % 10)
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    script = [sys.executable, "-m", "tests.experiments.killing", str(seed), str(tmp_path)]
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(script, cwd=root, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False)
    logs = {path.name: path.read_text() for path in tmp_path.glob("*.log")}
    assert done.returncode == 0, logs
    whole = found(tmp_path / "whole-results")
    assert len(whole["units"]) == whole["planned"] == 4 + 8
    assert not any("diverged" in unit["values"] for unit in whole["units"])
    assert found(tmp_path / "killed-results") == whole
    assert found(tmp_path / "workers-results") == whole
    assert not any(tmp_path.glob("*/*/cut-*.safetensors"))
