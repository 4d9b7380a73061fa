"""What mkdocs does to a page beside rendering it."""

from __future__ import annotations

import re
from html import unescape
from pathlib import Path
from posixpath import normpath
from types import SimpleNamespace
from typing import Any

LINK = re.compile(r"\[([^\]\n]+)\]\((\.\./[^)#\s]+)(?:#[^)\s]*)?\)")
ROLE = re.compile(r":(?:func|class|meth|data|attr|mod):<code>(~?)\.?([^<]+)</code>")
DOUBLE_COLON = re.compile(r"\s*::(?=</p>)")


def on_page_markdown(markdown: str, page: SimpleNamespace, config: Any, **_: Any) -> str:
    """Names the files of the repository that pages link to: the site does not hold them.

    On the repository's front end the links work as they are; tests/test_docs.py follows them.
    """
    folder = Path(page.file.src_uri).parent.as_posix()

    def name(match: re.Match[str]) -> str:
        target = normpath(f"docs/{folder}/{match[2]}")
        if target.startswith("docs/"):
            return match[0]
        text = match[1].strip("`")
        return f"`{target}`" if Path(text).name in target else f"{match[1]} (`{target}`)"

    return LINK.sub(name, markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Makes code of the docstrings' roles, and one colon of two in front of a block."""

    def link(match: re.Match[str]) -> str:
        name = unescape(match[2])
        shown = name.rsplit(".", 1)[-1] if match[1] else name
        return f"<code>{shown}</code>"

    return DOUBLE_COLON.sub(":", ROLE.sub(link, html))
