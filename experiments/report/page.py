"""The blocks of the page, between markers, and the files that belong to it."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from benchmarks.readme import markdown
from experiments.config import CONFIGS
from experiments.report.figures import Figure, draw
from experiments.report.results import Result
from orthoreg_ext.errors import unknown_name

BEGIN = re.compile(r"<!-- results: ([^\s:]+)(?::(\S+))? -->")
END = "<!-- /results -->"
RUNS = "runs"  # the block that says what was run, where
PREFIX = "evidence-"

View = Callable[[Result], Sequence[str | Figure]]


def views_of(question: str) -> Mapping[str, View]:
    """How the results of a question can be shown.

    Raises:
        ValueError: nothing is written for it.
    """
    name = f"experiments.report.{question}"
    try:
        found: Mapping[str, View] = importlib.import_module(name).VIEWS
    except ModuleNotFoundError as error:
        if error.name != name:
            raise  # something that the module needs
        raise ValueError(
            f"question {question!r} has no report: write experiments/report/{question}.py with its "
            "VIEWS, as CONTRIBUTING.md shows"
        ) from error
    return found


class Page:
    """A page with the results that are shown on it.

    Args:
        text: its text, with markers.
        results: of all machines.

    Raises:
        ValueError: a marker is not closed, or names what does not exist.
    """

    def __init__(self, text: str, results: Sequence[Result]) -> None:
        self.results = results
        self.figures: dict[str, Figure] = {}
        self.shown: set[str] = set()
        self.text = self._rewritten(text)

    @property
    def hidden(self) -> list[str]:
        """The results that no block shows."""
        return sorted({result.name for result in self.results} - self.shown)

    def _rewritten(self, text: str) -> str:
        parts, at = [], 0
        while begin := BEGIN.search(text, at):
            end, following = text.find(END, begin.end()), BEGIN.search(text, begin.end())
            if end < 0 or (following and following.start() < end):
                raise ValueError(f"{begin[0]} has no {END}")
            parts += [text[at : begin.end()], "\n\n", self._block(begin[1], begin[2]), "\n\n"]
            at = end
        return "".join([*parts, text[at:]])

    def _block(self, name: str, view: str | None) -> str:
        if name == RUNS:
            return runs(self.results)
        found = [result for result in self.results if result.name == name]
        if not found:
            known = {path.stem for path in CONFIGS.glob("*.toml")}
            if name not in known:
                raise unknown_name("experiment", name, sorted(known))
            return f"No results yet: `python -m experiments {name}` writes them."
        self.shown.add(name)
        parts: list[str] = []
        for result in found:
            several = len(found) > 1
            views = views_of(str(result.config["question"]))
            if view is not None and view not in views:
                raise unknown_name("view", view, list(views))
            parts += [f"**On {result.document['machine']['name']}:**"] if several else []
            parts += [result.unfinished] if result.unfinished else []
            for key in views if view is None else (view,):
                shown = [part for part in views[key](result) if part]
                parts += [self._part(part, result, several) for part in shown]
        return "\n\n".join(parts)

    def _part(self, part: str | Figure, result: Result, several: bool) -> str:
        if isinstance(part, str):
            return part
        where = f"-{result.document['machine']['slug']}" if several else ""
        file = f"{PREFIX}{result.name}-{part.name}{where}.svg"
        self.figures[file] = part
        return f"![{part.y} against {part.x}](figures/{file})\n\n*{part.caption}*"


def runs(results: Sequence[Result]) -> str:
    """What was run, on which images, networks and machine."""
    if not results:
        return "No results yet: `python -m experiments NAME` writes them."
    head = ["experiment", "images", "networks", "seeds", "epochs", "units", "hours", "machine"]
    return markdown([head, *map(_run, results)])


def _run(result: Result) -> list[str]:
    config, machine = result.config, result.document["machine"]
    data, recipe = config["data"], config["recipe"]
    parts = [
        f"{data[key]} to {word}"
        for key, word in (("train", "train"), ("test", "test"))
        if data[key]
    ]
    parts += [f"{data['image_size']} x {data['image_size']}"] if data["image_size"] else []
    images = ", ".join([data["source"], *(parts or ["all"]), f"checksum {result.document['data']}"])
    schedule = config["options"].get("epochs")  # of a method, or so much longer a fine-tuning
    phases = [recipe["epochs"], *([schedule] if schedule else []), recipe["finetune_epochs"]]
    count = machine["threads"]
    threads = f", {count} thread{'s' if count > 1 else ''} a unit"
    threads = "" if machine["device"] == "cuda" else threads
    return [
        f"`{result.name}`",
        images,
        ", ".join(f"`{model}`" for model in config["models"]),
        str(result.seeds),
        " + ".join(map(str, phases)),
        f"{len(result.rows)} of {result.document['planned']}",
        f"{result.document['seconds'] / 3600:.1f}",
        f"{machine['name']}{threads}, torch {machine['torch']}",
    ]


def stale(page: Path, made: Page) -> list[str]:
    """What is not as it would be written; empty where all is."""
    found = [] if page.read_text() == made.text else [page.name]
    folder = page.parent / "figures"
    for file, figure in made.figures.items():
        path = folder / file
        if not path.exists() or figure.mark not in path.read_text():
            found.append(file)
    found += [f"{path.name} (of no results)" for path in leftover(folder, made)]
    return found + [f"no block shows {name}" for name in made.hidden]


def leftover(folder: Path, made: Page) -> list[Path]:
    """Figures of former results."""
    return [path for path in sorted(folder.glob(f"{PREFIX}*.svg")) if path.name not in made.figures]


def write(page: Path, made: Page) -> None:
    """Writes the page and its figures, and removes those of former results."""
    folder = page.parent / "figures"
    drawn = {file: draw(figure) for file, figure in made.figures.items()}
    folder.mkdir(parents=True, exist_ok=True)
    page.write_text(made.text)
    for file, text in drawn.items():
        (folder / file).write_text(text)
    for path in leftover(folder, made):
        path.unlink()
