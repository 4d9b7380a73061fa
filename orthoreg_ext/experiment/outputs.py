"""The files of a finished run."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ..pruning import checkpoint
from ..report import report_html
from .files import write_atomic
from .record import Run, summary

OUTPUTS = ("weights.safetensors", "model.pt2", "history.json", "report.html")
TOLERANCE = 1e-5  # largest difference of an output, relative to the largest output


def write_outputs(
    run: Run,
    network: nn.Module,
    images: Tensor,  # [n, channels, height, width]: network inputs to export and check with
    matrices: Mapping[str, Tensor],
    out: Path,
) -> None:
    """Writes ``OUTPUTS``: of the first seed's regularised network, pruned, and of the whole run.

    ``weights.safetensors`` and ``history.json`` are a checkpoint for
    :func:`orthoreg_ext.pruning.replay`; ``history.json`` holds the run, too, under ``"run"``.

    Args:
        run: The finished run; its ``export`` is filled in.
        network: The network whose weights are written.
        images: Network inputs of several images.
        matrices: What :func:`orthoreg_ext.report.report_html` draws.
        out: The folder.

    Raises:
        RuntimeError: The exported program does not do what the network does.
        OSError: A file cannot be written.
    """
    run.export = export_program(network, images, out / "model.pt2")
    arm = next(arm for arm in run.arms if arm.regularised)
    document = {**arm.checkpoint, **summary(run), "run": run.to_json()}
    write_atomic(out / "report.html", report_html(run, matrices).encode())
    checkpoint.save(network, document, out, overwrite=True)  # last: its history says "finished"


def exported(model: nn.Module, images: Tensor) -> torch.export.ExportedProgram:
    """Returns the network, put in eval mode, as a program for batches of any size.

    Args:
        model: The network.
        images: Network inputs, ``[n >= 2, channels, height, width]``.

    Raises:
        RuntimeError: Something in the network cannot be exported.
    """
    batch = torch.export.Dim("batch", min=1)
    return torch.export.export(model.eval(), (images,), dynamic_shapes=({0: batch},), strict=False)


def export_program(
    model: nn.Module,
    images: Tensor,  # [n >= 2, channels, height, width]: network inputs to export and check with
    path: Path,
) -> dict[str, float]:
    """Writes the network in eval mode with torch.export, for batches of any size, and checks it.

    It is loaded again, and its outputs compared with the network's, on all images and on one,
    before it is written.

    Returns:
        ``max_difference``, relative to the largest output, and the ``tolerance``.

    Raises:
        RuntimeError: The network cannot be exported, or the loaded program differs.
        OSError: The file cannot be written.
    """
    buffer = io.BytesIO()
    torch.export.save(exported(model, images), buffer)
    worst = max_difference(torch.export.load(io.BytesIO(buffer.getvalue())), model, images)
    write_atomic(path, buffer.getvalue())
    return {"max_difference": worst, "tolerance": TOLERANCE}


def max_difference(
    program: torch.export.ExportedProgram,
    model: nn.Module,
    images: Tensor,  # [n >= 2, channels, height, width]
) -> float:
    """Returns by how much a program's outputs differ from the network's, of the largest one.

    Raises:
        RuntimeError: They differ by more than ``TOLERANCE``.
    """
    loaded, worst = program.module(), 0.0
    with torch.no_grad():
        for inputs in (images, images[:1]):
            expected = model(inputs)
            difference = (loaded(inputs) - expected).abs().max()
            worst = max(worst, float(difference / expected.abs().max().clamp(min=1e-30)))
    if not worst <= TOLERANCE:
        raise RuntimeError(
            f"the exported program differs from the network by {worst:.2e} of its largest output, "
            f"at most {TOLERANCE:g} is accepted: its forward must be the same every time, in eval "
            "mode without random numbers"
        )
    return worst
