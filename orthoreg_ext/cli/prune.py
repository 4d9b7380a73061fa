"""``orthoreg prune``."""

from __future__ import annotations

import argparse
import functools
import sys
from pathlib import Path
from typing import Any, TextIO

from .options import (
    DATA,
    MODEL,
    STDOUT,
    Commands,
    add_json,
    check_folders,
    dumped,
    formatter,
    give,
    write_text,
)

TARGETS = ("filters", "macs", "params", "latency", "memory")


def add(commands: Commands[Any]) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "prune",
        help="train a network with OrthoReg, prune and fine-tune it, beside an unregularised twin",
        description="Trains, prunes and fine-tunes a network with OrthoReg and an unregularised "
        "twin pruned by L1; writes report.html, model.pt2, history.json and weights.safetensors.",
        formatter_class=formatter,
        allow_abbrev=False,
    )
    # no defaults here: a setting that is not given is the default's, or a stored run's
    settings = parser.add_argument_group("settings (kept in the run; the defaults are a demo)")
    for name, kind, text in (
        ("model", str, f"{MODEL} (vgg)"),
        ("data", str, f"{DATA} (digits)"),
        ("weights", str, "state dict that all networks start from (.safetensors, .pt)"),
        ("ratio", float, "share of the filters to remove (0.75)"),
        ("target", _target, "instead of --ratio: macs=0.5, params=, latency= or memory="),
        ("round-to", int, "leave a multiple of it in every coupled group of layers (1)"),
        ("rounds", int, "cuts in which it goes, each followed by fine-tuning (1)"),
        ("criterion", str, "scores the regularised network's filters (fisher)"),
        ("penalty", str, "the regulariser's penalty (orthoreg)"),
        ("strength", float, "its strength (depends on the penalty)"),
        ("seed", int, "the first seed (0)"),
        ("seeds", int, "number of seeds; tables show medians (3)"),
        ("epochs", int, "training epochs (8)"),
        ("finetune-epochs", int, "epochs after the cut, shared among the rounds (9)"),
        ("batch-size", int, "images a step (64)"),
        ("lr", float, "learning rate of the training (0.1)"),
        ("finetune-lr", float, "learning rate of the fine-tuning (0.05)"),
        ("max-layer-ratio", float, "no cut takes a larger share of a layer (0.9)"),
        ("image-size", int, "resize images to this side"),
        ("channels", int, "bring images to grey (1) or colour (3)"),
        ("device", str, "auto (default), cpu or cuda"),
        ("threads", int, "CPU threads (1)"),
    ):
        metavar = {str: "NAME", int: "N", float: "X", _target: "WHAT=X"}[kind]
        metavar = {"model": "MODEL", "data": "DATA", "weights": "FILE"}.get(name, metavar)
        settings.add_argument(f"--{name}", type=kind, metavar=metavar, help=text)
    parser.set_defaults(settings=[action.dest for action in settings._group_actions])
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("orthoreg-run"),
        metavar="FOLDER",
        help="results folder (%(default)s)",
    )
    parser.add_argument("--resume", action="store_true", help="continue the run in --out")
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    add_json(parser)
    parser.set_defaults(
        work=_prune,
        interrupted="; the same command with --resume continues",
        lack="does not suffice; what was stored is intact: make room and continue with --resume, "
        "or start again with a smaller --batch-size and another --out",
    )


def _target(text: str) -> tuple[str, float]:
    name, equals, share = text.partition("=")
    try:
        if not equals or name not in TARGETS:
            raise ValueError
        return name, float(share)
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} is none; expected one of {', '.join(t + '=0.5' for t in TARGETS)}: the "
            "share to remove"
        ) from error


def _given(options: argparse.Namespace) -> dict[str, Any]:
    """The settings that the command line gives."""
    given = {name: getattr(options, name) for name in options.settings}
    given = {name: value for name, value in given.items() if value is not None}
    if "target" in given and "ratio" in given:
        raise ValueError("--ratio and --target say the same thing; give one of them")
    if "target" in given:
        given["target"], given["ratio"] = given["target"]
        if not 0 < given["ratio"] < 1:
            raise ValueError(
                f"--target is {given['target']}={given['ratio']}; expected a share between 0 and 1"
            )
    elif "ratio" in given:
        given["target"] = "filters"
    return given


def _prune(options: argparse.Namespace) -> None:
    from ..experiment import run
    from ..experiment.progress import check_terminal, print_result, showing
    from ..experiment.record import summary

    given = _given(options)
    check_folders(options, "json")
    alone = options.json == STDOUT
    progress: TextIO = sys.stderr if alone else sys.stdout
    screen = functools.partial(showing, stream=progress, quiet=options.quiet)
    shown = ([] if options.quiet else [progress]) + ([] if alone else [sys.stdout])
    check_terminal(*shown)
    result = run(given, options.out, resume=options.resume, screen=screen)
    document = {"out": str(options.out), **summary(result)}
    if alone:
        give(options, document, "")
        return
    print_result(result, sys.stdout)
    print(f"report: {options.out / 'report.html'}")
    if options.json:
        write_text(Path(options.json), dumped(document) + "\n")
