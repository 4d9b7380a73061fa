"""What mkdocs does to a page beside rendering it."""

from __future__ import annotations

import re
from html import unescape
from pathlib import Path
from posixpath import normpath
from types import SimpleNamespace
from typing import Any

DOCS = Path(__file__).parents[1]
LINK = re.compile(r"\[([^\]\n]+)\]\((\.\./[^)#\s]+)(?:#[^)\s]*)?\)")
TABLES = re.compile(r"<!-- benchmarks: .*?-->(.*)<!-- /benchmarks -->", re.DOTALL)
ROLE = re.compile(r":(?:func|class|meth|data|attr|mod):<code>(~?)\.?([^<]+)</code>")
PAGE = re.compile(r"\bdocs/([a-z-]+)\.md\b(?![^<]*</(?:a|code)>)")
FETCHED = re.compile(r"<(?:script|link|img|iframe)\b[^>]*(?:src|href)=\"?(?:https?:)?//[^>]*>")
DOUBLE_COLON = re.compile(r"\s*::(?=</p>)")


def on_page_markdown(markdown: str, page: SimpleNamespace, **_: Any) -> str:
    """Shows the README's benchmarks, and names files of the repository, which the site lacks.

    On the repository's front end the links work as they are; tests/test_docs.py follows them.
    """
    folder = Path(page.file.src_uri).parent.as_posix()

    def name(match: re.Match[str]) -> str:
        target = normpath(f"docs/{folder}/{match[2]}")
        if target.startswith("docs/"):
            return match[0]
        text = match[1].strip("`")
        return f"`{target}`" if Path(text).name in target else f"{match[1]} (`{target}`)"

    if "<!-- README.md: benchmarks -->" in markdown:
        found = TABLES.search((DOCS.parent / "README.md").read_text(encoding="utf-8"))
        assert found, "README.md has no benchmarks"
        tables = found[1].replace("](docs/", "](")
        markdown = markdown.replace("<!-- README.md: benchmarks -->", tables)
    return LINK.sub(name, markdown)


def on_page_content(html: str, page: SimpleNamespace, **_: Any) -> str:
    """Gives docstrings their links: to what a role names, and to pages of the documentation."""
    if not page.file.src_uri.startswith("api/"):
        return html

    def name(match: re.Match[str]) -> str:
        path = unescape(match[2])
        shown = f"<code>{path.rsplit('.', 1)[-1] if match[1] else path}</code>"
        if not path.startswith("orthoreg_ext."):
            return shown
        return f'<autoref identifier="{path}" optional>{shown}</autoref>'

    def link(match: re.Match[str]) -> str:
        assert (DOCS / f"{match[1]}.md").exists(), f"a docstring names {match[0]}: no such page"
        return f'<a href="../{match[1]}.html">{match[1]}</a>'

    return PAGE.sub(link, DOUBLE_COLON.sub(":", ROLE.sub(name, html)))


def on_post_page(output: str, page: SimpleNamespace, **_: Any) -> str:
    """Refuses a page that would fetch something: the site is read without a network, too.

    Raises:
        ValueError: it would.
    """
    fetched = FETCHED.search(output)
    if fetched:
        raise ValueError(f"{page.file.src_uri} fetches from elsewhere: {fetched[0]}")
    return output
