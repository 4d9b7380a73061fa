"""``python -m tests.emu.bugs LIBRARY``: run one and print its error; see sanitize.py."""

import sys
from pathlib import Path

from tests.emu.bugs import run

print(f"error {run(Path(sys.argv[1])):.3g}")
