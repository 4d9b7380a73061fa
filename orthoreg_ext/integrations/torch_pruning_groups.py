"""Reads Torch-Pruning's groups: which layers count, and which channel of the root each score has.

A group lists (dependency, indices) pairs: one side of a layer and the channels of it that leave
together with channels of the group's root, `root_idxs`, pair by pair.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

OUT = (tp.prune_conv_out_channels, tp.prune_linear_out_channels)
IN = (tp.prune_conv_in_channels, tp.prune_linear_in_channels)
DEPTHWISE = (tp.prune_depthwise_conv_out_channels,)
BATCHNORM = (tp.prune_batchnorm_out_channels,)
LAYERNORM = (tp.prune_layernorm_out_channels,)
GROUPNORM = (tp.prune_groupnorm_out_channels,)

# what a reduction sees where a layer has nothing for a channel of the root
_ABSENT = {"prod": 1.0, "max": -99999.0}


@dataclass(frozen=True)
class Item:
    """One side of one layer in a group."""

    layer: nn.Module
    inputs: bool  # its input channels, not its filters
    channels: list[int] | None  # of the layer; None: 0, 1, 2, ...
    places: list[int] | None  # of each the root channel's position in the group; None: 0, 1, 2, ...

    def spread(
        self,
        scores: Tensor,  # [channels of the layer]
        size: int,
        reduction: str | None,
    ) -> Tensor:  # [size]
        """The scores by root channel; those of several channels of one root channel are added.

        Raises:
            IndexError: the layer has no such channel.
        """
        last = size - 1 if self.channels is None else max(self.channels, default=0)
        if last >= len(scores):
            raise IndexError(f"channel {last}, but the layer has {len(scores)}")
        if self.channels is None:
            scores = scores[:size]
        else:
            scores = scores[torch.tensor(self.channels, device=scores.device)]
        if self.places is None:
            return scores
        places = torch.tensor(self.places, device=scores.device)
        found = scores.new_zeros(size).index_add_(0, places, scores)
        absent = _ABSENT.get(reduction or "")
        if absent is not None and len(set(self.places)) < size:
            held = torch.zeros(size, dtype=torch.bool, device=scores.device)
            held[places] = True
            found = torch.where(held, found, absent)
        return found


def size_of(group: Any) -> int:
    """The root channels of a group."""
    return len(group[0].idxs)


def is_whole(group: Any) -> bool:
    """Whether a group holds all channels of its root, as those that a pruner scores do."""
    graph, root = group._DG, group[0].dep
    if graph is None:
        return False
    inputs = root.handler in IN  # attention is scored from the layer behind it
    channels = graph.get_in_channels if inputs else graph.get_out_channels
    return bool(size_of(group) == channels(root.target))


def items_of(
    group: Any, handlers: Collection[Any], types: tuple[type[nn.Module], ...]
) -> list[Item]:
    """The sides of layers in a group that a criterion counts.

    Args:
        group: a ``tp.Group``, of all channels of its root or some, in any order.
        handlers: the pruning functions that stand for a side that counts.
        types: the classes of the layers that count.
    """
    first = group[0].root_idxs
    order = list(range(len(first)))
    found = []
    for item in group.items:
        layer, handler, roots = item.dep.target.module, item.dep.handler, item.root_idxs
        if handler not in handlers or not _counts(layer, types):
            continue
        channels = None if item.idxs == order else list(item.idxs)
        places = None
        if roots != first:
            if None in roots:  # grouped-query attention: the origin is lost
                continue
            position = {root: place for place, root in enumerate(first)}
            places = [position[root] for root in roots]
        found.append(Item(layer, handler in IN, channels, places))
    return found


def reduced(
    rows: list[Tensor],  # each [r]
    reduction: str | None,
) -> Tensor:  # [r], without reduction [rows, r]
    """One score a root channel of those of the layers of a group."""
    if reduction == "first":
        return rows[0]
    if reduction == "gate":
        return rows[-1]
    table = torch.stack([row.to(rows[0].device) for row in rows])
    if reduction == "mean":
        return table.mean(0)
    if reduction == "sum":
        return table.sum(0)
    if reduction == "max":
        return table.amax(0)
    return table if reduction is None else table.prod(0)


@dataclass(frozen=True)
class LayerScores:
    """The scores of one layer."""

    outputs: Tensor  # [out]
    inputs: Tensor | None  # [in]
    bias: Tensor | None  # [out]


@dataclass(frozen=True)
class _Stamp:
    """Tells whether a tensor is still the one that was read, unchanged."""

    tensor: weakref.ref[Tensor]
    state: tuple[Any, ...]

    @staticmethod
    def of(tensor: Tensor) -> _Stamp:
        return _Stamp(weakref.ref(tensor), _state(tensor))

    def fits(self, tensor: Tensor) -> bool:
        return self.tensor() is tensor and self.state == _state(tensor)


def _state(tensor: Tensor) -> tuple[Any, ...]:
    # inference tensors count no versions: never equal, so never taken from the cache
    version = object() if tensor.is_inference() else tensor._version
    return version, tensor.data_ptr(), tensor.shape, tensor.dtype


class ScoreCache:
    """The scores of a model's layers during one pass of a pruner over its groups.

    A pass scores every group once, so a group that comes again begins a new pass, and nothing of
    the old one is kept. Within a pass scores are dropped as soon as a tensor that they come from is
    replaced (pruned, or a new gradient) or written in place. The one change that torch does not
    tell is a write through ``.data`` between two groups of the same pass.
    """

    def __init__(self) -> None:
        self._graph: weakref.ref[Any] | None = None
        self._scored: set[tuple[int, Any]] = set()
        self._found: weakref.WeakKeyDictionary[nn.Module, tuple[LayerScores, list[_Stamp]]] = (
            weakref.WeakKeyDictionary()
        )

    def __reduce__(self) -> tuple[type[ScoreCache], tuple[()]]:
        """A copy begins empty."""
        return ScoreCache, ()

    def begin(self, group: Any) -> None:
        """To be called before a group is scored."""
        root = group[0].dep
        key = (id(root.target.module), root.handler)
        if self._graph is None or self._graph() is not group._DG or key in self._scored:
            self.clear()
            self._graph = weakref.ref(group._DG)
        self._scored.add(key)

    def clear(self) -> None:
        """Forgets all scores."""
        self._graph = None
        self._scored.clear()
        self._found.clear()

    def get(self, layer: nn.Module, tensors: Iterable[Tensor]) -> LayerScores | None:
        """The scores of a layer if these are the tensors that they were computed from."""
        found = self._found.get(layer)
        if found is None:
            return None
        scores, stamps = found
        now = list(tensors)
        fits = len(now) == len(stamps) and all(map(_Stamp.fits, stamps, now))
        return scores if fits else None

    def put(self, layer: nn.Module, tensors: Iterable[Tensor], scores: LayerScores) -> None:
        """Keeps the scores of a layer and what they were computed from."""
        self._found[layer] = (scores, [_Stamp.of(tensor) for tensor in tensors])


def layers_of(group: Any, types: tuple[type[nn.Module], ...]) -> Iterator[nn.Module]:
    """All layers of the model that a criterion may count, whichever group they are in."""
    for module in group._DG.module2node:
        if _counts(module, types):
            yield module


def _counts(module: Any, types: tuple[type[nn.Module], ...]) -> bool:
    return isinstance(module, types) and isinstance(getattr(module, "weight", None), Tensor)


def name_of(group: Any, layer: nn.Module) -> str:
    """The name of a layer, for messages."""
    names: dict[nn.Module, str] = getattr(group._DG, "_module2name", {})
    return names.get(layer) or type(layer).__name__
