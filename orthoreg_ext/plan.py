"""Which layers of a model are regularised, on which side and with what weight."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from operator import attrgetter, is_, methodcaller
from typing import Any

import torch
from torch import Tensor, nn

from .arguments import is_factor
from .distributed import refuse_flat_parameters
from .errors import unknown_name
from .in_place import is_capturing
from .layers import FilterLayer, SkippedLayer, inspect_layers
from .options import check_num_groups, count_groups
from .penalties import PENALTIES, Row
from .reference import compute_dtype
from .whole_matrix import start_vectors

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
    costs: list[int]  # of each layer, in proportion
    coefficients: Tensor  # [L], on the device
    common: dict[str, Any]  # what the penalty takes beside the layers
    by_layer: dict[str, list[Any]]  # the same, one entry a layer

    def tensors(self) -> dict[str, Any]:
        """The current parameters, as arguments of a functional call."""
        return {
            "weights": [layer.weight for layer in self.layers],
            "biases": [
                layer.bias if bias else None
                for layer, bias in zip(self.layers, self.with_bias, strict=True)
            ],
            "groups": [layer.groups for layer in self.layers],
            **self.common,
            **self.by_layer,
        }

    def owned(self, parameters: set[int]) -> list[int]:
        """The layers with a parameter of that set of identities."""
        return [
            i
            for i in range(len(self.layers))
            if any(id(p) in parameters for p in self.parameters(i))
        ]

    def parameters(self, i: int) -> list[Tensor]:
        """The parameters of a layer that the term is of."""
        layer = self.layers[i]
        bias = layer.own_bias if self.with_bias[i] else None
        return [*layer.weight_parameters(), *([] if bias is None else [bias])]

    def take(self, indices: Sequence[int]) -> Term:
        """The term of some of the layers."""
        return replace(
            self,
            layers=[self.layers[i] for i in indices],
            columns=[self.columns[i] for i in indices],
            with_bias=[self.with_bias[i] for i in indices],
            factors=[self.factors[i] for i in indices],
            costs=[self.costs[i] for i in indices],
            coefficients=self.coefficients_of(indices, self.coefficients.dtype),
            by_layer={name: [of[i] for i in indices] for name, of in self.by_layer.items()},
        )

    def coefficients_of(self, indices: Sequence[int], dtype: torch.dtype) -> Tensor:  # [L]
        """The coefficients of some layers, on the device; to be kept, for they may be copied there.

        Raises:
            RuntimeError: they have to be copied while a CUDA graph is captured.
        """
        ordered = list(indices) == list(range(len(self.layers)))
        if ordered and dtype == self.coefficients.dtype:
            return self.coefficients
        return _on_device([self.factors[i] for i in indices], dtype, self.coefficients.device)

    def _owns_weight(self, i: int, parameters: set[int]) -> bool:
        return any(id(p) in parameters for p in self.layers[i].weight_parameters())

    def arguments(self, indices: Sequence[int], parameters: set[int]) -> dict[str, Any]:
        """The current parameters of some layers, as arguments of a functional call.

        Tensors outside the set are detached: some other optimizer steps them.
        """
        weights, biases = [], []
        for i in indices:
            layer = self.layers[i]
            bias = layer.bias if self.with_bias[i] else None
            mine = self._owns_weight(i, parameters)
            weights.append(layer.weight if mine else layer.weight.detach())
            if bias is not None and id(layer.own_bias) not in parameters:
                bias = bias.detach()
            biases.append(bias)
        groups = [self.layers[i].groups for i in indices]
        taken = {name: [of[i] for i in indices] for name, of in self.by_layer.items()}
        return {"weights": weights, "biases": biases, "groups": groups, **self.common, **taken}


@dataclass(frozen=True)
class Plan:
    """The layers as a model has them at one time: one term a device, and what is left out."""

    terms: list[Term]
    skipped: list[SkippedLayer]

    def vectors(self) -> dict[str, Tensor]:
        """The eigenvectors of the layers, by name, of a penalty that takes them."""
        return {
            layer.name: vector
            for term in self.terms
            for layer, vector in zip(term.layers, term.by_layer.get("vectors", []), strict=False)
        }


class ModelState:
    """What a plan hangs on: the modules and parameters of a model, and the parameters' form."""

    _form = attrgetter("requires_grad", "device", "dtype", "shape")
    _entries = methodcaller("values")

    def __init__(self, model: nn.Module) -> None:
        modules = list(model.modules())
        # nothing says that a module has changed, so all is compared; this is fast because no loop
        # over modules or parameters runs in Python
        self._tables: list[Any] = [m._modules for m in modules] + [m._parameters for m in modules]
        self._lengths = [len(table) for table in self._tables]
        self._filled = [table for table in self._tables if table]
        self._objects = list(chain.from_iterable(map(self._entries, self._filled)))
        self._parameters = list(model.parameters())
        self._forms = list(map(self._form, self._parameters))

    def holds(self) -> bool:
        """Whether the model has the same modules and parameters, in the same form."""
        return (
            list(map(len, self._tables)) == self._lengths
            and all(map(is_, chain.from_iterable(map(self._entries, self._filled)), self._objects))
            and list(map(self._form, self._parameters)) == self._forms
        )


