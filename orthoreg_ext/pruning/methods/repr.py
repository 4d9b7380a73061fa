"""RePr: drop the most correlated filters, train without them, bring them back orthogonal."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ...layers import FilterLayer
from ..held import Held, Spread
from ..layout import one_input_per_group
from ..redundancy import cosines
from ..schedule import check_ratio
from ..units import Slot
from .checks import steps
from .method import Method
from .rows import scores_by_matrix


class RePr(Method):
    """Dropping filters and bringing them back (Prakash et al., CVPR 2019, arXiv 1811.07275).

    Each of N rounds trains the whole net for S1 epochs, then drops the filters that are most
    correlated with the others of their layer, over all layers: the largest ::

        1 / n * sum_{j != i} |cos(w_i, w_j)|

    and trains the others for S2 epochs. Dropped filters, with their biases and the scales and
    shifts behind them, are held at zero and get no gradient. Before the next round they come back:
    as directions orthogonal to all filters of the layer that stayed and to what they were
    themselves, with the mean norm of those that stayed; where a layer has no such direction left,
    as uniform noise in +-1 / sqrt(k). After the last S2 epochs the method is done, and
    :meth:`finish` removes what is dropped.

    Paper against code: the paper's authors released none; siahuat0727/RePr, whose 30 % and epochs
    are the defaults here, brings the last filters back too, as the paper does: removal is ours. It
    leaves biases and BatchNorms of dropped filters in place, clips the unit vectors of the null
    space to +-1 / sqrt(k), which makes them oblique, and takes rounding for rank. Like it, this
    draws the weights that read the returned filters anew; with `zero_inputs`, its option, they
    start from 0, and the net computes the same right after as before.

    Args:
        model: as for :class:`~.method.Method`, like all that is not named here; by default ratio
            0.3 and scope "global".
        example_inputs: as for :class:`~.method.Method`.
        whole_epochs: S1.
        dropped_epochs: S2.
        rounds: N.
        zero_inputs: zeros, not noise, in the weights that read a returned filter.
        seed: of the directions and the noise.

    Attributes:
        dropped: the units that are at zero, [r] int64.
    """

    DEFAULTS: ClassVar[dict[str, Any]] = {"criterion": "repr", "scope": "global"}

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        *,
        whole_epochs: int = 20,
        dropped_epochs: int = 10,
        rounds: int = 3,
        zero_inputs: bool = False,
        seed: int = 0,
        **arguments: Any,
    ) -> None:
        self.whole_epochs = steps("whole_epochs", whole_epochs)
        self.dropped_epochs = steps("dropped_epochs", dropped_epochs)
        self.rounds = steps("rounds", rounds)
        self.zero_inputs, self.seed = bool(zero_inputs), steps("seed", seed, zero=True)
        if "criterion" in arguments:
            raise ValueError("RePr ranks by its own criterion; leave criterion out")
        super().__init__(model, example_inputs, **{"ratio": 0.3, **arguments})
        check_ratio(self.ratio)
        self.dropped = torch.empty(0, dtype=torch.int64)
        self._before: dict[str, Tensor] = {}  # what the dropped filters, biases and norms were

    @property
    def done(self) -> bool:  # noqa: D102
        return super().done or self.epochs >= self.rounds * self._cycle

    def _before_step(self) -> None:
        if len(self.dropped) and not super().done:
            self._zeros.scale_gradients_()

    def after_step(self) -> None:  # noqa: D102
        super().after_step()
        if len(self.dropped) and not super().done:
            self._zeros.scale_()  # momentum has moved them

    def after_epoch(self) -> None:  # noqa: D102
        over = self.done
        super().after_epoch()
        if over:
            return
        if self.epochs % self._cycle == self.whole_epochs:
            self._drop()
        elif self.epochs % self._cycle == 0 and not self.done:
            self._bring_back()

    @property
    def _cycle(self) -> int:
        return self.whole_epochs + self.dropped_epochs

    @cached_property
    def _zeros(self) -> Spread:
        """Zeros for what is dropped."""
        return self.holders.spread(self.holders.values(self.dropped, 0.0, rest=1.0))

    def _worst(self) -> Tensor:  # [r] int64
        scores = scores_by_matrix(self.engine, mean_cosines)
        return self.engine.select([-score for score in scores], check_ratio(self.ratio))

    def _drop(self) -> None:
        self.dropped = self._worst()
        self._before = {
            m.layer.name: m.layer.weight.detach()[self._where(m.units)].flatten(1)
            for m in self.holders.matrices
        }
        for held in self._vectors():
            where = self._where(held.units)
            self._before[held.name] = held.parameter.detach().index_select(held.dim, where)
        self.__dict__.pop("_zeros", None)
        self._zeros.scale_()

    def _vectors(self) -> list[Held]:
        """The biases, scales and shifts."""
        biases = [held for held in self.holders.filters if held.attribute == "bias"]
        return [h for h in (*biases, *self.holders.norms) if h.parameter.requires_grad]

    def _where(self, units: Tensor) -> Tensor:  # [channels] -> [d] int64
        """The channels that are dropped."""
        return torch.isin(units, self.dropped.to(units.device)).nonzero().flatten()

    @torch.no_grad()
    def _bring_back(self) -> None:
        generator = torch.Generator().manual_seed(self.seed + self.epochs)
        for slot in self.engine.structure.slots:
            where = self._where(slot.units)
            module = self.model.get_submodule(slot.owner)
            if isinstance(module, _BatchNorm):
                frozen = module.affine and not module.weight.requires_grad
                if module.running_var is not None and not frozen:
                    module.running_mean[where.to(module.running_var.device)] = 0  # type: ignore[index]
                    module.running_var[where.to(module.running_var.device)] = 1
            elif slot.side == "in" and slot.kind == "filters" and not one_input_per_group(module):
                self._redraw_readers(slot, module, generator)
        for matrix in self.holders.matrices:
            if matrix.layer.trainable:
                old = self._before[matrix.layer.name]
                _redraw(matrix.layer, self._where(matrix.units), old, generator)
        for held in self._vectors():
            where, values = self._where(held.units), self._before[held.name]
            held.parameter.index_copy_(held.dim, where, values.to(held.parameter.device))
        self.dropped = self.dropped[:0]
        self._before = {}

    def _redraw_readers(self, slot: Slot, module: Any, generator: torch.Generator) -> None:
        """New weights for what the dropped filters are read with."""
        (place,) = slot.layout.places
        weight = module.weight
        where = self._where(slot.units[: len(slot.units) // place.groups]).to(weight.device)
        if not weight.requires_grad or not len(where):
            return
        shape = list(weight.shape)
        shape[place.dim] = len(where)
        bound = 0.0 if self.zero_inputs else 1 / math.sqrt(weight[0].numel())
        noise = torch.rand(shape, generator=generator, dtype=torch.float64)
        weight.index_copy_(place.dim, where, ((2 * noise - 1) * bound).to(weight))

    def _finish(self) -> None:
        self.remove(self.dropped if len(self.dropped) else self._worst())

    def _settings(self) -> dict[str, Any]:
        own = ("whole_epochs", "dropped_epochs", "rounds", "zero_inputs", "seed")
        return {**super()._settings(), **{name: getattr(self, name) for name in own}}

    def _state(self) -> dict[str, Any]:
        before = {name: _encode(tensor) for name, tensor in self._before.items()}
        return {"dropped": self.dropped.tolist(), "before": before}

    def _load(self, state: Mapping[str, Any]) -> None:
        self.dropped = torch.tensor(state["dropped"], dtype=torch.int64)
        self.__dict__.pop("_zeros", None)
        self._before = {name: _decode(entry) for name, entry in state["before"].items()}


def mean_cosines(rows: Tensor, others: Tensor) -> Tensor:  # [n, k], [n] -> [n]
    """The sum of |cos| of each row with the others, over the number of rows."""
    return (cosines(rows) * others).sum(1) / len(rows)


def orthogonal_rows(rows: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Random orthonormal vectors that are orthogonal to all rows.

    Args:
        rows: [n, k] float64, of any rank.
        count: how many are wanted.
        generator: of the randomness.

    Returns:
        [min(count, k - rank), k].
    """
    width = rows.shape[1]
    _, values, basis = torch.linalg.svd(rows, full_matrices=False)
    largest = values.max() if len(values) else torch.zeros(())
    basis = basis[values > largest * max(rows.shape) * torch.finfo(rows.dtype).eps]
    count = min(count, width - len(basis))
    drawn = torch.randn(count, width, generator=generator, dtype=rows.dtype)
    for _ in range(2):  # once leaves rounding errors of the size of what is taken away
        drawn -= drawn @ basis.T @ basis
    frame: Tensor = torch.linalg.qr(drawn.T)[0]
    return frame.T


