"""Does the units of an experiment, on several processes, so that it can be stopped at any moment.

A unit is a dict of parameters. What it measures goes to a file of its own, whole or not at all, and
is not measured again; the folder's name tells the configuration and the data apart, so that another
one begins anew (more seeds go on). Units of a stage begin when the stage before is done: they read
its networks.
"""

from __future__ import annotations

import errno
import importlib
import json
import multiprocessing
import os
import pkgutil
import statistics
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from experiments import data, questions
from experiments.config import Config, fingerprint
from experiments.lab import Lab, versions
from experiments.training import REMEDY
from orthoreg_ext import pruning
from orthoreg_ext.errors import choose
from orthoreg_ext.experiment.data import Dataset
from orthoreg_ext.experiment.files import write_atomic
from orthoreg_ext.experiment.models import build_model, model_factory
from orthoreg_ext.experiment.train import DivergedError, deterministic
from orthoreg_ext.machine import describe

RESULTS = Path(__file__).resolve().parent / "results"

SIZE = {"ratio", "scope", "target", "max_layer_ratio", "round_to"}  # of a cut, whatever goes in it
FOUND = {"unit", "values", "seconds"}  # what the file of a unit holds

Unit = Mapping[str, Any]
Values = dict[str, Any]


class Question(Protocol):
    """A module of ``questions/``."""

    def stages(self, config: Config) -> Sequence[Sequence[Unit]]:
        """The units, stage by stage; each with a ``seed``."""

    def measure(self, lab: Lab, unit: Unit) -> Values:
        """What one unit found, ready for JSON."""


class UnitError(RuntimeError):
    """A unit failed with an error that nobody foresaw; its traceback is that of the cause."""


@dataclass(frozen=True)
class Place:
    """Where things are: images, what is under way, results."""

    images: Path
    work: Path
    results: Path = RESULTS


def question_of(config: Config) -> Question:
    """The module that asks the configuration's question.

    Raises:
        ValueError: there is none of that name.
    """
    names = [module.name for module in pkgutil.iter_modules(questions.__path__)]
    name = choose("question", config.question, names)
    found: Any = importlib.import_module(f"experiments.questions.{name}")
    return found  # type: ignore[no-any-return]


def run(config: Config, place: Place, *, jobs: int = 1, minutes: float | None = None) -> Path:
    """Does what is left of an experiment.

    Args:
        config: the configuration.
        place: where things are.
        jobs: processes.
        minutes: begin no unit after so many; the same call goes on later.

    Returns:
        The file of the results so far.

    Raises:
        ValueError: the configuration or the images do not do.
        OSError: something cannot be written; what was done stays.
    """
    stages = _stages(config)
    _check_machine(config)
    dataset = data.load(config.data, place.images, place.work)
    checksum = f"{dataset.checksum:08x}"
    folder = place.work / f"{config.name}-{fingerprint(config.kind, versions(), checksum)}"
    _make(folder)
    _make(place.results)
    total = sum(len(stage) for stage in stages)
    left = [[unit for unit in stage if _found(folder, unit) is None] for stage in stages]
    if any(left):
        _check_networks(config, dataset, [unit for stage in left for unit in stage])
    count = total - sum(len(stage) for stage in left)
    print(f"{config.name}: {total} units, {count} done before", flush=True)
    begin, seconds = time.monotonic(), list[float]()
    end = None if minutes is None else begin + 60 * minutes
    try:
        for stage in left:
            if not stage or (end is not None and time.monotonic() > end):
                continue
            for unit, took in _done(config, place, folder, stage, jobs, end):
                count += 1
                seconds.append(took)
                rest = (total - count) * statistics.fmean(seconds) / jobs / 60
                passed = (time.monotonic() - begin) / 60
                line = f"[{count:>4}/{total}] {passed:5.1f} min, about {rest:.0f} left: "
                print(line + said(unit), flush=True)
            if any(not _file(folder, unit).exists() for unit in stage):
                break  # the next stage reads its networks
    finally:
        path = collect(config, place, folder, checksum)
    print(f"{config.name}: {count} of {total} units are done", flush=True)
    return path


