"""Runs the cases of the bench_*.py files in one session: options, time, records.

The figures are those of the interleaved measurement: they go to ``--records`` after every case, and
into ``extra_info``. What pytest-benchmark times itself is the package's own way alone, afterwards,
so that ``--benchmark-compare`` can follow it from commit to commit.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from benchmarks import ceilings, memory
from benchmarks.engine import Case, implementation, prepare, timed
from benchmarks.recording import Recorder
from orthoreg_ext.machine import describe

ORDER = ("penalty", "scores", "scaling", "memory", "training_step", "methods")  # the longest last


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("orthoreg_ext benchmarks")
    group.addoption("--full", action="store_true", help="every model, every baseline")
    group.addoption("--budget", type=float, default=None, help="seconds (200, or 2700 with --full)")
    group.addoption("--device", default="auto", choices=("auto", "cpu", "cuda"))
    group.addoption("--records", type=Path, default=Path("build/bench/records"), help="stem")


def _device(config: pytest.Config) -> str:
    device = str(config.getoption("--device"))
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return device


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        module: Any = metafunc.module
        full, device = bool(metafunc.config.getoption("--full")), _device(metafunc.config)
        cases: list[Case] = module.CASES[metafunc.function.__name__](full, device)
        metafunc.parametrize("case", cases, ids=[f"{c.model}-{c.matmul}" for c in cases])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The first case of every question, then the second ones: whatever time there is, all show."""
    seen: dict[str, int] = {}
    places: dict[pytest.Item, tuple[int, int]] = {}
    for item in items:
        function = item.nodeid.partition("[")[0]
        seen[function] = seen.get(function, -1) + 1
        name = item.path.stem.removeprefix("bench_")
        order = ORDER.index(name) if name in ORDER else len(ORDER)
        places[item] = (seen[function], order)
    items.sort(key=places.__getitem__)


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    machine_info.pop("node", None)  # a host name


@pytest.fixture(scope="session")
def device(pytestconfig: pytest.Config) -> str:
    return _device(pytestconfig)


@pytest.fixture(scope="session")
def recorder(request: pytest.FixtureRequest, device: str) -> Recorder:
    config = request.config
    asked = config.getoption("--budget")
    seconds = (2700.0 if config.getoption("--full") else 200.0) if asked is None else asked
    if not 0 < seconds < float("inf"):
        raise pytest.UsageError(f"--budget is {seconds}, expected a positive number of seconds")
    stem, count = config.getoption("--records"), len(request.session.items)
    limits = ceilings.measured(device, min(2.0, seconds / 20))
    recorder = Recorder(describe(device), stem, count, seconds)
    recorder.ceilings(limits)
    return recorder


@pytest.fixture
def record(
    benchmark: Any, recorder: Recorder, device: str, pytestconfig: pytest.Config
) -> Iterator[Callable[[Case], None]]:
    """Measures a case, or notes that no time is left for it."""
    full = bool(pytestconfig.getoption("--full"))

    def measure(case: Case) -> None:
        share = recorder.share()
        if share is None:
            recorder.skip(f"{case.question} {case.model}")
            pytest.skip("no time is left: raise --budget")
        if case.work == "memory":
            found = benchmark.pedantic(memory.run_case, (case, device), rounds=1)
        else:
            begun = time.monotonic()
            prepared = prepare(case, device)
            found = timed(prepared, share, rounds=(3, 40 if full else 15))
            found["took_s"] = time.monotonic() - begun  # preparing, compiling and checking too
            own = prepared.own
            slow = own is None or found["rows"][own]["ms"]["median"] > 300
            call = prepared.calls[own] if own is not None else lambda: None
            benchmark.pedantic(call, rounds=1 if slow else 5, warmup_rounds=0 if slow else 1)
        benchmark.group = case.question
        benchmark.extra_info["record"] = found
        print(f"\n{recorder.add(found)}")
        assert not found["failed"], found["left_out"]

    with implementation(device):
        yield measure


def cases_of(module: ModuleType, full: bool, device: str) -> list[Case]:
    """Every case of a bench_*.py file."""
    return [case for make in module.CASES.values() for case in make(full, device)]
