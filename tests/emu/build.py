"""Build CUDA sources for the CPU: nvcc makes host object and PTX, ptx2cpp.py makes C++ of the PTX.

``python -m tests.emu.build [--sanitize address|thread]`` builds the project's own csrc/ and prints
the path of the library. Every object lies in a cache (`cache_folder`) under the hash of all that
went into it, so an unchanged file is compiled once; processes may build at the same time.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import functools
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

from tests.emu.ptx2cpp import translate

Sanitizer = Literal["address", "thread"]

ROOT = Path(__file__).resolve().parents[2]
EMU = Path(__file__).resolve().parent
JOBS = 2
PROJECT_DEFINES = ("ORTHOREG_NAMESPACE=orthoreg_emu", "ORTHOREG_CUDA_KEY=CPU")
TORCH_TARGET = "TORCH_TARGET_VERSION=0x020a000000000000ULL"  # as in CMakeLists.txt: torch 2.10
KEEP_DAYS = 14


class NvccMissingError(RuntimeError):
    """There is no nvcc, without which the emulator cannot read CUDA sources."""


def cache_folder() -> Path:
    """ORTHOREG_EMU_CACHE, or .cache/emu below the repository."""
    folder = Path(os.environ.get("ORTHOREG_EMU_CACHE") or ROOT / ".cache" / "emu")
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / ".gitignore").exists():
        (folder / ".gitignore").write_text("*\n")
    return folder


@functools.cache
def find_nvcc() -> str:
    """The nvcc of CUDACXX, of CUDA_HOME or CUDA_PATH, or on the PATH.

    Raises:
        NvccMissingError: none is there.
    """
    places = [os.environ.get("CUDACXX", "")]
    places += [f"{os.environ[v]}/bin/nvcc" for v in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(v)]
    for place in (*places, "nvcc", "/usr/local/cuda/bin/nvcc"):
        if place and (found := shutil.which(place)):
            return found
    raise NvccMissingError(
        "the CUDA emulator needs nvcc (the CUDA toolkit's compiler; no GPU, no driver): install it "
        "and put it on the PATH or set CUDA_HOME; it was sought in CUDACXX, CUDA_HOME, CUDA_PATH, "
        "the PATH and /usr/local/cuda/bin"
    )


def why_not() -> str:
    """Why the emulator cannot be built here; empty where it can."""
    try:
        find_nvcc()
    except NvccMissingError as missing:
        return str(missing)
    if os.uname().machine != "x86_64":
        return f"the CUDA emulator's context switch is x86-64 only, this is {os.uname().machine}"
    return "" if shutil.which("g++") else "the CUDA emulator needs g++"


def _tool(*command: str) -> subprocess.CompletedProcess[str]:
    """Runs a compiler, without the sanitizer that this process itself may run under."""
    environment = {key: value for key, value in os.environ.items() if key != "LD_PRELOAD"}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


@functools.cache
def _toolkit() -> tuple[str, str]:
    """The include folder of the toolkit, as nvcc finds it, and its version."""
    dry = _tool(find_nvcc(), "--dryrun", "-x", "cu", "-c", "/dev/null")
    found = re.search(r'INCLUDES="-I([^"]+)"', dry.stderr)
    if not found:
        raise RuntimeError(f"{find_nvcc()} --dryrun names no include folder:\n{dry.stderr[-2000:]}")
    return os.path.normpath(found[1]), _tool(find_nvcc(), "--version").stdout


@functools.cache
def _gxx_version() -> str:
    return _tool("g++", "--version").stdout


@functools.cache
def _fma() -> tuple[str, ...]:
    """Without the instruction std::fma is a slow call; the value is the same."""
    cpuinfo = Path("/proc/cpuinfo")
    return (
        ("-mfma",)
        if cpuinfo.exists() and re.search(r"^flags.* fma ", cpuinfo.read_text(), re.M)
        else ()
    )


def _torch() -> tuple[Path, str]:
    import torch

    return Path(torch.__file__).parent, torch.__version__


def _run(command: Sequence[str | Path]) -> None:
    words = [str(w) for w in command]
    done = _tool(*words)
    if done.returncode:
        output = (done.stdout + done.stderr)[-8000:]
        raise RuntimeError(
            f"{words[0]} failed with exit status {done.returncode}:\n{shlex.join(words)}\n{output}"
        )


def _closure(source: Path, seen: dict[Path, bytes]) -> dict[Path, bytes]:
    """A source and all that it includes in quotes, with the contents."""
    source = source.resolve()
    if source not in seen:
        seen[source] = source.read_bytes()
        for name in re.findall(rb'^\s*#\s*include\s+"([^"]+)"', seen[source], re.M):
            if (header := source.parent / os.fsdecode(name)).exists():
                _closure(header, seen)
    return seen


def _key(*parts: object, sources: Sequence[Path] = ()) -> str:
    digest = hashlib.sha256(repr(parts).encode())
    for source in sources:
        for path, content in sorted(_closure(source, {}).items()):
            digest.update(f"{path}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()[:32]


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(path, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _cached(key: str, suffix: str, make: Callable[[Path, Path], None]) -> Path:
    """The cached file of this key; `make(target, scratch folder)` writes it if there is none."""
    target = cache_folder() / f"{key}{suffix}"
    with _locked(cache_folder() / f"{key}.lock"):
        if target.exists():
            os.utime(target)
        else:
            with tempfile.TemporaryDirectory(dir=cache_folder(), prefix="build-") as folder:
                made = Path(folder) / f"made{suffix}"
                make(made, Path(folder))
                os.replace(made, target)
    return target


def _compile(source: Path, flags: Sequence[str], versions: object) -> Path:
    """A C++ file -> an object."""
    command = ["g++", *flags, "-c", str(source)]
    key = _key(command, _gxx_version(), versions, sources=[source])
    return _cached(key, ".o", lambda made, _: _run([*command, "-o", made]))


def _host_object_and_ptx(source: Path, flags: Sequence[str], versions: object) -> tuple[Path, Path]:
    """A CUDA file -> its host object and the PTX of its kernels, from one run of nvcc."""
    command = [find_nvcc(), *flags, "-c", str(source)]
    key = _key(command, _toolkit(), versions, sources=[source])

    def make(made: Path, folder: Path) -> None:
        _run([*command, "--keep", f"--keep-dir={folder}", "-o", made])
        ptx = list(folder.glob("*.ptx"))
        if len(ptx) != 1:
            raise RuntimeError(
                f"nvcc left {[p.name for p in ptx]} of {source}, one .ptx was expected"
            )
        os.replace(ptx[0], cache_folder() / f"{key}.ptx")

    host_object, ptx = _cached(key, ".o", make), cache_folder() / f"{key}.ptx"
    os.utime(ptx)
    return host_object, ptx


def _translated(source: Path, ptx: Path) -> Path:
    translator = [
        EMU / f"{name}.py" for name in ("ptx2cpp", "ptx_parse", "ptx_ops", "ptx_statements")
    ]
    key = _key(ptx.name, [p.read_bytes() for p in translator])

    def write(made: Path, _: Path) -> None:
        made.write_text(translate(ptx.read_text(), root=ROOT, toolkit=_toolkit()[0]))

    return _cached(key, f"-{source.stem}.cpp", write)


def _forget_old(folder: Path) -> None:
    limit = time.time() - KEEP_DAYS * 86400
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):
            if path.is_file() and path.name != ".gitignore" and path.stat().st_mtime < limit:
                path.unlink()


def build(
    sources: Sequence[Path],
    out: Path | None = None,
    *,
    extra: Sequence[Path] = (),
    sanitize: Sanitizer | None = None,
    defines: Sequence[str] = (),
    arch: int = 90,
) -> Path:
    """Build one shared library whose kernels run on the CPU.

    Args:
        sources: .cu files; each may use torch's stable ABI.
        out: where the library is wanted; without it, the path in the cache is given back.
        extra: C++ files to compile and link beside them.
        sanitize: build for a process that runs under this sanitizer (sanitize.py); by default
            what ORTHOREG_EMU_SANITIZE says, which sanitize.py sets.
        defines: ``NAME`` or ``NAME=value``, for `sources` and `extra`.
        arch: the compute capability whose code path is taken (``__CUDA_ARCH__ == 10 * arch``).

    Returns:
        The path of the library.

    Raises:
        NvccMissingError: there is no nvcc.
        RuntimeError: a compiler failed; the text holds its command and its errors.
        TranslationError: the kernels use something that the emulator does not know.
    """
    sanitize = sanitize or os.environ.get("ORTHOREG_EMU_SANITIZE") or None  # type: ignore[assignment]
    if sanitize not in (None, "address", "thread"):
        raise ValueError(f"sanitize is {sanitize!r}; expected None, 'address' or 'thread'")
    torch, torch_version = _torch()
    toolkit, _ = _toolkit()
    find = [
        "-isystem",
        str(torch / "include"),
        "-isystem",
        str(torch / "include/torch/csrc/api/include"),
    ]
    macros = [f"-D{d}" for d in (TORCH_TARGET, *defines)]
    nvcc = [
        "-std=c++17",
        f"-gencode=arch=compute_{arch},code=compute_{arch}",
        "-lineinfo",
        "-cudart=none",
    ]
    nvcc += ["--expt-relaxed-constexpr", "-Xcompiler=-fPIC,-O1,-fvisibility=hidden", *find, *macros]
    gxx = ["-std=c++20", "-g1", "-fPIC", "-fvisibility=hidden", "-isystem", toolkit]
    checks = [f"-fsanitize={sanitize}", "-fno-omit-frame-pointer", "-O0"] if sanitize else ["-O2"]
    if sanitize == "address":  # registers are variables on the stack: minutes a file to guard them
        checks.append("--param=asan-stack=0")
    # Unused registers and labels are the rule in translated code; contraction would change values.
    device = [
        *gxx,
        *checks,
        *_fma(),
        "-ffp-contract=off",
        "-fno-strict-aliasing",
        "-w",
        f"-I{EMU}",
        f"-DEMU_ARCH={arch}",
    ]
    host = [*gxx, "-O1", *find, *macros]

    def kernels(source: Path) -> list[Path]:
        host_object, ptx = _host_object_and_ptx(source, nvcc, torch_version)
        headers = _key(sources=sorted(EMU.glob("*.h")))
        return [host_object, _compile(_translated(source, ptx), device, headers)]

    with ThreadPoolExecutor(JOBS) as pool:
        work = [pool.submit(kernels, Path(s).resolve()) for s in sources]
        work += [
            pool.submit(lambda p: [_compile(p, host, torch_version)], Path(p).resolve())
            for p in extra
        ]
        work += [
            pool.submit(lambda p: [_compile(p, device, "")], EMU / f"{n}.cpp")
            for n in ("engine", "report", "cudart")
        ]
        objects = [o for w in work for o in w.result()]

    # Own definitions first: torch with CUDA puts the real runtime into the global scope.
    link = ["g++", "-shared", "-Wl,-Bsymbolic", "-Wl,--no-undefined", "-Wl,--as-needed"]
    link += [f"-fsanitize={sanitize}"] if sanitize else []
    link += [
        *map(str, objects),
        f"-L{torch / 'lib'}",
        f"-Wl,-rpath,{torch / 'lib'}",
        "-ltorch",
        "-ltorch_cpu",
        "-lc10",
        "-lpthread",
    ]
    library = _cached(_key(link), ".so", lambda made, _: _run([*link, "-o", made]))
    _forget_old(cache_folder())
    if out is None:
        return library
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        copy = shutil.copy2(library, Path(folder) / "copy.so")
        os.replace(copy, out)
    return out


def build_project(out: Path | None = None, *, sanitize: Sanitizer | None = None) -> Path:
    """Build csrc/: its kernels become ``torch.ops.orthoreg_emu.*`` on CPU tensors."""
    cuda = ROOT / "csrc" / "cuda"
    sources, extra = sorted(cuda.glob("*.cu")), sorted(cuda.glob("*.cpp"))
    if not sources:
        raise RuntimeError(f"there is no .cu file in {cuda.relative_to(ROOT)}")
    return build(
        sources,
        out,
        extra=[ROOT / "csrc" / "library.cpp", ROOT / "csrc" / "common" / "prepared.cpp", *extra],
        sanitize=sanitize,
        defines=PROJECT_DEFINES,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; see the module's text."""
    parser = argparse.ArgumentParser(prog="python -m tests.emu.build", description=__doc__)
    parser.add_argument("--sanitize", choices=("address", "thread"))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(argv)
    start = time.monotonic()
    print(build_project(options.out, sanitize=options.sanitize))
    print(f"{time.monotonic() - start:.1f} s", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
