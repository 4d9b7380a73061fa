"""Which units go: a scope is one function over pools of scored units."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

_FUZZ = 1e-9  # 0.29 * 100 is 28.999999999999996


@dataclass(frozen=True)
class Pool:
    """What selection has to know of a group: the score and size of its units, and its limits."""

    name: str
    scores: Tensor  # [u] float64, CPU: lower goes first
    filters: Tensor  # [u] int64, CPU: the filters that leave with each unit
    original: int  # units before the first round
    original_filters: int  # filters before the first round
    channels: int = 1  # channels that a unit takes from a layer


@dataclass(frozen=True)
class Limits:
    """What has to stay in every pool."""

    max_layer_ratio: float = 0.95
    round_to: int = 1

    def step(self, pool: Pool) -> int:
        """The remaining units must be a multiple of this."""
        return self.round_to // math.gcd(self.round_to, pool.channels)

    def keep(self, pool: Pool) -> int:
        """The fewest units that may remain."""
        share = pool.original - math.floor(self.max_layer_ratio * pool.original + _FUZZ)
        return max(1, self.step(pool), share)


@dataclass(frozen=True)
class Block:
    """Units of one pool that go together, so that the remaining count is a multiple of the step."""

    pool: int
    units: tuple[int, ...]  # positions in the pool
    score: float  # the mean of its units
    filters: int


def blocks_of(index: int, pool: Pool, limits: Limits) -> list[Block]:
    """Cuts a pool into removable blocks, the least important first.

    Units are ranked by score (ties by position). The first block brings the count down to a
    multiple of the step, each later one has `step` units; the most important units, which the
    limits protect, are in none.
    """
    step, order = limits.step(pool), torch.argsort(pool.scores, stable=True).tolist()
    blocks: list[Block] = []
    start = 0
    while True:
        size = (len(order) - start) % step or step
        if len(order) - start - size < limits.keep(pool):
            return blocks
        units = tuple(order[start : start + size])
        score = float(pool.scores[list(units)].mean())
        blocks.append(Block(index, units, score, int(pool.filters[list(units)].sum())))
        start += size


def take_blocks(blocks: Sequence[Block], target: int) -> list[Block]:
    """The first blocks, in the given order, whose filters come closest to a target."""
    taken: list[Block] = []
    total = 0
    for block in blocks:
        if total + block.filters - target > target - total:  # further away with it
            break
        taken.append(block)
        total += block.filters
        if total >= target:
            break
    return taken


def filters_to_remove(pool: Pool, share: float) -> int:
    """The filters that have to go now, for `share` of the original ones to be gone in total."""
    gone = pool.original_filters - int(pool.filters.sum())
    return max(0, math.floor(share * pool.original_filters + _FUZZ) - gone)


def select_global(pools: Sequence[Pool], share: float, limits: Limits) -> list[Block]:
    """Ranks the blocks of all pools by their raw scores, as OrthoReg does.

    When a pool reaches its limit the others give more, so that the total is met.
    """
    blocks = [b for i, pool in enumerate(pools) for b in blocks_of(i, pool, limits)]
    blocks.sort(key=lambda block: block.score)
    gone = sum(pool.original_filters - int(pool.filters.sum()) for pool in pools)
    total = sum(pool.original_filters for pool in pools)
    return take_blocks(blocks, max(0, math.floor(share * total + _FUZZ) - gone))


def select_local(pools: Sequence[Pool], share: float, limits: Limits) -> list[Block]:
    """Removes the same share of every pool; one too small for that keeps what the limits say."""
    return [
        block
        for i, pool in enumerate(pools)
        for block in take_blocks(blocks_of(i, pool, limits), filters_to_remove(pool, share))
    ]


SCOPES: dict[str, Callable[[Sequence[Pool], float, Limits], list[Block]]] = {
    "global": select_global,
    "local": select_local,
}


def check_reachable(scope: str, pools: Sequence[Pool], ratio: float, limits: Limits) -> None:
    """Refuses a ratio that would empty a layer, break a limit or remove nothing.

    The answer depends on sizes alone, so it holds for every round before the first one is scored.

    Raises:
        ValueError: naming the layers at their limit.
    """
    rules = f"max_layer_ratio={limits.max_layer_ratio}, round_to={limits.round_to}"
    if scope == "local" and ratio > limits.max_layer_ratio + _FUZZ:
        raise ValueError(
            f"ratio={ratio} is above max_layer_ratio={limits.max_layer_ratio}, which protects the "
            "most important filters of every layer; lower ratio or raise max_layer_ratio"
        )
    flat = [replace(pool, scores=torch.zeros_like(pool.scores)) for pool in pools]
    blocks = [blocks_of(i, pool, limits) for i, pool in enumerate(flat)]
    total = sum(pool.original_filters for pool in pools)
    room = sum(block.filters for row in blocks for block in row)
    target = math.floor(ratio * total + _FUZZ)
    if scope == "global" and target > room:
        tight = ", ".join(
            f"{pool.name!r} ({len(pool.scores)} -> {limits.keep(pool)} units)" for pool in pools[:4]
        )
        more = f" and {len(pools) - 4} more" if len(pools) > 4 else ""
        raise ValueError(
            f"ratio={ratio} would empty a layer or pass its limit: it asks for {target} of {total} "
            f"prunable filters, but at most {room} ({room / total:.3f}) can go with {rules}; at "
            f"the limit are {tight}{more}. Lower ratio, raise max_layer_ratio or lower round_to"
        )
    if not SCOPES[scope](flat, ratio, limits):
        raise ValueError(
            f"ratio={ratio} removes nothing: of {total} prunable filters in {len(pools)} groups "
            f"none can go with {rules}; raise ratio or lower round_to"
        )
