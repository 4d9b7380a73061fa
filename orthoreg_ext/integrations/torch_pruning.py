"""Importances and a regulariser for the pruners of Torch-Pruning (1.6).

    from orthoreg_ext.integrations.torch_pruning import OrthoRegImportance, with_orthoreg

    pruner = with_orthoreg(tp.pruner.BasePruner)(model, example_inputs, OrthoRegImportance(), ...)

An importance is called once a group. Here the first call of a pruner's step scores all layers of
the model, in one pass over weights and gradients; the others read from it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from .. import functional
from ..errors import choose
from ..pruning.variety_rules import RULES, THRESHOLD
from . import missing

try:
    import torch_pruning  # noqa: F401
except ModuleNotFoundError as error:
    raise missing(__name__, error) from None
from .torch_pruning_fused import FusedImportance, Normalizer, warn_of_train_mode
from .torch_pruning_groups import (
    BATCHNORM,
    DEPTHWISE,
    GROUPNORM,
    IN,
    LAYERNORM,
    OUT,
    LayerScores,
    items_of,
    size_of,
)
from .torch_pruning_regularized import with_orthoreg
from .torch_pruning_similarity import distinct, filters_of, similar

__all__ = [
    "FusedMagnitudeImportance",
    "FusedTaylorImportance",
    "OrthoRegImportance",
    "VarietyImportance",
    "with_orthoreg",
]


class FusedMagnitudeImportance(FusedImportance):
    """``tp.importance.GroupMagnitudeImportance`` in one pass over all layers of the model.

    The score of a channel in a layer is sum |w|^p over the weights that make it (convolution and
    linear outputs, scales of BatchNorm and LayerNorm) or read it (inputs); a bias is a layer of
    its own. `group_reduction` makes one score of those of all layers in the group. Depthwise
    filters do not count, and an input channel of a grouped convolution has the sum over all
    groups, both as there (importance.py:155-245 of 1.6.1). Half precision is added in float32.

    Args:
        p: the degree of the norm; the root is not taken.
        group_reduction: ``"mean"``, ``"sum"``, ``"max"``, ``"prod"``, ``"first"`` or ``"gate"``
            (the last layer of the group); None for all of them, [layers, channels].
        normalizer: ``"sum"``, ``"mean"``, ``"max"``, ``"standarization"``, ``"gaussian"``,
            ``"lamp"``, ``"sentinel_q"`` (over the q-quantile), a function or None.
        bias: whether biases count.
        target_types: the layers that count.

    Raises:
        ValueError: an argument is unknown or out of range.
    """

    HANDLERS: tuple[Any, ...] = (*OUT, *IN, *BATCHNORM, *LAYERNORM)

    def __init__(
        self,
        p: float = 2,
        group_reduction: str | None = "mean",
        normalizer: Normalizer = "mean",
        bias: bool = False,
        target_types: Sequence[type[nn.Module]] | None = None,
    ) -> None:
        if isinstance(p, bool) or not isinstance(p, (int, float)) or not p > 0:
            raise ValueError(f"p is {p!r}, expected the degree of a norm above 0")
        super().__init__(group_reduction, normalizer, bias, target_types)
        self.p = p

    def _sums(
        self, tensors: list[Tensor], slopes: list[Tensor] | None, groups: list[int]
    ) -> tuple[list[Tensor], list[Tensor]]:
        name = "l2" if self.p == 2 else "l1"
        if self.p not in (1, 2):
            wide = [t.to(torch.promote_types(t.dtype, torch.float32)) for t in tensors]
            tensors = [t.abs().pow_(self.p) for t in wide]
        outputs, inputs = functional.filter_scores(
            tensors, criteria=(name,), dim=(0, 1), groups=groups
        )
        if name == "l2":
            return _squared(outputs[name]), _squared(inputs[name])
        return outputs[name], inputs[name]


class FusedTaylorImportance(FusedImportance):
    """``tp.importance.GroupTaylorImportance`` in one pass over all layers of the model.

    The score of a channel in a layer is sum |w g| over the weights that make it or read it, or
    |sum w g| with `multivariable`; all else as in :class:`FusedMagnitudeImportance`. g is the
    gradient that is there when the pruner's step begins.

    Torch-Pruning 1.6.1 lists BatchNorm among its target types but never scores it, since it asks
    for the pruning function of GroupNorm instead (importance.py:508). The same happens here, so
    that the same channels go; `batchnorm` scores what it says it scores, |gamma g|. It also sorts
    the indices of each layer but not those of the root that belong to them; here pairs stay pairs.

    Args:
        group_reduction: as in :class:`FusedMagnitudeImportance`.
        normalizer: as in :class:`FusedMagnitudeImportance`.
        multivariable: the absolute value of the sum, not the sum of absolute values. Take the
            gradient in eval mode then: see :class:`OrthoRegImportance`.
        bias: whether biases count.
        target_types: the layers that count.
        batchnorm: whether BatchNorms count.

    Raises:
        ValueError: an argument is unknown.
    """

    HANDLERS: tuple[Any, ...] = (*OUT, *IN, *GROUPNORM, *LAYERNORM)
    SLOPES: ClassVar[bool] = True

    def __init__(
        self,
        group_reduction: str | None = "mean",
        normalizer: Normalizer = "mean",
        multivariable: bool = False,
        bias: bool = False,
        target_types: Sequence[type[nn.Module]] | None = None,
        *,
        batchnorm: bool = False,
    ) -> None:
        super().__init__(group_reduction, normalizer, bias, target_types)
        self.multivariable = multivariable
        if batchnorm:
            self.HANDLERS = (*self.HANDLERS, *BATCHNORM)

    def _sums(
        self, tensors: list[Tensor], slopes: list[Tensor] | None, groups: list[int]
    ) -> tuple[list[Tensor], list[Tensor]]:
        name = "taylor" if self.multivariable else "taylor_abs"
        outputs, inputs = functional.filter_scores(
            tensors, slopes, (name,), dim=(0, 1), groups=groups
        )
        return outputs[name], inputs[name]


class OrthoRegImportance(FusedImportance):
    """OrthoReg's estimator on Torch-Pruning's groups, in one pass over all layers of the model.

    The score of a channel in a layer is (sum w g)^2 over the filter that makes it, bias included
    (Lubana et al., arXiv 2009.05014, released code: the square of the mean gradient product), for
    convolutions of any kind and linear layers. The released code sorts the raw scores of all
    layers, so nothing is normalised by default; and it knows no groups: `group_reduction` is ours.
    Equal to ``ox.pruning.prune(..., criterion="fisher")`` where every group is one unit.

    g is the gradient of the mean loss over the samples, **in eval mode**: behind a BatchNorm in
    train mode sum w g is 0 but for rounding, and the cut would be arbitrary. A warning tells when
    the scores look like that.

    Args:
        group_reduction: as in :class:`FusedMagnitudeImportance`.
        normalizer: as in :class:`FusedMagnitudeImportance`.
        bias: whether a bias is one more entry of its filter.
        target_types: the layers that count.

    Raises:
        ValueError: an argument is unknown.
    """

    HANDLERS: tuple[Any, ...] = (*OUT, *DEPTHWISE)
    TYPES: ClassVar[tuple[type[nn.Module], ...]] = (_ConvNd, nn.Linear)
    SLOPES: ClassVar[bool] = True

    def __init__(
        self,
        group_reduction: str | None = "mean",
        normalizer: Normalizer = None,
        bias: bool = True,
        target_types: Sequence[type[nn.Module]] | None = None,
    ) -> None:
        super().__init__(group_reduction, normalizer, bias, target_types)

    def _pass(self, layers: list[nn.Module]) -> list[LayerScores]:
        filters = [filters_of(layer) for layer in layers]
        biases = [self._bias(layer) for layer in layers]
        has_bias = any(bias is not None for bias in biases)
        scores = functional.filter_scores(
            [rows.weight for rows in filters],
            [rows.rows(rows.module.weight.grad) for rows in filters],  # type: ignore[arg-type]
            ("fisher", "taylor_abs"),
            biases=biases if has_bias else None,
            bias_grads=[None if b is None else b.grad for b in biases] if has_bias else None,
            groups=[rows.groups for rows in filters],
        )
        warn_of_train_mode(layers, scores["fisher"], scores["taylor_abs"])
        return [LayerScores(row, None, None) for row in scores["fisher"]]


class VarietyImportance(FusedImportance):
    """Makes a host importance look at redundant channels first (Hubens et al., arXiv 2203.05807).

    The paper's rule is not public; ours are those of ``ox.pruning.variety``: ``pairwise`` takes the
    most similar remaining pair of a group by |cos| and drops the channel with the lower host score,
    again and again; ``reweight`` lowers each host score by the share of the largest similarity to a
    channel that ranks higher; ``gate`` lets those with such a similarity of at least the threshold
    go first. How alike two channels are is the mean |cos| of the filters that make them, over the
    filter matrices of the group in which both have one; a bias does not count.

    Args:
        host: ``"l1"``, ``"l2"`` or ``"taylor"`` for the fused importances of that name with the
            arguments below, ``"orthoreg"``, or any importance of Torch-Pruning, whose own
            reduction and normalizer hold.
        mode: ``"pairwise"``, ``"reweight"`` or ``"gate"``.
        threshold: of ``"gate"``, in [0, 1].
        group_reduction: of a host given by name; as in :class:`FusedMagnitudeImportance`, but None.
        normalizer: of the result, as in :class:`FusedMagnitudeImportance`.
        bias: whether biases count in a host given by name.

    Raises:
        ValueError: an argument is unknown or out of range.
    """

    HANDLERS: tuple[Any, ...] = OUT
    TYPES: ClassVar[tuple[type[nn.Module], ...]] = (_ConvNd, nn.Linear)

    def __init__(
        self,
        host: str | Callable[[Any], Tensor | None] = "l1",
        mode: str = "pairwise",
        threshold: float = THRESHOLD,
        group_reduction: str = "mean",
        normalizer: Normalizer = "mean",
        bias: bool = False,
    ) -> None:
        self.rule = RULES[choose("mode", mode, RULES)]
        if not isinstance(threshold, (int, float)) or not 0 <= threshold <= 1:
            raise ValueError(f"threshold is {threshold!r}, expected a number in [0, 1]")
        if group_reduction is None:
            raise ValueError("group_reduction is None, but a channel needs one score: try 'mean'")
        self.threshold = threshold
        super().__init__(group_reduction, normalizer, bias, None)
        if callable(host):
            self.host = host
        else:
            make = _HOSTS[choose("host", host, _HOSTS)]
            self.host = make(group_reduction=group_reduction, normalizer=None, bias=bias)

    def clear(self) -> None:  # noqa: D102
        if isinstance(self.host, FusedImportance):
            self.host.clear()

    def _raw(self, group: Any) -> Tensor | None:  # [root channels]
        scores = self.host(group)
        if scores is None:
            return None
        if scores.dim() != 1 or len(scores) != size_of(group):
            raise ValueError(
                f"the host importance gives a tensor of shape {tuple(scores.shape)} for a group of "
                f"{size_of(group)} channels, expected one score each"
            )
        items = items_of(group, self.HANDLERS, tuple(self.target_types))
        alike = similar(items, len(scores))
        found = self.rule(scores.double().cpu(), alike, self.threshold)
        return distinct(found).to(scores.device)


_HOSTS: dict[str, Callable[..., Callable[[Any], Tensor | None]]] = {
    "l1": lambda **arguments: FusedMagnitudeImportance(1, **arguments),
    "l2": lambda **arguments: FusedMagnitudeImportance(2, **arguments),
    "taylor": FusedTaylorImportance,
    "orthoreg": OrthoRegImportance,
}


def _squared(rows: list[Tensor]) -> list[Tensor]:  # each [n]
    return list(torch.cat(rows).square_().split([len(row) for row in rows]))
