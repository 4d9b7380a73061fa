"""What the loss really loses with a group of filters, beside the sum of what it loses with each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as nnf

from orthoreg_ext.experiment.data import Samples

FILTERS = 32  # of a layer at most, drawn at random
GROUP = 8


@dataclass(frozen=True)
class Groups:
    """Of a layer, [groups]: the rise of the loss without a group, and the sum over its filters."""

    together: list[float]
    summed: list[float]

    @property
    def error(self) -> float:
        """The sum of |together - summed| over that of |together| + |summed|: 0 if they add up."""
        pairs = list(zip(self.together, self.summed, strict=True))
        scale = sum(abs(a) + abs(b) for a, b in pairs)
        return sum(abs(a - b) for a, b in pairs) / scale if scale else 0.0


@torch.no_grad()
def group_errors(net: nn.Module, samples: Samples, seed: int) -> dict[str, Groups]:
    """Silences filters behind their BatchNorm, in eval mode, one by one and in groups of `GROUP`.

    Every 2-D BatchNorm counts as the filters in front of it; the groups are drawn at random and do
    not overlap. A silent channel is what a cut leaves to the next layer, where no shortcut
    adds to it.

    Args:
        net: the network.
        samples: images of which the loss is the mean.
        seed: of the groups.
    """
    net.eval()
    generator = torch.Generator().manual_seed(seed)
    images, labels = samples.batch(slice(0, len(samples)))
    dense = float(nnf.cross_entropy(net(images), labels))
    found: dict[str, Groups] = {}
    for name, norm in net.named_modules():
        if not isinstance(norm, nn.BatchNorm2d):
            continue
        width = norm.num_features
        chosen = torch.randperm(width, generator=generator)[:FILTERS]
        groups = [part for part in chosen.split(GROUP) if len(part) > 1]

        def rise(silent: Tensor, norm: nn.Module = norm) -> float:
            handle = norm.register_forward_hook(_silencing(silent))
            try:
                return float(nnf.cross_entropy(net(images), labels)) - dense
            finally:
                handle.remove()

        together = [rise(group) for group in groups]
        summed = [sum(rise(group[i : i + 1]) for i in range(len(group))) for group in groups]
        found[name] = Groups(together, summed)
    return found


def _silencing(silent: Tensor) -> Callable[[nn.Module, object, Tensor], Tensor]:
    def hook(module: nn.Module, args: object, output: Tensor) -> Tensor:
        return output.index_fill(1, silent.to(output.device), 0.0)

    return hook
