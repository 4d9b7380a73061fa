from __future__ import annotations

import errno
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from sklearn.datasets import load_digits

import orthoreg_ext as ox
from orthoreg_ext.experiment import Settings, run
from orthoreg_ext.experiment.data import load_dataset
from orthoreg_ext.experiment.files import owned
from orthoreg_ext.experiment.job import extended, plan
from orthoreg_ext.experiment.models import build_model
from orthoreg_ext.experiment.outputs import OUTPUTS
from orthoreg_ext.experiment.state import STATE_NAME, load_state, save_state
from orthoreg_ext.experiment.train import DivergedError, accuracy, deterministic


def numbers(out: Path) -> dict[str, Any]:
    """Everything of a history but what is measured with a clock."""
    history = json.loads((out / "history.json").read_text())
    history["run"].pop("latency")
    history["table"] = [row for row in history["table"] if not row["what"].startswith("latency")]
    return history


def interrupting(steps: int):
    """A screen that stops the run after so many steps."""

    @contextmanager
    def screen(total: int, done: int) -> Iterator[Any]:
        left = iter(range(steps))

        def show(line: str, keep: bool) -> None:
            if next(left, None) is None:
                raise KeyboardInterrupt

        yield show

    return screen


def test_the_plan_shares_the_epochs_among_the_rounds() -> None:
    steps = plan(Settings(ratio=0.75, rounds=2, epochs=2, finetune_epochs=5))
    kinds = [(s.stage, s.cut, s.epoch, s.epochs) for s in steps]
    assert kinds == [
        ("train", 0, 0, 2), ("train", 0, 1, 2),
        ("cut", 0, 0, 0), ("tune", 1, 0, 2), ("tune", 1, 1, 2),
        ("cut", 1, 0, 0), ("tune", 2, 0, 3), ("tune", 2, 1, 3), ("tune", 2, 2, 3),
    ]  # fmt: skip
    cuts = [step for step in steps if step.stage == "cut"]
    assert [step.gone for step in cuts] == pytest.approx([0.6, 0.75])  # r = .6, .375


def test_histories_of_several_cuts_count_the_first_networks_filters() -> None:
    sizes = {"before": {}, "after": {}}
    first = {
        "history": [{"round": 1, "layer": "a", "removed": [0, 2], "filters": 3}],
        "sizes": sizes,
        "widths": {"a": 3},
        "architecture": "x",
    }
    second = {
        "history": [
            {"round": 1, "layer": "a", "removed": [1], "filters": 2},
            {"round": 1, "layer": "b", "removed": [3], "filters": 3},
        ],
        "sizes": sizes,
        "widths": {"a": 2},
        "architecture": "y",
    }
    joined = extended(first, second, 2)
    assert [(e["round"], e["layer"], e["removed"]) for e in joined["history"]] == [
        (1, "a", [0, 2]),
        (2, "a", [3]),
        (2, "b", [3]),
    ]
    assert joined["architecture"] == "x"
    assert joined["widths"] == {"a": 2}


