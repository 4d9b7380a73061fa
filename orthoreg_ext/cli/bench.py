"""``orthoreg bench``."""

from __future__ import annotations

import argparse
from typing import Any

from .options import (
    Commands,
    add_device,
    add_input,
    add_json,
    add_model,
    add_threads,
    check_folders,
    device_and_threads,
    formatter,
    give,
)


def add(commands: Commands[Any]) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "bench",
        help="what regulariser and scores cost on the layers of your model, beside plain PyTorch",
        description="Times reg.attach(optimizer), loss + reg() and five filter scores on the "
        "layers of a model, and the same in plain PyTorch, in turns; rounds that other processes "
        "disturbed are left out.",
        formatter_class=formatter,
        allow_abbrev=False,
    )
    add_model(parser)
    parser.add_argument(
        "--penalty", default="orthoreg", metavar="NAME", help="the penalty (%(default)s)"
    )
    parser.add_argument(
        "--seconds", type=float, default=20.0, metavar="X", help="for all timing (%(default)s)"
    )
    add_device(parser)
    add_threads(parser)
    add_json(parser)
    add_input(parser, data=False)
    parser.set_defaults(
        work=_bench, lack="does not suffice for MODEL and its gradients; name a smaller one"
    )


def _bench(options: argparse.Namespace) -> None:
    from ..bench import bench, table

    check_folders(options, "json")
    device = device_and_threads(options)
    names = ("penalty", "seconds", "num_classes", "input_shape", "image_size", "channels")
    given = {name: getattr(options, name) for name in names}
    result = bench(options.model, device=device, **given)
    give(options, result, table(result))
