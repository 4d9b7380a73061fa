from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from orthoreg_ext.pruning import prune
from orthoreg_ext.pruning.engine import Engine
from orthoreg_ext.pruning.families import kinds
from orthoreg_ext.pruning.selection import (
    SCOPES,
    Block,
    Limits,
    Pool,
    blocks_of,
    check_reachable,
    first_blocks,
    ranking,
    select,
)
from orthoreg_ext.pruning.structure import trace

from .nets import MLP, ResNet


def pool(
    *scores: float,
    name: str = "a",
    filters: int = 1,
    channels: int = 1,
    of: int = 0,
    kind: str = "",
) -> Pool:
    n, original = len(scores), of or len(scores)
    sizes = torch.full((n,), filters)
    values = torch.tensor(scores, dtype=torch.float64)
    return Pool(name, values, sizes, original, original * filters, channels, kind)


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
    assert chosen(select("global", [A, B], share, Limits())) == expected


@pytest.mark.parametrize(
    ("share", "expected"),
    [(0.25, {0: [1], 1: [1]}), (0.5, {0: [1, 3], 1: [0, 1]}), (0.74, {0: [1, 3], 1: [0, 1]})],
)
def test_local_ranks_within_each_layer(share: float, expected: dict) -> None:
    assert chosen(select("local", [A, B], share, Limits())) == expected


def test_the_cap_protects_the_most_important_filters_not_the_last() -> None:
    scores = pool(9, 8, *[0.1] * 8)  # the released code would keep 8 and 9, here 0 and 1 stay
    others, limits = pool(*[100] * 10), Limits(max_layer_ratio=0.8)
    for scope in SCOPES:
        taken = chosen(select(scope, [scores, others], 0.4, limits))
        assert not {0, 1} & set(taken[0]), scope
    assert chosen(select("global", [scores, others], 0.4, limits)) == {0: list(range(2, 10))}
    assert chosen(select("local", [scores, others], 0.8, limits))[0] == list(range(2, 10))


def test_a_capped_layer_leaves_the_rest_to_the_others() -> None:
    taken = chosen(select("global", [pool(*[0] * 10), pool(*range(1, 11))], 0.5, Limits(0.8)))
    assert len(taken[0]) == 8
    assert taken[1] == [0, 1]


def test_the_cap_counts_the_original_filters_over_rounds() -> None:
    later = pool(1, 2, 3, of=10)  # 7 of 10 are gone
    assert chosen(select("local", [later], 0.9, Limits(0.8))) == {0: [0]}


@pytest.mark.parametrize("scope", sorted(SCOPES))
def test_no_layer_is_ever_emptied(scope: str) -> None:
    pools = [pool(0), pool(0, 0), pool(*range(40))]
    taken = chosen(select(scope, pools, 0.9, Limits(max_layer_ratio=1.0)))
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
    assert chosen(select("global", [a, b], 0.25, Limits(1.0, 2))) == {1: [0, 1]}


@pytest.mark.parametrize(("target", "taken"), [(0, 0), (2, 0), (3, 1), (4, 1), (7, 1), (8, 2)])
def test_large_blocks_come_as_close_as_they_can(target: int, taken: int) -> None:
    large = pool(0, 1, 2, 3, filters=5)
    # 5 or 10 filters of 20: the nearest, the smaller removal in a tie
    assert len(select("global", [large], target / 20, Limits())) == taken


def test_equal_scores_go_by_position() -> None:
    assert chosen(select("local", [pool(1, 1, 1, 1)], 0.5, Limits())) == {0: [0, 1]}


