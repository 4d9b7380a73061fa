"""The command ``orthoreg``."""

from __future__ import annotations

import argparse
import errno
import functools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn, TextIO

import torch

from .build_info import build_info

BAD_INPUT = 2
FAILED = 1
INTERRUPTED = 130
PLOTS = (".svg", ".png", ".pdf")
_REPORTED = (ValueError, ImportError, ArithmeticError, OSError, RuntimeError, MemoryError)


class _Parser(argparse.ArgumentParser):
    """Reports a wrong command line as one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(BAD_INPUT, f"{self.prog}: error: {message}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: The arguments; None takes those of the process.

    Returns:
        0, or 1 where the work failed (training diverged, disk or memory full, an export that is
        wrong), 2 for bad input, 130 after Ctrl-C. Errors are one line on stderr.
    """
    options = _parser().parse_args(argv)
    commands = {"info": _info, "prune": _prune, "bench": _bench}
    work = {**commands, "analyze": _analyze, "sensitivity": _sensitivity}[options.command]
    try:
        return work(options)
    except KeyboardInterrupt:
        hint = "; the same command with --resume continues" if options.command == "prune" else ""
        print(f"\northoreg {options.command}: interrupted{hint}", file=sys.stderr)
        return INTERRUPTED
    except _REPORTED as error:
        line = " ".join(_text(error, options.command).split())
        print(f"orthoreg {options.command}: error: {line}", file=sys.stderr)
        failed = isinstance(error, (ArithmeticError, RuntimeError, MemoryError)) or (
            isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EIO, errno.EDQUOT)
        )
        return FAILED if failed else BAD_INPUT


