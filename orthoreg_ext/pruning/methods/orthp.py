"""OrthP: after the cut every layer is made orthonormal again."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ...layers import FilterLayer, filter_layers
from .. import checks
from ..schedule import check_ratio
from .checks import positive
from .method import Method


class OrthP(Method):
    """Pruning, then exact isometry (the oracle of Wang and Fu, ICLR 2023, arXiv 2207.12534).

    There is no schedule: :meth:`finish` removes the filters that the rules choose, and
    :func:`orthogonalise` makes the filter matrix of every layer orthonormal. In a linear network
    that is all that trainability asks for; in others it throws away what the weights had learned,
    and the paper's own tables put it below pruning alone: it is there to be compared with. As the
    last step of another removal call :func:`orthogonalise` itself. An averaged copy (`ema`) is cut,
    and keeps its weights.

    Paper against code: see :func:`orthogonalise`.

    Args:
        model: as for :class:`~.method.Method`, like all that is not named here; by default
            criterion "l1" and scope "local".
        example_inputs: as for :class:`~.method.Method`.
        gain: as for :func:`orthogonalise`.
        layers: as for :func:`orthogonalise`.
    """

    DEFAULTS: ClassVar[dict[str, Any]] = {"criterion": "l1", "scope": "local"}

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        *,
        gain: float | str = 1.0,
        layers: Iterable[str | nn.Module] | None = None,
        **arguments: Any,
    ) -> None:
        self.gain = _gain(gain)
        super().__init__(model, example_inputs, **arguments)
        check_ratio(self.ratio)
        self.layers = [layer.name for layer in _layers(model, layers)]

    @property
    def done(self) -> bool:  # noqa: D102
        return True

    def _finish(self) -> None:
        chosen = self.lowest()
        _layers(self.model, self.layers)  # refuses what cannot be written before anything is cut
        self.remove(chosen)
        optimizers = self.engine.optimizers
        orthogonalise(self.model, gain=self.gain, layers=self.layers, optimizer=optimizers)

    def _settings(self) -> dict[str, Any]:
        return {**super()._settings(), "gain": self.gain, "layers": self.layers}


def orthogonalise(
    model: nn.Module,
    *,
    gain: float | str = 1.0,
    layers: Iterable[str | nn.Module] | None = None,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
) -> list[str]:
    """Makes the filters of every layer orthonormal in place, e.g. after :func:`prune`.

    With W [n, k] the filter matrix of a layer and Q R = W^T where n < k (Q R = W else) ::

        W <- gain * (Q diag(sign(R)))^T     (without the transposition else)

    so that W W^T = gain^2 I (W^T W else). Of a grouped convolution every group has its own matrix.
    A filter of zeros is dead: it stays so and is left out of the matrix.

    Paper against code: the released code takes sign(0) = 0, which deletes directions of a matrix
    without full rank; here it is 1, and QR completes them. QR depends on the order of the filters;
    the nearest orthonormal matrix would be the polar factor.

    Args:
        model: changed in place; frozen weights stay.
        gain: a number, or the name of a nonlinearity for ``torch.nn.init.calculate_gain``.
        layers: names or modules, containers for all inside; None for all convolutions and linear
            layers.
        optimizer: one or several; their state of the weights that are replaced is dropped.

    Returns:
        the names of the layers.

    Raises:
        TypeError, ValueError: an argument is wrong, a weight is not finite, or it is computed from
            others (a parametrization); nothing was changed.
    """
    factor = _gain(gain)
    optimizers = checks.optimizer_list(optimizer)
    chosen = _layers(model, layers)
    new = [[_orthonormal(view) * factor for view in _matrices(layer)] for layer in chosen]
    with torch.no_grad():
        for layer, matrices in zip(chosen, new, strict=True):
            for view, matrix in zip(_matrices(layer), matrices, strict=True):
                view.copy_(matrix.view(view.shape))
            for owner in optimizers:
                owner.state.pop(layer.weight_parameters()[0], None)
    return [layer.name for layer in chosen]


def _gain(gain: float | str) -> float:
    if isinstance(gain, str):
        return float(nn.init.calculate_gain(gain))  # type: ignore[arg-type]
    return positive("gain", gain)


def _layers(model: nn.Module, wanted: Iterable[str | nn.Module] | None) -> list[FilterLayer]:
    """The trainable layers to make orthonormal.

    Raises:
        ValueError: one cannot be written, or is not finite.
    """
    names = None if wanted is None else checks.layer_names(model, wanted)
    found = []
    for layer in filter_layers(model):
        if (names is not None and layer.name not in names) or not layer.trainable:
            continue
        if "weight" not in layer.module._parameters:
            raise ValueError(
                f"layer {layer.name!r}: 'weight' is parametrized and cannot be replaced; call "
                "torch.nn.utils.parametrize.remove_parametrizations first, or name the other "
                "layers in layers"
            )
        if not bool(torch.isfinite(layer.weight).all()):
            raise ValueError(
                f"layer {layer.name!r} has weights that are NaN or infinite; nothing was changed"
            )
        found.append(layer)
    return found


def _matrices(layer: FilterLayer) -> list[Tensor]:
    """The filters of each group, [n, ...] each, as views that can be written."""
    weight: Tensor = layer.module.weight.detach()  # type: ignore[operator]
    parts = list(weight.chunk(layer.groups))
    return [part.transpose(0, 1) for part in parts] if layer.kind == "transposed" else parts


def _orthonormal(filters: Tensor) -> Tensor:  # [n, ...] -> [n, k]
    """The orthonormal factor of the filters that are not zero; the others stay zero."""
    matrix = filters.flatten(1).to(torch.promote_types(filters.dtype, torch.float32))
    result = torch.zeros_like(matrix)
    live = matrix.abs().amax(1) > 0
    rows = matrix[live]
    wide = rows.shape[0] < rows.shape[1]
    q, r = torch.linalg.qr(rows.mT if wide else rows)
    q = q * torch.where(r.diagonal() < 0, -1.0, 1.0).to(q)
    result[live] = q.mT if wide else q
    return result
