"""What the commands share: their options, and how they print and write."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch

if TYPE_CHECKING:
    from ..experiment.named import Request

BAD_INPUT = 2
FAILED = 1
INTERRUPTED = 130

MODEL = "vgg, resnet, torchvision:NAME, timm:NAME, pkg.module:factory"
DATA = "digits, DIR/class/*.png (or DIR/train, DIR/test), file.npz"
STDOUT = "-"

Commands = argparse._SubParsersAction


class Parser(argparse.ArgumentParser):
    """Reports a wrong command line as one line."""

    def error(self, message: str) -> NoReturn:
        """Exits with 2."""
        self.exit(BAD_INPUT, f"{self.prog}: error: {message}; see {self.prog} --help\n")


def formatter(prog: str) -> argparse.HelpFormatter:
    """Help texts with room for the longest options, and line breaks in the epilog."""
    return _Help(prog, max_help_position=30)


class _Help(argparse.HelpFormatter):
    def _fill_text(self, text: str, width: int, indent: str) -> str:
        parts = text.split("\n\n")
        return "\n\n".join(
            part if "\n" in part else super(_Help, self)._fill_text(part, width, indent)
            for part in parts
        )


def add_model(parser: argparse.ArgumentParser) -> None:
    """MODEL, as every command takes it."""
    parser.add_argument(
        "model", metavar="MODEL", help=f"{MODEL}, or the folder of a finished orthoreg prune"
    )


def add_input(parser: argparse.ArgumentParser, *, data: bool = True) -> None:
    """What the model reads: options that fill a Request."""
    group = parser.add_argument_group("what MODEL reads (by default what it is made for)")
    if data:
        group.add_argument("--data", metavar="DATA", help=DATA)
    group.add_argument(
        "--num-classes", type=int, metavar="N", help="length of its output (that of the data)"
    )
    group.add_argument(
        "--input-shape",
        type=_shape,
        metavar="C,H,W",
        help="channels, height and width of one input" + (", without --data" if data else ""),
    )
    group.add_argument(
        "--image-size",
        type=int,
        metavar="N",
        help="resize images to N x N" if data else "the same for N x N",
    )
    group.add_argument(
        "--channels",
        type=int,
        choices=(1, 3),
        help="bring images to grey (1) or colour (3)" if data else "the same for its channels",
    )


def request(options: argparse.Namespace, model: str, weights: Path | None) -> Request:
    """A model with what :func:`add_input` says about its input."""
    from ..experiment.named import Request

    return Request(
        model,
        options.data,
        weights,
        options.num_classes,
        options.input_shape,
        options.image_size,
        options.channels,
    )


def add_weights(parser: argparse.ArgumentParser) -> None:
    """--weights of a file or of the folder of a pruned model."""
    parser.add_argument(
        "--weights",
        type=Path,
        metavar="PATH",
        help="state dict of the model (.safetensors, .pt), or the folder of a pruned one",
    )


def _shape(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.replace("x", ",").split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no shape; expected e.g. 3,224,224"
        ) from error


def add_device(parser: argparse.ArgumentParser) -> None:
    """--device."""
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="(%(default)s)"
    )


def add_threads(parser: argparse.ArgumentParser) -> None:
    """--threads."""
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (torch's default)")


def add_json(parser: argparse.ArgumentParser) -> None:
    """--json [FILE]."""
    parser.add_argument(
        "--json",
        nargs="?",
        const=STDOUT,
        type=_json_file,
        metavar="FILE",
        help="the result as JSON: on stdout instead of the table, or in FILE beside it",
    )


def _json_file(text: str) -> str:
    if ":" in text or text in ("vgg", "resnet") or Path(text).is_dir():
        raise argparse.ArgumentTypeError(
            f"{text!r} is no file; write --json last, or --json=- for stdout"
        )
    return text


def set_threads(options: argparse.Namespace) -> None:
    """Does what --threads says."""
    if options.threads is not None:
        if options.threads < 1:
            raise ValueError(f"--threads is {options.threads}; expected a positive number")
        torch.set_num_threads(options.threads)


def device_and_threads(options: argparse.Namespace) -> str:
    """Sets the number of threads; returns the device."""
    set_threads(options)
    if options.device != "auto":
        return str(options.device)
    return "cuda" if torch.cuda.is_available() else "cpu"


def check_folders(options: argparse.Namespace, *names: str) -> None:
    """Checks, before the work, that the folders of the files to write are there."""
    for name in names:
        path = getattr(options, name)
        if path and path != STDOUT and not Path(path).parent.is_dir():
            folder = str(Path(path).parent)
            raise ValueError(f"--{name}: there is no folder {folder!r}; make it first")
        if path and path != STDOUT and not os.access(Path(path).parent, os.W_OK):
            raise ValueError(f"--{name}: {str(path)!r} cannot be written; choose another folder")


def give(options: argparse.Namespace, document: object, text: str) -> None:
    """Prints the text, or the document as JSON where --json stands alone; writes it to its FILE."""
    if options.json == STDOUT:
        print(dumped(document))
        return
    print(text)
    if options.json:
        write_text(Path(options.json), dumped(document) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a file that is there whole or not at all; a pipe or device as it is."""
    from ..experiment.files import write_atomic

    if path.exists() and not path.is_file():
        path.write_text(text)
    else:
        write_atomic(path, text.encode(), "make room or choose another file")


def dumped(document: object) -> str:
    """Strict JSON."""
    return json.dumps(_plain(document), indent=1, allow_nan=False)


def _plain(value: Any) -> Any:
    """JSON has neither NaN nor infinity: they become null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(entry) for entry in value]
    return value


def progress_to_stderr(done: int, total: int) -> None:
    """Shows that something goes on, without a word on stdout."""
    print(f"{done} of {total} measurements", file=sys.stderr)
