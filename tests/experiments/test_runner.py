from __future__ import annotations

import errno
import json
import math
import os
import pickle
import re
from collections.abc import Callable, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from experiments import __main__ as command
from experiments import runner
from experiments.config import Config
from experiments.lab import Lab
from experiments.runner import Place, Unit, UnitError, run
from orthoreg_ext.experiment.train import DivergedError

Configs = Callable[..., Config]


@dataclass
class Asked:
    """A question of 2 x 3 units that take a minute each, of a clock of its own."""

    does: Callable[[Unit], dict[str, Any]] = lambda unit: {"value": 0.1 * unit["number"]}
    clock: float = 0.0
    measured: list[int] = field(default_factory=list)

    def stages(self, config: Config) -> Sequence[Sequence[Unit]]:
        units = [{"seed": seed, "number": 3 * seed + i} for seed in config.seeds for i in range(3)]
        return units[:3], units[3:]

    def measure(self, lab: Lab, unit: Unit) -> dict[str, Any]:
        self.measured.append(unit["number"])
        self.clock += 60
        return self.does(unit)

    def monotonic(self) -> float:
        return self.clock


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    found = Asked()
    monkeypatch.setattr(runner, "question_of", lambda config: found)
    monkeypatch.setattr(runner, "time", found)
    return found


