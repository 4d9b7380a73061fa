"""The package of adapters is there without any framework."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

import orthoreg_ext as ox

tp = pytest.importorskip("torch_pruning", reason="pip install orthoreg_ext[pruning]")
from orthoreg_ext.integrations import torch_pruning as adapter  # noqa: E402


def test_importing_the_package_imports_no_framework() -> None:
    code = (
        "import sys, orthoreg_ext as ox; print(dir(ox.integrations));"
        "print({'torch_pruning', 'lightning', 'transformers', 'peft'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "'torch_pruning'" in done.stdout.splitlines()[0]
    assert done.stdout.splitlines()[1] == "set()"


def test_adapters_are_attributes_of_the_package() -> None:
    assert ox.integrations.torch_pruning is adapter
    with pytest.raises(AttributeError, match=r"no attribute 'keras'. Valid: .*torch_pruning"):
        _ = ox.integrations.keras


@pytest.mark.parametrize("way", ["attribute", "import"])
def test_a_missing_framework_is_named_with_its_remedy(
    way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    for name in [name for name in sys.modules if "integrations.torch_pruning" in name]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(ox.integrations, "torch_pruning", raising=False)
    ask = {
        "attribute": lambda: ox.integrations.torch_pruning,
        "import": lambda: importlib.import_module("orthoreg_ext.integrations.torch_pruning"),
    }
    with pytest.raises(ImportError, match=r"torch_pruning needs torch_pruning.*pip install"):
        ask[way]()
