"""``orthoreg replay``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .options import (
    MODEL,
    Commands,
    add_input,
    add_json,
    add_threads,
    check_folders,
    formatter,
    give,
    request,
    set_threads,
)


def add(commands: Commands[Any]) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "replay",
        help="rebuild a pruned model from its folder and check that it does what it did",
        description="Builds the unpruned model, repeats the recorded cuts on it and loads its "
        "weights; then compares its accuracy with the recorded one and its outputs with the "
        "model.pt2 beside it, and prints the widths. In Python: orthoreg_ext.pruning.replay.",
        formatter_class=formatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "folder", type=Path, metavar="FOLDER", help="of orthoreg prune, or of PruneResult.save"
    )
    parser.add_argument(
        "--model", metavar="MODEL", help=f"{MODEL}; needless for a folder of orthoreg prune"
    )
    add_threads(parser)
    add_json(parser)
    add_input(parser)
    parser.set_defaults(work=_replay, lack="does not suffice for the model")


def _replay(options: argparse.Namespace) -> None:
    from ..experiment.replayed import replayed

    check_folders(options, "json")
    set_threads(options)
    model, weights = str(options.folder), None
    if options.model:
        model, weights = options.model, options.folder
    result = replayed(options.folder, request(options, model, weights))
    give(options, result.to_json(), result.table())