@pytest.mark.parametrize("seed", range(20))
def test_random_pools_meet_the_ratio_and_keep_the_best(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(2, 60, (7,), generator=generator).tolist()
    pools = [pool(*torch.rand(n, generator=generator).tolist(), name=str(n)) for n in sizes]
    share = float(torch.rand((), generator=generator)) * 0.8 + 0.05
    taken = chosen(select("global", pools, share, Limits()))
    assert sum(map(len, taken.values())) == int(share * sum(sizes) + 1e-9), f"seed {seed}"
    for i, entry in enumerate(pools):
        gone = set(taken.get(i, []))
        stay = [float(entry.scores[j]) for j in range(len(entry.scores)) if j not in gone]
        assert stay
        assert max([float(entry.scores[j]) for j in gone], default=0) <= min(stay), f"seed {seed}"


ALIKE = [  # two of kind c, one of kind d with scores of another scale
    pool(1, 2, 3, 40, kind="c"),
    pool(100, 200, 300, 400, kind="d"),
    pool(10, 20, 30, 4, kind="c"),
]


@pytest.mark.parametrize(
    ("share", "expected"),
    [
        (0.25, {0: [0, 1], 1: [0]}),  # 2 of 8, 1 of 4
        (0.5, {0: [0, 1, 2], 1: [0, 1], 2: [3]}),
        (0.375, {0: [0, 1, 2], 1: [0]}),
        (0.75, {0: [0, 1, 2], 1: [0, 1, 2], 2: [0, 1, 3]}),
    ],
)
def test_isomorphic_ranks_pools_alike_together_and_gives_each_kind_its_share(
    share: float, expected: dict
) -> None:
    assert chosen(select("isomorphic", ALIKE, share, Limits())) == expected


def test_one_at_a_time_begins_as_global() -> None:
    for share in (0.1, 0.5, 0.7):
        blocks = select("one_at_a_time", ALIKE, share, Limits())
        assert blocks == select("global", ALIKE, share, Limits())


@pytest.mark.parametrize(
    ("scope", "order"),
    [
        ("global", [(0, 0), (0, 1), (0, 2), (2, 3), (2, 0), (2, 1), (1, 0), (1, 1), (1, 2)]),
        # c gives 1/8, then 2/8 with d's 1/4, ...: ties in the order of the families
        ("isomorphic", [(0, 0), (0, 1), (1, 0), (0, 2), (2, 3), (1, 1), (2, 0), (2, 1), (1, 2)]),
        ("local", [(0, 0), (1, 0), (2, 3), (0, 1), (1, 1), (2, 0), (0, 2), (1, 2), (2, 1)]),
    ],
)
def test_a_ranking_holds_every_choice_as_a_beginning(
    scope: str, order: list[tuple[int, int]]
) -> None:
    ranked = ranking(scope, ALIKE, Limits())
    assert [(block.pool, block.units[0]) for block in ranked] == order
    for share in (0.1, 0.25, 0.4, 0.6):
        some = select(scope, ALIKE, share, Limits())
        assert some == ranked[: len(some)]


@pytest.mark.parametrize("scope", sorted(SCOPES))
def test_round_to_holds_in_every_scope(scope: str) -> None:
    pools = [pool(*range(16), kind="c"), pool(*range(5, 17), kind="d"), pool(*range(8), kind="c")]
    for share in (0.2, 0.4, 0.5):
        taken = chosen(select(scope, pools, share, Limits(round_to=4)))
        assert all(len(gone) % 4 == 0 for gone in taken.values())


@pytest.mark.parametrize(("units", "taken"), [(1, 1), (2, 1), (3, 2), (5, 3), (9, 4)])
def test_first_blocks_hold_at_most_so_many_units_but_one_block(units: int, taken: int) -> None:
    blocks = [Block(0, tuple(range(size)), 0.0, size) for size in (2, 1, 2, 1)]
    assert len(first_blocks(blocks, units)) == taken


class Alike(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 1)
        self.a = nn.Conv2d(6, 8, 3, padding=1)
        self.b = nn.Conv2d(8, 4, 5, padding=2)
        self.grouped = nn.Conv2d(4, 8, 1, groups=2)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.grouped(self.b(self.a(self.stem(x)))).mean((2, 3)))


def test_groups_are_isomorphic_by_layers_and_coupling_not_by_size(x: Tensor) -> None:
    model = Alike()
    structure = trace(model, x)
    found = dict(zip((g.name for g in structure.prunable), kinds(model, structure), strict=True))
    assert found["stem"] == found["a"]  # convolution to convolution
    conv = ("Conv2d", "conv")
    assert found["a"] == ((*conv, "in", (1,)), (*conv, "out", (1,)))
    grouped = ("Conv2d", "grouped")  # a unit of b is two channels: one of each group
    assert found["b"] == ((*conv, "out", (2,)), (*grouped, "in", (2,)))
    assert found["grouped"] == ((*grouped, "out", (2,)), ("Linear", "linear", "in", (2,)))


def test_residual_groups_of_the_same_depth_are_isomorphic(x: Tensor) -> None:
    model = ResNet()
    structure = trace(model, x)
    found = dict(zip((g.name for g in structure.prunable), kinds(model, structure), strict=True))
    inner = {found[f"layer{i}.conv1"] for i in (1, 2, 3)}
    assert len(inner) == 1  # 8 -> 10, 8 -> 12 with a stride, 12 -> 8
    assert len({*inner, found["stem"], found["layer2.conv2"]}) == 3


def test_prune_gives_each_kind_its_share(x: Tensor) -> None:
    model = ResNet()
    for i, scale in enumerate((1e-3, 1, 1), start=1):  # global would take all of layer1.conv1
        model.get_submodule(f"layer{i}.conv1").weight.data *= scale
    model.stem.weight.data *= 1e3
    result = prune(model, x, criterion="l1", scope="isomorphic", ratio=0.5)
    width = {layer.name: (layer.before, layer.after) for layer in result.layers}
    inner = [width[f"layer{i}.conv1"] for i in (1, 2, 3)]
    assert sum(before - after for before, after in inner) == 15  # of 10 + 12 + 8
    assert inner[0] == (10, 1)  # the cap
    assert width["stem"] == (8, 4)
    assert width["layer2.conv2"] == (12, 6)