@dataclass(frozen=True)
class Selection:
    """The arguments of OrthoRegularizer that choose layers."""

    side: str
    layer_weights: LayerWeights
    include: Selector | None
    exclude: Selector | None
    bias: bool | str
    max_dim: int
    penalty: Row = PENALTIES["orthoreg"]
    num_groups: int | None = None

    def plan(self, model: nn.Module, vectors: Mapping[str, Tensor] | None = None) -> Plan:
        """Sorts the layers that a model has now; `vectors` are those of the plan before."""
        refuse_flat_parameters(model)
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
                costs=[self._cost(taken[i]) for i in indices],
                coefficients=_on_device([factors[i] for i in indices], widest(taken), device),
                common={} if self.num_groups is None else {"num_groups": self.num_groups},
                by_layer=self._by_layer([taken[i] for i in indices], vectors or {}),
            )
            for device, indices in by_device.items()
        ]
        return Plan(terms, skipped)

    def _reason_to_skip(self, layer: FilterLayer, found: list[FilterLayer]) -> str:
        if self.exclude is not None and selects(self.exclude, layer):
            return "excluded by exclude="
        if self.include is not None and not selects(self.include, layer):
            return "not selected by include="
        if not layer.trainable:
            return "frozen: its weight does not require a gradient"
        if layer.filters == 0 or layer.fan_in == 0:
            return "it has no filters"
        if self.penalty.convolutional and not _is_2d(layer):
            return (
                f"penalty {self.penalty.name!r} is of 2-D convolutions and linear layers, not of "
                f"{type(layer.module).__name__}"
            )
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

    def _by_layer(
        self, layers: list[FilterLayer], vectors: Mapping[str, Tensor]
    ) -> dict[str, list[Any]]:
        """What the penalty takes of each layer beside its parameters."""
        found: dict[str, list[Any]] = {}
        if "strides" in self.penalty.takes:
            found["strides"] = [_stride(layer.module) for layer in layers]
        if "vectors" in self.penalty.takes:
            found["vectors"] = [self._vectors(of, vectors.get(of.name)) for of in layers]
        return found

    def _vectors(self, layer: FilterLayer, known: Tensor | None) -> Tensor:  # [g, m]
        """The eigenvectors of the layer: those that are known, if they still fit."""
        size, columns = self._gram_size(layer)
        weight = layer.weight
        dtype = compute_dtype(weight.dtype)
        if known is not None and known.shape == (layer.groups, size):
            return known.to(weight.device, dtype)
        bias = layer.bias if self._takes_bias(layer) else None
        return start_vectors(weight, bias, layer.groups, columns)

    def _takes_bias(self, layer: FilterLayer) -> bool:
        wanted = layer.kind != "linear" if self.bias == "conv" else bool(self.bias)
        return wanted and layer.own_bias is not None and not self.penalty.convolutional

    def _groups(self, layer: FilterLayer) -> int:
        """The filter matrices of the layer that are compared within themselves."""
        if "num_groups" not in self.penalty.takes:
            return layer.groups
        most = check_num_groups(self.num_groups)
        return layer.groups * count_groups(layer.filters // layer.groups, most)

    def _gram_size(self, layer: FilterLayer) -> tuple[int, bool]:
        """The rows of the layer's Gram matrices, and whether they are on the columns' side."""
        n = layer.filters // self._groups(layer)
        k = layer.fan_in + int(self._takes_bias(layer))
        small = self.side == "small" or self.penalty.both_sides
        columns = n > k if small else self.side == "cols"
        if self.penalty.of_filters:
            columns = False
        return (k if columns else n), columns

    def _cost(self, layer: FilterLayer) -> int:
        """The multiply-accumulates of value and gradient, in proportion.

        Each entry of W meets one row of G in G and one in its gradient; power iteration makes no G,
        and the self-convolution one for each of its shifts.
        """
        entries = layer.filters * (layer.fan_in + int(self._takes_bias(layer)))
        if "vectors" in self.penalty.takes:
            return entries
        cost = entries * self._gram_size(layer)[0]
        if self.penalty.convolutional and layer.kind != "linear":
            size: tuple[int, ...] = tuple(layer.module.weight.shape[2:])  # type: ignore[index]
            steps = zip(size, _stride(layer.module), strict=True)
            cost *= math.prod(2 * ((side - 1) // stride) + 1 for side, stride in steps)
        return cost

    def _factors(self, taken: list[FilterLayer]) -> list[float]:
        if isinstance(self.layer_weights, str):
            groups = [self._groups(layer) for layer in taken]
            sizes = [self._gram_size(layer)[0] for layer in taken]
            return LAYER_WEIGHTS[self.layer_weights](groups, sizes)
        return [float(self.layer_weights.get(layer.name, 1.0)) for layer in taken]

    def check(self, model: nn.Module) -> None:
        """Every name or pattern must mean some layer: a typo would switch the term off silently.

        Raises:
            TypeError: there is something else than names, patterns and functions.
            ValueError: one does not, or a layer weight is no finite number of at least 0.
        """
        names = [layer.name for layer in inspect_layers(model)[0]]
        for argument, selector in (("include", self.include), ("exclude", self.exclude)):
            if not _is_selector(selector):
                raise TypeError(
                    f"{argument} is {selector!r}, expected a name or pattern, a list of them or a "
                    "function of name and module"
                )
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


def _is_2d(layer: FilterLayer) -> bool:
    return isinstance(layer.module, nn.Conv2d | nn.Linear)


def _stride(module: nn.Module) -> tuple[int, int]:
    """The stride S, with dilation d S / gcd(S, d): the overlapping shifts are multiples of both."""
    if not isinstance(module, nn.Conv2d):
        return 1, 1
    (down, across), (d, e) = module.stride, module.dilation
    return down // math.gcd(down, d), across // math.gcd(across, e)


def widest(layers: list[FilterLayer]) -> torch.dtype:
    """The widest computing precision of the layers."""
    double = any(p.dtype == torch.float64 for layer in layers for p in layer.weight_parameters())
    return torch.float64 if double else torch.float32


def _on_device(factors: list[float], dtype: torch.dtype, device: torch.device) -> Tensor:  # [L]
    if is_capturing(device):
        raise RuntimeError(
            "the factors of the layers cannot be copied to the GPU while a CUDA graph is captured: "
            "run a step like the captured one before the capture"
        )
    return torch.tensor(factors, dtype=dtype).to(device)


def _is_selector(value: object) -> bool:
    if value is None or callable(value) or isinstance(value, str):
        return True
    return isinstance(value, Collection) and all(isinstance(name, str) for name in value)


def _patterns(selector: Selector | None) -> list[str]:
    if selector is None or callable(selector):
        return []
    return [selector] if isinstance(selector, str) else list(selector)


def selects(selector: Selector, layer: FilterLayer) -> bool:
    """Whether the names, patterns or function mean this layer."""
    if callable(selector):
        return bool(selector(layer.name, layer.module))
    return any(fnmatch.fnmatchcase(layer.name, pattern) for pattern in _patterns(selector))
