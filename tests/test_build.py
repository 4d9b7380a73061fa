"""The build: what it decides, what it says when it cannot, what it puts into the packages."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODULE = importlib.util.find_spec("orthoreg_ext._C")
SOURCES = ["setup.py", "pyproject.toml", "CMakeLists.txt", "MANIFEST.in", "LICENSE", "README.md"]


def script(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


stable_abi = script("scripts/stable_abi.py")

compiled_only = pytest.mark.skipif(MODULE is None, reason="orthoreg_ext._C is not built here")


def run(
    command: list[str], cwd: Path, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    hidden = ("ORTHOREG_", "CMAKE_", "CUDA", "TORCH_CUDA", "MAX_JOBS", "PYTHONPATH")
    env = {k: v for k, v in os.environ.items() if not k.startswith(hidden)}
    return subprocess.run(
        command, cwd=cwd, env=env | (environment or {}), capture_output=True, text=True, timeout=300
    )


def package_folder(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"{name} is not installed here")
    return Path(spec.submodule_search_locations[0])


def cmake() -> str:
    if importlib.util.find_spec("cmake") is not None:
        return str(Path(importlib.import_module("cmake").CMAKE_BIN_DIR) / "cmake")
    return shutil.which("cmake") or pytest.skip("cmake is not installed here")


def lend(packages: Path, *names: str) -> None:
    """Makes packages of this Python available in `packages`."""
    for name in names:
        source = package_folder(name)
        for path in [source, *source.parent.glob(f"{name}-*.dist-info")]:
            (packages / path.name).symlink_to(path)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the source tree without anything built."""
    target = tmp_path / "tree"
    target.mkdir()
    for name in [*SOURCES, "Makefile", "CHANGELOG.md", "CONTRIBUTING.md", ".clang-format"]:
        shutil.copy(ROOT / name, target / name)
    for name in ("orthoreg_ext", "csrc", "cmake", "docs", "scripts"):
        ignore = shutil.ignore_patterns("__pycache__", "*.so")
        shutil.copytree(ROOT / name, target / name, ignore=ignore)
    return target


@pytest.fixture
def bare_python(tmp_path: Path) -> tuple[str, dict[str, str]]:
    """A Python that has setuptools and nothing else, and the environment to run it in."""
    folder = tmp_path / "bare"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    packages = tmp_path / "packages"
    packages.mkdir()
    lend(packages, "setuptools", "_distutils_hack")
    environment = {"PYTHONPATH": str(packages), "PATH": str(tmp_path / "empty")}
    return str(folder / "bin" / "python"), environment


# --- the binary


def symbols(option: str) -> list[tuple[str, str]]:
    """(type, name@version) of the dynamic symbols of _C."""
    assert MODULE is not None
    assert MODULE.origin is not None
    if shutil.which("nm") is None:
        pytest.skip("nm (binutils) is not installed here")
    found: list[tuple[str, str]] = stable_abi.symbols(Path(MODULE.origin), option)
    return found


@compiled_only
def test_binary_needs_only_the_stable_abi() -> None:
    symbols("--undefined-only")  # skips without nm
    assert stable_abi.problems(Path(MODULE.origin)) == []


def test_what_is_no_stable_abi_is_seen() -> None:
    host = importlib.util.find_spec("orthoreg_ext._host") or pytest.skip("_host is not built here")
    said = "\n".join(stable_abi.problems(Path(host.origin)))
    assert "undefined symbol PyObject_" in said  # pybind11: one CPython only
    assert "takes nothing from torch's stable ABI" in said
    assert "looks for torch in []" in said


@compiled_only
def test_binary_loads_beside_a_torch_without_cuda() -> None:
    # In libtorch_cuda only, so a CPU-only torch lacks it: it must be weak.
    stream = [kind for kind, name in symbols("--undefined-only") if "current_cuda_stream" in name]
    assert all(kind in "wv" for kind in stream)


@compiled_only
def test_binary_exports_nothing_but_its_entry() -> None:
    strong = [name for kind, name in symbols("--defined-only") if kind in "TDR"]
    assert [name for name in strong if name not in ("_edata", "_end", "_fini", "_init")] == [
        "PyInit__C"
    ]


# --- the choice of CUDA, run alone with a made-up nvcc


def configure(tmp_path: Path, code: str, environment: dict[str, str] | None = None) -> str:
    """Runs `code` with cmake/OrthoregCuda.cmake loaded; returns what it prints."""
    script = tmp_path / "script.cmake"
    script.write_text(
        "cmake_minimum_required(VERSION 3.24)\n"
        f'include("{ROOT}/cmake/OrthoregCuda.cmake")\n'
        f'set(ORTHOREG_NVCC_FALLBACK "{tmp_path}/nowhere")\n{code}\n'
    )
    environment = {"PATH": "/usr/bin:/bin"} | (environment or {})
    done = run([cmake(), "-P", str(script)], tmp_path, environment)
    return " ".join((done.stdout + done.stderr).split())


