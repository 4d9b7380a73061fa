"""Draws docs/report.png from the report.html of a `make demo`: three screens of a phone.

python scripts/report_picture.py [build/demo/report.html] [docs/report.png]

Needs Chromium and Pillow.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

from browser import Browser, chromium
from PIL import Image

SCREENS = (("main", False), ("#correlation", True), ("#scores", False))
WIDTH, HEIGHT, GAP = 360, 720, 12


def main(page: Path, target: Path) -> None:
    """Puts the screens side by side, in few colours so that the file stays small."""
    path = chromium()
    if path is None:
        raise SystemExit("no Chromium is installed")
    size = (len(SCREENS) * (WIDTH + GAP) - GAP, HEIGHT)
    whole = Image.new("RGB", size, "#8b949e")
    with Browser(path) as browser:
        for place, (section, dark) in enumerate(SCREENS):
            browser.open(page, WIDTH, HEIGHT, dark)
            browser.evaluate(f"document.querySelector({section!r}).scrollIntoView()")
            screen = Image.open(io.BytesIO(browser.picture()))
            whole.paste(screen, (place * (WIDTH + GAP), 0))
    target.parent.mkdir(exist_ok=True)
    whole.quantize(64).save(target, optimize=True)


if __name__ == "__main__":
    arguments = [Path(a) for a in sys.argv[1:]]
    main(*(arguments + [Path("build/demo/report.html"), Path("docs/report.png")][len(arguments) :]))
