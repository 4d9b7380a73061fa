"""``orthoreg sensitivity``."""

from __future__ import annotations

import argparse
from typing import Any

from .options import (
    DATA,
    Commands,
    add_device,
    add_json,
    add_model,
    add_threads,
    add_weights,
    check_folders,
    formatter,
    give,
    progress_to_stderr,
    set_threads,
)


def add(commands: Commands[Any]) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "sensitivity",
        help="the accuracy or loss of a model when one coupled group of its layers alone is cut",
        description="Cuts each coupled group of layers alone, at several ratios, and measures the "
        "model on the held-out part of the data. The model is as its factory returns it, or as "
        "--weights says.",
        formatter_class=formatter,
        allow_abbrev=False,
    )
    add_model(parser)
    parser.add_argument("--data", default="digits", metavar="DATA", help=f"{DATA} (%(default)s)")
    parser.add_argument("--image-size", type=int, metavar="N", help="resize images to N x N")
    parser.add_argument(
        "--channels", type=int, choices=(1, 3), help="bring images to grey (1) or colour (3)"
    )
    parser.add_argument(
        "--num-classes", type=int, metavar="N", help="length of its output (that of the data)"
    )
    add_weights(parser)
    parser.add_argument("--criterion", default="fisher", metavar="NAME", help="(%(default)s)")
    parser.add_argument(
        "--metric", choices=("accuracy", "loss"), default="accuracy", help="(%(default)s)"
    )
    parser.add_argument(
        "--ratios",
        default="0.25,0.5,0.75",
        metavar="X,X",
        help="shares of each group (%(default)s)",
    )
    parser.add_argument(
        "--samples",
        type=int,
        default=2048,
        metavar="N",
        help="training images for the criterion's gradients (%(default)s)",
    )
    add_device(parser)
    add_threads(parser)
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    add_json(parser)
    parser.set_defaults(
        work=_sensitivity,
        lack="does not suffice for MODEL and its gradients; name a smaller one",
    )


def _sensitivity(options: argparse.Namespace) -> None:
    from ..experiment.sensitivity import table

    check_folders(options, "json")
    set_threads(options)
    names = "image_size channels num_classes weights criterion metric ratios samples device"
    given = {name: getattr(options, name) for name in names.split()}
    progress = None if options.quiet else progress_to_stderr
    result = table(options.model, options.data, **given, progress=progress)
    give(options, result.as_dict(), str(result))