def fake_nvcc(tmp_path: Path, version: str, architectures: str = "75 80 90 120") -> dict[str, str]:
    """The environment in which nvcc reports `version` and knows `architectures`."""
    folder = tmp_path / f"cuda-{version}" / "bin"
    folder.mkdir(parents=True)
    listed = "\n".join(f"echo compute_{number}" for number in architectures.split())
    (folder / "nvcc").write_text(
        "#!/bin/sh\n"
        f'if [ "$1" = --version ]; then echo "Cuda tools, release {version}, V1"; exit; fi\n'
        f"{listed}\n"
    )
    (folder / "nvcc").chmod(0o755)
    return {"CUDA_HOME": str(folder.parent)}


CHOOSE = (
    'orthoreg_choose_cuda("{mode}" "{torch}" use why)\nmessage("use=${{use}} because ${{why}}")'
)


@pytest.mark.parametrize(
    ("mode", "torch_cuda", "nvcc", "expected"),
    [
        ("AUTO", "", "13.0", "use=OFF because torch is built without CUDA"),
        ("AUTO", "13.0", "13.2", "use=ON because torch has CUDA 13.0 and there is nvcc 13.2"),
        ("auto", "12.8", "13.0", "use=OFF because nvcc 13.0"),
        ("AUTO", "12.8", "13.0", "torch's CUDA 12.8 differ in the major version"),
        ("AUTO", "13.0", None, "use=OFF because nvcc is not found in CUDACXX, CUDA_HOME"),
        ("ON", "", "13.0", "beside a torch without CUDA"),
        ("ON", "13.0", "13.2", "use=ON because ORTHOREG_CUDA=ON, nvcc 13.2"),
        ("ON", "12.8", "13.0", "Error"),
        ("ON", "12.8", "13.0", "point CUDA_HOME to a toolkit 12.x, or use ORTHOREG_CUDA=OFF"),
        ("ON", "", None, "ORTHOREG_CUDA=ON, but nvcc is not found"),
        ("OFF", "13.0", "13.0", "use=OFF because ORTHOREG_CUDA=OFF"),
        ("maybe", "", "13.0", "ORTHOREG_CUDA must be AUTO, ON or OFF, got 'MAYBE'"),
    ],
)
def test_cuda_is_chosen_with_a_reason(
    tmp_path: Path, mode: str, torch_cuda: str, nvcc: str | None, expected: str
) -> None:
    environment = fake_nvcc(tmp_path, nvcc) if nvcc else {"PATH": str(tmp_path)}
    assert expected in configure(tmp_path, CHOOSE.format(mode=mode, torch=torch_cuda), environment)


def test_cudacxx_is_preferred(tmp_path: Path) -> None:
    environment = fake_nvcc(tmp_path, "13.0")
    other = fake_nvcc(tmp_path, "12.9")["CUDA_HOME"]
    environment["CUDACXX"] = f"{other}/bin/nvcc"
    assert "nvcc 12.9" in configure(tmp_path, CHOOSE.format(mode="ON", torch=""), environment)


ARCHITECTURES = (
    "orthoreg_find_nvcc()\n{before}\n"
    "orthoreg_choose_architectures(CMAKE_CUDA_ARCHITECTURES)\n"
    'message("chosen=${{CMAKE_CUDA_ARCHITECTURES}}.")'
)


@pytest.mark.parametrize(
    ("known", "before", "wanted", "expected"),
    [
        ("75 80 86 87 90 120", "", None, "chosen=75-real;80-real;86-real;90-real;120."),
        ("50 80", "", None, "chosen=80."),
        ("50 60", "", None, "knows none of the architectures"),
        ("75 80 90", "", "8.0;9.0+PTX", "chosen=80-real;90."),
        ("75 80 90", "", "8.0 9.0a", "chosen=80-real;90a-real."),
        ("75 80 90", "", "Ampere", "TORCH_CUDA_ARCH_LIST holds 'Ampere'"),
        ("75 80 90", "", "12.0", "TORCH_CUDA_ARCH_LIST asks for CUDA architecture 120-real"),
        ("75 80 90", "set(CMAKE_CUDA_ARCHITECTURES 75 native)", "8.0", "chosen=75;native."),
        (
            "75 80",
            "set(CMAKE_CUDA_ARCHITECTURES 90)",
            None,
            "CMAKE_CUDA_ARCHITECTURES asks for CUDA architecture 90",
        ),
    ],
)
def test_architectures_are_those_nvcc_knows(
    tmp_path: Path, known: str, before: str, wanted: str | None, expected: str
) -> None:
    environment = fake_nvcc(tmp_path, "13.0", known)
    if wanted is not None:
        environment["TORCH_CUDA_ARCH_LIST"] = wanted
    assert expected in configure(tmp_path, ARCHITECTURES.format(before=before), environment)


