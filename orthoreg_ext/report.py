"""``report.html``: a run on one page that needs nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from html import escape
from importlib.resources import files
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from .experiment.record import Run


def report_html(
    run: Run,
    matrices: Mapping[str, Tensor],  # name: |cosines| of one layer's filters, [n, n]
) -> str:
    """Returns the report of a finished run: verdicts, tables, figures, configuration.

    One HTML page with its style and figures inside, for wide screens, phones and dark mode.

    Args:
        run: A finished run.
        matrices: Correlations to draw; see :func:`orthoreg_ext.experiment.figures.figures`.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from .experiment.figures import figures
    from .experiment.record import table, verdicts

    settings = run.settings
    style = files(__package__).joinpath("experiment/report.css").read_text()
    marks = "".join(
        f'<li class="{"yes" if v.holds else "no"}"><b>{"yes" if v.holds else "no"}</b> '
        f"{escape(v.text)}</li>"
        for v in verdicts(run)
    )
    drawn = "".join(
        f"<section><h2>{escape(title)}</h2><figure>{svg}<figcaption>{escape(text)}</figcaption>"
        "</figure></section>"
        for title, text, svg in figures(run, matrices)
    )
    data = run.data
    shape = " x ".join(map(str, data["image_shape"]))
    facts = {
        **{key.replace("_", " "): value for key, value in asdict(settings).items()},
        "images": f"{data['train']} to train on, {data['test']} held out, {shape}, "
        f"{len(data['classes'])} classes",
        "network input": f"(pixel / 255 - mean) / std, mean {_numbers(data['mean'])}, "
        f"std {_numbers(data['std'])}",
        "model.pt2": f"differs from the network by {run.export['max_difference']:.1e} of its "
        f"largest output (at most {run.export['tolerance']:g} is accepted)",
        **run.versions,
    }
    seeds = f"medians over seeds {', '.join(map(str, settings.seeds_used()))}"
    if settings.seeds == 1:
        seeds = f"those of seed {settings.seed}"
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>orthoreg prune: {escape(settings.model)} on {escape(settings.data)}</title>
<style>
{style}</style>
</head>
<body>
<main>
<h1>{escape(settings.model)} on {escape(settings.data)}, {settings.removed()} removed</h1>
<p>One network was trained with the <code>{escape(settings.penalty)}</code> penalty and cut by
<code>{escape(settings.criterion)}</code>; its twin, with the same parameters at the start and the
same batches, was trained without it and cut by <code>l1</code>. Both were fine-tuned alike,
without it. Numbers are {seeds}.</p>
<ul class="verdicts">{marks}</ul>
<section><h2>Result</h2>{_table(("", "regularised", "twin"), table(run))}
<p class="note">a -&gt; b: before the first cut -&gt; after the last. Latency: median of interleaved
runs on the machine below, networks of seed {settings.seed}.</p></section>
{drawn}
<section><h2>Every seed</h2>{_table(*_seeds(run))}
<p class="note">Accuracy in percent on the held-out images.</p></section>
<section><h2>Configuration</h2>{_table(("", ""), [(k, str(v)) for k, v in facts.items()], "facts")}
</section>
</main>
</body>
</html>
"""


def _seeds(run: Run) -> tuple[Sequence[str], list[Sequence[str]]]:
    head = ("seed", "network", "before", "after cut", "fine-tuned", "|corr|", "parameters", "MACs")
    rows: list[Sequence[str]] = [
        (
            str(arm.seed),
            arm.name,
            f"{arm.cuts[0].accuracy_before:.2f}",
            f"{arm.cuts[-1].accuracy_after:.2f}",
            f"{arm.last('tune').accuracy:.2f}",
            f"{arm.last('train').correlation:.4f}",
            f"{arm.cuts[-1].after.params:,}",
            f"{arm.cuts[-1].after.macs:,}",
        )
        for arm in run.arms
    ]
    return head, rows


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "numbers") -> str:
    first = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    top = f"<thead><tr>{first}</tr></thead>" if any(head) else ""
    body = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>'
        + "".join(f"<td>{escape(cell)}</td>" for cell in row[1:])
        + "</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table class="{kind}">{top}<tbody>{body}</tbody></table></div>'


def _numbers(values: Iterable[float]) -> str:
    return ", ".join(f"{value:.4f}" for value in values)
