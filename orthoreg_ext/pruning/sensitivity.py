"""How much a model suffers when one coupled group alone is cut."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..distributed import current, sum_over_ranks, together
from . import checks
from .calibration import Loss, batches, check_data, one_pass
from .engine import Engine
from .inputs import call, device_of, undisturbed
from .rules import Rules
from .schedule import check_ratio
from .scores import Criterion
from .selection import select

RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


@dataclass(frozen=True)
class GroupSensitivity:
    """The metric after cuts of one coupled group.

    Attributes:
        name: the first layer of the group.
        layers: every layer that loses filters with it.
        units: how many units it has.
        removed: the units that were removed at each ratio.
        values: the metric then.
    """

    name: str
    layers: tuple[str, ...]
    units: int
    removed: list[int]
    values: list[float]


@dataclass(frozen=True)
class Sensitivity:
    """The table of :func:`sensitivity`; ``str`` shows it.

    Attributes:
        metric: "loss", or the name of the function `evaluate`.
        baseline: the metric of the model as it is.
        ratios: the shares of a group's filters that were asked for, ascending.
        groups: a row for each prunable group, in the order of the model.
    """

    metric: str
    baseline: float
    ratios: tuple[float, ...]
    groups: list[GroupSensitivity]

    @property
    def values(self) -> Tensor:  # [groups, ratios] float64
        """The metric for every group and ratio."""
        return torch.tensor([group.values for group in self.groups], dtype=torch.float64)

    @property
    def change(self) -> Tensor:  # [groups, ratios] float64
        """The metric less its baseline."""
        return self.values - self.baseline

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def __str__(self) -> str:
        titles = [" + ".join(group.layers) for group in self.groups]
        titles = [title if len(title) <= 40 else f"{title[:37]}..." for title in titles]
        width = max(len(title) for title in ["layers", *titles])
        shares = "".join(f"{f'{ratio:.0%}':>11}" for ratio in self.ratios)
        lines = [f"{self.metric} {self.baseline:.5g}; with one group cut:"]
        lines.append(f"{'layers':<{width}}  {'units':>5}{shares}")
        for title, group in zip(titles, self.groups, strict=True):
            cells = "".join(f"{value:>11.5g}" for value in group.values)
            lines.append(f"{title:<{width}}  {group.units:>5}{cells}")
        return "\n".join(lines)


def sensitivity(
    model: nn.Module,
    example_inputs: Any,
    data: Iterable[Any] | None = None,
    *,
    evaluate: Callable[[nn.Module], float] | None = None,
    loss: Loss | None = None,
    ratios: Sequence[float] = RATIOS,
    criterion: str | Criterion = "fisher",
    round_to: int = 1,
    group_reduction: str = "mean",
    bias: bool = False,
    ignored: Iterable[str | nn.Module] = (),
    verify: bool = True,
    progress: Callable[[int, int], object] | None = None,
) -> Sensitivity:
    """Cuts each coupled group alone, at several ratios, and measures what is left of the model.

    For every group and ratio the lowest units by the criterion are really removed, from all layers
    they run through (so that a residual stage is cut as a whole, and no layer looks robust because
    its neighbours stood in for it), the metric is measured in eval mode without gradients, and the
    cut is taken back: the same objects are in their places afterwards. A group keeps at least one
    unit; where two ratios come to the same number of units, the metric is measured once.

    Args:
        model: as for :func:`prune`.
        example_inputs: as for :func:`prune`.
        data: (input, target) batches, for the criterion's gradients and, without `evaluate`, for
            the metric; read many times.
        evaluate: evaluate(model) -> number, any metric; it must not change the parameters. Without
            it the metric is the mean loss over `data`.
        loss: (output, target) -> mean loss; cross entropy by default.
        ratios: the shares of a group's filters to remove, each in (0, 1).
        criterion: as for :func:`prune`, like those that follow.
        round_to: the remaining channels are a multiple of it.
        group_reduction: how the scores of coupled filters become one.
        bias: count a filter's bias among its entries.
        ignored: layers that keep their filters; their groups are left out of the table.
        verify: check every cut as :func:`prune` does; two more forward passes each.
        progress: called as progress(done, total) with the number of measurements done.

    Raises:
        TypeError, ValueError: an argument is wrong, or the metric is not a number; the model is as
            before.
        RuntimeError: the model cannot be followed, or a cut failed its check; it was taken back.
    """
    with together("checking the arguments"):
        wanted = _check_ratios(ratios)
        for name, value, signature in (
            ("evaluate", evaluate, "evaluate(model)"),
            ("loss", loss, "loss(output, target)"),
            ("progress", progress, "progress(done, total)"),
        ):
            checks.check_callable(name, value, signature)
        rules = Rules(
            criterion=criterion,
            scope="local",
            round_to=round_to,
            max_layer_ratio=1.0,
            group_reduction=group_reduction,
            bias=bias,
        )
        if data is not None:
            check_data(data, rounds=2)
        if evaluate is None and data is None:
            raise ValueError(
                "neither data nor evaluate was given; pass data=[(input, target), ...] to measure "
                "the loss, or a function evaluate(model) -> number"
            )
        engine = Engine(model, example_inputs, rules, ignored=ignored, verify=verify)

    def measure(where: str) -> float:
        with undisturbed(model), torch.no_grad():
            if evaluate is not None:
                return _number(evaluate(model), where)
            return _number(_mean_loss(model, () if data is None else data, loss), where)

    scores = engine.score(data, loss)
    pools = engine.pools(scores)
    cuts = [select("local", pools, ratio, rules.limits) for ratio in wanted]
    groups, rows = engine.structure.prunable, []
    counts = [
        [sum(len(b.units) for b in blocks if b.pool == i) for blocks in cuts]
        for i in range(len(groups))
    ]
    total = 1 + sum(len(set(row) - {0}) for row in counts)
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    baseline = measure("the model as it is")
    step()
    names = [name for name, _ in model.named_modules()]
    for i, group in sorted(enumerate(groups), key=lambda entry: names.index(entry[1].name)):
        order = group.units[torch.argsort(pools[i].scores, stable=True)]
        found = {0: baseline}
        for count in counts[i]:
            if count not in found:
                with engine.rehearsal():
                    engine.remove(order[:count])
                    found[count] = measure(f"{count} of {len(order)} units of {group.name!r} cut")
                step()
        values = [found[count] for count in counts[i]]
        rows.append(GroupSensitivity(group.name, group.layers, len(order), counts[i], values))
    metric = "loss" if evaluate is None else getattr(evaluate, "__name__", type(evaluate).__name__)
    return Sensitivity(metric, baseline, wanted, rows)


def _check_ratios(ratios: Sequence[float]) -> tuple[float, ...]:
    if isinstance(ratios, (str, int, float)) or not len(ratios):
        raise ValueError(f"ratios is {ratios!r}, expected numbers in (0, 1), e.g. (0.25, 0.5)")
    for ratio in ratios:
        check_ratio(ratio)
    return tuple(sorted(set(ratios)))


def _mean_loss(model: nn.Module, data: Iterable[Any], loss: Loss | None) -> float:
    """The mean over the samples of all ranks, batches weighted by their size."""
    total = 0.0
    with one_pass("measuring the loss") as seen:
        for batch in batches(model, data, seen):
            value = (loss or functional.cross_entropy)(call(model, batch.inputs), batch.target)
            total += float(value) * batch.size
    samples: float = seen.samples
    if current() is not None:
        sums = torch.tensor([total, samples], dtype=torch.float64).to(device_of(model))
        sum_over_ranks([sums])
        total, samples = sums.tolist()
    return total / samples


def _number(value: object, where: str) -> float:
    number = float(value)  # type: ignore[arg-type]
    if math.isnan(number):
        raise ValueError(f"the metric is NaN ({where}); look at evaluate, loss or data")
    return number
