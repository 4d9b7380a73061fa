"""What the importances for Torch-Pruning share: one pass over the model, a reduction a group."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from ..errors import choose
from ..layers import layer_kind
from .torch_pruning_groups import (
    Item,
    LayerScores,
    ScoreCache,
    is_whole,
    items_of,
    layers_of,
    name_of,
    reduced,
    size_of,
)

Normalizer = str | Callable[[Tensor], Tensor] | None

REDUCTIONS = ("mean", "sum", "max", "prod", "first", "gate")
NORMALIZERS = ("sum", "standarization", "mean", "max", "gaussian", "lamp")  # [sic], as there
_TRAIN_MODE = 1e-4  # |sum w g| / sum |w g| behind a BatchNorm in train mode: 1e-6; else about 0.1


class FusedImportance(tp.importance.GroupMagnitudeImportance):  # type: ignore[misc]
    """What the importances share: one pass over the model, then a reduction for each group.

    ``group_reduction`` and ``normalizer`` have the names and the meaning of Torch-Pruning's
    ``GroupMagnitudeImportance``, but for three things that it gets wrong. Where several channels of
    a layer hang on one channel of the root (a linear layer behind a flatten) their scores are added
    before layers are reduced, whatever the reduction; there only ``"mean"`` and ``"sum"`` do so and
    ``"max"``, ``"prod"``, ``"first"`` and ``"gate"`` keep whichever comes last. A group of some
    channels has scores in the order asked for; there it fails, or Taylor sorts them. And scores of
    a group that is all zeros stay 0 where there the normalizer gives NaN.
    """

    HANDLERS: tuple[Any, ...] = ()  # the sides of layers that count
    TYPES: ClassVar[tuple[type[nn.Module], ...]] = (_ConvNd, nn.Linear, _BatchNorm, nn.LayerNorm)
    SLOPES: ClassVar[bool] = False  # whether gradients count

    def __init__(
        self,
        group_reduction: str | None,
        normalizer: Normalizer,
        bias: bool,
        target_types: Sequence[type[nn.Module]] | None,
    ) -> None:
        if group_reduction is not None:
            choose("group_reduction", group_reduction, REDUCTIONS)
        _check_normalizer(normalizer)
        types = self.TYPES if target_types is None else target_types
        super().__init__(
            group_reduction=group_reduction,
            normalizer=normalizer,
            bias=bias,
            target_types=list(types),
        )
        self._cache = ScoreCache()

    def clear(self) -> None:
        """Forgets the scores of the current pass.

        Needed only after a write through ``.data`` between two groups that are scored by hand.
        """
        self._cache.clear()

    @torch.no_grad()
    def __call__(self, group: Any) -> Tensor | None:  # [root channels]
        """Scores the channels of a ``tp.Group``; None where it has no layer that counts.

        Raises:
            ValueError: a layer has no gradient where one is needed, or a score is not finite.
        """
        scores = self._raw(group)
        return None if scores is None else self._normalized(scores)

    def _raw(self, group: Any) -> Tensor | None:  # [root channels]
        items = items_of(group, self.HANDLERS, tuple(self.target_types))
        if self.SLOPES:
            self._check_gradients(group, items)
        found = self._scores(group, [item.layer for item in items])
        rows, size = [], size_of(group)
        for item in items:
            scores = found[item.layer]
            own = (scores.inputs, None) if item.inputs else (scores.outputs, scores.bias)
            try:
                rows += [item.spread(s, size, self.group_reduction) for s in own if s is not None]
            except IndexError as error:
                raise ValueError(
                    f"Torch-Pruning's graph is wrong about layer {name_of(group, item.layer)!r} "
                    f"({error}): list it in ignored_layers, or use orthoreg_ext.pruning.prune"
                ) from None
        return reduced(rows, self.group_reduction).float() if rows else None

    def _normalized(self, scores: Tensor) -> Tensor:  # [n] -> [n]
        found: Tensor = self._normalize(scores, self.normalizer)
        if callable(self.normalizer):
            return found
        return found.nan_to_num(0.0, math.inf, -math.inf)  # 0 / 0: nothing tells the channels apart

    def _scores(self, group: Any, layers: list[nn.Module]) -> dict[nn.Module, LayerScores]:
        """The scores of layers of a group; of all layers of the model where they are not known."""
        layers = list(dict.fromkeys(layers))
        whole = is_whole(group)
        if whole:
            self._cache.begin(group)
            known = {layer: self._cache.get(layer, self._tensors(layer)) for layer in layers}
            if all(scores is not None for scores in known.values()):
                return {layer: scores for layer, scores in known.items() if scores is not None}
            layers = self._unknown(group, layers)
        computed: dict[nn.Module, LayerScores] = {}
        for device in {layer.weight.device for layer in layers}:
            part = [layer for layer in layers if layer.weight.device == device]
            scored = self._pass(part)
            _check_finite(type(self).__name__, group, part, scored)
            computed.update(zip(part, scored, strict=True))
        if not whole:
            return computed
        for layer, scores in computed.items():
            self._cache.put(layer, self._tensors(layer), scores)
        return {**{k: v for k, v in known.items() if v is not None}, **computed}

    def _unknown(self, group: Any, layers: list[nn.Module]) -> list[nn.Module]:
        candidates = [*layers_of(group, tuple(self.target_types)), *layers]
        return [
            layer
            for layer in dict.fromkeys(candidates)
            if not (self.SLOPES and layer.weight.grad is None)
            and self._cache.get(layer, self._tensors(layer)) is None
        ]

    def _bias(self, layer: nn.Module) -> Tensor | None:
        """The bias, where it counts and, if gradients do, has one."""
        bias: Tensor | None = getattr(layer, "bias", None) if self.bias else None
        return None if bias is None or (self.SLOPES and bias.grad is None) else bias

    def _parameters(self, layer: Any) -> list[Tensor]:
        """The weight, and the bias where it counts."""
        bias = self._bias(layer)
        return [layer.weight] if bias is None else [layer.weight, bias]

    def _tensors(self, layer: nn.Module) -> Iterable[Tensor]:
        """All that the scores of a layer are computed from."""
        for parameter in self._parameters(layer):
            yield parameter
            if self.SLOPES and parameter.grad is not None:
                yield parameter.grad

    def _check_gradients(self, group: Any, items: list[Item]) -> None:
        for item in items:
            names = ["weight", "bias"] if self.bias and not item.inputs else ["weight"]
            for name in names:
                parameter = getattr(item.layer, name, None)
                if parameter is not None and parameter.grad is None:
                    raise ValueError(
                        f"{type(self).__name__} needs gradients, but the {name} of layer "
                        f"{name_of(group, item.layer)!r} has none: call loss.backward() before "
                        "the pruner's step, or list the layer in ignored_layers if it is frozen"
                    )

    def _pass(self, layers: list[nn.Module]) -> list[LayerScores]:
        """Scores layers of one device in one pass; biases are entries of their own."""
        tensors: list[Tensor] = []
        shared: list[int] = []
        for layer in layers:
            parameters = self._parameters(layer)
            tensors += parameters
            # the groups of a convolution lose the same inputs, so an input counts in all of them
            split = getattr(layer, "groups", 1) if layer_kind(layer) == "transposed" else 1
            shared += [int(split), *[1] * (len(parameters) - 1)]
        slopes = [t.grad for t in tensors if t.grad is not None] if self.SLOPES else None
        rows = iter(zip(*self._sums(tensors, slopes, shared), strict=True))
        found = []
        for layer in layers:
            outputs, inputs = next(rows)
            bias = None if self._bias(layer) is None else next(rows)[0]
            if layer_kind(layer) == "transposed":
                outputs, inputs = inputs, outputs
            elif isinstance(layer, _ConvNd):
                inputs = inputs.repeat(layer.groups)
            found.append(LayerScores(outputs, inputs, bias))
        return found

    def _sums(
        self,
        tensors: list[Tensor],  # each [n, ...]
        slopes: list[Tensor] | None,  # like tensors
        groups: list[int],
    ) -> tuple[list[Tensor], list[Tensor]]:  # each [n], each [groups * i]
        """The sums over the entries of each row, and over those of each column."""
        raise NotImplementedError


def _check_normalizer(normalizer: object) -> None:
    if normalizer is None or callable(normalizer):
        return
    name, _, share = str(normalizer).partition("_")
    if isinstance(normalizer, str) and name == "sentinel":
        try:
            if 0 <= float(share) < 1:
                return
        except ValueError:
            pass
        raise ValueError(
            f"normalizer is {normalizer!r}, expected a share in [0, 1), e.g. 'sentinel_0.5'"
        )
    choose("normalizer", normalizer, (*NORMALIZERS, "sentinel_0.5"))


def _check_finite(
    importance: str, group: Any, layers: list[nn.Module], scores: list[LayerScores]
) -> None:
    rows = [
        (layer, row)
        for layer, found in zip(layers, scores, strict=True)
        for row in (found.outputs, found.inputs, found.bias)
        if row is not None
    ]
    if torch.isfinite(torch.cat([row for _, row in rows])).all():  # the one wait for the device
        return
    layer = next(layer for layer, row in rows if not torch.isfinite(row).all())
    raise ValueError(
        f"{importance} is not finite for layer {name_of(group, layer)!r}: the cut would be "
        "arbitrary. Look for NaN or infinity in its weights, or in the gradients (loss, data)"
    )


def warn_of_train_mode(
    layers: list[nn.Module], fisher: list[Tensor], absolute: list[Tensor]
) -> None:
    """Warns where sum w g is 0 but for rounding in all filters of a layer."""
    signed = torch.stack([row.sqrt().sum() for row in fisher])
    whole = torch.stack([row.sum() for row in absolute])
    none = ((signed < _TRAIN_MODE * whole) & (whole > 0)).nonzero().flatten().tolist()
    several = [i for i in none if len(fisher[i]) > 1]
    if several:
        warnings.warn(
            f"sum w g is 0 but for rounding in {len(several)} of {len(layers)} layers, e.g. "
            f"{layers[several[0]]}: behind a BatchNorm the gradient has to be taken in eval mode "
            "(model.eval() before loss.backward())",
            stacklevel=2,
        )
