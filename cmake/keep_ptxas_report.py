"""Runs nvcc and keeps what ptxas -v said beside the object, for scripts/compile_gate.py.

    python cmake/keep_ptxas_report.py nvcc ... -o OBJECT ...

CMake calls it as the compiler launcher of the CUDA files; OBJECT.ptxas.txt is as new as OBJECT.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

REPORT = re.compile(r"ptxas info  *:|    \d+ bytes stack frame,")


def main(command: list[str]) -> int:
    """Runs the command; returns its exit status."""
    report = Path(command[command.index("-o") + 1] + ".ptxas.txt")
    report.unlink(missing_ok=True)
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    for line in done.stdout.splitlines():
        if not REPORT.match(line):
            print(line)
    if done.returncode == 0:
        report.write_text(done.stdout)
    return done.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