def _stages(config: Config) -> list[list[Unit]]:
    """The units, stage by stage, each with a file of its own."""
    try:
        stages = [list(stage) for stage in question_of(config).stages(config)]
    except ValueError as error:
        raise ValueError(f"{config.name}: {error}") from error
    units = [unit for stage in stages for unit in stage]
    if not units:
        raise ValueError(f"{config.name}: question {config.question!r} has no unit to measure")
    named = {_file(Path(), unit): unit for unit in units}
    for unit in units:
        if named[_file(Path(), unit)] is not unit:
            raise ValueError(
                f"{config.name}: two units are one: {said(unit)}; expected no value twice in a list"
            )
    return stages


def _check_machine(config: Config) -> None:
    """What would fail in the middle otherwise."""
    for model in config.models:
        model_factory(model)
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is 'cuda', but torch finds no GPU here; set device = \"cpu\"")


def _check_networks(config: Config, dataset: Dataset, units: Sequence[Unit]) -> None:
    """Builds every network and tries every size of a cut, before hours went into a training."""
    classes, shape = len(dataset.classes), dataset.image_shape
    found = [cut for unit in units if isinstance(cut := unit.get("cut"), Mapping)]  # of Lab.prune
    found = [cut for cut in found if {"criterion", "ratio"} <= cut.keys()]
    cuts = {json.dumps({k: v for k, v in cut.items() if k in SIZE}): cut for cut in found}
    example = dataset.train.batch(slice(0, 1))[0]
    cap, told = {"max_layer_ratio": config.recipe.max_layer_ratio}, ""
    try:
        for model in config.models:
            told = ""
            net = build_model(model, num_classes=classes, image_shape=shape, seed=config.seeds[0])
            for text, cut in cuts.items():
                size = json.loads(text)
                if size.get("target") != "latency":  # which has to be measured
                    told = f"{model}, cut={cut}: "
                    pruning.prune(net.eval(), example, criterion="l1", dry_run=True, **cap | size)
    except ValueError as error:  # it may name options of another command
        says = str(error).replace("--channels 3", "images of 3 channels")
        raise ValueError(told + says.replace("--image-size", "data.image_size")) from error


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise OSError(
            error.errno,
            f"the folder {str(folder)!r} cannot be written ({error.strerror}); mend it, or choose "
            "another one with --work or --results",
        ) from error


def said(unit: Unit) -> str:
    """A unit in a line."""
    return " ".join(f"{key}={value}" for key, value in unit.items())


def collect(config: Config, place: Place, folder: Path, checksum: str) -> Path:
    """Writes the results of all units that are done, in the order of the question.

    Results of the same configuration that are there already stay until as many are done, and any
    until one is.
    """
    planned = [unit for stage in _stages(config) for unit in stage]
    units = [found for unit in planned if (found := _found(folder, unit)) is not None]
    machine = describe(config.device)
    document = {
        "config": config.document(),
        "machine": {**machine, "threads": config.threads},
        "data": checksum,
        "planned": len(planned),
        "seconds": sum(unit["seconds"] for unit in units),
        "units": units,
    }
    path = place.results / str(machine["slug"]) / f"{config.name}.json"
    if len(units) < _kept(path, document):
        print(f"{path}: left as it is, with more units than are done here", flush=True)
        return path
    _make(path.parent)
    write_atomic(path, _lines(document).encode(), REMEDY)
    return path


def _kept(path: Path, document: Mapping[str, Any]) -> int:
    """The units that must be done before results that are there may be replaced."""
    try:
        old = json.loads(path.read_bytes())
        same = old["config"] == document["config"] and old["data"] == document["data"]
        return len(old["units"]) if same else 1
    except FileNotFoundError:
        return 0
    except (ValueError, TypeError, LookupError):  # damaged, or of something else
        return 1


