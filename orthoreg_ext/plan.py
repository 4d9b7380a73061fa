"""Which layers of a model are regularised, on which side and with what weight."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from .errors import unknown_name
from .layers import FilterLayer, SkippedLayer, inspect_layers

Selector = str | Sequence[str] | Callable[[str, nn.Module], bool]
LayerWeights = str | Mapping[str, float]

LAYER_WEIGHTS: dict[str, Callable[[list[int], list[int]], list[float]]] = {
    "sqrt": lambda groups, sizes: _normalised(
        [math.sqrt(g * m) for g, m in zip(groups, sizes, strict=True)]
    ),
    "uniform": lambda groups, sizes: [1.0] * len(sizes),
    "mean": lambda groups, sizes: [1 / (g * m * m) for g, m in zip(groups, sizes, strict=True)],
}
"""Layer weights from the number and the size m of each layer's Gram matrices."""


def _normalised(weights: list[float]) -> list[float]:
    total = sum(weights)
    return [w / total for w in weights]


@dataclass(frozen=True)
class Term:
    """The regularised layers of one device, with everything that is fixed until they change."""

    layers: list[FilterLayer]
    columns: list[bool]
    with_bias: list[bool]
    factors: list[float]
    coefficients: Tensor  # [L], on the device
    subsets: dict[tuple[int, ...], Tensor] = field(default_factory=dict)

    def tensors(self) -> dict[str, Any]:
        """The current parameters, as arguments of a functional call."""
        return {
            "weights": [layer.weight for layer in self.layers],
            "biases": [
                layer.bias if bias else None
                for layer, bias in zip(self.layers, self.with_bias, strict=True)
            ],
            "groups": [layer.groups for layer in self.layers],
        }

    def owned(self, parameters: set[int]) -> tuple[dict[str, Any], Tensor] | None:
        """Arguments and coefficients of the layers with a parameter of that set.

        Of those, tensors outside the set are detached: some other optimizer steps them.
        """
        taken, weights, biases = [], [], []
        for i, layer in enumerate(self.layers):
            bias = layer.bias if self.with_bias[i] else None
            mine = any(id(p) in parameters for p in layer.weight_parameters())
            bias_mine = bias is not None and id(bias) in parameters
            if mine or bias_mine:
                taken.append(i)
                weights.append(layer.weight if mine else layer.weight.detach())
                biases.append(bias if bias is None or bias_mine else bias.detach())
        if not taken:
            return None
        key = tuple(taken)
        if key not in self.subsets:
            whole = len(taken) == len(self.layers)
            self.subsets[key] = self.coefficients if whole else self.coefficients[taken]
        groups = [self.layers[i].groups for i in taken]
        return {"weights": weights, "biases": biases, "groups": groups}, self.subsets[key]


@dataclass(frozen=True)
class Plan:
    """The layers as a model has them at one time: one term a device, and what is left out."""

    terms: list[Term]
    skipped: list[SkippedLayer]


