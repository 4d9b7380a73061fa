"""What a run is made of: everything that changes its numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from ..errors import choose
from ..pruning import CRITERIA
from ..pruning.targets import TARGETS

DEVICES = ("auto", "cpu", "cuda")
STRENGTHS = {
    "orthoreg": 1e-2,
    "so": 1e-1,
    "frobenius": 3e-1,
    "offdiag": 1e-1,
    "cosine": 1e-1,
    "dso": 5e-2,
    "gor": 1e-1,
    "mc": 1.0,
    "srip": 1.0,
    "ocnn": 1.0,
}
"""Default strength of each penalty; chosen on the digits, see ``Settings``.

Those of the last five with seed 10 alone. The correlation of the filters falls by 8.6 with `dso`;
by 2.9 with `mc` and 2.0 with `srip` and `ocnn`, which have other aims than pairs of filters; by 1.4
with `gor`, which leaves filters of different groups alone.
"""


@dataclass(frozen=True)
class Settings:
    """The settings of ``orthoreg prune``.

    The defaults were chosen by small experiments on the digits with seeds 10 to 14; the default run
    uses seeds 0 to 2, so that its comparison is not one the settings were picked for. Medians then,
    regularised against twin: strength 1e-2 correlation 4.6 times lower, fine-tuned accuracy 98.7
    against 92.0 %; strength 2e-2 8.8 times, 98.3 against 92.0 %. Equal filters are not equal work:
    L1 over all layers starves the first ones, so the twin keeps a sixth of the regularised
    network's multiply-accumulates. Tables show both.

    Attributes:
        model: ``vgg``, ``resnet``, ``torchvision:NAME``, ``timm:NAME`` or ``pkg.module:factory``.
        data: ``digits``, a folder of classes or an ``.npz`` file.
        weights: State dict from which every network starts; None: parameters of its seed.
        ratio: Share of the target to remove, in (0, 1).
        target: What the ratio is a share of: ``filters``, or of one image ``macs``, ``params``,
            ``memory`` or ``latency``, of which at least the ratio goes. A latency is measured at
            each cut, once, and stored with it.
        round_to: What is left of every coupled group of layers is a multiple of it.
        rounds: Cuts in which they go; the fine-tuning epochs are shared among them.
        criterion: Score of the regularised network's filters; the twin's is ``l1``.
        penalty: The regulariser's penalty.
        strength: Its strength; None takes the penalty's own of ``STRENGTHS``.
        seed: The first seed: of parameters, order and augmentation.
        seeds: How many seeds, counted up from ``seed``.
        epochs: Training epochs, with the regulariser or (the twin) without.
        finetune_epochs: Epochs after the cut, without it.
        batch_size: Images a step.
        lr: Learning rate at the start of the training.
        finetune_lr: Learning rate after a cut.
        max_layer_ratio: No cut takes a larger share of the filters that a layer has left.
        image_size: Side to which images are resized; None keeps a source's own.
        channels: 3 repeats grey images, 1 makes colour grey; None keeps a source's own.
        device: ``cpu`` or ``cuda``.
        threads: CPU threads. Networks as small as the demo's gain nothing from a second one and
            lose much where other processes keep the cores busy; larger ones gain.
    """

    model: str = "vgg"
    data: str = "digits"
    weights: str | None = None
    ratio: float = 0.75
    target: str = "filters"
    round_to: int = 1
    rounds: int = 1
    criterion: str = "fisher"
    penalty: str = "orthoreg"
    strength: float | None = None
    seed: int = 0
    seeds: int = 3
    epochs: int = 8
    finetune_epochs: int = 9
    batch_size: int = 64
    lr: float = 0.1
    finetune_lr: float = 0.05
    max_layer_ratio: float = 0.9
    image_size: int | None = None
    channels: int | None = None
    device: str = "auto"
    threads: int = 1

    def resolved(self) -> Settings:
        """Returns checked settings without any "choose for me" left in them.

        Raises:
            ValueError: A setting is out of its range or unknown; the text names its option.
        """
        choose("--criterion", self.criterion, CRITERIA)
        choose("--penalty", self.penalty, STRENGTHS)
        choose("--device", self.device, DEVICES)
        choose("--target", self.target, TARGETS)
        for name in ("ratio", "max_layer_ratio"):
            _expect(name, getattr(self, name), 0 < getattr(self, name) < 1, "between 0 and 1")
        for name in ("rounds", "seeds", "epochs", "finetune_epochs", "round_to"):
            _expect(name, getattr(self, name), getattr(self, name) >= 1, "of at least 1")
        tunable = f"no larger than --finetune-epochs ({self.finetune_epochs}): every cut is tuned"
        _expect("rounds", self.rounds, self.rounds <= self.finetune_epochs, tunable)
        _expect("batch_size", self.batch_size, self.batch_size >= 2, "of at least 2 (BatchNorm)")
        last = self.seed + self.seeds - 1
        _expect("seed", self.seed, self.seed >= 0 and last < 2**63, "from 0 to 2**63 - --seeds")
        _expect("threads", self.threads, self.threads >= 1, "of at least 1")
        for name in ("lr", "finetune_lr"):
            _expect(name, getattr(self, name), getattr(self, name) > 0, "above 0")
        if self.image_size is not None:
            _expect("image_size", self.image_size, self.image_size >= 1, "of at least 1")
        strength = STRENGTHS.get(self.penalty, 1e-2) if self.strength is None else self.strength
        _expect("strength", strength, strength >= 0, "of at least 0")
        device, reason = self.device, why_no_gpu()
        if device == "auto":
            device = "cpu" if reason else "cuda"
        elif device == "cuda" and reason:
            raise ValueError(f"--device cuda cannot be used ({reason}); use --device cpu")
        return replace(self, strength=strength, device=device)

    def removed(self) -> str:
        """Says what goes: ``75 % of the filters``."""
        what = {"filters": "filters", "macs": "MACs", "params": "parameters"}
        return f"{100 * self.ratio:g} % of the {what.get(self.target, self.target)}"

    def seeds_used(self) -> list[int]:
        """Returns the seeds of the run, in order."""
        return list(range(self.seed, self.seed + self.seeds))

    def check_same(self, given: Mapping[str, Any]) -> None:
        """Checks that settings given again are those of this run.

        Args:
            given: Some settings by name; a device of ``"auto"`` is the one that the run has.

        Raises:
            ValueError: One differs or is out of its range; the text names its option.
        """
        stored = asdict(self)
        device = choose("--device", given.get("device", "auto"), DEVICES)
        again = asdict(replace(self, **{**given, "device": "cpu"}).resolved())
        again["device"] = self.device if device == "auto" else device
        for name in given:
            if again[name] != stored[name]:
                raise ValueError(
                    f"{option(name)} is {again[name]!r}, but the run to continue has "
                    f"{stored[name]!r}; leave the option out, or choose another --out"
                )


def why_no_gpu() -> str:
    """Says why ``--device cuda`` cannot be used here; empty when it can."""
    if torch.cuda.is_available():
        return ""
    return "torch is built without CUDA" if torch.version.cuda is None else "no GPU is visible"


def option(name: str) -> str:
    """Returns the command-line option of a setting."""
    return "--" + name.replace("_", "-")


def _expect(name: str, got: float, good: bool, expected: str) -> None:
    if not good or not math.isfinite(got):
        raise ValueError(f"{option(name)} is {got!r}; expected a number {expected}")
