"""``orthoreg replay``: a pruned network from its folder, and whether it does what it did."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..pruning import PruneResult, count
from ..pruning.counts import widths
from ..pruning.result import LayerWidth
from .named import Request, Subject, load
from .outputs import TOLERANCE
from .train import accuracy

POINTS = 0.5
"""Of accuracy, by which another machine may differ; the same one gives the same number."""


@dataclass(frozen=True)
class Replayed:
    """A pruned network, rebuilt.

    Attributes:
        subject: The network with its weights, and the unpruned one.
        result: Its widths and sizes.
        accuracy: On the held-out images, in percent, where there are data.
        recorded: What the run recorded, where it was one on these data.
        program_difference: From ``model.pt2`` beside it, of the largest output.
    """

    subject: Subject
    result: PruneResult
    accuracy: float | None
    recorded: float | None
    program_difference: float | None

    def to_json(self) -> dict[str, Any]:
        """For JSON."""
        result = self.result
        return {
            "model": self.subject.name,
            "folder": str(self.subject.folder),
            "input": list(self.subject.shape or ()),
            "before": vars(result.before),
            "after": vars(result.after),
            "layers": [vars(row) for row in result.layers],
            "accuracy": self.accuracy,
            "recorded_accuracy": self.recorded,
            "program_difference": self.program_difference,
            "no_data": self.subject.no_data,
        }

    def table(self) -> str:
        """The widths, the sizes and what was checked."""
        lines = [self.result.table(), "", "cuts repeated, weights loaded, outputs finite"]
        if self.accuracy is not None:
            line = f"accuracy on the held-out images: {self.accuracy:.2f} %"
            lines.append(
                line + ("" if self.recorded is None else f" (recorded: {self.recorded:.2f} %)")
            )
        elif self.subject.no_data:
            lines.append(f"accuracy: not measured, {self.subject.no_data}")
        if self.program_difference is not None:
            lines.append(
                f"model.pt2 beside it: differs by {self.program_difference:.1e} of the largest "
                f"output (at most {TOLERANCE:g})"
            )
        return "\n".join(lines)


def replayed(folder: Path, request: Request) -> Replayed:
    """Rebuilds the pruned network of a folder and checks its outputs.

    Args:
        folder: Of a finished ``orthoreg prune``, or written by ``PruneResult.save``.
        request: Its model, where the folder does not name it; what the model reads; data.

    Raises:
        ValueError: The folder holds no pruned model, or not one of this model.
        RuntimeError: The network does not do what the run recorded, or what model.pt2 does.
    """
    if not folder.is_dir():
        raise ValueError(f"FOLDER {str(folder)!r} is no folder")
    subject = load(request, runs=True)
    assert subject.original is not None
    model = subject.model.eval()
    inputs = subject.example(4)
    with torch.no_grad():
        expected = model(inputs)
    if not expected.isfinite().all():
        raise RuntimeError(f"the network of {str(folder)!r} returns NaN or inf on random inputs")
    found, recorded = None, None
    if subject.dataset is not None:
        found = accuracy(model, subject.dataset.test)
        recorded = _recorded(subject)
        if recorded is not None and abs(found - recorded) > POINTS:
            raise RuntimeError(
                f"the network of {str(folder)!r} has an accuracy of {found:.2f} %, but its run "
                f"recorded {recorded:.2f} %; the data or the factory changed since"
            )
    difference = None
    if (folder / "model.pt2").is_file():
        y = _answer(folder / "model.pt2", inputs)
        difference = float((y - expected).abs().max() / expected.abs().max().clamp(min=1e-30))
        if not difference <= TOLERANCE:
            raise RuntimeError(
                f"model.pt2 in {str(folder)!r} differs from its weights by {difference:.2e} of the "
                f"largest output; at most {TOLERANCE:g} was expected: the files do not belong "
                "together"
            )
    return Replayed(subject, _result(subject), found, recorded, difference)


def _answer(path: Path, inputs: Tensor) -> Tensor:
    """What an exported program returns for ``inputs``, [batch, channels, height, width]."""
    from ..export import silence

    try:
        with silence(), torch.no_grad():
            y: Tensor = torch.export.load(path).module()(inputs)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # of zipfile, of JSON, of pickle, of the program itself
        raise ValueError(
            f"{str(path)!r} is damaged, or of another torch "
            f"({str(error).partition(chr(10))[0] or type(error).__name__}); remove it, the weights "
            "are whole, or write it again with orthoreg export"
        ) from error
    return y


def _recorded(subject: Subject) -> float | None:
    run: Mapping[str, Any] = subject.document.get("run", {})
    assert subject.dataset is not None
    if not run or run["data"]["checksum"] != subject.dataset.checksum:
        return None
    arm = next(arm for arm in run["arms"] if arm["regularised"])
    return float([e for e in arm["epochs"] if e["stage"] == "tune"][-1]["accuracy"])


def _result(subject: Subject) -> PruneResult:
    assert subject.original is not None
    example, document = subject.example(), subject.document
    before, after = widths(subject.original), widths(subject.model)
    return PruneResult(
        document["history"],
        count(subject.original, example),
        count(subject.model, example),
        [LayerWidth(name, width, after[name]) for name, width in before.items()],
        document.get("settings", {}),
        document["architecture"],
        subject.model,
    )
