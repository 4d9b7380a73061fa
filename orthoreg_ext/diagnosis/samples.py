"""Reading a few samples of whatever data there is, and taking single ones out of a batch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..pruning.calibration import check_data
from ..pruning.inputs import tensors_in


@dataclass(frozen=True)
class Batch:
    """Some samples: every tensor of inputs and target has `size` of them along its first dim."""

    inputs: Any
    target: Any
    size: int

    def part(self, start: int, stop: int) -> Batch:
        """Returns the samples from `start` to before `stop`."""
        if (start, stop) == (0, self.size):
            return self
        take = slice(start, stop)
        inputs, target = (_sliced(v, take, self.size) for v in (self.inputs, self.target))
        return Batch(inputs, target, len(range(self.size)[take]))

    def parts(self, size: int) -> list[Batch]:
        """Returns the samples, `size` at a time."""
        return [self.part(i, min(i + size, self.size)) for i in range(0, self.size, size)]


def read(data: Iterable[Any], samples: int) -> list[Batch]:
    """Reads as many batches as are needed for that many samples, and no sample more.

    Raises:
        TypeError: `data` is no iterable.
        ValueError: no batch, one that is no pair (input, target), or one without samples.
    """
    check_data(data, 1)
    batches: list[Batch] = []
    missing = samples
    for i, pair in enumerate(data):
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            got = type(pair).__name__
            raise ValueError(f"data: batch {i} is a {got}, expected a pair (input, target)")
        inputs, target = pair
        tensors = [t for t in (*tensors_in(target), *tensors_in(inputs)) if t.dim() > 0]
        if not tensors or not len(tensors[0]):
            raise ValueError(
                f"data: batch {i} has no samples; expected tensors whose first dimension counts "
                "them"
            )
        batch = Batch(inputs, target, len(tensors[0]))
        batches.append(batch.part(0, min(missing, batch.size)))
        missing -= batches[-1].size
        if missing <= 0:
            break
    if not batches:
        raise ValueError("data is empty: pass at least one (input, target) batch, or leave it out")
    return batches


def _sliced(value: Any, take: slice, size: int) -> Any:
    if isinstance(value, Tensor):
        return value[take] if value.dim() > 0 and len(value) == size else value
    if isinstance(value, Mapping):
        return {key: _sliced(entry, take, size) for key, entry in value.items()}
    if isinstance(value, (tuple, list)):
        return tuple(_sliced(entry, take, size) for entry in value)
    return value
