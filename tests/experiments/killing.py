"""Kills runs of an experiment at drawn moments; ``python -m tests.experiments.killing SEED DIR``.

One process that has imported everything forks the runs, so that a kill costs no second import.
"""

from __future__ import annotations

import importlib
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

from experiments import __main__ as command
from experiments import training

KILLS = 8
NETS = 4  # units of the first stage
PATIENCE = 120.0  # seconds, of what takes one


def child(folder: Path, name: str, jobs: int, hook: Any = lambda: None) -> int:
    """Starts a run in a session of its own."""
    pid = os.fork()
    if pid:
        return pid
    os.setsid()
    log = os.open(folder / f"{name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    training.PAUSE = 0.0
    hook()
    places = [f"--work={folder / name}", f"--results={folder / (name + '-results')}"]
    os._exit(
        command.main([str(folder / "kill.toml"), f"--data={folder}", *places, f"--jobs={jobs}"])
    )


def dying(what: str, count: int) -> Any:
    """Makes a process kill itself: at its so many-th batch, or the moment before or after a file
    of that number is whole."""

    def hook() -> None:
        left = [count]
        module, name = (training, "shift") if what == "batch" else (os, "replace")
        original = getattr(module, name)

        def counted(*args: Any) -> Any:
            left[0] -= 1
            if left[0] <= 0 and what != "after":
                os.kill(os.getpid(), signal.SIGKILL)
            value = original(*args)
            if left[0] <= 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return value

        setattr(module, name, counted)

    return hook


def members(session: int) -> list[int]:
    """The processes of a session that are not dead."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, *rest = entry.read_text().rpartition(")")[2].split()
        except OSError:  # it ended
            continue
        if int(rest[2]) == session and state != "Z":
            found.append(int(entry.parent.name))
    return found


def wait_for(condition: Any, what: str) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, f"waited in vain: {what}"
        time.sleep(0.02)


def ended(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill_many(folder: Path, draw: random.Random) -> None:
    """One process, at any batch and before or after any file."""
    kinds = []
    for _ in range(KILLS):
        what = draw.choice(["batch", "batch", "before", "after"])
        pid = child(folder, "killed", 1, dying(what, draw.randint(2, 60 if what == "batch" else 9)))
        code = ended(pid)
        assert code in (0, -signal.SIGKILL), code
        kinds.append(f"{what}: {code}")
    print("kills", kinds)
    assert kinds[0].endswith("-9")
    assert ended(child(folder, "killed", 1)) == 0


def kill_workers(folder: Path) -> None:
    """Two processes beside the runner, while one of them at least trains after a cut."""
    pid = child(folder, "workers", 2)

    def under_way() -> bool:
        assert os.waitpid(pid, os.WNOHANG) == (0, 0), "it ended before it was killed"
        return len(list((folder / "workers").glob("kill-*/unit-*.json"))) > NETS

    wait_for(under_way, "the first cut")
    workers = members(pid)
    assert len(workers) >= 3, workers
    os.kill(pid, signal.SIGKILL)
    assert ended(pid) == -signal.SIGKILL
    wait_for(lambda: not members(pid), "the end of the workers")
    done = list((folder / "workers").glob("kill-*/unit-*.json"))
    print("killed with", len(done), "units done")
    assert ended(child(folder, "workers", 2)) == 0


if __name__ == "__main__":
    target = Path(sys.argv[2])
    for module in ("experiments.questions.cross", "torch_pruning", "safetensors.torch"):
        importlib.import_module(module)
    assert ended(child(target, "whole", 1)) == 0
    kill_many(target, random.Random(int(sys.argv[1])))
    kill_workers(target)
