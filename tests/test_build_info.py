"""What is told about the compiled modules, and that a broken one is told and not swallowed."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import orthoreg_ext
from orthoreg_ext.build_info import VERSION, build_info

build_module = sys.modules["orthoreg_ext.build_info"]
PACKAGE = Path(orthoreg_ext.__file__).parent

# The finder of an editable install would fill in modules that the copy lacks.
TELL = """\
import json, sys
sys.meta_path = [f for f in sys.meta_path if "Editable" not in getattr(f, "__name__", "")]
import torch
import orthoreg_ext as ox
import orthoreg_ext.functional as F
(gram,) = F.gram([torch.tensor([[1.0, 2.0], [3.0, 4.0]])])
print(json.dumps({"info": ox.build_info(), "gram": gram.tolist(), "file": ox.__file__}))
"""
NO_LIBRARY = "this is no shared library\n" * 10


@pytest.fixture
def copied_package(tmp_path: Path) -> Path:
    """A copy of the package without compiled modules."""
    target = tmp_path / "orthoreg_ext"
    shutil.copytree(PACKAGE, target, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return target


def tell(package: Path) -> tuple[dict[str, Any], str]:
    """Imports the copy in its own process; returns what it tells and its error output."""
    hidden = {"PYTHONWARNINGS", "ORTHOREG_EXT_BACKEND"}
    env = {k: v for k, v in os.environ.items() if k not in hidden}
    env |= {"PYTHONPATH": str(package.parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "always", "-c", TELL],
        cwd=package.parent,
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert Path(told["file"]).parent == package, "another installation was imported"
    assert told["gram"] == [[5.0, 11.0], [11.0, 25.0]]
    return told["info"], done.stderr


@pytest.mark.parametrize("content", [NO_LIBRARY, ""], ids=["text", "empty"])
def test_broken_operators_warn_once_and_the_reference_runs(
    copied_package: Path, content: str
) -> None:
    (copied_package / "_C.abi3.so").write_text(content)
    info, errors = tell(copied_package)
    assert errors.count("RuntimeWarning") == 1
    assert "orthoreg_ext._C does not load" in errors
    reason = info["compiled"]["reason"]
    assert re.search(r"_C\.abi3\.so: (invalid ELF header|file too short)", reason), reason
    assert reason in errors
    assert info["compiled"]["loaded"] is False
    assert info["cpu"] == {"compiled": False, "levels": [], "runs": "reference", "reason": ""}
    assert info["cuda"]["usable"] is False
    assert info["cuda"]["reason"] == reason


def test_broken_host_module_warns_once(copied_package: Path) -> None:
    (copied_package / "_host.abi3.so").write_text(NO_LIBRARY)
    info, errors = tell(copied_package)
    assert errors.count("RuntimeWarning") == 1
    assert "orthoreg_ext._host does not load" in errors
    assert "invalid ELF header" in info["host"]["reason"]


def test_package_that_was_never_built_is_quiet(copied_package: Path) -> None:
    info, errors = tell(copied_package)
    assert "orthoreg_ext" not in errors
    assert info["compiled"]["loaded"] is False
    assert "installed without compiled modules" in info["compiled"]["reason"]


def test_binary_of_another_python_is_named(copied_package: Path) -> None:
    name = "_host.cpython-39-x86_64-linux-gnu.so"
    (copied_package / name).write_text("for another Python")
    info, errors = tell(copied_package)
    assert "orthoreg_ext" not in errors
    assert info["host"] == {
        "loaded": False,
        "reason": f"{name} is built for another Python: build again",
    }


def test_build_info_is_json_and_consistent() -> None:
    info = build_info()
    assert json.loads(json.dumps(info)) == info
    assert info["version"] == VERSION
    assert info["torch"]["version"] == torch.__version__
    assert info["compiled"]["loaded"] is (info["compiled"]["reason"] == "")
    assert info["cuda"]["usable"] is (info["cuda"]["reason"] == "")
    if info["compiled"]["loaded"] and info["host"]["loaded"]:
        assert info["cpu"]["runs"] in info["cpu"]["levels"]
        assert info["torch"]["target"] == "2.10"
        assert info["cuda"]["compiled"] is bool(info["cuda"]["architectures"])
        assert info["cuda"]["compiled"] is (info["cuda"]["toolkit"] is not None)


def test_version_is_the_one_of_the_distribution() -> None:
    text = (PACKAGE.parent / "pyproject.toml").read_text()
    assert f'\nversion = "{VERSION}"\n' in text


@pytest.mark.parametrize(
    ("capability", "architectures", "runs"),
    [
        ((8, 0), ["80-real"], True),
        ((8, 6), ["80-real"], True),  # machine code runs on later minors of its major
        ((8, 0), ["86-real"], False),
        ((9, 0), ["80-real"], False),
        ((9, 0), ["80"], True),  # PTX is compiled for anything newer
        ((9, 0), ["80-virtual"], True),
        ((8, 0), ["90-virtual"], False),
        ((7, 0), ["75-real", "80-real", "120"], False),
        ((12, 1), ["90-real", "120"], True),
        ((13, 0), ["90-real", "120"], True),
        ((9, 0), ["native"], True),
        ((9, 0), [], True),  # unknown: built without _host
    ],
)
def test_architectures_that_run_on_a_gpu(
    capability: tuple[int, int], architectures: list[str], runs: bool
) -> None:
    assert build_module._runs_on(capability, architectures) is runs


@pytest.fixture(autouse=True)
def asked_afresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """No answer that an earlier test was given, no warning that it had."""
    monkeypatch.setattr(build_module, "_cuda_reasons", {})
    monkeypatch.setattr(build_module, "_warned", set())


class _Operators:
    def __init__(self, has_cuda: bool) -> None:
        self._torch_has_cuda = lambda: has_cuda


@pytest.mark.parametrize(
    ("compiled", "with_cuda", "torch_cuda", "available", "stream", "expected"),
    [
        (False, False, "13.0", True, True, "the file is broken"),
        (True, False, "13.0", True, True, "built without CUDA kernels: nvcc is not found"),
        (True, True, None, False, True, "torch is built without CUDA"),
        (True, True, "13.0", False, True, "no GPU is visible to torch"),
        (True, True, "13.0", True, False, "torch's CUDA library is not loaded"),
        (True, True, "13.0", True, True, ""),
    ],
)
def test_why_cuda_does_not_run(
    monkeypatch: pytest.MonkeyPatch,
    compiled: bool,
    with_cuda: bool,
    torch_cuda: str | None,
    available: bool,
    stream: bool,
    expected: str,
) -> None:
    monkeypatch.setattr(build_module, "compiled", compiled)
    monkeypatch.setattr(build_module, "reason", "" if compiled else "the file is broken")
    monkeypatch.setattr(build_module, "cuda_compiled", with_cuda)
    built = {"cuda_reason": "nvcc is not found", "cuda_architectures": ["80-real", "90"]}
    monkeypatch.setattr(build_module, "_build", built)
    monkeypatch.setattr(torch.version, "cuda", torch_cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _=0: (9, 0))
    monkeypatch.setattr(torch.ops, "orthoreg", _Operators(stream))
    told = build_module.cuda_reason()
    assert told.startswith(expected)
    assert bool(told) is bool(expected)


def test_gpu_without_matching_kernels_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_module, "compiled", True)
    monkeypatch.setattr(build_module, "cuda_compiled", True)
    monkeypatch.setattr(build_module, "_build", {"cuda_architectures": ["80-real", "90"]})
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _=0: (7, 0))
    monkeypatch.setattr(torch.ops, "orthoreg", _Operators(True))
    told = build_module.cuda_reason()
    assert "built for architectures 80-real 90, GPU 0 has compute capability 7.0" in told


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """A machine with a GPU that the kernels run on, and one that they do not; the current one."""
    current = [0]
    monkeypatch.setattr(build_module, "compiled", True)
    monkeypatch.setattr(build_module, "cuda_compiled", True)
    monkeypatch.setattr(build_module, "_build", {"cuda_architectures": ["80-real"]})
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    capabilities = [(8, 6), (7, 5)]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i=0: capabilities[i])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i=0: f"GPU {i}")
    monkeypatch.setattr(torch.ops, "orthoreg", _Operators(True))
    return current


def test_every_gpu_is_answered_for_itself(two_gpus: list[int]) -> None:
    assert build_module.cuda_reason() == ""
    assert build_module.cuda_reason(0) == ""
    assert "GPU 1 has compute capability 7.5" in build_module.cuda_reason(1)
    assert build_info()["cuda"]["usable"] is True
    two_gpus[0] = 1
    assert "GPU 1 has compute capability 7.5" in build_module.cuda_reason()
    assert build_info()["cuda"]["usable"] is False
    with pytest.raises(ValueError, match="index is 2; expected 0 to 1"):
        build_module.cuda_reason(2)


def test_gpu_of_a_process_that_has_not_used_it_is_the_first(
    two_gpus: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    two_gpus[0] = 1
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    assert build_module.cuda_reason() == ""


def test_fallback_on_a_gpu_warns_once_with_the_reason(
    two_gpus: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build_module.warn_cuda_fallback_once()  # the kernels run there
    with pytest.warns(RuntimeWarning, match=r"compute capability 7\.5.* runs in their place"):
        build_module.warn_cuda_fallback_once(1)
    monkeypatch.setattr(build_module, "cuda_compiled", False)
    monkeypatch.setattr(build_module, "_build", {"cuda_reason": "nvcc is not found"})
    monkeypatch.setattr(build_module, "_cuda_reasons", {})
    with pytest.warns(RuntimeWarning, match="built without CUDA kernels: nvcc is not found"):
        build_module.warn_cuda_fallback_once()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build_module.warn_cuda_fallback_once()
        build_module.warn_cuda_fallback_once(1)


@pytest.mark.parametrize("lacking", ["torch", "GPU", "binary"])
def test_fallback_is_silent_where_nothing_was_to_be_expected(
    lacking: str, two_gpus: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build_module, "cuda_compiled", False)
    if lacking == "torch":
        monkeypatch.setattr(torch.version, "cuda", None)
    elif lacking == "GPU":
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    else:  # installed without compiled modules: chosen, or warned of when it was loaded
        monkeypatch.setattr(build_module, "compiled", False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build_module.warn_cuda_fallback_once()


def test_wrong_environment_is_told_and_not_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong() -> str:
        raise RuntimeError("ORTHOREG_EXT_CPU=mmx is unknown; valid: generic")

    monkeypatch.setattr(build_module, "compiled", True)
    operators = _Operators(False)
    operators._cpu_level = wrong  # type: ignore[attr-defined]
    monkeypatch.setattr(torch.ops, "orthoreg", operators)
    monkeypatch.setenv("ORTHOREG_EXT_BACKEND", "cuda")
    monkeypatch.setattr(torch.version, "cuda", None)
    info = build_info()
    assert info["cpu"]["runs"] is None
    assert info["cpu"]["reason"] == "ORTHOREG_EXT_CPU=mmx is unknown; valid: generic"
    assert info["backend"] == "cuda"
    assert info["backend_reason"].startswith("backend 'cuda' cannot run here: ")
    assert json.loads(json.dumps(info)) == info


def test_gpu_kernels_are_usable_where_a_gpu_is() -> None:
    if not torch.cuda.is_available() or not build_module.cuda_compiled:
        pytest.skip("needs a GPU and CUDA kernels")
    assert build_info()["cuda"]["reason"] == ""
    assert build_info()["cuda"]["devices"]
