"""Which units go: a scope says which pools compete, and a ranking follows from it."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
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
    kind: Hashable = ""  # equal for pools that are isomorphic

    @property
    def gone(self) -> int:
        """The filters that earlier rounds took."""
        return self.original_filters - int(self.filters.sum())


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
    units: tuple[int, ...]  # positions in the pool, the least important first
    score: float  # the mean of its units
    filters: int
    share: float = 0.0  # it goes once this share of the filters of its family is asked for


# One row a scope: the family of every pool. Pools of one family are ranked together, and every
# family gives the same share of its filters.
SCOPES: dict[str, Callable[[Sequence[Pool]], Sequence[Hashable]]] = {
    "global": lambda pools: [0] * len(pools),
    "local": lambda pools: range(len(pools)),
    "isomorphic": lambda pools: [pool.kind for pool in pools],
    "one_at_a_time": lambda pools: [0] * len(pools),  # and scored anew after every few units
}


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


def ranking(scope: str, pools: Sequence[Pool], limits: Limits) -> list[Block]:
    """All blocks in the order in which they go; what is chosen is a beginning of it.

    Families are merged by the share that each has given, so that every beginning takes about the
    same share of each. When a pool reaches its limit, the others of its family give more.
    """
    families: dict[Hashable, list[int]] = defaultdict(list)
    for i, family in enumerate(SCOPES[scope](pools)):
        families[family].append(i)
    order = [block for members in families.values() for block in _family(pools, members, limits)]
    return sorted(order, key=lambda block: block.share)


def _family(pools: Sequence[Pool], members: list[int], limits: Limits) -> list[Block]:
    """The blocks of pools that are ranked together by their raw scores, as in OrthoReg."""
    blocks = [block for i in members for block in blocks_of(i, pools[i], limits)]
    gone = sum(pools[i].gone for i in members)
    total = sum(pools[i].original_filters for i in members)
    order = []
    for block in sorted(blocks, key=lambda block: block.score):
        # the count of filters that comes closest to the one asked for, the lower one in a tie
        order.append(replace(block, share=math.ceil(gone + block.filters / 2) / total))
        gone += block.filters
    return order


def select(scope: str, pools: Sequence[Pool], share: float, limits: Limits) -> list[Block]:
    """The blocks to remove now, for a share of the original filters to be gone in total.

    A family takes the number of filters that comes closest to floor(share * its filters).
    """
    return [block for block in ranking(scope, pools, limits) if block.share <= share + _FUZZ]


def first_blocks(blocks: Sequence[Block], units: int) -> list[Block]:
    """As many of the first blocks as have that many units; at least one."""
    taken: list[Block] = []
    count = 0
    for block in blocks:
        if taken and count + len(block.units) > units:
            break
        taken.append(block)
        count += len(block.units)
    return taken


class RemovesNothingError(ValueError):
    """A ratio is smaller than the smallest block that may go."""


def check_reachable(scope: str, pools: Sequence[Pool], ratio: float, limits: Limits) -> None:
    """Refuses a ratio of filters that would empty a layer, break a limit or remove nothing.

    The answer depends on sizes alone, so it holds for every round before the first one is scored.

    Raises:
        ValueError: naming the layers at their limit.
    """
    rules = f"max_layer_ratio={limits.max_layer_ratio}, round_to={limits.round_to}"
    shared = scope in ("local", "isomorphic")  # a small family may give less than its share
    if shared and ratio > limits.max_layer_ratio + _FUZZ:
        raise ValueError(
            f"ratio={ratio} is above max_layer_ratio={limits.max_layer_ratio}, which protects the "
            "most important filters of every layer; lower ratio or raise max_layer_ratio"
        )
    flat = [replace(pool, scores=torch.zeros_like(pool.scores)) for pool in pools]
    order = ranking(scope, flat, limits)
    total = sum(pool.original_filters for pool in pools)
    room = sum(pool.gone for pool in pools) + sum(block.filters for block in order)
    target = math.floor(ratio * total + _FUZZ)
    if not shared and target > room:
        raise ValueError(
            f"ratio={ratio} would empty a layer or pass its limit: it asks for {target} of {total} "
            f"prunable filters, but at most {room} ({room / total:.3f}) can go with {rules}; at "
            f"the limit are {limits_of(pools, limits)}. Lower ratio, raise max_layer_ratio or "
            "lower round_to"
        )
    if not any(block.share <= ratio + _FUZZ for block in order):
        raise RemovesNothingError(
            f"ratio={ratio} removes nothing: of {total} prunable filters in {len(pools)} groups "
            f"none can go with {rules}; raise ratio or lower round_to"
        )


def limits_of(pools: Sequence[Pool], limits: Limits) -> str:
    """The fewest units that may remain in the first few pools, as text."""
    text = ", ".join(
        f"{pool.name!r} ({len(pool.scores)} -> {limits.keep(pool)} units)" for pool in pools[:4]
    )
    return text + (f" and {len(pools) - 4} more" if len(pools) > 4 else "")
