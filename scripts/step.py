"""Runs one step of a longer job: announces it, shows its progress, says how long it took.

    python scripts/step.py "compile" --quiet -- pip install .

With --quiet the output goes to build/logs/ and only progress lines are shown; if the step fails,
all of it is printed.
"""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

LOGS = Path(__file__).resolve().parent.parent / "build" / "logs"
PROGRESS = re.compile(r"^\[\d+/\d+\] |^-- orthoreg_ext: |^Successfully installed ")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("title")
    parser.add_argument("--quiet", action="store_true", help="show progress lines only")
    at = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    own, command = sys.argv[1:at], sys.argv[at + 1 :]
    arguments = parser.parse_args(own)
    if not command:
        parser.error("no command after --")

    print(f"==> {arguments.title}", flush=True)
    start = time.monotonic()
    if arguments.quiet:
        LOGS.mkdir(parents=True, exist_ok=True)
        log = LOGS / (re.sub(r"\W+", "-", arguments.title.lower()).strip("-") + ".log")
        code = run_quietly(command, log)
    else:
        code = subprocess.run(command).returncode
    elapsed = time.monotonic() - start
    if code:
        print(
            f"==> {arguments.title}: FAILED ({code}) after {elapsed:.1f} s: {shlex.join(command)}"
        )
        return code if code > 0 else 1
    print(f"==> {arguments.title}: done in {elapsed:.1f} s", flush=True)
    return 0


def run_quietly(command: list[str], log: Path) -> int:
    with (
        log.open("w") as file,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        ) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            file.write(line)
            if PROGRESS.search(line.strip()):
                print("   ", line.strip()[:160], flush=True)
    if process.returncode:
        print(log.read_text(), flush=True)
        print(f"(the output above is kept in {log})", flush=True)
    return process.returncode


if __name__ == "__main__":
    sys.exit(main())
