"""`orthoreg completion`: what the shells themselves make of the scripts."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from orthoreg_ext import cli
from tests.test_cli import one_line

BASH = """
source {script}
COMP_WORDS=({words}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); COMPREPLY=()
_orthoreg
printf '%s\\n' "${{COMPREPLY[@]}}"
"""

LINES = [
    (["re"], {"replay"}),
    (["prune", "--round"], {"--rounds", "--round-to"}),
    (["prune", "--criterion", "fis"], {"fisher"}),
    (["prune", "--penalty", "gor"], {"gor"}),
    (["export", "--format", ""], {"pt2", "onnx", "both"}),
    (["completion", ""], {"bash", "zsh", "fish"}),
    (["analyze", "res"], {"resnet"}),
    (["analyze", "mine."], {"mine.npz"}),
    (["analyze", "--data", "di"], {"digits"}),
    (["sensitivity", "vgg", "--weights", "mine"], {"mine.npz"}),
]


def script(shell: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    if shutil.which(shell) is None:
        pytest.skip(f"needs {shell}")
    assert cli.main(["completion", shell]) == 0
    path = folder / f"orthoreg.{shell}"
    path.write_text(capsys.readouterr().out)
    return path


def answer(shell: str, text: str, folder: Path) -> str:
    done = subprocess.run([shell, "-c", text], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_bash_completes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = script("bash", tmp_path, capsys)
    (tmp_path / "mine.npz").touch()
    for words, want in LINES:
        quoted = " ".join(f"'{word}'" for word in ["orthoreg", *words])
        got = answer("bash", BASH.format(script=path, words=quoted), tmp_path)
        assert set(got.split()) == want, words
    got = answer("bash", BASH.format(script=path, words="orthoreg prune --target = m"), tmp_path)
    assert set(got.split()) == {"macs=", "memory="}


def test_fish_completes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = script("fish", tmp_path, capsys)
    (tmp_path / "mine.npz").touch()
    for words, want in LINES:
        line = " ".join(["orthoreg", *words])
        got = answer("fish", f"source {path}; complete -C '{line}'", tmp_path)
        assert want <= {row.split("\t")[0] for row in got.splitlines()}, words


def test_zsh_takes_the_script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = script("zsh", tmp_path, capsys)
    text = f"autoload -U compinit; compinit -u -D; source {path}; print $_comps[orthoreg]"
    assert answer("zsh", text, tmp_path).strip() == "_orthoreg"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_every_command_and_option_is_there(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["completion", shell]) == 0
    text = capsys.readouterr().out
    for command in ("info", "analyze", "sensitivity", "prune", "replay", "export", "bench"):
        assert command in text
    for option in ("round-to", "input-shape", "overwrite", "finetune-epochs", "metric", "json"):
        assert option in text


def test_another_shell_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["completion", "tcsh"])
    assert stop.value.code == 2
    assert "invalid choice: 'tcsh'" in one_line(capsys.readouterr().err)
