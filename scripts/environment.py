"""Makes the virtual environment of the Makefile: torch pinned, then the build tools.

A Python that already has a torch with CUDA, on a machine with an NVIDIA GPU, lends its packages to
the environment; otherwise the pinned torch is installed, the CPU-only build where there is no GPU.
Whatever is installed later is bound to that torch by constraints.txt in the environment.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

# Asks an environment's Python what it has: "" when the package is not there.
TORCH = "import torch; print(torch.__version__, torch.version.cuda or 'cpu')"
TOOLS = {
    "setuptools": "setuptools>=77",
    "cmake": "cmake>=3.24",
    "ninja": "ninja",
    "pybind11": "pybind11>=2.13",
}
HAS_TOOL = """\
import sys
from importlib.metadata import PackageNotFoundError, version
try:
    found = tuple(int(x) for x in version(sys.argv[1]).split(".")[:2] if x.isdigit())
except PackageNotFoundError:
    sys.exit(1)
sys.exit(found < tuple(int(x) for x in sys.argv[2].split(".")))
"""


def has_gpu() -> bool:
    smi = shutil.which("nvidia-smi")
    return smi is not None and subprocess.run([smi, "-L"], capture_output=True).returncode == 0


def ask(python: str, code: str, *arguments: str) -> str:
    found = subprocess.run([python, "-c", code, *arguments], capture_output=True, text=True)
    return found.stdout.strip() if found.returncode == 0 else ""


def pip(python: str, *arguments: str, quiet: bool = False) -> bool:
    command = [python, "-m", "pip", "install", "--disable-pip-version-check", *arguments]
    found = subprocess.run(command, capture_output=quiet, text=True)
    return found.returncode == 0


def create(folder: Path, lend: bool) -> str:
    """Creates the environment, returns its Python; with `lend` it sees this one's packages."""
    command = [sys.executable, "-m", "venv", str(folder)]
    if lend:
        command.append("--system-site-packages")
    if subprocess.run(command).returncode:
        shutil.rmtree(folder, ignore_errors=True)
        raise SystemExit(
            f"{sys.executable} cannot make a virtual environment: on Debian and Ubuntu run "
            "apt-get install python3-venv"
        )
    python = str(folder / "bin" / "python")
    if lend and sys.prefix != sys.base_prefix:
        # This Python is itself a virtual environment, whose packages venv does not pass on.
        import site

        target = Path(ask(python, "import sysconfig; print(sysconfig.get_path('purelib'))"))
        lines = [f"import site; site.addsitedir({path!r})" for path in site.getsitepackages()]
        (target / "_lent.pth").write_text("\n".join(lines) + "\n")
    return python


def install_torch(python: str, version: str, gpu: bool) -> None:
    """Installs the pinned torch, CPU-only where pip finds that and no GPU needs more."""
    if not gpu and "+" not in version:
        print(f"    torch {version}, CPU-only", flush=True)
        if pip(python, f"torch=={version}+cpu", quiet=True):
            return
        print(
            f"    pip's configured indexes have no torch=={version}+cpu; taking torch=={version},\n"
            "    which on Linux brings CUDA libraries along (gigabytes)",
            flush=True,
        )
    if not pip(python, f"torch=={version}"):
        raise SystemExit(
            f"torch {version} cannot be installed for Python {sys.version.split()[0]} (the reason "
            "is above): choose another one with  make TORCH=<version>"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--torch", required=True, help="the version to pin")
    arguments = parser.parse_args()
    if sys.version_info < (3, 10):  # noqa: UP036  (whichever python3 the Makefile found)
        raise SystemExit(f"Python 3.10 or newer is needed, this is {sys.version.split()[0]}")
    gpu = has_gpu()
    lend = gpu and ask(sys.executable, TORCH).split(" ")[-1] not in ("", "cpu")
    python = create(arguments.folder, lend)
    if not lend:
        install_torch(python, arguments.torch, gpu)
    found = ask(python, TORCH)
    if not found:
        raise SystemExit(f"torch does not import in {arguments.folder}: {python} -c 'import torch'")
    version, cuda = found.split(" ")
    origin = "lent by " + sys.executable if lend else "installed"
    print(f"    torch {version} (CUDA: {cuda}), {origin}", flush=True)
    (arguments.folder / "constraints.txt").write_text(f"torch=={version}\n")
    for name, requirement in TOOLS.items():
        at_least = requirement.partition(">=")[2] or "0"
        if subprocess.run([python, "-c", HAS_TOOL, name, at_least]).returncode and not pip(
            python, requirement, quiet=True
        ):
            raise SystemExit(f"the build tool {requirement} cannot be installed by pip")


if __name__ == "__main__":
    main()
