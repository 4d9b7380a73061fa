"""From modules to filter matrices: conv, grouped, depthwise, transposed conv and linear layers."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor as _is_wrapped

from .distributed import whole

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True)
class FilterLayer:
    """A layer whose weight is a set of filters.

    The tensors are read from the module at every access, so that a replaced parameter (pruning,
    parametrization) is the one that is seen.
    """

    name: str
    module: nn.Module
    kind: str  # "conv", "grouped", "depthwise", "transposed" or "linear"
    groups: int

    @property
    def weight(self) -> Tensor:  # [n, ...], the output dimension first
        """The filters; a view of the parameter but for grouped transposed convolutions (a copy).

        A weight that is sharded over ranks (DTensor) is gathered, on all of them.
        """
        return self.rows(whole(self.module.weight))  # type: ignore[arg-type]

    def rows(self, tensor: Tensor) -> Tensor:  # [n, ...]
        """Filters first: a tensor shaped as the parameter (its gradient, say), like `weight`."""
        if self.kind != "transposed":
            return tensor
        if self.groups == 1:
            return tensor.transpose(0, 1)
        # [groups * i, o, ...] -> [groups * o, i, ...]
        by_group: Tensor = tensor.unflatten(0, (self.groups, -1))
        return by_group.transpose(1, 2).flatten(0, 1)

    @property
    def bias(self) -> Tensor | None:  # [n]
        """The bias of the filters, if the layer has one; gathered like the weight."""
        bias = self.own_bias
        return None if bias is None else whole(bias)

    @property
    def own_bias(self) -> Tensor | None:  # [n]
        """The bias as the module has it."""
        bias: Tensor | None = self.module.bias  # type: ignore[assignment]
        return bias

    @property
    def trainable(self) -> bool:
        """Whether the weight, or the tensors it is computed from, require a gradient."""
        # what torch.func differentiates need not say that it requires a gradient
        return any(p.requires_grad or _is_wrapped(p) for p in self.weight_parameters())

    def weight_parameters(self) -> list[nn.Parameter]:
        """The parameters behind the weight: itself, or those of its parametrization."""
        own = self.module._parameters.get("weight")
        if own is not None:
            return [own]
        parametrizations = getattr(self.module, "parametrizations", {})
        return list(parametrizations["weight"].parameters())

    @property
    def filters(self) -> int:
        """The output filters of all groups."""
        weight: Tensor = self.module.weight  # type: ignore[assignment]
        return weight.shape[1] * self.groups if self.kind == "transposed" else weight.shape[0]

    @property
    def fan_in(self) -> int:
        """The entries of one filter, without its bias."""
        weight: Tensor = self.module.weight  # type: ignore[assignment]
        return weight.numel() // self.filters if self.filters else 0


@dataclass(frozen=True)
class SkippedLayer:
    """A layer that holds filters and is left alone, and why."""

    name: str
    kind: str
    reason: str


def layer_kind(module: nn.Module) -> str | None:
    """The kind of a layer with filters, as in :class:`FilterLayer`; None for other modules."""
    if isinstance(module, nn.Linear):
        return "linear"
    if isinstance(module, _TRANSPOSED):
        return "transposed"
    if isinstance(module, _CONVS):
        if module.groups == 1:
            return "conv"
        # with one filter a group and one input a filter
        one_input = module.in_channels == module.groups
        return "depthwise" if one_input and module.out_channels == module.groups else "grouped"
    return None


def filter_layers(model: nn.Module) -> list[FilterLayer]:
    """Lists the layers of a model that have filters, in the order of ``named_modules``.

    A module or a parameter that occurs twice is listed once, under its first name. Lazy layers
    have no shape yet and raise.

    Args:
        model: any module, also a single layer.

    Raises:
        ValueError: a lazy layer was not initialised by a first forward pass.
    """
    return inspect_layers(model)[0]


def inspect_layers(model: nn.Module) -> tuple[list[FilterLayer], list[SkippedLayer]]:
    """Like :func:`filter_layers`, with the layers that cannot be taken and the reason.

    Raises:
        ValueError: a lazy layer was not initialised by a first forward pass.
    """
    found: list[FilterLayer] = []
    skipped: list[SkippedLayer] = []
    seen: dict[int, str] = {}
    for full_name, module in model.named_modules():
        name = _without_wrappers(full_name)
        if any(nn.parameter.is_lazy(p) for p in module.parameters(recurse=False)):
            raise ValueError(f"layer {name!r} is lazy: run one forward pass before this")
        kind = layer_kind(module)
        if kind is None:
            skipped.extend(_foreign(name, module))
            continue
        key = _parameter_key(module)
        if key is None:
            skipped.append(
                SkippedLayer(
                    name,
                    kind,
                    "a forward hook recomputes its weight (torch.nn.utils.prune, or the old "
                    "weight_norm and spectral_norm): make it permanent with prune.remove, or use "
                    "torch.nn.utils.parametrizations",
                )
            )
            continue
        owner = seen.setdefault(key, name)
        if owner != name:
            skipped.append(SkippedLayer(name, kind, f"shares its weight with {owner!r}"))
            continue
        groups = 1 if isinstance(module, nn.Linear) else int(module.groups)
        found.append(FilterLayer(name, module, kind, groups))
    return found, skipped


def _without_wrappers(name: str) -> str:
    """The name that the module has without torch.compile, which puts a module around it."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def _parameter_key(module: nn.Module) -> int | None:
    """Identifies the parameter behind module.weight, also through parametrizations."""
    parametrizations = getattr(module, "parametrizations", None)
    if parametrizations is not None and "weight" in parametrizations:
        return id(parametrizations["weight"])
    weight = module._parameters.get("weight")
    return None if weight is None else id(weight)


def _foreign(name: str, module: nn.Module) -> list[SkippedLayer]:
    """Matrices that belong to no layer known here (embeddings, recurrent and attention weights)."""
    if _is_parametrization(module):
        return []
    return [
        SkippedLayer(
            f"{name}.{parameter}" if name else parameter,
            type(module).__name__.lower(),
            f"{type(module).__name__} is not a convolution or linear layer",
        )
        for parameter, tensor in module.named_parameters(recurse=False)
        if tensor.dim() >= 2
    ]


def _is_parametrization(module: nn.Module) -> bool:
    return isinstance(module, nn.utils.parametrize.ParametrizationList)
