from __future__ import annotations

import errno
import functools
import importlib
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import orthoreg_ext as ox
from orthoreg_ext import cli

TINY = [
    *("--ratio=0.5", "--seeds=1", "--epochs=1", "--finetune-epochs=1"),
    *("--threads=1", "--device=cpu"),
]


def one_line(text: str) -> str:
    assert text.count("\n") == 1
    assert "Traceback" not in text
    return text


def test_info_says_what_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info"]) == 0
    lines = capsys.readouterr().out
    info = ox.build_info()
    assert info["torch"]["version"] in lines
    assert f"CPU runs            {info['cpu']['runs']}" in lines
    assert cli.main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == info


def test_json_goes_to_stdout_or_to_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "info.json"
    assert cli.main(["info", "--json", str(path)]) == 0
    assert "compiled operators" in capsys.readouterr().out
    for option in ("--json", "--json=-"):
        assert cli.main(["analyze", "vgg", option]) == 0
        document = json.loads(capsys.readouterr().out)
        assert document["layers"][0]["name"] == "conv1"
    assert json.loads(path.read_text()) == ox.build_info()
    assert cli.main(["info", "--json", "/dev/stderr"]) == 0  # no file to replace
    assert json.loads(capsys.readouterr().err or "{}") in (ox.build_info(), {})


def test_help_tells_the_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert [f"  {code} " in text for code in (0, 1, 2, 130)] == [True] * 4
    for command in cli.COMMANDS:
        assert command.__name__.rpartition(".")[2] in text


def test_who_reads_only_the_first_line_gets_no_traceback() -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = f"{sys.executable} -m orthoreg_ext.cli analyze vgg | true"
    done = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True)
    assert done.stderr == ""


def test_info_says_why_not() -> None:
    info = ox.build_info()
    info["compiled"] = {"loaded": False, "reason": "no compiler was there"}
    info["cuda"] |= {"usable": False, "reason": "no GPU is visible", "compiled": False}
    text = "\n".join(cli.info_lines(info))
    assert "compiled operators  no: no compiler was there" in text
    assert "GPU                 not used: no GPU is visible" in text