def test_the_whole_job_and_its_files(tiny: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run(tiny, out)
    assert {path.name for path in out.iterdir()} == {*OUTPUTS, STATE_NAME}
    own, twin = result.side(True), result.side(False)
    assert [arm.seed for arm in own] == [arm.seed for arm in twin] == [0, 1]
    assert own[0].last("train").penalty > 0
    assert twin[0].last("train").penalty == 0
    assert own[0].last("train").correlation < twin[0].last("train").correlation
    for arm in result.arms:
        assert [e.stage for e in arm.epochs] == ["train"] * 2 + ["tune"] * 3
        assert (arm.cuts[0].before.filters, arm.cuts[-1].after.filters) == (30, 20)
        assert arm.cuts[-1].after.macs < arm.cuts[0].before.macs
    assert result.export["max_difference"] <= result.export["tolerance"]
    assert result.latency.keys() == {"1", "64"}
    assert json.loads((out / "history.json").read_text())["run"] == json.loads(
        json.dumps(result.to_json())
    )
    assert result.finished

    # what was written is the network that was measured
    data = load_dataset("digits")
    x, _ = data.test.batch(slice(0, 5))
    model = build_model(tiny["model"], num_classes=10, image_shape=(1, 8, 8), seed=7)
    ox.pruning.replay(model, x, out).eval()
    assert accuracy(model, data.test) == own[0].last("tune").accuracy
    weights = safetensors.torch.load_file(out / "weights.safetensors")
    assert all(torch.equal(weights[key], value) for key, value in model.state_dict().items())
    program = torch.export.load(out / "model.pt2").module()
    torch.testing.assert_close(program(x), model(x), rtol=1e-5, atol=1e-5)


def test_interrupted_after_any_step_it_ends_with_the_same_numbers(
    tiny: dict[str, Any], tmp_path: Path
) -> None:
    tiny["seeds"] = 1
    run(tiny, tmp_path / "whole")
    expected = numbers(tmp_path / "whole")
    out = tmp_path / "parts"
    steps = 2 * len(plan(Settings(**tiny)))
    for _ in range(steps):  # one step more each time, from the stored state every time
        with pytest.raises(KeyboardInterrupt):
            run(tiny, out, resume=True, screen=interrupting(0))
    run({}, out, resume=True)
    assert numbers(out) == expected
    states = [(tmp_path / name / STATE_NAME).stat().st_size for name in ("whole", "parts")]
    assert abs(states[0] - states[1]) < 200  # latencies have more or fewer digits


def test_interrupted_while_it_writes_its_files(
    tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny |= {"seeds": 1, "rounds": 1, "epochs": 1, "finetune_epochs": 1}
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr("orthoreg_ext.experiment.outputs.report_html", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(tiny, out)
    assert not (out / "report.html").exists()
    assert run({}, out, resume=True).finished
    assert {path.name for path in out.iterdir()} == {*OUTPUTS, STATE_NAME}


def _interrupt(*_: object) -> str:
    raise KeyboardInterrupt


def test_a_finished_run_is_only_read(tiny: dict[str, Any], tmp_path: Path) -> None:
    tiny |= {"seeds": 1, "rounds": 1, "epochs": 1, "finetune_epochs": 1}
    out = tmp_path / "out"
    first = run(tiny, out)
    before = {path: path.read_bytes() for path in out.iterdir()}
    assert run(tiny, out, resume=True).to_json() == first.to_json()
    assert {path: path.read_bytes() for path in out.iterdir()} == before
    with pytest.raises(ValueError, match=r"--ratio is 0\.6, but the run to continue has 0\.5"):
        run({"ratio": 0.6}, out, resume=True)
    with pytest.raises(ValueError, match="holds a run; continue it with --resume"):
        run(tiny, out)
    (out / "report.html").unlink()
    run({}, out, resume=True)
    assert (out / "report.html").exists()


def test_divergence_names_the_epoch_and_keeps_the_state(
    tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny["lr"] = 1e30
    out = tmp_path / "out"
    with pytest.raises(DivergedError, match=r"diverged in train epoch 1 of 2 .*lower --lr"):
        run(tiny, out)
    assert [path.name for path in out.iterdir()] == [STATE_NAME]


@pytest.mark.parametrize(
    ("call", "code"),
    [("os.fsync", errno.ENOSPC), ("orthoreg_ext.experiment.files.open", errno.EROFS)],
    ids=["full", "read-only"],
)
def test_a_disk_that_takes_nothing_keeps_the_state(
    call: str, code: int, tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        run(tiny, out, screen=interrupting(1))
    before = (out / STATE_NAME).read_bytes()

    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(call, refuse, raising=False)
        with pytest.raises(OSError, match="is intact"):
            run({}, out, resume=True)
    assert (out / STATE_NAME).read_bytes() == before
    with pytest.raises(KeyboardInterrupt):  # with room again, it goes on
        run({}, out, resume=True, screen=interrupting(1))
    assert load_state(out / STATE_NAME)[0]["arms"][0]["done"] == 4


def test_bad_input_leaves_nothing_behind(tiny: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "out"
    for wrong, text in (
        ({"ratio": 2.0}, "--ratio"),
        ({"data": "digitz"}, "unknown data 'digitz'"),
        ({"model": "vggg"}, "unknown model 'vggg'"),
        ({"ratio": 0.95, "max_layer_ratio": 0.5, "rounds": 1}, "ratio"),
    ):
        with pytest.raises(ValueError, match=text):
            run(tiny | wrong, out)
        assert not out.exists()


def test_a_folder_that_cannot_be_written_is_refused_at_once(
    tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path or mode == os.R_OK)
    with pytest.raises(ValueError, match=r"--out .* is not writable; choose another folder"):
        run(tiny, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny_net.py"]


def test_other_folders_are_refused(tiny: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("mine")
    (tmp_path / "file").write_text("")
    for resume in (False, True):
        with pytest.raises(ValueError, match=r"is not empty .*thesis\.tex.* choose another --out"):
            run(tiny, tmp_path / "full", resume=resume)
    with pytest.raises(ValueError, match="is a file"):
        run(tiny, tmp_path / "file")
    with pytest.raises(OSError, match="cannot be created"):
        run(tiny, tmp_path / "file" / "below")


def test_a_folder_without_a_run_is_not_continued(tiny: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'.*mistyped' holds no run to continue"):
        run({}, tmp_path / "mistyped", resume=True)
    assert not (tmp_path / "mistyped").exists()
    with pytest.raises(KeyboardInterrupt):  # the same command, stopped before it began
        run(tiny, tmp_path / "out", resume=True, screen=interrupting(0))
    with (
        owned(tmp_path / "out"),
        pytest.raises(ValueError, match="is in use"),
    ):
        run({}, tmp_path / "out", resume=True)


def test_changed_data_or_network_cannot_be_continued(tiny: dict[str, Any], tmp_path: Path) -> None:
    digits = load_digits()
    images = (digits.images * 15).astype(np.uint8)
    np.savez(tmp_path / "d.npz", images=images, labels=digits.target)
    tiny["data"] = str(tmp_path / "d.npz")
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        run(tiny, out, screen=interrupting(0))
    images[3, 3, 3] ^= 1
    np.savez(tmp_path / "d.npz", images=images, labels=digits.target)
    with pytest.raises(ValueError, match="changed since the run began"):
        run({}, out, resume=True)
    images[3, 3, 3] ^= 1
    np.savez(tmp_path / "d.npz", images=images, labels=digits.target)

    net = tmp_path / "tiny_net.py"
    # of another length: bytecode is told apart by whole seconds and sizes
    net.write_text(net.read_text().replace("12", "14") + "# wider\n")
    sys.modules.pop("tiny_net", None)
    with pytest.raises(ValueError, match="another architecture"):
        run({}, out, resume=True)


def test_a_network_that_cannot_be_cut_or_exported_is_refused_at_once(
    tiny: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    net = tmp_path / "odd_nets.py"
    net.write_text(ODD_NETS)
    for factory, text in (
        ("shuffled", "cannot be pruned .*conv"),
        ("branching", "cannot be exported"),
        ("random", "cannot be exported .*the same every time"),
    ):
        with pytest.raises(ValueError, match=f"--model 'odd_nets:{factory}' {text}"):
            run(tiny | {"model": f"odd_nets:{factory}"}, tmp_path / "out")
        assert not (tmp_path / "out").exists()
        assert capfd.readouterr() == ("", "")  # the error says it all


ODD_NETS = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, in_channels, num_classes):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 12, 3, padding=1)
        self.out = nn.Linear(12, num_classes)

class Shuffled(Net):
    def forward(self, x):
        x = self.conv(x).relu()
        x = nn.functional.channel_shuffle(x, 2)  # misread by the graph: only the values tell
        return self.out(self.conv2(x).relu().mean((2, 3)))

class Branching(Net):
    def forward(self, x):
        x = self.conv(x).relu()
        if x.sum() > 1e9:
            x = 2 * x
        return self.out(self.conv2(x).relu().mean((2, 3)))

class Random(Net):
    def forward(self, x):
        x = self.conv(x).relu()
        return self.out(self.conv2(x).relu().mean((2, 3))) + torch.rand(1)

def random(in_channels, num_classes): return Random(in_channels, num_classes)
def shuffled(in_channels, num_classes): return Shuffled(in_channels, num_classes)
def branching(in_channels, num_classes): return Branching(in_channels, num_classes)
"""


@pytest.mark.parametrize("package", ["safetensors", "torch_pruning"])
def test_a_package_that_is_missing_at_the_end_is_missed_at_the_start(
    package: str, tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in list(sys.modules):
        if name.partition(".")[0] == package:
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    with pytest.raises(ImportError, match=rf"{package}.*pip install orthoreg_ext\[cli\]"):
        run(tiny, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_run_on_a_gpu_needs_one_to_be_continued_but_not_to_be_read(
    tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    tiny |= {"seeds": 1, "rounds": 1, "epochs": 1, "finetune_epochs": 1}
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        run(tiny, out, screen=interrupting(0))

    def moved_to(device: str) -> None:
        record, tensors = load_state(out / STATE_NAME)
        record["settings"]["device"] = device
        save_state(out / STATE_NAME, record, tensors)

    moved_to("cuda")
    before = (out / STATE_NAME).read_bytes()
    with pytest.raises(ValueError, match=r"has --device cuda, .*; continue it where a GPU is"):
        run({}, out, resume=True)
    assert (out / STATE_NAME).read_bytes() == before
    moved_to("cpu")
    run({}, out, resume=True)
    moved_to("cuda")
    assert run({}, out, resume=True).finished


def test_a_forced_backend_that_does_not_fit_is_refused_at_once(
    tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ORTHOREG_EXT_BACKEND", "cuda")
    with pytest.raises(ValueError, match="backend 'cuda' "):
        run(tiny, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_cuda_runs_are_deterministic_and_leave_the_process_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)

    def state() -> tuple[object, ...]:
        return (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            torch.backends.cudnn.benchmark,
            torch.utils.deterministic.fill_uninitialized_memory,
            os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
        )

    before = state()
    found = []

    def interrupted_work() -> None:
        with deterministic("cuda"):
            found.append(state())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted_work()
    assert found == [(True, True, False, False, ":4096:8")]
    assert state() == before
    with deterministic("cpu"):
        assert state() == before


def test_the_job_is_done_deterministically(
    tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    @contextmanager
    def noted(device: str) -> Iterator[None]:
        asked.append(device)
        yield
        asked.append("end")

    monkeypatch.setattr("orthoreg_ext.experiment.job.deterministic", noted)
    monkeypatch.setattr("orthoreg_ext.experiment.job.Job.execute", lambda *_: asked.append("work"))
    monkeypatch.setattr("orthoreg_ext.experiment.job.Job.finish", lambda _: asked.append("finish"))
    run(tiny, tmp_path / "out")
    assert asked == ["cpu", "work", "finish", "end"]


@pytest.mark.parametrize("target", ["macs", "params", "memory"])
def test_a_target_is_reached_over_the_rounds(
    target: str, tiny: dict[str, Any], tmp_path: Path
) -> None:
    tiny |= {"seeds": 1, "epochs": 1, "finetune_epochs": 2, "target": target}
    tiny["round_to"] = 1 if target == "macs" else 2
    result = run(tiny, tmp_path / "out")
    for arm in result.arms:
        left = [1 - cut.saved for cut in arm.cuts]
        assert 0.35 < left[0] * left[1] <= 0.5  # at least what was asked for
        assert all(after % tiny["round_to"] == 0 for _, _, after in arm.cuts[-1].layers)
        if target != "memory":
            sizes = [getattr(arm.cuts[i], when) for i, when in ((0, "before"), (-1, "after"))]
            first, last = (getattr(size, target) for size in sizes)
            assert left[0] * left[1] == pytest.approx(last / first)
    text = (tmp_path / "out" / "report.html").read_text()
    assert {"macs": "50 % of the MACs", "params": "50 % of the parameters"}.get(target, "%") in text


def test_a_latency_is_measured_once_and_stored(
    tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that was interrupted after its cuts ends as if the clock had stopped there."""
    tiny |= {"seeds": 1, "rounds": 1, "epochs": 1, "target": "latency", "ratio": 0.4}
    noise = iter(range(10**6))

    def ratio(before: Any, after: Any, inputs: Any) -> tuple[float, str]:
        sizes = [sum(p.numel() for p in model.parameters()) for model in (before, after)]
        return sizes[1] / sizes[0] * (1 + 0.02 * (next(noise) % 7)), "quiet"

    monkeypatch.setattr("orthoreg_ext.pruning.latency.time_ratio", ratio)
    with pytest.raises(KeyboardInterrupt):
        run(tiny, tmp_path / "own", screen=interrupting(6))  # the twin was cut
    state, _ = load_state(tmp_path / "own" / STATE_NAME)
    stored = [arm["cuts"] for arm in state["arms"]]
    assert [len(cuts) for cuts in stored] == [1, 1]
    assert all(cuts[0]["saved"] >= 0.4 for cuts in stored)

    shutil.copytree(tmp_path / "own", tmp_path / "again")
    monkeypatch.setattr("orthoreg_ext.pruning.latency.time_ratio", None)  # not called any more
    for name in ("own", "again"):
        run(tiny, tmp_path / name, resume=True)
    assert numbers(tmp_path / "own") == numbers(tmp_path / "again")
    cuts = [arm["cuts"] for arm in numbers(tmp_path / "own")["run"]["arms"]]
    assert cuts == stored
    weights = [tmp_path / name / "weights.safetensors" for name in ("own", "again")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_weights_are_where_every_network_starts(tiny: dict[str, Any], tmp_path: Path) -> None:
    model = build_model(tiny["model"], num_classes=10, image_shape=(1, 8, 8), seed=5)
    path = tmp_path / "start.safetensors"
    safetensors.torch.save_file(model.state_dict(), path)
    tiny |= {"seeds": 1, "rounds": 1, "epochs": 1, "lr": 1e-30, "weights": str(path)}
    with pytest.raises(KeyboardInterrupt):
        run(tiny, tmp_path / "out", screen=interrupting(0))
    _, tensors = load_state(tmp_path / "out" / STATE_NAME)
    for key, value in model.named_parameters():
        torch.testing.assert_close(tensors[f"model.{key}"], value, rtol=0, atol=1e-20, msg=key)
    safetensors.torch.save_file({k: v + 1 for k, v in model.state_dict().items()}, path)
    with pytest.raises(ValueError, match=r"or --weights .* changed since the run began"):
        run({}, tmp_path / "out", resume=True)


@pytest.mark.parametrize("target", ["filters", "macs"])
def test_a_round_after_one_that_went_too_far_cuts_nothing(
    target: str, tiny: dict[str, Any], tmp_path: Path
) -> None:
    tiny |= {"seeds": 1, "epochs": 1, "finetune_epochs": 3, "rounds": 3, "target": target}
    tiny |= {"round_to": 4, "ratio": 0.3}
    result = run(tiny, tmp_path / "out")
    for arm in result.arms:
        widths = [{name: after for name, _, after in cut.layers} for cut in arm.cuts]
        assert len(widths) == 3
        assert all(width % 4 == 0 for width in (*widths[-1].values(),) if width != 10)
        still = [cut for cut in arm.cuts if not cut.ratio]
        assert still
        assert all(cut.accuracy_before == cut.accuracy_after for cut in still)
    model = build_model(tiny["model"], num_classes=10, image_shape=(1, 8, 8), seed=7)
    ox.pruning.replay(model, torch.zeros(1, 1, 8, 8), tmp_path / "out")
