"""The command ``python -m experiments``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.config import CONFIGS, load
from experiments.runner import RESULTS, Place, run


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one experiment, some, or all."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments",
        description="Runs experiments; after a stop the same call does what is left.",
        epilog="experiments: " + " ".join(sorted(path.stem for path in CONFIGS.glob("*.toml"))),
    )
    parser.add_argument("names", nargs="+", metavar="NAME", help="an experiment, or a .toml file")
    parser.add_argument("--data", type=Path, default=Path("data"), help="the folder of the images")
    parser.add_argument("--work", type=Path, default=Path("build/experiments"), help="for states")
    parser.add_argument("--results", type=Path, default=RESULTS, help="for the results")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--minutes", type=float, help="begin nothing new after so many")
    options = parser.parse_args(argv)
    place = Place(options.data, options.work, options.results)
    try:
        for config in [load(name) for name in options.names]:
            path = run(config, place, jobs=options.jobs, minutes=options.minutes)
            print(f"written: {path}", flush=True)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