def one_at_a_time(model: nn.Module, remove: int) -> dict[str, list[int]]:
    """Zeroes the smallest filter of fc1 or fc2 by mean |w| over the rows of an MLP, and again."""
    layers = {"fc1": model.fc1, "fc2": model.fc2}
    dead: dict[str, list[int]] = {name: [] for name in layers}
    for _ in range(remove):
        best = min(
            (layer.weight[i].abs().sum().item(), name, i)
            for name, layer in layers.items()
            for i in range(len(layer.weight))
            if i not in dead[name]
        )
        dead[best[1]].append(best[2])
        if best[1] == "fc1":
            model.fc2.weight.data[:, best[2]] = 0  # its inputs leave fc2
    return {name: sorted(gone) for name, gone in dead.items() if gone}


def test_one_at_a_time_scores_anew_after_every_unit() -> None:
    model, x = MLP(), torch.randn(2, 12)
    model.fc1.weight.data[:3] *= 1e-3  # the first to go; filter 5 of fc2 reads them alone
    model.fc2.weight.data[5] = torch.eye(20)[:3].sum(0) * 100
    expected = one_at_a_time(copy.deepcopy(model), 18)
    once = prune(copy.deepcopy(model), x, criterion="l1", ratio=0.5)
    result = prune(
        model, x, criterion="l1", ratio=0.5, scope="one_at_a_time", rescore_every=1, verify=False
    )
    found = {entry["layer"]: entry["removed"] for entry in result.history}
    assert found == expected
    assert found != {entry["layer"]: entry["removed"] for entry in once.history}
    assert {entry["round"] for entry in result.history} == {1}
    for entry in result.history:
        assert entry["filters"] == getattr(model, entry["layer"]).out_features
    assert model(x).shape == (2, 4)


@pytest.mark.parametrize(("every", "scorings"), [(1, 18), (4, 5), (None, 18), (100, 1)])
def test_scoring_anew_is_bounded(
    every: int | None, scorings: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, score = [], Engine.score
    monkeypatch.setattr(Engine, "score", lambda *a: calls.append(1) or score(*a))
    options = {"scope": "one_at_a_time", "rescore_every": every, "criterion": "l1"}
    prune(MLP(), torch.randn(2, 12), ratio=0.5, verify=False, **options)
    assert len(calls) == scorings


def test_by_default_a_round_scores_about_64_times(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, score = [], Engine.score
    monkeypatch.setattr(Engine, "score", lambda *a: calls.append(1) or score(*a))
    model = nn.Sequential(nn.Linear(4, 400), nn.ReLU(), nn.Linear(400, 2))
    prune(model, torch.randn(1, 4), criterion="l1", ratio=0.5, scope="one_at_a_time", verify=False)
    assert len(calls) == 50  # 200 units, four at a time


def test_a_failure_amid_a_round_takes_all_its_steps_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = MLP(), torch.randn(2, 12)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    parameters = list(model.parameters())
    state = {name: t.clone() for name, t in model.state_dict().items()}
    calls, score = [], Engine.score

    def fail(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 5:
            raise ValueError("no gradient")
        return score(*arguments)

    monkeypatch.setattr(Engine, "score", fail)
    options = {"scope": "one_at_a_time", "rescore_every": 1, "optimizer": optimizer}
    with pytest.raises(ValueError, match="no gradient"):
        prune(model, x, criterion="l1", ratio=0.5, **options)
    assert len(calls) == 5
    for now, before in zip(model.parameters(), parameters, strict=True):
        assert now is before
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    assert all(a is b for a, b in zip(optimizer.param_groups[0]["params"], parameters, strict=True))
    assert (model.fc1.out_features, model.fc2.in_features) == (20, 20)


def test_data_that_can_be_read_once_is_refused_where_it_is_read_often() -> None:
    data = iter([(torch.randn(4, 12), torch.arange(4))])
    with pytest.raises(ValueError, match="can be read once"):
        prune(MLP(), torch.randn(2, 12), data=data, scope="one_at_a_time")


def test_a_ratio_that_would_empty_a_layer_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"would empty a layer .*7 of 8.*at most 6.*'a' \(4 -> 1"):
        check_reachable("global", [A, B], 0.9, Limits())


def test_a_local_ratio_above_the_cap_is_refused() -> None:
    for scope in ("local", "isomorphic"):
        with pytest.raises(ValueError, match=r"above max_layer_ratio=0.5"):
            check_reachable(scope, [A, B], 0.6, Limits(0.5))


@pytest.mark.parametrize("scope", sorted(SCOPES))
def test_a_ratio_that_removes_nothing_is_refused(scope: str) -> None:
    with pytest.raises(ValueError, match="removes nothing"):
        check_reachable(scope, [A, B], 0.01, Limits())
