"""Runs the examples, and reads from them what adopting an adapter changes."""

from __future__ import annotations

import ast
import runpy
import sys
from pathlib import Path

import pytest

from orthoreg_ext.experiment.zoo import load_package

EXAMPLES = Path(__file__).parents[2] / "examples"
MARK = "# <- orthoreg_ext"


def framework(*packages: str) -> None:
    """Imports packages that may import torchvision by themselves, or skips the test saying why."""
    try:
        for package in packages:
            load_package(package)
    except ImportError as error:
        pytest.skip(str(error))


def run_example(name: str, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What the example prints."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, *arguments])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return capsys.readouterr().out


def check_adoption(name: str, lines: int = 2) -> None:
    """At most so many marked lines, without which the rest is a script that never heard of us."""
    text = (EXAMPLES / name).read_text()
    marked = [line for line in text.splitlines() if line.endswith(MARK)]
    plain = "\n".join(line for line in text.splitlines() if not line.endswith(MARK))
    assert 0 < len(marked) <= lines
    used = {node.id for node in ast.walk(ast.parse(plain)) if isinstance(node, ast.Name)}
    bound = {
        alias.asname or alias.name
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
        if (getattr(node, "module", None) or alias.name).startswith("orthoreg_ext")
    }
    assert bound
    assert not used & bound
    assert "orthoreg" not in ast.unparse(ast.parse(plain)).partition('"""')[2].partition('"""')[2]
