"""Run Python under AddressSanitizer or ThreadSanitizer with the emulated kernels built for it.

``python -m tests.emu.sanitize thread tests/test_gram.py -k small`` runs that pytest selection and
fails on a failed test and on any report. The sanitizer's runtime is preloaded, since Python itself
is not built with it, and `build` makes libraries for it (ORTHOREG_EMU_SANITIZE).
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.emu.build import EMU, ROOT, Sanitizer

REPORT = re.compile(r"(?:WARNING|ERROR|FATAL): (?:Address|Thread)Sanitizer|runtime error:")


def _runtime(sanitize: Sanitizer) -> str:
    # AddressSanitizer looks for the C++ runtime's throw when it starts, so that comes along.
    names = {"address": ("libasan.so", "libstdc++.so.6"), "thread": ("libtsan.so",)}[sanitize]
    paths = []
    for name in names:
        found = subprocess.run(
            ["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True
        )
        if not os.path.isabs(found.stdout.strip()):
            raise RuntimeError(
                f"g++ has no {name}; install your compiler's sanitizer runtimes (libasan, libtsan)"
            )
        paths.append(os.path.realpath(found.stdout.strip()))
    return " ".join(paths)


def _prefix(sanitize: Sanitizer) -> list[str]:
    """ThreadSanitizer of older compilers does not start under much address randomisation."""
    command = ["setarch", os.uname().machine, "-R"]
    if sanitize == "thread":
        try:
            if subprocess.run([*command, "true"], capture_output=True, check=False).returncode == 0:
                return command
        except FileNotFoundError:
            pass
    return []


def run_python(sanitize: Sanitizer, arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run ``python *arguments`` under a sanitizer.

    Returns:
        The finished process. Its stderr ends with the sanitizer's reports, and its returncode is
        not zero if there is one.
    """
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "report"
        environment = os.environ | {
            "LD_PRELOAD": _runtime(sanitize),
            "ORTHOREG_EMU_SANITIZE": sanitize,
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
            "MKL_NUM_THREADS": "1",
            "ASAN_OPTIONS": f"detect_leaks=0:log_path={log}",
            "TSAN_OPTIONS": f"log_path={log}:suppressions={EMU / 'tsan.supp'}",
            "PYTHONPATH": os.pathsep.join(
                filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")])
            ),
        }
        done = subprocess.run(
            [*_prefix(sanitize), sys.executable, *arguments],
            env=environment, cwd=ROOT, capture_output=True, text=True, check=False,
        )  # fmt: skip
        reports = "".join(p.read_text(errors="replace") for p in sorted(Path(folder).iterdir()))
    done.stderr += reports
    if REPORT.search(done.stderr) and done.returncode == 0:
        done.returncode = 1
    return done


def run(sanitize: Sanitizer, pytest_arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run a pytest selection under a sanitizer, up to the first failure: `run_python` of pytest."""
    return run_python(sanitize, ["-m", "pytest", "-p", "no:cacheprovider", "-x", *pytest_arguments])


def main(argv: Sequence[str]) -> int:
    """The command line; see the module's text."""
    if not argv or argv[0] not in ("address", "thread"):
        print(
            "usage: python -m tests.emu.sanitize address|thread [pytest arguments]", file=sys.stderr
        )
        return 2
    done = run("address" if argv[0] == "address" else "thread", argv[1:])
    print(done.stdout, end="")
    print(done.stderr, end="", file=sys.stderr)
    return done.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
