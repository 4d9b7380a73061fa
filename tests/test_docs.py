"""Every block of code in README.md and docs/ runs, every command and every link exists."""

from __future__ import annotations

import ast
import io
import re
import shlex
import textwrap
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch

from orthoreg_ext import cli, integrations
from orthoreg_ext.experiment.zoo import load_package
from orthoreg_ext.penalties import PENALTIES
from orthoreg_ext.pruning import CRITERIA, methods

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]

FENCE = re.compile(r"^( *)(```+)(\S*)")
NOT_RUN = re.compile(r"^ *<!-- not run: (.+) -->$")
AFTER = re.compile(r"^<!-- after: (\S+) -->$", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: Path
    line: int  # of its first line of code, from 1
    language: str
    text: str
    not_run: str  # the reason, or empty

    def __str__(self) -> str:
        return f"{name_of(self.page)}:{self.line}"


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix() if page.is_relative_to(ROOT) else page.name


@cache
def blocks(page: Path) -> tuple[Block, ...]:
    lines = page.read_text(encoding="utf-8").splitlines()
    found, start, number = [], 0, 0
    while number < len(lines):
        opening = FENCE.match(lines[number])
        number += 1
        if not opening:
            continue
        start = number
        while number < len(lines) and lines[number].strip() != opening[2]:
            number += 1
        assert number < len(lines), f"{name_of(page)}:{start}: the fence is not closed"
        above = next((line for line in reversed(lines[: start - 1]) if line.strip()), "")
        reason = NOT_RUN.match(above)
        text = textwrap.dedent("\n".join(lines[start:number]))
        found.append(Block(page, start + 1, opening[3], text, reason[1] if reason else ""))
        number += 1
    return tuple(found)


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    lines = page.read_text(encoding="utf-8").splitlines()
    for block in blocks(page):
        for index in range(block.line - 2, block.line + block.text.count("\n") + 1):
            lines[index] = ""
    return "\n".join(lines)


# ---- the code ------------------------------------------------------------------------------------


def python(page: Path) -> list[Block]:
    return [block for block in blocks(page) if block.language == "python"]


def program(page: Path) -> list[Block]:
    """What runs of a page: first the first block of the page that it says it follows."""
    before = [
        python((page.parent / name).resolve())[0]
        for name in AFTER.findall(page.read_text(encoding="utf-8"))
    ]
    return before + [block for block in python(page) if not block.not_run]


def run(page: Path) -> dict[str, object]:
    names: dict[str, object] = {"__name__": "__main__"}
    for block in program(page):
        code = "\n" * (block.line - 1) + block.text  # so that a traceback has the page's lines
        exec(compile(code, name_of(block.page), "exec"), names)
    return names


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """One thread, a seed, a folder to write to, and torch's settings back afterwards."""
    monkeypatch.chdir(tmp_path)
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    matmul = torch.get_float32_matmul_precision()
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield
    torch.use_deterministic_algorithms(deterministic)
    torch.set_float32_matmul_precision(matmul)
    torch.set_default_dtype(dtype)
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("quiet")
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("page", [page for page in PAGES if program(page)], ids=name_of)
def test_the_code_of_a_page_runs(page: Path) -> None:
    code = "\n".join(block.text for block in program(page))
    if re.search(r"^ *(from|import) (torchvision|timm|lightning|transformers|peft)\b", code, re.M):
        load_package("torchvision")  # so that it imports beside any build of torch
    run(page)


@pytest.mark.parametrize("block", [b for page in PAGES for b in python(page) if b.not_run], ids=str)
def test_a_block_that_is_not_run_compiles(block: Block) -> None:
    compile(block.text, str(block), "exec")
    pytest.skip(f"not run: {block.not_run}")


def test_a_failing_block_fails_its_page(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("a\n\n```python\nx = 1\n```\n\n- b\n\n  ```python\n  assert x == 2\n  ```\n")
    assert [(block.line, block.text) for block in blocks(page)] == [
        (4, "x = 1"),
        (10, "assert x == 2"),
    ]
    with pytest.raises(AssertionError):
        run(page)
    marked = tmp_path / "marked.md"
    marked.write_text("<!-- not run: needs a GPU -->\n```python\nassert False\n```\n")
    assert [block.not_run for block in blocks(marked)] == ["needs a GPU"]
    run(marked)


# ---- commands ------------------------------------------------------------------------------------


def commands(page: Path) -> list[str]:
    """The lines of blocks, and the inline code, that call orthoreg or make."""
    shell = [b.text for b in blocks(page) if b.language in ("", "console", "bash", "sh", "shell")]
    lines = "\n".join(shell).replace("\\\n", " ").splitlines()
    lines += re.findall(r"`([^`]+)`", prose(page).replace("\n", " "))
    lines = [line.strip().removeprefix("$ ") for line in lines]
    return [line for line in lines if re.match(r"(orthoreg|make) [a-z]", line)]


@cache
def help_of(command: str) -> str:
    shown = io.StringIO()
    with redirect_stdout(shown), redirect_stderr(shown), pytest.raises(SystemExit) as end:
        cli.main([command, "--help"])
    assert not end.value.code, f"there is no command orthoreg {command}:\n{shown.getvalue()}"
    return shown.getvalue()


@cache
def targets() -> tuple[set[str], set[str]]:
    """The targets of the Makefile, and the variables that they and their scripts know."""
    text = (ROOT / "Makefile").read_text()
    known = text + (ROOT / "scripts" / "gpu_check.sh").read_text()
    return set(re.findall(r"^([a-z][a-z-]*):", text, re.MULTILINE)), set(
        re.findall(r"[A-Z][A-Z_]+", known)
    )


def check_command(line: str) -> None:
    tool, *words = shlex.split(line.split(" | ")[0], comments=True)
    words = [word for word in words if word not in ("...", ">") and not word.startswith("|")]
    if tool == "make":
        names, variables = targets()
        for word in words:
            name, assigned, _ = word.partition("=")
            assert name in (variables if assigned else names), f"`{line}`: make knows no {name}"
        return
    options = set(re.findall(r"--[a-z][a-z-]*", help_of(words[0])))
    for word in words[1:]:
        if word.startswith("--"):
            option = word.partition("=")[0]
            assert option in options, f"`{line}`: orthoreg {words[0]} has no {option}"


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=name_of)
def test_the_commands_of_a_page_exist(page: Path) -> None:
    for line in commands(page):
        check_command(line)


@pytest.mark.parametrize(
    "line", ["orthoreg prun", "orthoreg prune --ration 0.5", "make dmeo", "make bench FUL=1"]
)
def test_a_wrong_command_is_found(line: str) -> None:
    with pytest.raises(AssertionError, match="no"):
        check_command(line)


# ---- links ---------------------------------------------------------------------------------------


def slug(heading: str) -> str:
    """As GitHub and mkdocs.yml make anchors of headings."""
    plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").strip()
    return re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")


@cache
def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ +(.+?) *#*$", prose(page), re.MULTILINE)
    return {slug(heading) for heading in headings}


def broken_links(page: Path) -> list[str]:
    text = re.sub(r"`[^`\n]*`", "", prose(page))
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and file.suffix == ".md" and anchor not in anchors(file)):
            broken.append(target)
    return broken


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=name_of)
def test_the_links_of_a_page_lead_somewhere(page: Path) -> None:
    assert not broken_links(page)


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A `b`, c\n[x](page.md#a-b-c) [y](#a) [z](no.md) ![p](no.png) `[q](no)`\n")
    assert broken_links(page) == ["#a", "no.md", "no.png"]


# ---- completeness --------------------------------------------------------------------------------

SECTIONS = {"Source", "Paper against code", "Cost", "When not to use it", "Example"}
ALIASES = {"group_fisher_macs": "group_fisher", "group_fisher_nothing": "group_fisher"}
METHODS = [name for name in methods.__all__ if hasattr(getattr(methods, name), "finish")]
NAMED = [
    *(("penalties", name) for name in PENALTIES),
    *(("criteria", ALIASES.get(name, name)) for name in CRITERIA),
    *(("methods", name.lower()) for name in METHODS),
]


@pytest.mark.parametrize(("folder", "name"), dict.fromkeys(NAMED))
def test_every_penalty_criterion_and_method_has_its_page(folder: str, name: str) -> None:
    page = DOCS / folder / f"{name}.md"
    assert set(re.findall(r"^## (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)) >= SECTIONS
    assert python(page), "there is no example"
    overview = (DOCS / f"{folder}.md").read_text(encoding="utf-8")
    assert f"({folder}/{name}.md)" in overview, "the overview does not link to it"


def public_names(path: Path) -> set[str]:
    """What a module offers: its __all__, or the classes and functions that it defines."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return set(ast.literal_eval(node.value))
    names = {n.name for n in tree.body if isinstance(n, ast.ClassDef | ast.FunctionDef)}
    for node in tree.body:
        if isinstance(node, ast.ImportFrom):
            names |= {a.asname for a in node.names if a.asname and a.asname == a.name}
    return {name for name in names if not name.startswith("_")}


MODULES = {
    "orthoreg_ext": "__init__.py",
    "orthoreg_ext.functional": "functional.py",
    "orthoreg_ext.schedules": "schedules.py",
    "orthoreg_ext.pruning": "pruning/__init__.py",
    "orthoreg_ext.diagnosis": "diagnosis/__init__.py",
    "orthoreg_ext.report": "report/__init__.py",
    **{
        f"orthoreg_ext.integrations.{name}": f"integrations/{name}.py"
        for name in integrations.__all__
    },
}
NO_ENTRY = {"distributed", "functional", "integrations", "pruning", "schedules", "__version__"}


@pytest.mark.parametrize("module", MODULES)
def test_the_reference_has_every_public_name(module: str) -> None:
    pages = "\n".join(page.read_text(encoding="utf-8") for page in (DOCS / "api").glob("*.md"))
    shown = re.findall(r"^::: (\S+)$", pages, re.MULTILINE)
    modules = [s for s in shown if (ROOT / s.replace(".", "/")).with_suffix(".py").exists()]
    assert not modules, "these show a module, not what it holds under the same name"
    shown = [name for name in shown if name.startswith(f"{module}.")]
    names = public_names(ROOT / "orthoreg_ext" / MODULES[module]) - NO_ENTRY
    assert names, "the module has no public name"
    missing = sorted(name for name in names if not any(s.endswith(f".{name}") for s in shown))
    assert not missing, f"docs/api lacks ::: {module}.X for {missing}"