def read(path: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(path.read_text())
    return document


def values(path: Path) -> list[Any]:
    return [unit["values"] for unit in read(path)["units"]]


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


EXPECTED = [{"value": 0.1 * number} for number in range(6)]


def test_results_hold_every_unit_in_order(tiny: Configs, place: Place, asked: Asked) -> None:
    config = tiny()
    path = run(config, place)
    found = read(path)
    assert path == place.results / found["machine"]["slug"] / "tiny.json"
    assert found.keys() == {"config", "machine", "data", "planned", "seconds", "units"}
    assert found["config"] == config.document()
    assert (found["planned"], found["seconds"], found["machine"]["threads"]) == (6, 360, 1)
    assert [unit["unit"]["number"] for unit in found["units"]] == list(range(6))
    assert values(path) == EXPECTED
    lines = [line.strip(" ,") for line in path.read_text().splitlines()]
    assert all(json.dumps(unit) in lines for unit in found["units"])


def test_what_is_done_is_not_done_again(tiny: Configs, place: Place, asked: Asked) -> None:
    before = run(tiny(), place).read_text()
    assert run(tiny(), place).read_text() == before
    assert asked.measured == list(range(6))
    run(tiny(recipe={"lr": 0.2}), place)  # another configuration begins anew
    run(tiny(data={"train": 65}), place)
    assert asked.measured == [*range(6)] * 3


def test_more_seeds_go_on_with_what_is_there(tiny: Configs, place: Place, asked: Asked) -> None:
    assert len(values(run(tiny(seeds=[0]), place))) == 3
    assert values(run(tiny(), place)) == EXPECTED
    assert asked.measured == list(range(6))


def test_other_images_begin_anew(
    tiny: Configs, place: Place, asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tiny(), place)
    load = runner.data.load

    def other(*args: Any) -> Any:
        dataset = load(*args)
        object.__setattr__(dataset, "checksum", 7)
        return dataset

    monkeypatch.setattr(runner.data, "load", other)
    assert read(run(tiny(), place))["data"] == "00000007"
    assert asked.measured == [*range(6)] * 2


@pytest.mark.parametrize("stage", [1, 4])
def test_an_error_costs_its_unit_only(
    tiny: Configs, place: Place, asked: Asked, stage: int
) -> None:
    def fails(unit: Unit) -> dict[str, Any]:
        if unit["number"] == stage:
            raise ValueError("something is wrong")
        return {"value": 0.1 * unit["number"]}

    good, asked.does = asked.does, fails
    with pytest.raises(ValueError, match=rf"seed=\d number={stage}: something is wrong"):
        run(tiny(), place)
    (path,) = place.results.glob("*/tiny.json")
    assert values(path) == EXPECTED[:stage]
    asked.does = good
    assert values(run(tiny(), place)) == EXPECTED
    assert asked.measured == [*range(stage + 1), *range(stage, 6)]


@pytest.mark.parametrize("error", [RuntimeError("two shapes"), KeyError("x"), AssertionError()])
def test_an_error_that_nobody_foresaw_names_its_unit(
    tiny: Configs, place: Place, asked: Asked, error: Exception
) -> None:
    def fails(unit: Unit) -> dict[str, Any]:
        raise error

    asked.does = fails
    with pytest.raises(UnitError, match=rf"^seed=0 number=0: {type(error).__name__}: ") as raised:
        run(tiny(), place)
    assert raised.value.__cause__ is error
    assert str(pickle.loads(pickle.dumps(raised.value))) == str(raised.value)  # of a process


@pytest.mark.parametrize("network", ["blind", "coloured"])
def test_every_network_is_built_before_anything_is_trained(
    tiny: Configs, place: Place, asked: Asked, network: str
) -> None:
    models = ["tests.experiments.nets:tiny", f"tests.experiments.nets:{network}"]
    says = {"blind": "returned .*expected .1, 10.", "coloured": "pass images of 3 .* data.image_s"}
    with pytest.raises(ValueError, match=f"{network}' .*{says[network]}"):
        run(tiny(models=models), place)
    assert asked.measured == []


def test_a_cut_that_cannot_be_made_is_said_before_anything_is_trained(
    tiny: Configs, place: Place
) -> None:
    good = {"criterion": ["l1"], "ratio": [0.5, 0.9]}
    config = tiny(options={"cuts": [good, {**good, "max_layer_ratio": [0.8]}]})
    with pytest.raises(ValueError, match=r"nets:tiny, cut=.*0\.9.*0\.8.*: ratio=0.9 would empty"):
        run(config, place)
    assert not list(place.work.glob("*/*"))
    latency = {**good, "ratio": [0.01], "target": ["latency"]}  # is measured: not in advance
    assert len(values(run(tiny(options={"cuts": [latency]}, seeds=[0]), place, minutes=0))) == 0


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "torn": lambda text: text[:-3],
    "empty": lambda text: b"",
    "noise": lambda text: b"\xff\x00" * 9,
    "null": lambda text: b"null",
    "list": lambda text: b"[]",
    "part": lambda text: b'{"unit": {}}',
    "no values": lambda text: text.replace(b'{"value": 0.2}', b"3"),
    "empty values": lambda text: text.replace(b'{"value": 0.2}', b"{}"),
    "not a number": lambda text: text.replace(b"0.2}", b"NaN}"),
    "no seconds": lambda text: text.replace(b"60.0", b'"x"'),
    "another": lambda text: text.replace(b'"number": 2', b'"number": 3'),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_unit_is_measured_again(
    tiny: Configs,
    place: Place,
    asked: Asked,
    capsys: pytest.CaptureFixture[str],
    damage: str,
) -> None:
    before = run(tiny(), place).read_text()
    (folder,) = place.work.iterdir()
    (path,) = [f for f in folder.iterdir() if b'"number": 2' in f.read_bytes()]
    whole = path.read_bytes()
    path.write_bytes(DAMAGES[damage](whole))
    assert path.read_bytes() != whole
    capsys.readouterr()
    assert run(tiny(), place).read_text() == before
    assert asked.measured == [*range(6), 2]
    out = capsys.readouterr().out
    assert f"{path.name}' is damaged: measured again" in out
    assert "6 units, 5 done before" in out


def test_half_written_files_are_passed_by(tiny: Configs, place: Place, asked: Asked) -> None:
    before = run(tiny(), place).read_text()
    (folder,) = place.work.iterdir()
    for path in list(folder.iterdir()):
        (folder / f".{path.name}.1.tmp").write_bytes(path.read_bytes()[:9])
    (results,) = place.results.glob("*/tiny.json")
    results.write_text(before[: len(before) // 2])
    assert run(tiny(), place).read_text() == before
    assert asked.measured == list(range(6))


def test_minutes_end_it_early_and_the_next_call_goes_on(
    tiny: Configs, place: Place, asked: Asked, capsys: pytest.CaptureFixture[str]
) -> None:
    for minutes, done in ((1.5, 2), (0.5, 3), (1.5, 5), (9.0, 6)):
        asked.clock = 0.0
        found = read(run(tiny(), place, minutes=minutes))
        assert (found["planned"], len(found["units"])) == (6, done)
        assert f"tiny: {done} of 6 units are done" in capsys.readouterr().out
    assert asked.measured == list(range(6))
    assert [unit["values"] for unit in found["units"]] == EXPECTED


def test_results_stay_as_long_as_there_are_no_others(
    tiny: Configs, place: Place, asked: Asked
) -> None:
    before = run(tiny(), place).read_text()
    other = tiny(recipe={"lr": 0.3})
    assert run(other, place, minutes=-1).read_text() == before
    found = read(run(other, place, minutes=0.5))
    assert found["config"] == other.document()
    assert len(found["units"]) == 1


def test_results_of_the_same_stay_until_as_many_units_are_done(
    tiny: Configs, place: Place, asked: Asked, tmp_path: Path
) -> None:
    before = run(tiny(), place).read_text()
    anew = replace(place, work=tmp_path / "elsewhere")
    assert run(tiny(), anew, minutes=3.5).read_text() == before
    after = run(tiny(), anew)
    assert after.read_text() == before
    assert asked.measured == [*range(6)] * 2
    after.write_text(before[:99])  # half of it is worth no more than any other
    assert len(values(run(tiny(), replace(place, work=tmp_path / "again"), minutes=0.5))) == 1


def test_a_diverged_unit_is_a_result(tiny: Configs, place: Place, asked: Asked) -> None:
    def fails(unit: Unit) -> dict[str, Any]:
        if unit["number"] == 1:
            raise DivergedError("the loss is nan in epoch 3")
        return {"values": [1.0, math.nan]} if unit["number"] == 4 else {"value": 0}

    asked.does = fails
    path = run(tiny(), place)
    found = values(path)
    assert found[1] == {"diverged": "the loss is nan in epoch 3"}
    assert found[4].keys() == {"diverged"}
    assert "not finite" in found[4]["diverged"]
    assert [found[i] for i in (0, 2, 3, 5)] == [{"value": 0}] * 4
    assert "NaN" not in path.read_text()
    run(tiny(), place)
    assert len(asked.measured) == 6


def test_a_network_that_diverges_is_one(tiny: Configs, place: Place) -> None:
    path = run(tiny(recipe={"lr": 1e30, "epochs": 2}, seeds=[0]), place)
    assert [list(value) for value in values(path)] == [["diverged"], ["diverged"]]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_is_named_and_nothing_is_lost(
    tiny: Configs,
    place: Place,
    asked: Asked,
    monkeypatch: pytest.MonkeyPatch,
    call: str,
) -> None:
    run(tiny(), place, minutes=1.5)
    (results,) = place.results.glob("*/tiny.json")
    before = results.read_text()
    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        with pytest.raises(OSError, match=r"cannot write .*No space .*run the same command again"):
            run(tiny(), place)
    assert results.read_text() == before
    (folder,) = place.work.iterdir()
    assert len(list(folder.iterdir())) == 2
    asked.clock = 0.0
    assert values(run(tiny(), place)) == EXPECTED
    assert asked.measured == [0, 1, 2, 2, 3, 4, 5]


@pytest.mark.parametrize("which", ["work", "results"])
@pytest.mark.parametrize("how", ["a file", "read-only"])
def test_a_folder_that_cannot_be_written_is_named_first(
    tiny: Configs,
    place: Place,
    asked: Asked,
    monkeypatch: pytest.MonkeyPatch,
    which: str,
    how: str,
) -> None:
    folder = getattr(place, which)
    if how == "a file":
        folder.write_text("")
    else:  # whoever runs the tests may write everything
        allowed = os.access
        denied = lambda path: folder in (path, path.parent)  # noqa: E731
        monkeypatch.setattr(os, "access", lambda path, how: not denied(path) and allowed(path, how))
    with pytest.raises(OSError, match=rf"folder '.*{which}.*' cannot be written .*--{which}"):
        run(tiny(), place)
    assert asked.measured == []


def test_units_that_share_a_file_are_refused(
    tiny: Configs, place: Place, asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    units = [{"seed": 0, "ratio": 0.5}, {"seed": 0, "ratio": 0.5}]
    monkeypatch.setattr(asked, "stages", lambda config: [units])
    with pytest.raises(ValueError, match=r"two units are one: seed=0 ratio=0.5"):
        run(tiny(), place)
    monkeypatch.setattr(asked, "stages", lambda config: [[], []])
    with pytest.raises(ValueError, match="has no unit to measure"):
        run(tiny(), place)


def test_without_a_gpu_cuda_is_refused(
    tiny: Configs, place: Place, asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ValueError, match=r"device is 'cuda', but torch finds no GPU"):
        run(tiny(device="cuda"), place)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--jobs", "0"], "--jobs is 0, expected"),
        (["--minutes", "-1"], "--minutes is -1.0, expected"),
        (["--minutes", "nan"], "--minutes is nan, expected"),
    ],
)
def test_wrong_numbers_are_refused(
    capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    assert command.main(["cross-digits", *arguments]) == 1
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (BrokenProcessPool("abruptly"), 1, "error: a process was killed .* smaller --jobs"),
        (KeyboardInterrupt(), 130, "stopped; the same command goes on"),
        (ImportError("timm is not installed; install"), 1, "error: timm is not installed; install"),
        (OSError(errno.ENOSPC, "cannot write 'x'"), 1, "error: cannot write 'x'"),
    ],
)
def test_an_end_before_the_end_is_said_in_a_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    code: int,
    says: str,
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(command, "run", fails)
    assert command.main(["cross-digits"]) == code
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1
    assert re.match(says, err)


def test_minutes_are_those_of_the_whole_call(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, left = [0.0], []

    def runs(config: Config, place: Place, *, jobs: int, minutes: float) -> None:
        left.append(minutes)
        clock[0] += 120

    monkeypatch.setattr(command, "run", runs)
    monkeypatch.setattr(command.time, "monotonic", lambda: clock[0])
    assert command.main(["cross-digits"] * 3 + ["--minutes", "3"]) == 0
    assert left == [3, 1, -1]
