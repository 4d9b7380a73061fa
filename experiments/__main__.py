"""The command ``python -m experiments``."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
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
    begin = time.monotonic()
    try:
        if options.jobs < 1:
            raise ValueError(f"--jobs is {options.jobs}, expected a number of at least 1")
        if options.minutes is not None and not options.minutes >= 0:
            raise ValueError(f"--minutes is {options.minutes}, expected a number of at least 0")
        for config in [load(name) for name in options.names]:
            left = None  # of the minutes of the whole call
            if options.minutes is not None:
                left = options.minutes - (time.monotonic() - begin) / 60
            path = run(config, place, jobs=options.jobs, minutes=left)
            print(f"written: {path}", flush=True)
    except (ValueError, OSError, ImportError) as error:
        text = error.strerror if isinstance(error, OSError) and not error.filename else None
        print(f"error: {text or error}", file=sys.stderr)
        return 1
    except BrokenProcessPool:
        print(
            "error: a process was killed from outside, perhaps for its memory; what is done stays: "
            "run the same command again, with a smaller --jobs",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
