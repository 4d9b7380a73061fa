"""What an experiment is made of: everything that changes its numbers."""

from __future__ import annotations

import itertools
import json
import math
import re
import sys
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from orthoreg_ext.errors import choose, unknown_name
from orthoreg_ext.settings import check_penalty
from orthoreg_ext.sides import SIDES

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

CONFIGS = Path(__file__).resolve().parent / "configs"
KINDS = {
    str: "a text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    list: "a list",
    Mapping: "a table",
}
NAME = re.compile(r"\w[\w.+-]*")
LAST_SEED = 10**12  # what is drawn from one is some million times as large
POSITIVE = {"train", "test", "image_size", "batch_size", "calibration", "threads"}


@dataclass(frozen=True)
class Data:
    """The images.

    Attributes:
        source: ``digits``, or the name of an ``.npz`` file or a folder, looked for in the folder
            given by ``--data``; see :mod:`experiments.data`.
        train: how many of the training images to take, drawn once for all seeds; None for all.
        test: how many of the test images; None for all.
        image_size: the side to which they are resized; None keeps them as they are.
    """

    source: str = "digits"
    train: int | None = None
    test: int | None = None
    image_size: int | None = None


@dataclass(frozen=True)
class Recipe:
    """How networks are trained, all of an experiment alike: SGD, momentum 0.9, Nesterov.

    Attributes:
        epochs: of the first training.
        finetune_epochs: after the cut.
        lr: at the start of the first training.
        finetune_lr: at the start after the cut.
        batch_size: images a step.
        weight_decay: of all parameters; with a regulariser 0 as long as it is on, as OrthoReg's
            released code has it.
        flip: mirror every other image at random.
        calibration: training images that score the filters, at most; 10 000 in OrthoReg's code.
        max_layer_ratio: the share of a layer that a cut may take, where the question says nothing
            else; that of OrthoReg's code.
    """

    epochs: int = 8
    finetune_epochs: int = 8
    lr: float = 0.1
    finetune_lr: float = 0.05
    batch_size: int = 64
    weight_decay: float = 5e-4
    flip: bool = False
    calibration: int = 10_000
    max_layer_ratio: float = 0.95


@dataclass(frozen=True)
class Arm:
    """What is added to the first training.

    Attributes:
        penalty: of an OrthoRegularizer; None for none.
        strength: its strength.
        side: its side.
        layer_weights: its layer weights.
        weight_decay: instead of the recipe's, or of 0 beside a penalty.
    """

    penalty: str | None = None
    strength: float = 1e-2
    side: str = "small"
    layer_weights: str = "sqrt"
    weight_decay: float | None = None


@dataclass(frozen=True)
class Config:
    """One experiment.

    Attributes:
        name: of the configuration and of its results.
        title: what it asks, in a sentence.
        question: the module of ``questions/`` that asks it.
        models: names for ``orthoreg_ext.experiment.models.build_model``.
        seeds: of parameters, order and augmentation.
        data: the images.
        recipe: the training.
        arms: name -> what is added to it.
        options: what else the question wants to know.
        threads: CPU threads of a unit; sums of floats depend on them.
        device: ``cpu`` or ``cuda``.
    """

    name: str
    title: str
    question: str
    models: tuple[str, ...] = ("vgg",)
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    data: Data = field(default_factory=Data)
    recipe: Recipe = field(default_factory=Recipe)
    arms: Mapping[str, Arm] = field(default_factory=lambda: {"none": Arm()})
    options: Mapping[str, Any] = field(default_factory=dict)
    threads: int = 1
    device: str = "cpu"

    def document(self) -> dict[str, Any]:
        """All of it, ready for JSON."""
        arms = {name: asdict(arm) for name, arm in self.arms.items()}
        return json.loads(json.dumps({**asdict(self), "arms": arms}))  # type: ignore[no-any-return]

    @property
    def kind(self) -> dict[str, Any]:
        """What the numbers of a unit depend on; more seeds only add units."""
        return {k: v for k, v in self.document().items() if k not in ("title", "seeds")}

    @property
    def networks(self) -> list[dict[str, Any]]:
        """A unit for every trained network, all of a seed before the next one."""
        ways = itertools.product(self.seeds, self.models, self.arms)
        return [{"model": model, "arm": arm, "seed": seed} for seed, model, arm in ways]

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> Config:
        """From a document, as a TOML file has it.

        Raises:
            ValueError: a key is unknown or missing, or has a value of another type.
        """
        parts = dict(document)
        arms = checked("arms", parts.pop("arms", {"none": {}}), Mapping)
        built = {
            "data": _built(Data, parts.pop("data", {}), "data"),
            "recipe": _built(Recipe, parts.pop("recipe", {}), "recipe"),
            "arms": {name: _arm(arm, f"arms.{name}") for name, arm in arms.items()},
        }
        config: Config = _built(cls, {**parts, **built}, "")
        choose("device", config.device, ("cpu", "cuda"))
        if not config.arms:
            raise ValueError("arms is empty, expected one at least: leave it out for one of none")
        if not NAME.fullmatch(config.name) or config.name == "runs":
            raise ValueError(
                f"name is {config.name!r}, expected letters, digits and any of '_.+-', and not "
                "'runs': it names files and a block of the page; rename the file, or set name"
            )
        for i, seed in enumerate(config.seeds):
            if seed > LAST_SEED:
                raise ValueError(f"seeds[{i}] is {seed}, expected a number up to {LAST_SEED}")
        if not 0 < (cap := config.recipe.max_layer_ratio) <= 1:
            raise ValueError(f"recipe.max_layer_ratio is {cap}, expected a number in (0, 1]")
        return config


