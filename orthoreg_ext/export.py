"""``orthoreg export``: a network as files that run without its source, checked before they are."""

from __future__ import annotations

import importlib
import io
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import choose
from .experiment.files import write_atomic
from .experiment.named import Request, Subject, load
from .experiment.outputs import exported
from .machine import describe
from .timing import measure, watch

FORMATS = ("pt2", "onnx", "both")
FILES = {"pt2": "model.pt2", "onnx": "model.onnx"}
TOLERANCES = {"pt2": 1e-5, "onnx": 1e-4}
"""Largest difference of an output that is accepted, relative to the largest output.

onnxruntime fuses BatchNorm into convolutions and sums in another order, which in a network of fifty
layers costs a digit or two of float32's seven.
"""

BATCHES = (1, 2, 7)  # of random inputs
IMAGES = 64  # of the data, held out
REMEDY = "make room or choose another --out; no file is half-written"

Runner = Callable[[Tensor], Tensor]


def export(
    request: Request,
    out: Path,
    *,
    format: str = "both",
    overwrite: bool = False,
    batch: int = 1,
    seconds: float = 6.0,
) -> dict[str, Any]:
    """Writes a network for torch.export and ONNX, compares them with it, and times all of them.

    Every file is read back from memory and run before it is written: on random inputs of several
    batch sizes, and on held-out images where there are data. The batch size stays free in both.

    Args:
        request: The network; of a folder of ``orthoreg prune`` its pruned one.
        out: The folder for the files.
        format: ``"pt2"``, ``"onnx"`` or ``"both"``.
        overwrite: Replace files of the same names.
        batch: Images of a call that is timed.
        seconds: For all timing; 0 leaves it out.

    Returns:
        What was written, its differences, and medians of milliseconds.

    Raises:
        ValueError: The network cannot be built, or an argument cannot be used.
        ImportError: onnx, onnxscript or onnxruntime is missing; nothing was written.
        RuntimeError: The network cannot be exported, or a file differs from it; it is not written.
        OSError: A file cannot be written; none is half-written.
    """
    choose("--format", format, FORMATS)
    wanted = [name for name in FILES if format in (name, "both")]
    if batch < 1:
        raise ValueError(f"--batch is {batch}; expected a number of at least 1")
    if not 0 <= seconds < float("inf"):
        raise ValueError(f"--seconds is {seconds}; expected 0 or a positive number")
    _check_out(out, [FILES[name] for name in wanted], overwrite)
    if "onnx" in wanted:
        check_onnx()
    subject = load(request, runs=True)
    model = subject.model.eval()
    inputs = {f"{n} random": subject.example(n, seed=n) for n in BATCHES}
    if subject.dataset is not None:
        images, _ = subject.dataset.test.batch(slice(0, IMAGES))
        inputs[f"{len(images)} of the data"] = images
    with torch.no_grad():
        expected = {what: model(x) for what, x in inputs.items()}
    for what, y in expected.items():
        if not y.isfinite().all():
            raise RuntimeError(
                f"the network itself returns NaN or inf on {what} inputs; mend its weights first"
            )

    program = _quietly(lambda: exported(model, subject.example(2)), "torch.export")
    made = {name: _MAKERS[name](program) for name in wanted}
    checks = {name: _check(name, run, inputs, expected) for name, (_, run) in made.items()}
    _create(out)
    for name, (content, _) in made.items():
        write_atomic(out / FILES[name], content, REMEDY)
    return {
        "model": subject.name,
        "folder": str(subject.folder or "") or None,
        "out": str(out),
        "input": ["batch", *(subject.shape or ())],
        "machine": describe("cpu"),
        "files": {
            name: {"path": str(out / FILES[name]), "bytes": len(content), **checks[name]}
            for name, (content, _) in made.items()
        },
        "latency": _latency(subject, made, batch, seconds) if seconds else None,
        "no_data": subject.no_data,
    }


def check_onnx() -> None:
    """Checks that the packages are there that ONNX takes.

    Raises:
        ImportError: One is missing.
    """
    from importlib.util import find_spec

    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
    if missing:
        raise ImportError(
            f"{' and '.join(missing)} is not installed, which --format onnx takes: pip install "
            "orthoreg_ext[export]; or choose --format pt2"
        )


def _check_out(out: Path, names: Sequence[str], overwrite: bool) -> None:
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {str(out)!r} is a file; choose a folder")
    parent = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    if not os.access(parent, os.W_OK):
        raise ValueError(f"--out {str(out)!r} cannot be written; choose a folder you may write")
    if parent != out:
        _create(out, keep=False)
    there = [name for name in names if (out / name).exists()]
    if there and not overwrite:
        raise ValueError(
            f"--out {str(out)!r} has a {there[0]} already; pass --overwrite to replace it, or "
            "choose another --out"
        )


def _create(out: Path, *, keep: bool = True) -> None:
    """Creates the folder, or tries whether that can be done."""
    missing = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        out.mkdir(parents=True, exist_ok=True)
        for folder in missing if not keep else ():
            folder.rmdir()
    except OSError as error:
        raise OSError(
            error.errno,
            f"--out {str(out)!r} cannot be created ({error.strerror}); choose a folder you may "
            "write",
        ) from error


def _make_pt2(program: torch.export.ExportedProgram) -> tuple[bytes, Runner]:
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    loaded = torch.export.load(io.BytesIO(buffer.getvalue())).module()
    return buffer.getvalue(), loaded


