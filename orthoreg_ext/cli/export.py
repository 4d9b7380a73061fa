"""``orthoreg export``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .options import (
    Commands,
    add_input,
    add_json,
    add_model,
    add_threads,
    add_weights,
    check_folders,
    formatter,
    give,
    request,
    set_threads,
)


def add(commands: Commands[Any]) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "export",
        help="write a model as torch.export and ONNX files, checked and timed",
        description="Writes model.pt2 (torch.export) and model.onnx of a model in eval mode, for "
        "batches of any size. Each is run and compared with the model before it is written, on "
        "random inputs and on held-out images of the data; then model and files are timed in "
        "turns, of a pruned model beside the unpruned one.",
        formatter_class=formatter,
        allow_abbrev=False,
    )
    add_model(parser)
    add_weights(parser)
    parser.add_argument(
        "--format", choices=("pt2", "onnx", "both"), default="both", help="(%(default)s)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("orthoreg-export"),
        metavar="FOLDER",
        help="for the files (%(default)s)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace files in --out")
    parser.add_argument(
        "--batch", type=int, default=1, metavar="N", help="images of a timed call (%(default)s)"
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=6.0,
        metavar="X",
        help="for all timing, 0 for none (%(default)s)",
    )
    add_threads(parser)
    add_json(parser)
    add_input(parser)
    parser.set_defaults(work=_export, lack="does not suffice for MODEL; name a smaller one")


def _export(options: argparse.Namespace) -> None:
    from ..export import export, table

    check_folders(options, "json")
    set_threads(options)
    result = export(
        request(options, options.model, options.weights),
        options.out,
        format=options.format,
        overwrite=options.overwrite,
        batch=options.batch,
        seconds=options.seconds,
    )
    give(options, result, table(result))
