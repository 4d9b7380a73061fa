"""``orthoreg analyze``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .options import (
    Commands,
    add_device,
    add_input,
    add_json,
    add_model,
    add_threads,
    add_weights,
    check_folders,
    device_and_threads,
    formatter,
    give,
)

PLOTS = (".svg", ".png", ".pdf")


def add(commands: Commands[Any]) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "analyze",
        help="how orthogonal, redundant and trainable the filters of your model are",
        description="Prints for every layer the degree of orthogonality, |cosines|, condition "
        "number and dead filters; with --data also the additivity gap of importances and the "
        "singular values of the Jacobian. docs/diagnostics.md says what they mean.",
        formatter_class=formatter,
        allow_abbrev=False,
    )
    add_model(parser)
    add_weights(parser)
    parser.add_argument(
        "--samples",
        type=int,
        default=1024,
        metavar="N",
        help="training images of --data used (%(default)s)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of parameters and images (%(default)s)"
    )
    add_device(parser)
    add_threads(parser)
    add_json(parser)
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw the numbers there (.svg, .png, .pdf)"
    )
    add_input(parser)
    parser.set_defaults(
        work=_analyze, lack="does not suffice for MODEL; take fewer --samples or a smaller one"
    )


def _analyze(options: argparse.Namespace) -> None:
    from ..analyze import analyze
    from ..experiment.extras import require

    check_folders(options, "json", "plot")
    if options.plot and options.plot.suffix not in PLOTS:
        raise ValueError(f"--plot is {str(options.plot)!r}; expected a file *{', *'.join(PLOTS)}")
    if options.plot:
        require("matplotlib.figure")
    names = "data weights samples seed num_classes input_shape image_size channels"
    given = {name: getattr(options, name) for name in names.split()}
    result = analyze(options.model, device=device_and_threads(options), **given)
    give(options, result.to_json(), str(result))
    if options.plot:
        result.plot(options.plot)