def _make_onnx(program: torch.export.ExportedProgram) -> tuple[bytes, Runner]:
    onnxruntime = importlib.import_module("onnxruntime")
    made: Any = _quietly(
        lambda: torch.onnx.export(
            program, (), dynamo=True, verbose=False, input_names=["input"], output_names=["output"]
        ),
        "ONNX",
    )
    if hasattr(made, "rename_axes"):  # of late; a symbol such as s77 tells nobody what it is
        made.rename_axes({made.model.graph.inputs[0].shape[0]: "batch"})
    try:
        content: bytes = made.model_proto.SerializeToString()
    except Exception as error:
        if type(error).__name__ != "EncodeError":
            raise
        raise RuntimeError(
            "the network is too large for one ONNX file (2 GiB); choose --format pt2"
        ) from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()  # as many as it is compared with
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])

    def run(x: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {"input": x.numpy()})[0])

    return content, run


_MAKERS = {"pt2": _make_pt2, "onnx": _make_onnx}


def _check(
    name: str, run: Runner, inputs: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> dict[str, Any]:
    """Compares a file with the network, both on the CPU."""
    worst, agree = 0.0, 0
    with torch.no_grad():
        for what, x in inputs.items():
            y, want = run(x), expected[what]
            if y.shape != want.shape:
                raise RuntimeError(
                    f"{FILES[name]} returns {list(y.shape)} for {what} inputs, the network "
                    f"{list(want.shape)}; it was not written"
                )
            difference = float((y - want).abs().max() / want.abs().max().clamp(min=1e-30))
            if not difference <= TOLERANCES[name]:
                raise RuntimeError(
                    f"{FILES[name]} differs from the network by {difference:.2e} of its largest "
                    f"output on {what} inputs, at most {TOLERANCES[name]:g} is accepted; it was "
                    "not written"
                )
            worst = max(worst, difference)
            agree += int((y.flatten(1).argmax(1) == want.flatten(1).argmax(1)).sum())
    total = sum(len(x) for x in inputs.values())
    return {
        "max_difference": worst,
        "tolerance": TOLERANCES[name],
        "same_class": agree,
        "inputs": total,
        "checked_on": list(inputs),
    }


def _latency(
    subject: Subject, made: Mapping[str, tuple[bytes, Runner]], batch: int, seconds: float
) -> dict[str, Any]:
    """Milliseconds of a call, turn by turn; ratios are of the first one's time."""
    x = subject.example(batch)
    runners: dict[str, Runner] = {}
    if subject.original is not None:
        runners["unpruned, PyTorch"] = subject.original.eval()
    runners["pruned, PyTorch" if runners else "PyTorch"] = subject.model
    for name, (_, run) in made.items():
        runners[FILES[name]] = run
    calls = {name: partial(run, x) for name, run in runners.items()}
    with torch.no_grad():
        timing = measure(calls, "cpu", seconds, load=watch("cpu"))
    first = next(iter(calls))
    rows = {
        name: {
            "ms": timing.spread(name, 1e3).as_dict(),
            "times_faster": timing.ratio(first, name).as_dict(),
        }
        for name in calls
    }
    return {"batch": batch, "base": first, **timing.about(), "rows": rows}


def table(result: Mapping[str, Any]) -> str:
    """The result of :func:`export` as text."""
    lines = [f"{result['model']}, input {' x '.join(map(str, result['input']))}"]
    if result["folder"]:
        lines[0] += f", pruned as in {result['folder']}"
    lines += [
        f"{row['path']}: {row['bytes'] / 1e6:.2f} MB, differs by {row['max_difference']:.1e} "
        f"of the largest output (at most {row['tolerance']:g}), the same class on "
        f"{row['same_class']} of {row['inputs']} inputs ({', '.join(row['checked_on'])})"
        for row in result["files"].values()
    ]
    if result["no_data"]:
        lines.append(f"checked on random inputs alone: {result['no_data']}")
    if latency := result["latency"]:
        note = {
            "contended": "; THE MACHINE WAS BUSY: do not trust these",
            "unwatched": "",
            "quiet": f", {latency['rejected']} disturbed ones left out",
        }[latency["state"]]
        machine = result["machine"]
        lines += [
            "",
            f"latency, batch {latency['batch']}, {machine['name']}, {machine['threads']} threads: "
            f"medians of {latency['rounds']} rounds{note}",
        ]
        width = max(map(len, latency["rows"]))
        for name, row in latency["rows"].items():
            ms, faster = row["ms"], row["times_faster"]
            line = (
                f"  {name:{width}}  {ms['median']:9.3f} ms  ({ms['low']:.3f} to {ms['high']:.3f})"
            )
            if name != latency["base"]:
                line += f"  {faster['median']:6.2f} x as fast"
            lines.append(line)
    return "\n".join(lines)


def _quietly(work: Callable[[], Any], what: str) -> Any:
    """Does the work without what torch prints and logs meanwhile; its failure is one line."""
    with silence():
        try:
            return work()
        except (torch.OutOfMemoryError, KeyboardInterrupt, MemoryError):
            raise
        except Exception as error:
            cause: BaseException = error
            while what == "ONNX" and cause.__cause__ is not None:  # the outer ones tell of steps
                cause = cause.__cause__
            reason = str(cause).strip().partition("\n")[0] or type(cause).__name__
            raise RuntimeError(
                f"the network cannot be exported by {what} ({reason}); {_REMEDIES[what]}; nothing "
                "was written"
            ) from error


_REMEDIES = {
    "torch.export": "it must be one that torch.export traces: its forward makes no choices that "
    "depend on the inputs",
    "ONNX": "replace that operation in the network, or choose --format pt2",
}


@contextmanager
def silence() -> Iterator[None]:
    """Keeps what torch and others print, log and warn of from the user."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            redirect_stdout(io.StringIO()),
            redirect_stderr(io.StringIO()),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
