"""The parts a report is made of: sections, tables, figures, and the page around them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files

# The page may load nothing and run nothing, and says so to the browser.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


@dataclass(frozen=True)
class Section:
    """A part of the page with a heading, to which the contents link."""

    key: str  # its id
    title: str
    body: str  # HTML


def page(title: str, lede: str, sections: Sequence[Section]) -> str:
    """Returns the whole page: one file, with its style inside, that needs no script.

    Args:
        title: heading and name of the page.
        lede: HTML between the heading and the contents.
        sections: the rest, in order.
    """
    style = files(__package__).joinpath("report.css").read_text("utf-8")
    links = "".join(f'<li><a href="#{s.key}">{escape(s.title)}</a></li>' for s in sections)
    body = "".join(
        f'<section id="{s.key}" aria-labelledby="{s.key}-title">\n'
        f'<h2 id="{s.key}-title">{escape(s.title)}</h2>\n{s.body}\n</section>\n'
        for s in sections
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<link rel="icon" href="data:,">
<title>{escape(title)}</title>
<style>
{style}</style>
</head>
<body>
<main>
<h1>{escape(title)}</h1>
{lede}
<nav aria-labelledby="contents-title">
<h2 id="contents-title">Contents</h2>
<ol>{links}</ol>
</nav>
{body}</main>
</body>
</html>
"""


def table(
    title: str,
    head: Sequence[str],
    rows: Iterable[Sequence[str]],
    kind: str = "numbers",
) -> str:
    """Returns a table that scrolls within its own box where it is too wide.

    Args:
        title: its caption, which also names the box for the keyboard.
        head: the columns.
        rows: cells as text; the first of each is the row's heading.
        kind: ``"numbers"`` aligns to the right, ``"facts"`` breaks long cells.
    """
    first = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    body = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>'
        + "".join(f"<td>{escape(cell)}</td>" for cell in row[1:])
        + "</tr>\n"
        for row in rows
    )
    # a box that scrolls has to be reachable by keyboard
    return (
        f'<div class="scroll" role="region" aria-label="{escape(title)}" tabindex="0">'
        f'<table class="{kind}"><caption><span>{escape(title)}</span></caption>'
        f"<thead><tr>{first}</tr></thead>\n<tbody>{body}</tbody></table></div>"
    )


def figure(
    panels: Iterable[tuple[str, str]],
    caption: str,
    legend: Mapping[str, str] | None = None,
    size: str = "",
) -> str:
    """Returns pictures side by side, below each other on a phone, with one caption.

    Args:
        panels: title (may be empty) and SVG of each.
        caption: what they show.
        legend: CSS classes of each mark, by what it stands for.
        size: ``"half"`` of the page for each picture, ``"small"`` for a quarter.
    """
    marks = "".join(
        f'<li><span class="mark {kind}" aria-hidden="true"></span>{escape(text)}</li>'
        for text, kind in (legend or {}).items()
    )
    drawn = "".join(
        '<div class="panel">' + (f"<h3>{escape(title)}</h3>" if title else "") + f"{svg}</div>\n"
        for title, svg in panels
    )
    classes = f"panels {size}".strip()
    return (
        "<figure>"
        + (f'<ul class="legend" aria-label="Legend">{marks}</ul>' if marks else "")
        + f'<div class="{classes}">{drawn}</div>'
        + f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def folded(title: str, body: str) -> str:
    """Returns HTML that is shown once its title is pressed."""
    return f"<details><summary>{escape(title)}</summary>{body}</details>"


def note(text: str) -> str:
    """Returns a remark."""
    return f'<p class="note">{escape(text)}</p>'