def _built(kind: Any, values: object, where: str) -> Any:
    hints = get_type_hints(kind)
    table = checked(where, values, Mapping)
    for name in table:
        if name not in hints:
            raise unknown_name(f"key in [{where}]" if where else "key", name, hints)
    needed = [e.name for e in fields(kind) if e.default is MISSING and e.default_factory is MISSING]
    for name in needed:
        if name not in table:
            raise ValueError(f"the key {name!r} is missing")
    prefix = f"{where}." if where else ""
    return kind(**{key: _value(prefix + key, table[key], hints[key]) for key in table})


def _value(key: str, value: object, hint: Any) -> Any:
    """A value of a key, checked against the type of the field."""
    if hint in (Data, Recipe):
        return value  # made by then
    if get_origin(hint) is Mapping:
        return checked(key, value, Mapping)
    kind, *others = get_args(hint) or (hint,)
    if get_origin(hint) is not tuple:
        return None if value is None and type(None) in others else checked(key, value, kind)
    found = tuple(checked(f"{key}[{i}]", part, kind) for i, part in enumerate(_list(key, value)))
    if not found or len(set(found)) < len(found):
        raise ValueError(f"{key} is {list(found)}, expected one at least, and none twice")
    return found


def _list(key: str, value: object) -> Sequence[Any]:
    return value if isinstance(value, tuple) else checked(key, value, list)


def checked(key: str, value: object, kind: Any) -> Any:
    """The value, if it is of a kind of `KINDS`; no number is negative."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    fits = whole if kind is int else isinstance(value, kind) or (kind is float and whole)
    if not fits:
        raise ValueError(f"{key} is {value!r}, expected {KINDS[kind]}")
    if kind in (int, float):
        least = 1 if key.rpartition(".")[2] in POSITIVE else 0
        try:
            fits = math.isfinite(value) and value >= least  # type: ignore[arg-type, operator]
        except OverflowError:  # an integer of more digits than a float holds
            fits = False
        if not fits:
            raise ValueError(f"{key} is {value!r}, expected {KINDS[kind]} of at least {least}")
    return value


def _arm(values: object, where: str) -> Arm:
    arm: Arm = _built(Arm, values, where)
    if arm.penalty is None:
        if replace(arm, weight_decay=None) != Arm():
            raise ValueError(
                f"{where} has a strength, side or layer_weights, but no penalty to use them: set "
                "penalty, or leave them out"
            )
    else:
        try:
            choose("side", arm.side, SIDES)
            check_penalty(arm.penalty, arm.side, arm.layer_weights, "conv", None)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where}: {error}") from error
    return arm


def check_options(
    config: Config, needed: Mapping[str, type], others: Mapping[str, type] | None = None
) -> None:
    """Checks the options of a question, so that none is misspelt and left without effect.

    Args:
        config: the configuration.
        needed: name -> type of each option that the question needs, of `KINDS`.
        others: of those that may be left out.

    Raises:
        ValueError: an option is unknown or missing, has a value of another type or a negative one.
    """
    kinds = {**needed, **(others or {})}
    for key, value in config.options.items():
        if key not in kinds:
            raise unknown_name("key in [options]", key, kinds)
        checked(f"options.{key}", value, kinds[key])
    for key in needed:
        if key not in config.options:
            raise ValueError(f"[options] has no {key!r}, which {config.question!r} needs")


def load(name: str | Path) -> Config:
    """Reads a configuration by its name, or by the path of a TOML file.

    Raises:
        ValueError: there is none, it is no TOML, or a key in it is wrong.
    """
    path = Path(name) if str(name).endswith(".toml") else CONFIGS / f"{name}.toml"
    if not path.is_file():
        raise unknown_name("experiment", str(name), sorted(p.stem for p in CONFIGS.glob("*.toml")))
    try:
        return Config.of({"name": path.stem, **tomllib.loads(path.read_text())})
    except ValueError as error:  # of which tomllib's is one
        raise ValueError(f"{path.name}: {error}") from error


def fingerprint(*documents: object) -> str:
    """Eight hexadecimal digits that tell whether documents differ."""
    text = json.dumps(documents, sort_keys=True)
    return f"{zlib.crc32(text.encode()):08x}"