@dataclass(frozen=True)
class Selection:
    """The arguments of OrthoRegularizer that choose layers."""

    side: str
    layer_weights: LayerWeights
    include: Selector | None
    exclude: Selector | None
    bias: bool | str
    max_dim: int

    def plan(self, model: nn.Module) -> Plan:
        """Sorts the layers that a model has now."""
        found, skipped = inspect_layers(model)
        taken: list[FilterLayer] = []
        for layer in found:
            reason = self._reason_to_skip(layer, found)
            if reason:
                skipped.append(SkippedLayer(layer.name, layer.kind, reason))
            else:
                taken.append(layer)
        factors = self._factors(taken)
        by_device: dict[torch.device, list[int]] = {}
        for i, layer in enumerate(taken):
            by_device.setdefault(layer.weight_parameters()[0].device, []).append(i)
        terms = [
            Term(
                layers=[taken[i] for i in indices],
                columns=[self._gram_size(taken[i])[1] for i in indices],
                with_bias=[self._takes_bias(taken[i]) for i in indices],
                factors=[factors[i] for i in indices],
                coefficients=_on_device([factors[i] for i in indices], taken, device),
            )
            for device, indices in by_device.items()
        ]
        return Plan(terms, skipped)

    def _reason_to_skip(self, layer: FilterLayer, found: list[FilterLayer]) -> str:
        if self.exclude is not None and _selects(self.exclude, layer):
            return "excluded by exclude="
        if self.include is not None and not _selects(self.include, layer):
            return "not selected by include="
        if not layer.trainable:
            return "frozen: its weight does not require a gradient"
        if layer.filters == 0 or layer.fan_in == 0:
            return "it has no filters"
        if self.include is not None:
            return ""
        if layer.kind == "linear" and layer is found[-1] and len(found) > 1:
            return "the classifier; name it in include= to regularise it"
        size = self._gram_size(layer)[0]
        if size > self.max_dim:
            return (
                f"its Gram matrix would be {size} x {size}, larger than max_dim={self.max_dim}; "
                "name it in include= or raise max_dim="
            )
        return ""

    def _takes_bias(self, layer: FilterLayer) -> bool:
        wanted = layer.kind != "linear" if self.bias == "conv" else bool(self.bias)
        return wanted and layer.bias is not None

    def _gram_size(self, layer: FilterLayer) -> tuple[int, bool]:
        """The rows of the layer's Gram matrices, and whether they are on the columns' side."""
        n = layer.filters // layer.groups
        k = layer.fan_in + int(self._takes_bias(layer))
        columns = self.side == "cols" or (self.side == "small" and n > k)
        return (k if columns else n), columns

    def _factors(self, taken: list[FilterLayer]) -> list[float]:
        if isinstance(self.layer_weights, str):
            groups = [layer.groups for layer in taken]
            sizes = [self._gram_size(layer)[0] for layer in taken]
            return LAYER_WEIGHTS[self.layer_weights](groups, sizes)
        return [float(self.layer_weights.get(layer.name, 1.0)) for layer in taken]

    def check(self, model: nn.Module) -> None:
        """Every name or pattern must mean some layer: a typo would switch the term off silently.

        Raises:
            ValueError: one does not, or a layer weight is no finite number of at least 0.
        """
        names = [layer.name for layer in inspect_layers(model)[0]]
        for argument, selector in (("include", self.include), ("exclude", self.exclude)):
            for pattern in _patterns(selector):
                if not fnmatch.filter(names, pattern):
                    raise unknown_name(f"layer in {argument}=", pattern, names)
        if not isinstance(self.layer_weights, str):
            for name, weight in self.layer_weights.items():
                if name not in names:
                    raise unknown_name("layer in layer_weights=", name, names)
                if not is_factor(weight):
                    raise ValueError(
                        f"layer_weights[{name!r}] is {weight!r}, expected a finite number of at "
                        "least 0"
                    )


def _on_device(
    factors: list[float], layers: list[FilterLayer], device: torch.device
) -> Tensor:  # [L]
    """The factors in the widest precision of the layers."""
    double = any(p.dtype == torch.float64 for layer in layers for p in layer.weight_parameters())
    return torch.tensor(factors, dtype=torch.float64 if double else torch.float32).to(device)


def is_factor(value: object) -> bool:
    """Whether the value is a finite number of at least 0."""
    return isinstance(value, Real) and math.isfinite(value) and float(value) >= 0


def _patterns(selector: Selector | None) -> list[str]:
    if selector is None or callable(selector):
        return []
    return [selector] if isinstance(selector, str) else list(selector)


def _selects(selector: Selector, layer: FilterLayer) -> bool:
    if callable(selector):
        return bool(selector(layer.name, layer.module))
    return any(fnmatch.fnmatchcase(layer.name, pattern) for pattern in _patterns(selector))