def _text(error: Exception, command: str) -> str:
    """What an error says, without the number that OSError puts in front."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        whose = "the GPU's memory" if isinstance(error, RuntimeError) else "the memory"
        if command in ("bench", "sensitivity"):
            return f"{whose} does not suffice for MODEL and its gradients; name a smaller one"
        if command == "analyze":
            return f"{whose} does not suffice for MODEL; take fewer --samples or a smaller one"
        return (
            f"{whose} does not suffice; what was stored is intact: make room and continue with "
            "--resume, or start again with a smaller --batch-size and another --out"
        )
    if not isinstance(error, OSError) or not error.strerror:
        return str(error) or type(error).__name__
    return error.strerror + (f": {error.filename!r}" if error.filename else "")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="orthoreg", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_Parser)

    info = commands.add_parser(
        "info", help="what is compiled, what runs and why something does not"
    )
    info.add_argument("--json", action="store_true", help="print it as JSON")

    prune = commands.add_parser(
        "prune",
        help="train a network with OrthoReg, prune and fine-tune it, beside an unregularised twin",
        description="Trains, prunes and fine-tunes a network with OrthoReg and an unregularised "
        "twin pruned by L1; writes report.html, model.pt2, history.json and weights.safetensors.",
        formatter_class=functools.partial(argparse.HelpFormatter, max_help_position=30),
        allow_abbrev=False,
    )
    # no defaults here: a setting that is not given is the default's, or a stored run's
    settings = prune.add_argument_group("settings (kept in the run; the defaults are a demo)")
    for name, kind, text in (
        ("model", str, "vgg (default), resnet, or pkg.module:factory"),
        ("data", str, "digits (default), DIR/class/*.png (or DIR/train, DIR/test), file.npz"),
        ("ratio", float, "share of the filters to remove (0.75)"),
        ("rounds", int, "cuts in which they go, each followed by fine-tuning (1)"),
        ("criterion", str, "scores the regularised network's filters (fisher)"),
        ("penalty", str, "the regulariser's penalty (orthoreg)"),
        ("strength", float, "its strength (depends on the penalty)"),
        ("seed", int, "the first seed (0)"),
        ("seeds", int, "number of seeds; tables show medians (3)"),
        ("epochs", int, "training epochs"),
        ("finetune-epochs", int, "epochs after the cut, shared among the rounds"),
        ("batch-size", int, "images a step (64)"),
        ("lr", float, "learning rate of the training (0.1)"),
        ("finetune-lr", float, "learning rate of the fine-tuning (0.05)"),
        ("max-layer-ratio", float, "no cut takes a larger share of a layer (0.9)"),
        ("image-size", int, "resize images to this side"),
        ("device", str, "auto (default), cpu or cuda"),
        ("threads", int, "CPU threads (1)"),
    ):
        metavar = {str: "NAME", int: "N", float: "X"}[kind]
        settings.add_argument(f"--{name}", type=kind, metavar=metavar, help=text)
    prune.set_defaults(settings=[action.dest for action in settings._group_actions])
    prune.add_argument(
        "--out", type=Path, default=Path("orthoreg-run"), help="results folder (%(default)s)"
    )
    prune.add_argument("--resume", action="store_true", help="continue the run in --out")
    prune.add_argument("--quiet", action="store_true", help="show no progress")
    prune.add_argument("--json", action="store_true", help="print the result as JSON on stdout")

    bench = commands.add_parser(
        "bench",
        help="what regulariser and scores cost on the layers of your model, beside plain PyTorch",
        description="Times reg.attach(optimizer), loss + reg() and five filter scores on the "
        "layers of a model, and the same in plain PyTorch, in turns; rounds that other processes "
        "disturbed are left out.",
        allow_abbrev=False,
    )
    _add_model(bench)
    bench.add_argument(
        "--penalty", default="orthoreg", metavar="NAME", help="the penalty (%(default)s)"
    )
    bench.add_argument(
        "--seconds", type=float, default=20.0, metavar="X", help="for all timing (%(default)s)"
    )
    _add_device(bench)
    _add_threads(bench)
    bench.add_argument("--json", type=Path, metavar="FILE", help="write the result there, too")

    analyze = commands.add_parser(
        "analyze",
        help="how orthogonal, redundant and trainable the filters of your model are",
        description="Prints for every layer the degree of orthogonality, |cosines|, condition "
        "number and dead filters; with --data also the additivity gap of importances and the "
        "singular values of the Jacobian. docs/diagnostics.md says what they mean.",
        allow_abbrev=False,
    )
    _add_model(analyze)
    analyze.add_argument(
        "--data", metavar="NAME", help="digits, DIR/class/*.png or file.npz; its training images"
    )
    analyze.add_argument(
        "--weights", type=Path, metavar="FILE", help="state dict of the model (.safetensors, .pt)"
    )
    analyze.add_argument(
        "--samples", type=int, default=1024, metavar="N", help="images used (%(default)s)"
    )
    analyze.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of parameters and images (%(default)s)"
    )
    _add_device(analyze)
    _add_threads(analyze)
    analyze.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there, too")
    analyze.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw them there (.svg, .png, .pdf)"
    )
    _add_sensitivity(commands)
    return parser


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="vgg, resnet, or pkg.module:factory")


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="(%(default)s)"
    )


def _add_threads(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (torch's default)")


def _add_sensitivity(commands: argparse._SubParsersAction[_Parser]) -> None:
    parser = commands.add_parser(
        "sensitivity",
        help="the accuracy or loss of a model when one coupled group of its layers alone is cut",
        description="Cuts each coupled group of layers alone, at several ratios, and measures the "
        "model on the held-out part of the data. The model is as its factory returns it, or as "
        "--weights says.",
        allow_abbrev=False,
    )
    _add_model(parser)
    parser.add_argument(
        "--data", default="digits", metavar="DATA", help="digits, a folder or an .npz (%(default)s)"
    )
    parser.add_argument("--image-size", type=int, metavar="N", help="resize images to N x N")
    parser.add_argument(
        "--weights",
        type=Path,
        metavar="PATH",
        help="state dict of the model (.safetensors, .pt), or the folder of a pruned one",
    )
    parser.add_argument("--criterion", default="fisher", metavar="NAME", help="(%(default)s)")
    parser.add_argument(
        "--metric", choices=("accuracy", "loss"), default="accuracy", help="(%(default)s)"
    )
    parser.add_argument(
        "--ratios",
        default="0.25,0.5,0.75",
        metavar="X,X",
        help="shares of each group (%(default)s)",
    )
    parser.add_argument(
        "--samples",
        type=int,
        default=2048,
        metavar="N",
        help="training images for the criterion's gradients (%(default)s)",
    )
    _add_device(parser)
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there, too")


def _info(options: argparse.Namespace) -> int:
    info = build_info()
    if options.json:
        print(json.dumps(info, indent=1))
    else:
        print("\n".join(info_lines(info)))
    return 0


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


def _prune(options: argparse.Namespace) -> int:
    from .experiment import run
    from .experiment.progress import check_terminal, print_result, showing
    from .experiment.record import summary

    given = {
        name: getattr(options, name)
        for name in options.settings
        if getattr(options, name) is not None
    }
    progress: TextIO = sys.stderr if options.json else sys.stdout
    screen = functools.partial(showing, stream=progress, quiet=options.quiet)
    shown = ([] if options.quiet else [progress]) + ([] if options.json else [sys.stdout])
    check_terminal(*shown)
    result = run(given, options.out, resume=options.resume, screen=screen)
    if options.json:
        print(json.dumps({"out": str(options.out), **summary(result)}, indent=1))
    else:
        print_result(result, sys.stdout)
        print(f"report: {options.out / 'report.html'}")
    return 0


def _bench(options: argparse.Namespace) -> int:
    from .bench import bench, table

    _check_folders(options, "json")
    device = _device_and_threads(options)
    result = bench(options.model, penalty=options.penalty, device=device, seconds=options.seconds)
    print(table(result))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def _sensitivity(options: argparse.Namespace) -> int:
    from .experiment.sensitivity import table

    _check_folders(options, "json")

    def show(done: int, total: int) -> None:
        print(f"{done} of {total} measurements", file=sys.stderr)

    names = ("image_size", "weights", "criterion", "metric", "ratios", "samples", "device")
    given = {name: getattr(options, name) for name in names}
    result = table(options.model, options.data, **given, progress=None if options.quiet else show)
    print(result)
    if options.json:
        options.json.write_text(json.dumps(result.as_dict(), indent=1) + "\n")
    return 0


def _analyze(options: argparse.Namespace) -> int:
    from .analyze import analyze
    from .experiment.extras import require

    _check_folders(options, "json", "plot")
    if options.plot and options.plot.suffix not in PLOTS:
        raise ValueError(f"--plot is {str(options.plot)!r}; expected a file *{', *'.join(PLOTS)}")
    if options.plot:
        require("matplotlib.figure")
    result = analyze(
        options.model,
        data=options.data,
        weights=options.weights,
        samples=options.samples,
        seed=options.seed,
        device=_device_and_threads(options),
    )
    print(result)
    if options.json:
        options.json.write_text(json.dumps(result.to_json(), indent=1, allow_nan=False) + "\n")
    if options.plot:
        result.plot(options.plot)
    return 0


def _device_and_threads(options: argparse.Namespace) -> str:
    """Sets the number of threads; returns the device."""
    if options.threads is not None:
        if options.threads < 1:
            raise ValueError(f"--threads is {options.threads}; expected a positive number")
        torch.set_num_threads(options.threads)
    if options.device != "auto":
        return str(options.device)
    return "cuda" if torch.cuda.is_available() else "cpu"


def _check_folders(options: argparse.Namespace, *names: str) -> None:
    for name in names:
        path = getattr(options, name)
        if path and not path.parent.is_dir():
            raise ValueError(f"--{name}: there is no folder {str(path.parent)!r}; make it first")


if __name__ == "__main__":
    sys.exit(main())
