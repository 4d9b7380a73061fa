"""OrthoReg: train towards orthonormal filters, cut all of the net at once by Fisher, retrain."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from ...regularizer import OrthoRegularizer
from .. import checks
from ..calibration import Loss, check_data
from ..result import PruneResult
from ..schedule import check_ratio, check_rounds, removed_share
from .checks import steps
from .method import Method
from .regularised import Phased


@dataclass(frozen=True)
class Phase:
    """Where a run of :class:`OrthoReg` is."""

    name: str  # "regularise", "retrain" or "done"
    round: int  # from 1
    epoch: int  # done in this phase
    epochs: int  # of this phase in total


class OrthoReg(Method):
    """Pruning with orthonormal filters (Lubana et al., arXiv 2009.05014).

    Filters that are scored one by one and removed together must not be correlated. So every round
    trains for `ortho_epochs` epochs with ::

        loss + strength * sum_l weight_l * |G_l - I|_1        (G = W W^T or W^T W, the smaller)

    and weight decay 0, scores all filters by (sum w g)^2 over `data` in eval mode, cuts the lowest
    of the whole net, and retrains without the term and with weight decay. After N rounds the share
    `ratio` is gone: round k removes p / (k p + N (1 - p)) of what remains, or up to thresholds[k].

    Learning rates belong to the loop; :attr:`phase` says what to choose by. The released code
    (config.py; SGD, momentum 0.9, batch 128, weight decay 1e-4) takes

    ==================================== ======================================
    phase                                learning rate : epochs
    ==================================== ======================================
    regularise                           0.1 : 24, 0.01 : 1
    retrain, one round                   0.1 : 60, 0.01 : 40, 0.001 : 40
    retrain, before the last of several  0.1 : 35, 0.01 : 35, 0.001 : 10
    retrain, after the last of several   0.1 : 40, 0.01 : 40, 0.001 : 20
    ==================================== ======================================

    and 10 000 samples for the score. These epochs are the defaults.

    Paper against code: the paper trains the iterative runs with Adam, the code with SGD, and it
    starts them from scratch unless told otherwise: here from the model as it is. The code caps a
    layer at 95 % by keeping its last filters, here the most important stay; its residual streams
    keep their width under a mask, here coupled channels leave together; and its rounds for nets
    other than VGG fail as released.

    The regulariser is attached to the optimizer, so its gradient is added after any clipping. While
    it is on, the weight decay of all parameter groups is 0; both end with the phase, with
    :meth:`finish` and with :meth:`close`. The regulariser sees the parameters as they are, so what
    was removed is in no Gram matrix.

    Args:
        model: as for :class:`~.method.Method`, like all that is not named here; by default
            criterion "fisher" with the biases of the filters, scope "global".
        example_inputs: as for :class:`~.method.Method`.
        data: (input, target) batches to score on; needed by criteria with gradients.
        loss: (output, target) -> mean loss; cross entropy by default.
        rounds: N.
        thresholds: the share of the filters that is gone after each round, e.g. [0.1, 0.5, 0.8],
            instead of `ratio` and `rounds`; the released code takes percent.
        ortho_epochs: epochs with the regulariser in each round.
        retrain_epochs: epochs without it after each round's cut: one number for all, or one a
            round. Without it those of the table.
        strength: of the default regulariser: 1e-2, the authors take 1e-3 for MobileNet.
        regularizer: one of this model's, attached to nothing, instead of the default.
        keep_weight_decay: leave weight decay on in the phases with the regulariser.

    Raises:
        TypeError, ValueError: an argument is wrong or cannot be met; nothing was changed.
    """

    DEFAULTS: ClassVar[dict[str, Any]] = {"criterion": "fisher", "scope": "global", "bias": True}

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        *,
        data: Iterable[Any] | None = None,
        loss: Loss | None = None,
        rounds: int = 1,
        thresholds: Sequence[float] | None = None,
        ortho_epochs: int = 25,
        retrain_epochs: int | Sequence[int] | None = None,
        strength: float = 1e-2,
        regularizer: OrthoRegularizer | None = None,
        keep_weight_decay: bool = False,
        **arguments: Any,
    ) -> None:
        check_rounds(rounds)
        if thresholds is not None:
            if "ratio" in arguments or rounds != 1:
                raise ValueError("thresholds says ratio and rounds; leave both out")
            thresholds = _check_thresholds(thresholds)
            arguments["ratio"], rounds = thresholds[-1], len(thresholds)
        ratio = arguments.setdefault("ratio", 0.5)
        check_ratio(ratio)
        self.shares = thresholds or removed_share(ratio, rounds)
        self.ortho_epochs = steps("ortho_epochs", ortho_epochs)
        self.retrain_epochs = _check_retrain(retrain_epochs, rounds)
        checks.check_callable("loss", loss, "loss(output, target)")
        self.data, self.loss = data, loss
        super().__init__(model, example_inputs, **arguments)
        self._check_data(rounds)
        if not self.engine.optimizers:
            raise ValueError("OrthoReg needs optimizer=, which the regulariser is attached to")
        self.phased = Phased(
            model,
            OrthoRegularizer(model, strength=strength) if regularizer is None else regularizer,
            self.engine.optimizers,
            keep_weight_decay,
        )
        self.phased.start()

    def _check_data(self, rounds: int) -> None:
        criterion = self.engine.rules.row
        if self.data is not None:
            check_data(self.data, rounds)
        elif criterion.needs_grad:
            raise ValueError(
                f"criterion {criterion.name!r} needs data=[(input, target), ...] to score on: the "
                "gradients of training are of one batch and in train mode"
            )

    @property
    def regularizer(self) -> OrthoRegularizer:
        """The regulariser, attached or not."""
        return self.phased.regularizer

    @property
    def phase(self) -> Phase:
        """What the next epoch belongs to: its kind, its round, its number and their count."""
        start = 0
        for round_, retrain in enumerate(self.retrain_epochs, start=1):
            for name, length in (("regularise", self.ortho_epochs), ("retrain", retrain)):
                if self.epochs < start + length and self._result is None:
                    return Phase(name, round_, self.epochs - start, length)
                start += length
        return Phase("done", len(self.shares), 0, 0)

    @property
    def done(self) -> bool:  # noqa: D102
        return self.phase.name == "done"

    def after_epoch(self) -> None:
        """To be called after every epoch; the last one of a phase with the regulariser cuts.

        Raises:
            ValueError: a score is not finite, or an optimizer's state cannot follow. The epoch does
                not count then, and nothing was removed.
        """
        phase = self.phase
        if phase.name == "regularise" and phase.epoch + 1 == phase.epochs:
            self._cut(self.shares[phase.round - 1])
        super().after_epoch()
        self._follow()

    def close(self) -> None:
        """Detaches the regulariser and gives the weight decay back; removes nothing."""
        self.phased.stop()

    def finish(self) -> PruneResult:  # noqa: D102
        result = super().finish()
        self.close()
        return result

    def _finish(self) -> None:
        phase = self.phase
        if phase.name == "regularise" or phase.round < len(self.shares):
            self._cut(self.shares[-1])

    def _cut(self, share: float) -> None:
        self.remove(self.engine.select(self.engine.score(self.data, self.loss), share))

    def _follow(self) -> None:
        """Turns the regulariser on or off, as the phase wants it."""
        if self.phase.name == "regularise":
            self.phased.start()
        else:
            self.phased.stop()

    def _settings(self) -> dict[str, Any]:
        return {
            **super()._settings(),
            "shares": list(self.shares),
            "ortho_epochs": self.ortho_epochs,
            "retrain_epochs": list(self.retrain_epochs),
            "regularizer": self.phased.settings(),
        }

    def _state(self) -> dict[str, Any]:
        return self.phased.state()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: D102
        if "weight_decays" in state:
            self.phased.check(state)
        super().load_state_dict(state)

    def _load(self, state: Mapping[str, Any]) -> None:
        self.phased.load(state)


def _check_thresholds(thresholds: Sequence[float]) -> list[float]:
    shares = list(thresholds)
    for share in shares:
        number = isinstance(share, (int, float)) and not isinstance(share, bool)
        if not number or not 0 < share < 1:
            raise ValueError(
                f"thresholds are {shares}, expected shares in (0, 1), e.g. [0.1, 0.5, 0.8]"
            )
    if not shares or sorted(set(shares)) != shares:
        raise ValueError(
            f"thresholds are {shares}, expected one a round, each larger than the one before: they "
            "count what is gone in total"
        )
    return shares


def _check_retrain(epochs: int | Sequence[int] | None, rounds: int) -> list[int]:
    if epochs is None:
        return [140] if rounds == 1 else [80] * (rounds - 1) + [100]
    if isinstance(epochs, Sequence):
        if len(epochs) != rounds:
            raise ValueError(
                f"retrain_epochs has {len(epochs)} entries, expected one for each of the "
                f"{rounds} rounds"
            )
        return [steps("retrain_epochs", count, zero=True) for count in epochs]
    return [steps("retrain_epochs", epochs, zero=True)] * rounds
