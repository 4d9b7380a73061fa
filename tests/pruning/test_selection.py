from __future__ import annotations

import pytest
import torch

from orthoreg_ext.pruning.selection import (
    SCOPES,
    Block,
    Limits,
    Pool,
    blocks_of,
    check_reachable,
    select_global,
    select_local,
    take_blocks,
)


def pool(*scores: float, name: str = "a", filters: int = 1, channels: int = 1, of: int = 0) -> Pool:
    n, original = len(scores), of or len(scores)
    sizes = torch.full((n,), filters)
    values = torch.tensor(scores, dtype=torch.float64)
    return Pool(name, values, sizes, original, original * filters, channels)


def chosen(blocks: list[Block]) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for block in blocks:
        found.setdefault(block.pool, []).extend(block.units)
    return {key: sorted(units) for key, units in found.items()}


A, B = pool(5, 1, 4, 2), pool(3, 0, 10, 11, name="b")


@pytest.mark.parametrize(
    ("share", "expected"),
    [
        (0.125, {1: [1]}),  # 1 of 8
        (0.25, {0: [1], 1: [1]}),
        (0.5, {0: [1, 3], 1: [0, 1]}),
        (0.625, {0: [1, 2, 3], 1: [0, 1]}),
        (0.75, {0: [1, 2, 3], 1: [0, 1, 2]}),  # a has one left: b gives instead
        (0.2, {1: [1]}),  # int(1.6)
    ],
)
def test_global_ranks_raw_scores_of_all_layers(share: float, expected: dict) -> None:
    assert chosen(select_global([A, B], share, Limits())) == expected


@pytest.mark.parametrize(
    ("share", "expected"),
    [(0.25, {0: [1], 1: [1]}), (0.5, {0: [1, 3], 1: [0, 1]}), (0.74, {0: [1, 3], 1: [0, 1]})],
)
def test_local_ranks_within_each_layer(share: float, expected: dict) -> None:
    assert chosen(select_local([A, B], share, Limits())) == expected


def test_the_cap_protects_the_most_important_filters_not_the_last() -> None:
    scores = pool(9, 8, *[0.1] * 8)  # the released code would keep 8 and 9, here 0 and 1 stay
    taken = chosen(select_global([scores, pool(*[100] * 10)], 0.4, Limits(max_layer_ratio=0.8)))
    assert taken == {0: list(range(2, 10))}


def test_a_capped_layer_leaves_the_rest_to_the_others() -> None:
    taken = chosen(select_global([pool(*[0] * 10), pool(*range(1, 11))], 0.5, Limits(0.8)))
    assert len(taken[0]) == 8
    assert taken[1] == [0, 1]


def test_the_cap_counts_the_original_filters_over_rounds() -> None:
    later = pool(1, 2, 3, of=10)  # 7 of 10 are gone
    assert chosen(select_local([later], 0.9, Limits(0.8))) == {0: [0]}


@pytest.mark.parametrize("scope", sorted(SCOPES))
def test_no_layer_is_ever_emptied(scope: str) -> None:
    pools = [pool(0), pool(0, 0), pool(*range(40))]
    taken = chosen(SCOPES[scope](pools, 0.9, Limits(max_layer_ratio=1.0)))
    assert 0 not in taken
    assert len(taken.get(1, [])) <= 1
    assert len(taken[2]) < 40


@pytest.mark.parametrize(
    ("n", "round_to", "channels", "sizes"),
    [
        (10, 4, 1, [2, 4]),  # 8, 4 left
        (8, 4, 1, [4]),  # 4 left
        (3, 4, 1, []),  # untouched
        (6, 4, 2, [2, 2]),  # 12 channels -> 8, 4: two units are four channels
        (5, 1, 1, [1, 1, 1, 1]),
        (6, 3, 4, [3]),  # lcm: 24 channels -> 12
    ],
)
def test_blocks_leave_a_multiple_of_round_to(
    n: int, round_to: int, channels: int, sizes: list[int]
) -> None:
    blocks = blocks_of(0, pool(*range(n), channels=channels), Limits(1.0, round_to))
    assert [len(block.units) for block in blocks] == sizes
    left = n
    for block in blocks:
        left -= len(block.units)
        assert left * channels % round_to == 0


def test_a_block_is_ranked_by_the_mean_of_its_filters() -> None:
    a, b = pool(0, 10, 20, 20, name="a"), pool(4, 4, 20, 20, name="b")
    assert [block.score for block in blocks_of(0, a, Limits(1.0, 2))] == [5]
    assert chosen(select_global([a, b], 0.25, Limits(1.0, 2))) == {1: [0, 1]}


@pytest.mark.parametrize(("target", "taken"), [(0, 0), (2, 0), (3, 1), (4, 1), (7, 1), (8, 2)])
def test_large_blocks_come_as_close_as_they_can(target: int, taken: int) -> None:
    blocks = [Block(0, (i,), float(i), 5) for i in range(3)]
    # 5 or 10 filters: the nearest, the smaller removal in a tie
    assert len(take_blocks(blocks, target)) == taken


def test_equal_scores_go_by_position() -> None:
    assert chosen(select_local([pool(1, 1, 1, 1)], 0.5, Limits())) == {0: [0, 1]}


@pytest.mark.parametrize("seed", range(20))
def test_random_pools_meet_the_ratio_and_keep_the_best(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(2, 60, (7,), generator=generator).tolist()
    pools = [pool(*torch.rand(n, generator=generator).tolist(), name=str(n)) for n in sizes]
    share = float(torch.rand((), generator=generator)) * 0.8 + 0.05
    taken = chosen(select_global(pools, share, Limits()))
    assert sum(map(len, taken.values())) == int(share * sum(sizes) + 1e-9), f"seed {seed}"
    for i, entry in enumerate(pools):
        gone = set(taken.get(i, []))
        stay = [float(entry.scores[j]) for j in range(len(entry.scores)) if j not in gone]
        assert stay
        assert max([float(entry.scores[j]) for j in gone], default=0) <= min(stay), f"seed {seed}"


def test_a_ratio_that_would_empty_a_layer_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"would empty a layer .*7 of 8.*at most 6.*'a' \(4 -> 1"):
        check_reachable("global", [A, B], 0.9, Limits())


def test_a_local_ratio_above_the_cap_is_refused() -> None:
    with pytest.raises(ValueError, match=r"above max_layer_ratio=0.5"):
        check_reachable("local", [A, B], 0.6, Limits(0.5))


@pytest.mark.parametrize("scope", sorted(SCOPES))
def test_a_ratio_that_removes_nothing_is_refused(scope: str) -> None:
    with pytest.raises(ValueError, match="removes nothing"):
        check_reachable(scope, [A, B], 0.01, Limits())