def _redraw(
    layer: FilterLayer,
    where: Tensor,  # [d] int64
    old: Tensor,  # [d, k]
    generator: torch.Generator,
) -> None:
    """Writes new filters in place of the dropped ones, group by group."""
    weight: Tensor = layer.module.weight  # type: ignore[assignment]
    views = weight.unflatten(0, (layer.groups, -1))
    if layer.kind == "transposed":  # [groups, i, o, ...] -> [groups, o, i, ...]
        views = views.transpose(1, 2)
    size = layer.filters // layer.groups
    for group, view in enumerate(views):
        mine = (where // size) == group
        positions = where[mine] - group * size
        stayed = torch.ones(size, dtype=torch.bool, device=where.device)
        stayed[positions] = False
        kept = view[stayed].flatten(1).cpu().double()
        before = old[mine.to(old.device)].cpu().double()
        fresh = orthogonal_rows(torch.cat([kept, before]), len(positions), generator)
        lengths = (kept if len(kept) else before).norm(dim=1)
        left = len(positions) - len(fresh)
        noise = torch.rand(left, fresh.shape[1], generator=generator, dtype=fresh.dtype)
        noise = (2 * noise - 1) / math.sqrt(fresh.shape[1])
        rows = torch.cat([fresh * (lengths.mean() if len(lengths) else 1.0), noise])
        view.index_copy_(0, positions, rows.to(view).view(-1, *view.shape[1:]))


def _encode(tensor: Tensor) -> dict[str, Any]:
    """A tensor for JSON, to the last bit."""
    data = tensor.detach().cpu().contiguous()
    raw = data.flatten().view(torch.uint8).numpy().tobytes()
    text = base64.b64encode(raw).decode()
    return {"dtype": str(data.dtype).removeprefix("torch."), "shape": list(data.shape), "b64": text}


def _decode(entry: Mapping[str, Any]) -> Tensor:
    raw = np.frombuffer(bytearray(base64.b64decode(entry["b64"])), dtype=np.uint8)
    flat = torch.from_numpy(raw).view(getattr(torch, entry["dtype"]))
    return flat.view(entry["shape"])
