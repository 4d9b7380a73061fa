"""The tables and figures of docs/evidence.md, made of the results.

python -m experiments.report            rewrites the blocks and docs/figures/evidence-*.svg
python -m experiments.report --check    says whether they are what it would write
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.report.page import Page, stale, write
from experiments.report.results import load
from experiments.runner import RESULTS

PAGE = Path(__file__).resolve().parents[2] / "docs" / "evidence.md"


def main(argv: Sequence[str] | None = None) -> int:
    """Writes or checks the page."""
    parser = argparse.ArgumentParser("python -m experiments.report", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--check", action="store_true", help="write nothing; 1 where they differ")
    parser.add_argument("--page", type=Path, default=PAGE, help="another page")
    parser.add_argument("--results", type=Path, default=RESULTS, help="another folder of results")
    options = parser.parse_args(argv)
    try:
        made = Page(options.page.read_text(), load(options.results))
        if not options.check:
            write(options.page, made)
        old = stale(options.page, made)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for name in old:
        print(f"{name}: not what python -m experiments.report makes of the results")
    return 1 if old else 0


if __name__ == "__main__":
    sys.exit(main())
