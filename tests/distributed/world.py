"""Runs checks in several processes: each world is made once, and every check runs on all ranks."""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path

Check = Callable[[int, int], None]
"""A check of a rank in a world of so many."""

TIMEOUT = timedelta(seconds=180)
"""After which a rank gives up waiting for another one."""


def run(ranks: int, modules: Sequence[str], folder: Path) -> list[str]:
    """Runs the functions ``check_*`` of some modules, in order, on every rank.

    Args:
        ranks: how many.
        modules: their names, e.g. "tests.distributed.ddp".
        folder: an empty one, where the ranks find each other.

    Returns:
        What failed, as text; after a failure the rest is not run, for ranks may be out of step.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "orthoreg_ext"])  # imported once, not in every rank
    pipes = [context.Pipe(duplex=False) for _ in range(ranks)]
    processes = [
        context.Process(
            target=_rank, args=(rank, ranks, list(modules), str(folder / "store"), sender)
        )
        for rank, (_, sender) in enumerate(pipes)
    ]
    for process in processes:
        process.start()
    for _, sender in pipes:
        sender.close()
    found = []
    for rank, (receiver, _) in enumerate(pipes):
        try:
            failure = receiver.recv()
        except EOFError:
            failure = "the process died"
        if failure is not None:
            found.append(f"rank {rank} of {ranks}: {failure}")
    for process in processes:
        process.join(30)
        if process.is_alive():
            process.kill()
    return found


def _rank(rank: int, ranks: int, modules: list[str], store: str, sender: Connection) -> None:
    import importlib

    import torch
    from torch import distributed as dist

    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=ranks, timeout=TIMEOUT
    )
    try:
        for module in modules:
            checks = vars(importlib.import_module(module))
            for name, check in list(checks.items()):
                if name.startswith("check_"):
                    torch.manual_seed(0)
                    check(rank, ranks)
                    dist.barrier()
        sender.send(None)
    except BaseException:  # noqa: BLE001 - told to the test
        sender.send(f"{module}.{name}:\n{traceback.format_exc()}")
        os._exit(1)  # those that wait see it at once
    dist.destroy_process_group()
