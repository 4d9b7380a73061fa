"""The command ``orthoreg``."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence

import torch

from ..build_info import VERSION
from . import analyze, bench, completion, export, info, prune, replay, sensitivity
from .info import info_lines
from .options import BAD_INPUT, FAILED, INTERRUPTED, Parser, formatter

__all__ = ["BAD_INPUT", "FAILED", "INTERRUPTED", "info_lines", "main"]

COMMANDS = (info, analyze, sensitivity, prune, replay, export, bench, completion)
_REPORTED = (ValueError, ImportError, ArithmeticError, OSError, RuntimeError, MemoryError)
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)  # not the caller's mistake
_EPILOG = """\
exit codes:
  0    done
  1    the work failed: training diverged, disk or memory full, an export that is wrong
  2    bad input: an option, a model, data or a file that cannot be used; nothing was changed
  130  Ctrl-C
Errors are one line on stderr; results alone are on stdout.

orthoreg COMMAND --help tells more."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: The arguments; None takes those of the process.

    Returns:
        0, or 1 where the work failed (training diverged, disk or memory full, an export that is
        wrong), 2 for bad input, 130 after Ctrl-C. Errors are one line on stderr.
    """
    options = _parser().parse_args(argv)
    try:
        options.work(options)
        sys.stdout.flush()
    except KeyboardInterrupt:
        hint = getattr(options, "interrupted", "")
        print(f"\northoreg {options.command}: interrupted{hint}", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # what reads the output, such as head, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except _REPORTED as error:
        line = " ".join(_text(error, options.lack).split())
        print(f"orthoreg {options.command}: error: {line}", file=sys.stderr)
        failed = isinstance(error, (ArithmeticError, RuntimeError, MemoryError)) or (
            isinstance(error, OSError) and error.errno in _DISK
        )
        return FAILED if failed else BAD_INPUT
    return 0


def _text(error: Exception, lack: str) -> str:
    """What an error says, without the number that OSError puts in front."""
    on_host = isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error)
    if on_host or isinstance(error, torch.OutOfMemoryError):
        whose = "the memory" if on_host else "the GPU's memory"
        return f"{whose} {lack or 'does not suffice'}"
    if not isinstance(error, OSError) or not error.strerror:
        return str(error) or type(error).__name__
    return error.strerror + (f": {error.filename!r}" if error.filename else "")


def _parser() -> Parser:
    parser = Parser(
        prog="orthoreg",
        description="Orthonormality regularisation and filter pruning of PyTorch models.",
        epilog=_EPILOG,
        formatter_class=formatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"orthoreg_ext {VERSION}")
    commands = parser.add_subparsers(
        dest="command", metavar="COMMAND", required=True, parser_class=Parser
    )
    for command in COMMANDS:
        command.add(commands)
    return parser