@pytest.mark.parametrize(
    ("variable", "value", "text"),
    [
        ("ORTHOREG_EXT_BACKEND", "cuda", "backend 'cuda' cannot run here: "),
        ("ORTHOREG_EXT_BACKEND", "cdua", "unknown backend 'cdua'; did you mean 'cuda'?"),
        ("ORTHOREG_EXT_CPU", "mmx", "ORTHOREG_EXT_CPU=mmx is unknown"),
    ],
)
def test_info_explains_a_wrong_environment(variable: str, value: str, text: str) -> None:
    info = ox.build_info()
    if (value == "cuda" and info["cuda"]["usable"]) or not info["compiled"]["loaded"]:
        pytest.skip("this environment is not wrong here")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), variable: value}
    done = subprocess.run(
        [sys.executable, "-m", "orthoreg_ext.cli", "info"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    line = next(line for line in done.stdout.splitlines() if text in line)
    assert line.startswith("CPU runs" if variable == "ORTHOREG_EXT_CPU" else "backend")


def test_info_needs_no_optional_package() -> None:
    code = (
        "import sys\n"
        "for name in ('rich', 'matplotlib', 'sklearn', 'PIL', 'safetensors', 'torch_pruning'):\n"
        "    sys.modules[name] = None\n"
        "from orthoreg_ext.cli import main\n"
        "assert main(['info']) == 0\n"
        "sys.exit(main(['prune', '--out', 'never-made']))\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 2, done.stderr
    assert "pip install orthoreg_ext[cli]" in one_line(done.stderr)


def test_a_whole_run_from_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("sklearn")
    out = tmp_path / "out"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    arguments = ["prune", "--out", str(out), *TINY]
    command = [sys.executable, "-m", "orthoreg_ext.cli", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert sum("regularised  train 1/1" in line for line in lines) == 1
    assert sum("twin         tune 1/1" in line for line in lines) == 1
    assert sum(line.startswith(("[yes] ", "[NO ] ")) for line in lines) == 3
    assert lines[-1] == f"report: {out / 'report.html'}"
    assert (out / "report.html").read_text().startswith("<!DOCTYPE html>")

    assert cli.main([*arguments, "--resume"]) == 0
    table = done.stdout[done.stdout.index("vgg on digits") :]
    assert capsys.readouterr().out.strip() == table.strip()

    assert cli.main([*arguments, "--resume", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert len(result["verdicts"]) == 3
    assert result["table"][0]["what"] == "accuracy before the cut, %"


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--ratio", "1.5"], "--ratio is 1.5; expected a number between 0 and 1"),
        (["--ratio", "half"], "argument --ratio: invalid float value: 'half'"),
        (["--data", "digit"], "unknown data 'digit'; did you mean 'digits'"),
        (["--model", "resnt"], "unknown model 'resnt'; did you mean 'resnet'"),
        (["--criterion", "l3"], "unknown --criterion 'l3'"),
        (["--penalty", "ortho"], "unknown --penalty 'ortho'; did you mean 'orthoreg'"),
        (["--image-size", "2"], "cannot read images of 1 x 2 x 2"),
        (["--epoch", "3"], "unrecognized arguments: --epoch"),
        (["--target", "macs"], "argument --target: 'macs' is none; expected one of filters=0.5"),
        (["--target", "flops=0.5"], "'flops=0.5' is none; expected one of filters=0.5, macs=0.5"),
        (["--target", "macs=2"], "--target is macs=2.0; expected a share between 0 and 1"),
        (["--target", "macs=0.5", "--ratio", "0.5"], "say the same thing; give one of them"),
        (["--target", "macs=0.9999"], "ratio=1 of target='macs' cannot be reached"),
        (["--round-to", "0"], "--round-to is 0; expected a number of at least 1"),
        (["--channels", "2"], "--channels is 2; expected 1 (grey) or 3 (colour)"),
        (["--weights", "none.pt"], "--weights: there is no file 'none.pt'"),
        (["--json", "none/x.json"], "--json: there is no folder 'none'; make it first"),
    ],
)
def test_bad_input_is_one_line(
    options: list[str], text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    try:
        code = cli.main(["prune", "--out", str(out), *options])
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    error = one_line(capsys.readouterr().err)
    assert text in error
    assert error.startswith(("orthoreg prune: error: ", "orthoreg: error: "))
    assert not out.exists()


def test_ctrl_c_says_how_to_continue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("orthoreg_ext.experiment.job.train_epoch", _interrupt)
    assert cli.main(["prune", "--out", str(tmp_path / "out"), *TINY]) == 130
    assert "the same command with --resume continues" in capsys.readouterr().err


def test_a_real_ctrl_c_can_be_continued(tmp_path: Path) -> None:
    out = tmp_path / "out"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "orthoreg_ext.cli", "prune", "--out", str(out), *TINY]
    process = subprocess.Popen(
        [*command, "--epochs=1000"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # a shell that runs the tests in the background lets them ignore it
        preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None
    process.stdout.readline()  # the first epoch is done
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert error.strip() == (
        "orthoreg prune: interrupted; the same command with --resume continues"
    )
    assert (out / "state.safetensors").exists()


def _interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def test_divergence_is_a_failure_not_bad_input(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["prune", "--out", str(tmp_path / "out"), *TINY, "--lr", "1e30"]) == 1
    assert "lower --lr or --strength" in one_line(capsys.readouterr().err)


def test_a_missing_package_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = importlib.import_module

    def missing(name: str, *rest: str) -> object:
        if name.startswith("sklearn"):
            raise ModuleNotFoundError("No module named 'sklearn'", name="sklearn")
        return real(name, *rest)

    monkeypatch.setattr(importlib, "import_module", missing)
    assert cli.main(["prune", "--out", str(tmp_path / "out"), *TINY]) == 2
    error = one_line(capsys.readouterr().err)
    assert "sklearn is not installed; install it with: pip install orthoreg_ext[cli]" in error


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_live_bar_and_a_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("rich")
    monkeypatch.setenv("COLUMNS", "120")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    assert cli.main(["prune", "--out", str(tmp_path / "out"), *TINY]) == 0
    text = terminal.getvalue()
    assert "\x1b[" in text
    assert "cut by fisher: 442 -> 226 filters" in text
    assert "MACs of one image" in text


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (RuntimeError("model.pt2 differs\nfrom the network"), "model.pt2 differs from the network"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), "smaller --batch-size"),
        (MemoryError(), "the memory does not suffice"),
        (OSError(errno.EROFS, "Read-only file system"), "Read-only file system"),
    ],
)
def test_what_fails_on_the_way_is_one_line_and_the_state_is_kept(
    error: Exception,
    text: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr("orthoreg_ext.experiment.job.train_epoch", fail)
        assert cli.main(["prune", "--out", str(out), *TINY]) == 1
    assert text in one_line(capsys.readouterr().err)
    assert [path.name for path in out.iterdir()] == ["state.safetensors"]
    if isinstance(error, MemoryError):  # once: the state is the same whatever the error
        assert cli.main(["prune", "--out", str(out), "--resume", "--quiet"]) == 0


def test_a_terminal_without_rich_is_told_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "rich"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "rich", None)
    monkeypatch.setattr(sys, "stdout", Terminal())
    for more in ([], ["--quiet"]):
        assert cli.main(["prune", "--out", str(tmp_path / "out"), *TINY, *more]) == 2
        assert "rich is not installed" in one_line(capsys.readouterr().err)
        assert not (tmp_path / "out").exists()


ROOT = Path(__file__).parent.parent


def test_one_extra_has_what_the_command_needs() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    table = text.split("[project.optional-dependencies]")[1].split("\n[project.scripts]")[0]
    extras = [line.split(" = ")[0] for line in table.splitlines() if " = [" in line]
    assert {"pruning", "cli", "test", "lint", "dev"} <= set(extras)
    named = {
        name
        for path in [ROOT / "Makefile", *(ROOT / "orthoreg_ext").rglob("*.py")]
        for name in re.findall(r"orthoreg_ext\[(\w+)\]|packages-(\w+)", path.read_text())
    }
    assert {a or b for a, b in named} <= {*extras, "export"}


def test_the_default_folder_is_ignored_by_git() -> None:
    options = cli._parser().parse_args(["prune"])
    assert f"{options.out}/" in (ROOT / ".gitignore").read_text().splitlines()


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    if shutil.which("make") is None:
        pytest.skip("needs make")
    return subprocess.run(
        ["make", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False
    )


def test_the_demo_begins_or_continues_and_deletes_nothing(tmp_path: Path) -> None:
    done = make("-n", "demo", f"DEMO_OUT={tmp_path}")
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if str(tmp_path) in line]
    assert not [line for line in lines if "rm -" in line.split("echo")[0]]
    (command,) = [line for line in lines if "bin/orthoreg prune" in line]
    options = cli._parser().parse_args(shlex.split(command.partition("bin/orthoreg ")[2]))
    assert options.resume
    # without a setting --resume would only continue
    assert any(getattr(options, name) is not None for name in options.settings)
    assert any("start over" in line for line in lines)


def test_make_removes_no_folder_that_is_no_environment(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    done = make(f"{tmp_path}/stamps/environment", f"VENV={tmp_path}", "PYTHON=false")
    assert done.returncode != 0
    assert (tmp_path / "thesis.tex").exists()
    assert "is no virtual environment" in done.stderr
    lines = make("-n", "clean", f"VENV={tmp_path}").stdout.splitlines()  # never run from here
    removal = next(i for i, line in enumerate(lines) if f"rm -rf {tmp_path}" in line)
    assert any("is no virtual environment" in line for line in lines[:removal])