def _lines(document: Mapping[str, Any]) -> str:
    """JSON with one line a unit."""
    head = {**document, "units": None}
    units = ",\n".join(json.dumps(unit) for unit in document["units"])
    return json.dumps(head, indent=1).replace('"units": null', f'"units": [\n{units}\n ]') + "\n"


def _file(folder: Path, unit: Unit) -> Path:
    return folder / f"unit-{fingerprint(dict(unit))}.json"


def _no_number(text: str) -> None:
    raise ValueError(text)  # NaN or Infinity, which the runner does not write


def _found(folder: Path, unit: Unit) -> dict[str, Any] | None:
    """What was measured of a unit; None, too, where its file is damaged: it is measured again."""
    path = _file(folder, unit)
    try:
        found: Any = json.loads(path.read_bytes(), parse_constant=_no_number)
    except FileNotFoundError:
        return None
    except ValueError:
        found = None
    whole = isinstance(found, dict) and found.keys() == FOUND
    if whole and found["unit"] == json.loads(json.dumps(dict(unit))):
        values, seconds = found["values"], found["seconds"]
        if isinstance(values, dict) and values and isinstance(seconds, int | float):
            return dict(found)
    print(f"{str(path)!r} is damaged: measured again", flush=True)
    return None


def _done(
    config: Config, place: Place, folder: Path, units: Sequence[Unit], jobs: int, end: float | None
) -> Iterator[tuple[Unit, float]]:
    """Does units, and yields each with the seconds it took."""
    if jobs == 1:
        _begin(config, place, folder, 0)
        for unit in units:
            if end is not None and time.monotonic() > end:
                return
            yield unit, _do(unit)
        return
    context = multiprocessing.get_context("spawn")
    arguments = (config, place, folder, os.getpid())
    with ProcessPoolExecutor(jobs, context, _begin, arguments) as pool:
        waiting, queue = dict[Future[float], Unit](), list(units)
        while queue or waiting:
            late = end is not None and time.monotonic() > end
            while queue and len(waiting) < jobs and not late:
                unit = queue.pop(0)
                waiting[pool.submit(_do, unit)] = unit
            if not waiting:
                return
            for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                yield waiting.pop(future), future.result()


_LAB: tuple[Lab, Question, Path] | None = None  # of a worker process


def _begin(config: Config, place: Place, folder: Path, parent: int) -> None:
    """Makes a process ready; parent: the process without which it ends, 0 for none."""
    global _LAB
    if parent:
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    torch.set_num_threads(config.threads)
    lab = Lab(config, data.load(config.data, place.images, place.work), folder)
    _LAB = lab, question_of(config), folder


def _end_with(parent: int) -> None:
    """A killed runner leaves no workers behind."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _do(unit: Unit) -> float:
    assert _LAB is not None
    lab, question, folder = _LAB
    begin = time.monotonic()
    try:
        with deterministic(lab.config.device):
            values = question.measure(lab, unit)
    except DivergedError as error:
        values = {"diverged": str(error)}  # a result, too
    except ValueError as error:
        raise ValueError(f"{said(unit)}: {error}") from error
    except (OSError, ImportError):
        raise  # they name the file and the package
    except Exception as error:  # of a network or a question of one's own: where, above all
        raise UnitError(f"{said(unit)}: {type(error).__name__}: {error}") from error
    seconds = time.monotonic() - begin
    found = {"unit": dict(unit), "values": values, "seconds": round(seconds, 2)}
    try:
        text = json.dumps(found, allow_nan=False)
    except ValueError as error:  # a network can be lost although its loss was a number
        text = json.dumps({**found, "values": {"diverged": f"a value is not finite ({error})"}})
    write_atomic(_file(folder, unit), text.encode(), REMEDY)
    return seconds
