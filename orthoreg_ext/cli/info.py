"""``orthoreg info``."""

from __future__ import annotations

import argparse
from typing import Any

from ..build_info import build_info
from .options import Commands, add_json, check_folders, formatter, give


def add(commands: Commands[Any]) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "info",
        help="what is compiled, what runs and why something does not",
        description="Says what is compiled, what runs and why something does not.",
        formatter_class=formatter,
        allow_abbrev=False,
    )
    add_json(parser)
    parser.set_defaults(work=_info, lack="")


def _info(options: argparse.Namespace) -> None:
    check_folders(options, "json")
    info = build_info()
    give(options, info, "\n".join(info_lines(info)))


def info_lines(info: dict[str, Any]) -> list[str]:
    """Returns what ``orthoreg info`` prints of :func:`orthoreg_ext.build_info`."""
    cpu, cuda, built_for = info["cpu"], info["cuda"], info["torch"]
    compiled = "yes" if info["compiled"]["loaded"] else f"no: {info['compiled']['reason']}"
    host = "yes" if info["host"]["loaded"] else f"no: {info['host']['reason']}"
    gpu = ", ".join(cuda["devices"]) if cuda["usable"] else f"not used: {cuda['reason']}"
    if cuda["compiled"]:
        built = f"toolkit {cuda['toolkit']}, architectures {' '.join(cuda['architectures'])}"
    else:
        built = "no"
    runs = cpu["runs"] or f"nothing: {cpu['reason']}"
    why_not = f" ({info['backend_reason']})" if info["backend_reason"] else ""
    levels = f" (built: {', '.join(cpu['levels'])})" if cpu["levels"] else ""
    return [
        f"orthoreg_ext        {info['version']}",
        f"python              {info['python']}",
        f"torch               {built_for['version']}, CUDA {built_for['cuda'] or 'none'}",
        f"compiled operators  {compiled}",
        f"host module         {host}",
        f"compiler            {info['compiler'] or 'none'}",
        f"CPU runs            {runs}{levels}",
        f"CUDA kernels        {built}",
        f"GPU                 {gpu}",
        f"backend             {info['backend']}{why_not}",
    ]
