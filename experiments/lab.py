"""What the questions work with: networks, trained and cut as a configuration says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from experiments.config import Arm, Config, fingerprint
from experiments.training import Fit, fit
from orthoreg_ext import OrthoRegularizer, build_info, pruning
from orthoreg_ext.errors import unknown_name
from orthoreg_ext.experiment.data import Dataset, Samples
from orthoreg_ext.experiment.models import build_model
from orthoreg_ext.experiment.train import accuracy
from orthoreg_ext.pruning import Criterion
from orthoreg_ext.pruning.rules import Rules
from orthoreg_ext.pruning.schedule import check_ratio, check_rounds

CALIBRATION_SEED = 7


class Lab:
    """A configuration with its images, and a folder for what is under way.

    Args:
        config: the configuration.
        dataset: its images.
        folder: for the states of trainings.
    """

    def __init__(self, config: Config, dataset: Dataset, folder: Path) -> None:
        self.config, self.dataset, self.folder = config, dataset, folder
        device = torch.device(config.device)
        self.train, self.test = dataset.train.to(device), dataset.test.to(device)
        self.example = self.train.batch(slice(0, 1))[0]

    def fresh(self, model: str, seed: int) -> nn.Module:
        """The untrained network of a seed."""
        net = build_model(
            model,
            num_classes=len(self.dataset.classes),
            image_shape=self.dataset.image_shape,
            seed=seed,
        )
        return net.to(self.config.device)

    def regularizer(self, net: nn.Module, arm: Arm) -> OrthoRegularizer | None:
        """The term of an arm, if it has one."""
        if arm.penalty is None:
            return None
        return OrthoRegularizer(
            net, arm.penalty, arm.strength, side=arm.side, layer_weights=arm.layer_weights
        )

    def first(self, seed: int, arm: Arm) -> Fit:
        """The first training of an arm."""
        recipe = self.config.recipe
        decay = arm.weight_decay
        if decay is None:
            decay = recipe.weight_decay if arm.penalty is None else 0.0
        return self._fit(recipe.epochs, recipe.lr, seed, decay)

    def second(self, seed: int) -> Fit:
        """The training after the cut."""
        recipe = self.config.recipe
        return self._fit(recipe.finetune_epochs, recipe.finetune_lr, seed, recipe.weight_decay)

    def _fit(self, epochs: int, lr: float, seed: int, decay: float) -> Fit:
        recipe = self.config.recipe
        return Fit(epochs, lr, seed, recipe.batch_size, decay, recipe.flip)

    def trained(self, model: str, arm: str, seed: int) -> nn.Module:
        """The network of a seed after the first training of an arm; made once, then read."""
        net, how = self.fresh(model, seed), self.config.arms[arm]
        store = self.store("net", model=model, arm=arm, seed=seed)
        regularizer = self.regularizer(net, how)
        fit(net, self.train, self.first(seed, how), regularizer=regularizer, store=store)
        return net

    def finetuned(self, net: nn.Module, unit: Mapping[str, Any], how: Fit | None = None) -> None:
        """Trains what a cut has left, in place, on other batches than those of the first training.

        Args:
            net: the network.
            unit: whose it is; an interrupted training goes on, and its state goes when it is done.
            how: the training; by default that of the recipe.
        """
        store, how = self.store("tuned", **unit), how or self.second(unit["seed"])
        fit(net, self.train, replace(how, seed=unit["seed"] + 500_000), store=store)
        store.unlink(missing_ok=True)

    def prune(self, net: nn.Module, criterion: str, ratio: float, **options: Any) -> Any:
        """Cuts a network, by samples of the training images, in eval mode; as pruning.prune."""
        options = {"max_layer_ratio": self.config.recipe.max_layer_ratio, **options}
        return pruning.prune(
            net.eval(),
            self.example,
            criterion=criterion_of(criterion),
            ratio=ratio,
            data=self.calibration(self.config.recipe.calibration),
            loss=nn.functional.cross_entropy,
            **options,
        )

    def calibration(self, count: int) -> list[tuple[Tensor, Tensor]]:
        """Batches of the training images, always the same ones."""
        return list(self.some(count).batches())

    def some(self, count: int) -> Samples:
        """At most so many of the training images, always the same ones."""
        generator = torch.Generator().manual_seed(CALIBRATION_SEED)
        chosen = torch.randperm(len(self.train), generator=generator)[:count].sort().values
        chosen = chosen.to(self.train.labels.device)
        images, labels = self.train.images[chosen], self.train.labels[chosen]
        return replace(self.train, images=images, labels=labels)

    def accuracy(self, net: nn.Module) -> float:
        """Right answers of the test images, in percent."""
        return accuracy(net, self.test)

    def store(self, kind: str, **key: Any) -> Path:
        """The file for the state of a training."""
        return self.folder / f"{kind}-{fingerprint(key)}.safetensors"


def check_cut(cut: Mapping[str, Any], where: str) -> None:
    """Checks arguments of :meth:`Lab.prune` before anything is trained for them.

    Raises:
        ValueError: one is unknown, missing or out of range.
    """
    rules = dict(cut)
    try:
        if missing := {"criterion", "ratio"} - cut.keys():
            raise ValueError(f"{' and '.join(sorted(missing))} missing in {dict(cut)}")
        known = {"ratio", "rounds", *(entry.name for entry in fields(Rules))}
        for key in cut.keys() - known:
            raise unknown_name("argument of a cut", key, known)
        check_ratio(rules.pop("ratio"))
        check_rounds(rules.pop("rounds", 1))
        Rules(**{**rules, "criterion": criterion_of(rules["criterion"])})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error


def criterion_of(name: str) -> str | Criterion:
    """A criterion by its name; ``variety(HOST)`` and ``variety(HOST, MODE)`` are made here."""
    host, mode = hosted(name)
    return pruning.variety(host, mode) if mode else name


def hosted(name: str) -> tuple[str, str]:
    """The criterion in ``variety(HOST, MODE)``, and the mode; none of another criterion."""
    if not (isinstance(name, str) and name.startswith("variety(") and name.endswith(")")):
        return name, ""  # also what is no name: it is refused where it is looked up
    host, _, mode = name.removeprefix("variety(").removesuffix(")").partition(",")
    return host.strip(), mode.strip() or "pairwise"


def saved(result: Any) -> dict[str, float]:
    """The shares of the filters, parameters and multiply-accumulates that went."""
    shares: Mapping[str, float] = result.saved
    return {name: shares[name] for name in ("filters", "params", "macs")}


def versions() -> dict[str, Any]:
    """What the numbers may depend on beside the configuration."""
    return {"orthoreg_ext": build_info()["version"], "torch": torch.__version__}
