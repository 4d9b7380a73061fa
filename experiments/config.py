"""What an experiment is made of: everything that changes its numbers."""

from __future__ import annotations

import json
import sys
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from orthoreg_ext.errors import choose, unknown_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

CONFIGS = Path(__file__).resolve().parent / "configs"


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
    """

    epochs: int = 8
    finetune_epochs: int = 8
    lr: float = 0.1
    finetune_lr: float = 0.05
    batch_size: int = 64
    weight_decay: float = 5e-4
    flip: bool = False
    calibration: int = 10_000


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

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> Config:
        """From a document, as a TOML file has it.

        Raises:
            ValueError: a key is unknown or missing, or has a value of another type.
        """
        parts = dict(document)
        arms = parts.pop("arms", {"none": {}})
        built = {
            "data": _built(Data, parts.pop("data", {}), "data"),
            "recipe": _built(Recipe, parts.pop("recipe", {}), "recipe"),
            "arms": {name: _built(Arm, arm, f"arms.{name}") for name, arm in arms.items()},
            **{key: tuple(parts.pop(key)) for key in ("models", "seeds") if key in parts},
        }
        config: Config = _built(cls, {**parts, **built}, "")
        choose("device", config.device, ("cpu", "cuda"))
        if not config.seeds or not config.models or not config.arms:
            raise ValueError("models, seeds and arms must not be empty")
        return config


def _built(kind: Any, values: Mapping[str, Any], where: str) -> Any:
    names = [entry.name for entry in fields(kind)]
    for name in values:
        if name not in names:
            raise unknown_name(f"key in [{where}]" if where else "key", name, names)
    try:
        return kind(**values)
    except TypeError as error:
        raise ValueError(f"{where or 'the configuration'}: {error}") from error


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
