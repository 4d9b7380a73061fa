"""EPruner: keep the exemplars that affinity propagation finds among the filters of a layer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ...errors import unknown_name
from .. import redundancy
from ..engine import Engine
from ..selection import blocks_of
from .checks import positive
from .method import Method

EXEMPLAR = 2.0  # the score of a unit that stays; those of others are in [0, 1]


class EPruner(Method):
    """Network pruning using adaptive exemplar filters (Lin et al., TNNLS 2021, arXiv 2101.07985).

    At once and without data: in every layer affinity propagation on ::

        s_ij = -|w_i - w_j|^2,    preference of i: beta * median_j s_ij

    chooses the filters that stand for the others, and how many of them. All others go: there is no
    ratio, and a larger beta leaves fewer. The method is done from the start: make it on the trained
    net, call :meth:`finish`, and retrain (the authors: 150 epochs, learning rate 0.01, a tenth of
    it after 50 and after 100).

    Paper against code: the code takes larger betas for deep layers (VGG-16 from the 8th convolution
    0.92, ResNet-50 from the 13th block 0.85), which is `betas` here; it leaves the layers in front
    of a residual addition alone, while here the filters of coupled layers are compared as one
    vector; and it starts the BatchNorms of pruned layers (of VGG the classifier too) afresh, which
    `reset_norms` does. Where the propagation does not converge, it runs again with more damping;
    the code would go on without exemplars.

    Args:
        model: as for :class:`~.method.Method`, like all that is not named here; there is neither
            ratio nor criterion nor scope.
        example_inputs: as for :class:`~.method.Method`.
        beta: 0.6 to 0.76 for CIFAR-10, 0.73 for ResNet-50.
        betas: those of some layers, by name.
        reset_norms: start the BatchNorms behind pruned layers afresh, with their optimizer state.

    Raises:
        ImportError: scikit-learn is not installed.
        TypeError, ValueError: an argument is wrong; nothing was changed.
    """

    DEFAULTS: ClassVar[dict[str, Any]] = {"criterion": "exemplar", "scope": "local"}

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        *,
        beta: float = 0.73,
        betas: Mapping[str, float] | None = None,
        reset_norms: bool = False,
        **arguments: Any,
    ) -> None:
        self.beta, self.reset_norms = positive("beta", beta), reset_norms
        self.betas = {k: positive(f"betas[{k!r}]", v) for k, v in (betas or {}).items()}
        for name in ("ratio", "criterion", "scope"):
            if name in arguments:
                raise ValueError(f"EPruner finds by itself what to keep; leave {name} out")
        redundancy._affinity_propagation()  # refuses to start without scikit-learn
        super().__init__(model, example_inputs, ratio=None, **arguments)
        known = {name for group in self.engine.structure.prunable for name in group.layers}
        for name in self.betas:
            if name not in known:
                raise unknown_name("layer in betas", name, known)

    @property
    def done(self) -> bool:  # noqa: D102
        return True

    def scores(self) -> list[Tensor]:  # each [u] float64
        """For every prunable group: 2 for an exemplar, else how far the unit is from its own.

        That is |v_i - v_e| / (|v_i| + |v_e|), with v the filters of a unit in all its layers.
        """
        vectors = unit_vectors(self.engine)
        scores = []
        for group in self.engine.structure.prunable:
            beta = next((self.betas[n] for n in group.layers if n in self.betas), self.beta)
            units = group.units.tolist()
            score = torch.full((len(units),), EXEMPLAR, dtype=torch.float64)
            for alike in _alike(units, vectors):
                matrix = torch.stack([vectors[units[i]] for i in alike])
                if not torch.isfinite(matrix).all():
                    raise ValueError(
                        f"layer {group.name!r} has NaN or infinite weights: its filters cannot be "
                        "compared"
                    )
                try:
                    owners = redundancy.exemplars(matrix, beta)
                except ValueError as error:
                    raise ValueError(f"layer {group.name!r}: {error}") from error
                far = (matrix - matrix[owners]).norm(dim=1)
                reach = (matrix.norm(dim=1) + matrix[owners].norm(dim=1)).clamp(min=1e-300)
                own = owners == torch.arange(len(owners))
                score[alike] = torch.where(own, EXEMPLAR, far / reach)
            scores.append(score)
        return scores

    def lowest(self) -> Tensor:  # [r] int64
        """The units that are no exemplars, as far as the limits let them go, nearest first."""
        pools, groups = self.engine.pools(), self.engine.structure.prunable
        chosen = [torch.empty(0, dtype=torch.int64)]
        for i, (pool, score) in enumerate(zip(pools, self.scores(), strict=True)):
            blocks = blocks_of(i, replace(pool, scores=score), self.engine.rules.limits)
            units = [u for block in blocks for u in block.units if _all_go(score, block.units)]
            chosen.append(groups[i].units[units])
        return torch.cat(chosen)

    def _finish(self) -> None:
        units = self.lowest()
        if not len(units):
            raise ValueError(
                f"beta={self.beta} keeps every filter as an exemplar, or the limits keep the "
                "others; raise beta"
            )
        norms = self._norms(units) if self.reset_norms else []
        self.remove(units)
        for name in norms:
            self._reset(name)

    def _norms(self, units: Tensor) -> list[str]:
        """The BatchNorms that lose channels with these units."""
        return [
            slot.owner
            for slot in self.engine.structure.slots
            if torch.isin(slot.units, units).any()
            and isinstance(self.model.get_submodule(slot.owner), _BatchNorm)
        ]

    def _reset(self, name: str) -> None:
        for model in (self.model, self.engine.ema):
            if model is not None:
                norm = model.get_submodule(name)
                assert isinstance(norm, _BatchNorm)
                norm.reset_parameters()
                for optimizer in self.engine.optimizers:
                    for parameter in norm.parameters():
                        optimizer.state.pop(parameter, None)

    def _settings(self) -> dict[str, Any]:
        own = ("beta", "betas", "reset_norms")
        return {**super()._settings(), **{name: getattr(self, name) for name in own}}


def unit_vectors(engine: Engine) -> dict[int, Tensor]:  # unit -> [k] float64, CPU
    """All filters of each unit, one after the other."""
    parts: dict[int, list[Tensor]] = defaultdict(list)
    for entry in engine.evidence().slots("matrices"):
        rows = torch.cat(entry.matrices()).cpu()
        for unit, row in zip(entry.slot.units.tolist(), rows, strict=True):
            parts[unit].append(row)
    return {unit: torch.cat(rows) for unit, rows in parts.items()}


def _all_go(score: Tensor, units: tuple[int, ...]) -> bool:
    return bool((score[list(units)] < EXEMPLAR).all())


def _alike(units: list[int], vectors: dict[int, Tensor]) -> list[list[int]]:
    """Positions of units that hold as many numbers, and so can be compared."""
    found: dict[int, list[int]] = defaultdict(list)
    for i, unit in enumerate(units):
        found[len(vectors[unit])].append(i)
    return list(found.values())
