"""What a run shows while it works: rich's live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

from .extras import require
from .record import Arm, Cut, Epoch, Run, short, table, verdicts

Show = Callable[[str, bool], None]
"""Called after every step with its line, and whether the line should stay on the screen."""


def check_terminal(*streams: TextIO) -> None:
    """Checks that rich is there if any of the streams, on which something is shown, is a terminal.

    Raises:
        ImportError: It is not installed; the text names the extra that brings it.
    """
    if any(stream.isatty() for stream in streams):
        for module in ("rich.console", "rich.progress", "rich.table"):
            require(module)


@contextmanager
def showing(total: int, done: int, stream: TextIO, *, quiet: bool) -> Iterator[Show]:
    """Yields the function that shows a step; ``done`` of ``total`` steps are behind already."""
    if quiet:
        yield lambda line, keep: None
    elif not stream.isatty():
        yield lambda line, keep: print(line, file=stream, flush=True)
    else:
        rich, bars = require("rich.console"), require("rich.progress")
        columns = (
            bars.BarColumn(bar_width=20),
            bars.MofNCompleteColumn(),
            bars.TimeRemainingColumn(),
            bars.TextColumn("{task.description}", markup=False),
        )
        with bars.Progress(*columns, console=rich.Console(file=stream), transient=True) as progress:
            task = progress.add_task("starting", total=total, completed=done)

            def show(line: str, keep: bool) -> None:
                progress.update(task, advance=1, description=line)
                if keep:
                    progress.console.print(line, markup=False, highlight=False)

            yield show


def epoch_line(arm: Arm, epoch: Epoch, epochs: int) -> str:
    """Returns an epoch as one line."""
    stage = f"{epoch.stage} {epoch.epoch}/{epochs}"
    return (
        f"seed {arm.seed}  {arm.name:<11}  {stage:<10}  loss {epoch.loss:.4f}  "
        f"penalty {epoch.penalty:.4f}  accuracy {epoch.accuracy:6.2f} %  "
        f"mean |corr| {epoch.correlation:.4f}"
    )


def cut_line(arm: Arm, cut: Cut) -> str:
    """Returns a cut as one line."""
    return (
        f"seed {arm.seed}  {arm.name:<11}  cut by {arm.criterion}: "
        f"{cut.before.filters} -> {cut.after.filters} filters, "
        f"{short(cut.before.macs)} -> {short(cut.after.macs)} MACs  "
        f"accuracy {cut.accuracy_before:.2f} -> {cut.accuracy_after:.2f} %"
    )


def print_result(run: Run, stream: TextIO) -> None:
    """Prints the final table and what it says about the claims."""
    rows = table(run)
    heads = ("", "regularised", "twin")
    title = f"{run.settings.model} on {run.settings.data}, " + (
        f"medians over seeds {', '.join(map(str, run.settings.seeds_used()))}"
        if run.settings.seeds > 1
        else f"seed {run.settings.seed}"
    )
    if stream.isatty():
        rich = require("rich.table")
        shown = rich.Table(title=title, title_justify="left")
        for head in heads:
            shown.add_column(head, justify="left" if not head else "right")
        for row in rows:
            shown.add_row(*row)
        require("rich.console").Console(file=stream).print(shown)
    else:
        widths = [max(len(row[i]) for row in (heads, *rows)) for i in range(3)]
        print(f"\n{title}", file=stream)
        for label, own, twin in (heads, *rows):
            line = f"{label:<{widths[0]}}  {own:>{widths[1]}}  {twin:>{widths[2]}}"
            print(line.rstrip(), file=stream)
    for verdict in verdicts(run):
        print(f"[{'yes' if verdict.holds else 'NO '}] {verdict.text}", file=stream)
