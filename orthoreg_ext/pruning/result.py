"""What a prune did: history, sizes, widths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import checkpoint
from .counts import Counts, widths
from .units import Structure


@dataclass(frozen=True)
class LayerWidth:
    """The filters of one layer."""

    name: str
    before: int
    after: int
    reason: str = ""  # why it was not pruned, if it could not be


@dataclass
class PruneResult:
    """What :func:`prune` did.

    Attributes:
        history: one entry a round and layer, ready for JSON: ``{"round": 1, "layer": "conv1",
            "removed": [3, 17], "filters": 14}``; indices count the filters of the unpruned layer,
            ``filters`` those left after that round. Inputs, BatchNorms and everything else that
            follows is implied by the dependency graph.
        before: sizes of the model before.
        after: sizes after the last round.
        layers: every convolution and linear layer with its width before and after, and the reason
            for those that had to stay.
        settings: criterion, ratio, scope and so on.
        architecture: fingerprint of the unpruned model (names and shapes of its state).
        model: the pruned model itself.
        latency: with target "latency" the last comparison with the unpruned model (`share` of the
            time saved, `filters`, `state` of the machine) and all `readings` of the search.
    """

    history: list[dict[str, Any]]
    before: Counts
    after: Counts
    layers: list[LayerWidth]
    settings: dict[str, Any]
    architecture: str
    model: nn.Module = field(repr=False)
    latency: dict[str, Any] = field(default_factory=dict, kw_only=True)

    def save(self, directory: str | Path, *, overwrite: bool = False) -> Path:
        """Writes `history.json` and `weights.safetensors`, the weights as they are now.

        So call it after fine-tuning. Each file appears complete or not at all. A process that
        is killed while it saves leaves a folder `.orthoreg-*` in the directory; it counts as not
        there, and the next save removes it once it has succeeded. Let one process save at a time.

        Args:
            directory: made if it is missing.
            overwrite: replace a checkpoint that is there; other files are left alone.

        Returns:
            the directory.

        Raises:
            FileExistsError: the directory has files and overwrite is false.
            OSError: the disk is full, or the like; what was there is still there.
            ValueError: the model's shapes are no longer those of this result.
        """
        return checkpoint.save(self.model, self.document(), Path(directory), overwrite=overwrite)

    def document(self) -> dict[str, Any]:
        """Everything that `history.json` holds about the cut."""
        sizes = {"before": vars(self.before), "after": vars(self.after)}
        return {
            "architecture": self.architecture,
            "settings": self.settings,
            "sizes": sizes,
            **({"latency": self.latency} if self.latency else {}),
            "history": self.history,
            "widths": {layer.name: layer.after for layer in self.layers},
        }

    @property
    def saved(self) -> dict[str, float]:
        """The shares of the model's filters, params, macs and memory (and latency) that went."""
        before, after = vars(self.before), vars(self.after)
        shares = {name: 1 - after[name] / old if old else 0.0 for name, old in before.items()}
        return {**shares, **({"latency": self.latency["share"]} if self.latency else {})}

    def table(self) -> str:
        """A plain-text table of the widths, with the totals; memory in bytes."""
        width = max([len(layer.name) for layer in self.layers] + [10])
        lines = [f"{'layer':<{width}}  {'before':>10}  {'after':>10}  {'removed':>8}"]
        for row in self.layers:
            gone = 1 - row.after / row.before
            note = f"  ({row.reason})" if row.reason else ""
            lines.append(
                f"{row.name:<{width}}  {row.before:>10}  {row.after:>10}  {gone:>8.1%}{note}"
            )
        after = vars(self.after)
        for name, old in vars(self.before).items():
            lines.append(f"{name:<{width}}  {old:>10}  {after[name]:>10}  {self.saved[name]:>8.1%}")
        if self.latency:
            note = f"  ({self.latency['state']})"
            lines.append(f"{'latency':<{width}}  {'':>22}  {self.saved['latency']:>8.1%}{note}")
        return "\n".join(lines)


class PrunePlan(PruneResult):
    """What :func:`prune` would do: a :class:`PruneResult` of a model that was left alone.

    With several rounds every later one was scored without training in between, so that other
    filters of the same layers may go in the end. Latencies were measured, and vary.
    """

    def save(self, directory: str | Path, *, overwrite: bool = False) -> Path:
        """Refuses: the model is not pruned.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "a plan cannot be saved, the model is not pruned; call prune without dry_run"
        )


class RoundError(RuntimeError):
    """A later round or `between_rounds` failed; the rounds before it are done and stay.

    The model is as the last complete round and `between_rounds` left it.

    Attributes:
        result: what was done up to there; it can be saved, unless `between_rounds` broke the model.
    """

    def __init__(self, message: str, result: PruneResult) -> None:
        super().__init__(message)
        self.result = result


def layer_widths(
    model: nn.Module, structure: Structure, before: dict[str, int]
) -> list[LayerWidth]:
    """The width of every filter layer before and after."""
    reasons = dict(structure.unreached)
    for group in structure.groups:
        reasons.update((name, group.reason) for name in group.layers if group.reason)
    return [
        LayerWidth(name, before[name], after, reasons.get(name, ""))
        for name, after in widths(model).items()
    ]


def merged(history: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A history with one entry for each round and layer, of all its removals in that round."""
    found: dict[tuple[int, str], dict[str, Any]] = {}
    for entry in history:
        first = found.setdefault((entry["round"], entry["layer"]), entry)
        if first is not entry:
            removed = sorted(first["removed"] + entry["removed"])
            found[entry["round"], entry["layer"]] = {**entry, "removed": removed}
    return list(found.values())


def records(structure: Structure, removed: torch.Tensor, number: int) -> list[dict[str, Any]]:
    """The history of one round, before its units are forgotten.

    Args:
        structure: the units still there.
        removed: units, [r] int64.
        number: the round, from 1.
    """
    entries = []
    for slot in structure.slots:
        if slot.has_filters and torch.isin(slot.units, removed).any():
            gone = torch.isin(slot.units, removed)
            entries.append(
                {
                    "round": number,
                    "layer": slot.layer,
                    "removed": slot.channels[gone].tolist(),
                    "filters": int((~gone).sum()),
                }
            )
    return entries