def test_torch_version_is_read_without_importing_it(tmp_path: Path) -> None:
    (tmp_path / "version.py").write_text(
        "raise RuntimeError\n"
        "__version__ = '2.11.0a0+git1234'\n"
        "cuda: Optional[str] = '13.0'\n"
        "hip: Optional[str] = None\n"
    )
    code = f'orthoreg_read_torch_version("{tmp_path}" v c)\nmessage("${{v}} ${{c}}.")'
    assert configure(tmp_path, code).endswith("2.11.0 13.0.")


# --- what is said when something is missing

# What pip calls, in the order in which it calls it.
METADATA = "from setuptools import build_meta; build_meta.prepare_metadata_for_build_wheel('.')"
WHEEL = "from setuptools import build_meta; build_meta.build_wheel('.')"


def test_no_torch_names_the_command(tree: Path, bare_python: tuple[str, dict[str, str]]) -> None:
    python, environment = bare_python
    for code in (METADATA, WHEEL):
        done = run([python, "-c", code], tree, environment)
        assert done.returncode != 0
        assert "pip install --no-build-isolation ." in done.stderr
        assert "ORTHOREG_EXT_NO_BUILD=1" in done.stderr


def fake_torch(environment: dict[str, str], version: str) -> None:
    folder = Path(environment["PYTHONPATH"]) / "torch"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "version.py").write_text(f"__version__ = '{version}'\ncuda: str | None = None\n")


def test_no_cmake_names_the_remedy(tree: Path, bare_python: tuple[str, dict[str, str]]) -> None:
    python, environment = bare_python
    fake_torch(environment, "2.13.0")
    done = run([python, "-c", WHEEL], tree, environment)
    assert done.returncode != 0
    assert "is not found: run  pip install cmake ninja pybind11" in done.stderr


def test_old_torch_is_refused(tree: Path, bare_python: tuple[str, dict[str, str]]) -> None:
    python, environment = bare_python
    fake_torch(environment, "2.9.1")
    lend(Path(environment["PYTHONPATH"]), "cmake", "ninja", "pybind11")
    done = run([python, "-c", WHEEL], tree, environment | {"PATH": os.environ["PATH"]})
    assert done.returncode != 0
    assert "torch 2.9.1" in done.stderr
    assert "older than 2.10" in " ".join(done.stderr.split())
    assert "The build failed" in done.stderr


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("MAX_JOBS", "many", "MAX_JOBS must be a positive number, got 'many'"),
        ("MAX_JOBS", "0", "MAX_JOBS must be a positive number, got '0'"),
        ("ORTHOREG_HOST_MODULE", "perhaps", "ORTHOREG_HOST_MODULE must be 0 or 1, got 'perhaps'"),
        ("ORTHOREG_EXT_NO_BUILD", "2", "ORTHOREG_EXT_NO_BUILD must be 0 or 1, got '2'"),
    ],
)
def test_bad_settings_are_named(tree: Path, name: str, value: str, expected: str) -> None:
    done = run([sys.executable, "-c", WHEEL], tree, {name: value})
    assert done.returncode != 0
    assert expected in done.stderr
    assert not list(tree.glob("build/cmake*"))


# --- what the packages hold

BUILD_META = "from setuptools import build_meta; print(build_meta.build_{kind}({folder!r}))"


def test_sdist_holds_every_source(tree: Path, tmp_path: Path) -> None:
    code = BUILD_META.format(kind="sdist", folder=str(tmp_path))
    done = run([sys.executable, "-c", code], tree)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    sources = {
        str(file.relative_to(tree))
        for folder in ("csrc", "cmake", "orthoreg_ext")
        for file in (tree / folder).rglob("*")
        if file.is_file()
    }
    assert sorted((sources | set(SOURCES)) - held) == []


def test_fallback_wheel_needs_no_compiler(
    tree: Path, tmp_path: Path, bare_python: tuple[str, dict[str, str]]
) -> None:
    python, environment = bare_python
    (tree / "orthoreg_ext" / "_C.abi3.so").write_text("left over from an editable install")
    code = BUILD_META.format(kind="wheel", folder=str(tmp_path))
    done = run([python, "-c", code], tree, environment | {"ORTHOREG_EXT_NO_BUILD": "1"})
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("*.whl")
    assert path.name.endswith("-py3-none-any.whl")
    names = zipfile.ZipFile(path).namelist()
    assert "orthoreg_ext/py.typed" in names
    assert not [name for name in names if name.endswith(".so")]
