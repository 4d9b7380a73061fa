"""What does a rank save by `shard=True`? The penalty of a step, on 2 processes of one thread each.

    python -m benchmarks.bench_distributed --model vgg13 --ranks 2 --rounds 15

Both ways are run in turns by the same processes over gloo, which wait for each other before each
turn. The time of a turn is that of the slowest rank, as in training; that of the processor is what
the rank computed, copied and sent, and does not grow when others use the machine.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import distributed as dist
from torch import nn

import orthoreg_ext as ox
from benchmarks.models import MODELS, Shape, shapes_of

ROUTES = ("loss + reg()", "attach")


class Still(torch.optim.Optimizer):
    """Steps nothing, so that a step is what is attached to it."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Leaves the parameters alone."""


def network(shapes: list[Shape]) -> nn.Module:
    """Layers of these shapes, with gradients, as a model has them after a backward pass."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for n, k, *size in shapes:
        layers.append(nn.Conv2d(k, n, tuple(size), bias=False) if size else nn.Linear(k, n))
    model = nn.ModuleList(layers)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return model


def turns(model: nn.Module) -> dict[tuple[str, bool], Callable[[], object]]:
    """The penalty of a step by each route, whole or shared."""
    found: dict[tuple[str, bool], Callable[[], object]] = {}
    for shard in (False, True):
        reg = ox.OrthoRegularizer(model, shard=shard)
        optimizer = Still(model.parameters())
        reg.attach(optimizer)
        found[ROUTES[0], shard] = lambda reg=reg: reg().backward()  # type: ignore[misc]
        found[ROUTES[1], shard] = optimizer.step
    return found


def _rank(rank: int, ranks: int, model: str, rounds: int, store: str, sender: Connection) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    calls = turns(network(shapes_of(model)))
    times: dict[tuple[str, bool], list[tuple[float, float]]] = {key: [] for key in calls}
    for number in range(-2, rounds):  # two to warm up
        for key, call in calls.items():
            dist.barrier()
            begun, used = time.perf_counter(), time.process_time()
            call()
            spent = time.perf_counter() - begun, time.process_time() - used
            if number >= 0:
                times[key].append(spent)
    dist.barrier()
    sender.send(times)
    dist.destroy_process_group()


def measured(model: str, ranks: int = 2, rounds: int = 15) -> list[dict[str, Any]]:
    """One record a route: medians and quartiles in ms, and what is left of them by sharing."""
    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe(duplex=False) for _ in range(ranks)]
    with tempfile.TemporaryDirectory() as folder:
        store = os.path.join(folder, "store")
        processes = [
            context.Process(target=_rank, args=(rank, ranks, model, rounds, store, sender))
            for rank, (_, sender) in enumerate(pipes)
        ]
        for process in processes:
            process.start()
        for _, sender in pipes:
            sender.close()
        found = [receiver.recv() for receiver, _ in pipes]
        for process in processes:
            process.join()
    return [_record(model, route, rounds, found) for route in ROUTES]


def _record(model: str, route: str, rounds: int, found: list[Any]) -> dict[str, Any]:
    record: dict[str, Any] = {"model": model, "route": route, "ranks": len(found)}
    for what, place in (("elapsed", 0), ("processor", 1)):
        slowest = {
            shard: [max(times[route, shard][i][place] for times in found) for i in range(rounds)]
            for shard in (False, True)
        }
        for shard, seconds in slowest.items():
            low, median, high = (1e3 * q for q in statistics.quantiles(seconds, n=4))
            name = f"{what}_{'shared' if shard else 'whole'}_ms"
            record[name] = {"median": median, "quartiles": [low, high]}
        pairs = zip(slowest[True], slowest[False], strict=True)
        record[f"{what}_ratio"] = statistics.median(after / before for after, before in pairs)
    return record


def bench_shared_penalty(benchmark: Any) -> None:
    """What is left of a rank's time; nothing is asserted about it."""
    records = benchmark.pedantic(measured, ("vgg13", 2, 5), rounds=1)
    benchmark.group = "distributed"
    benchmark.extra_info["record"] = records
    print(f"\n{table(records)}")


def table(records: list[dict[str, Any]]) -> str:
    """The records as lines."""
    lines = [f"{'model':<10} {'route':<13} {'time':<10} {'whole':>22} {'shared':>22} {'ratio':>6}"]
    for record in records:
        for what in ("elapsed", "processor"):
            cells = []
            for way in ("whole", "shared"):
                entry = record[f"{what}_{way}_ms"]
                low, high = entry["quartiles"]
                cells.append(f"{entry['median']:.1f} ({low:.1f}-{high:.1f}) ms")
            lines.append(
                f"{record['model']:<10} {record['route']:<13} {what:<10} {cells[0]:>22} "
                f"{cells[1]:>22} {record[f'{what}_ratio']:>6.2f}"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="vgg13", choices=list(MODELS))
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    records = measured(options.model, options.ranks, options.rounds)
    print(json.dumps(records, indent=2) if options.json else table(records))


if __name__ == "__main__":
    main()
