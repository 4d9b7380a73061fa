"""What a timing belongs to: the hardware by its product name, and the versions. No host name."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path
from typing import Any

import torch

from .build_info import build_info


def describe(device: str) -> dict[str, Any]:
    """The machine, for tables and JSON.

    Args:
        device: ``"cpu"``, ``"cuda"`` or ``"emulated"`` (CUDA kernels on the CPU: no time counts).
    """
    info = build_info()
    runs = info["cpu"]["runs"] or "reference"
    emulated = device == "emulated"
    if device == "cuda":
        name = torch.cuda.get_device_name()
        slug = slug_of(name)
    else:
        name = f"{processor()}, {os.cpu_count()} cores, {'emulated GPU' if emulated else runs}"
        slug = slug_of(name)
    return {
        "name": name,
        "slug": slug,
        "device": device,
        "emulated": emulated,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "runs": runs,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "orthoreg_ext": info["version"],
    }


def slug_of(name: str) -> str:
    """A folder name of a product name, without trademarks and clock rates."""
    name = re.sub(r"\((?:r|tm)\)|@.*?hz|\b(?:cpu|processor)\b|\d+-core", " ", name.lower())
    return "-".join(re.findall(r"[a-z0-9]+", name)) or "unknown"


def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The product name of the processor."""
    try:
        text = cpuinfo.read_text()
    except OSError:
        text = ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1].strip() if found else platform.processor() or platform.machine()
