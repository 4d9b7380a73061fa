"""Where the channels of a layer are stored: which dimension of which tensor, which attribute."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm


@dataclass(frozen=True)
class Place:
    """A dimension of a tensor that is indexed by channel.

    With groups > 1 it holds the channels of one convolution group only; the channels of all groups
    at the same position share an entry.
    """

    tensor: str  # attribute of the module: "weight", "running_mean", ...
    dim: int
    groups: int = 1


@dataclass(frozen=True)
class Layout:
    """One side of a layer: how many channels, where they are, which attributes count them."""

    channels: int
    places: tuple[Place, ...]
    sizes: tuple[str, ...]  # attributes that hold the number of channels


def is_depthwise(module: nn.Module) -> bool:
    """Whether input channel i alone makes output channel i (groups == inputs == outputs > 1)."""
    return (
        isinstance(module, _ConvNd)
        and module.groups == module.in_channels == module.out_channels
        and module.groups > 1
    )


def one_input_per_group(module: nn.Module) -> bool:
    """Whether every group of a convolution sees one input channel (depthwise, with multiplier)."""
    return isinstance(module, _ConvNd) and module.groups == module.in_channels and module.groups > 1


def layout(module: nn.Module, side: str) -> Layout | None:
    """The channels of one side of a module; None for a module that cannot be cut.

    Args:
        module: a layer with parameters.
        side: "out" (filters), "in" (inputs) or "both" (layers where one channel is both).
    """
    if isinstance(module, _ConvNd):
        return _conv(module, side)
    if isinstance(module, nn.Linear):
        if side == "in":
            return Layout(module.in_features, (Place("weight", 1),), ("in_features",))
        return Layout(
            module.out_features, (Place("weight", 0), Place("bias", 0)), ("out_features",)
        )
    if isinstance(module, (_BatchNorm, _InstanceNorm)):
        names = ("weight", "bias", "running_mean", "running_var")
        places = tuple(Place(name, 0) for name in names)
        return Layout(module.num_features, places, ("num_features",))
    if isinstance(module, nn.GroupNorm):
        return Layout(
            module.num_channels, (Place("weight", 0), Place("bias", 0)), ("num_channels",)
        )
    if isinstance(module, nn.LayerNorm) and len(module.normalized_shape) == 1:
        size = module.normalized_shape[0]
        return Layout(size, (Place("weight", 0), Place("bias", 0)), ("normalized_shape",))
    if isinstance(module, nn.PReLU):
        places = (Place("weight", 0),) if module.num_parameters > 1 else ()
        return Layout(module.num_parameters, places, ("num_parameters",) if places else ())
    if isinstance(module, nn.Embedding):
        return Layout(module.embedding_dim, (Place("weight", 1),), ("embedding_dim",))
    return None


def _conv(conv: _ConvNd, side: str) -> Layout:
    groups, weight = conv.groups, ("weight", 1 if conv.transposed else 0)
    if is_depthwise(conv):
        places = (Place("weight", 0), Place("bias", 0))
        return Layout(conv.out_channels, places, ("out_channels", "in_channels", "groups"))
    if one_input_per_group(conv):
        # input i makes outputs i * m .. (i + 1) * m: a whole group goes at once
        if side == "in":
            rows = (Place("weight", 0),) if conv.transposed else ()
            return Layout(conv.in_channels, rows, ("in_channels", "groups"))
        rows = () if conv.transposed else (Place("weight", 0),)
        return Layout(conv.out_channels, (*rows, Place("bias", 0)), ("out_channels",))
    if side == "in":
        place = Place("weight", 0) if conv.transposed else Place("weight", 1, groups)
        return Layout(conv.in_channels, (place,), ("in_channels",))
    place = Place(*weight, groups if conv.transposed else 1)
    return Layout(conv.out_channels, (place, Place("bias", 0)), ("out_channels",))


def tied_positions(module: nn.Module, side: str) -> int:
    """The period with which channels of one side must go together; 0 where each may go alone.

    A grouped convolution and a GroupNorm stay valid when every group loses the same positions:
    channels i and i + period belong together.
    """
    if isinstance(module, nn.GroupNorm):
        return module.num_channels // module.num_groups if module.num_groups > 1 else 0
    if isinstance(module, _ConvNd) and module.groups > 1 and not one_input_per_group(module):
        return (module.in_channels if side == "in" else module.out_channels) // module.groups
    return 0
