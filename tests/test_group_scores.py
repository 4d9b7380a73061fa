"""group_scores: the scores of coupled layers become one score a channel of the group."""

from __future__ import annotations

import pytest
import torch

import orthoreg_ext as ox
import orthoreg_ext.functional as F
from orthoreg_ext.reference import REDUCTIONS
from tests.conftest import Target, relative_error

# two groups: channels of scores 0 and 1 coupled in another order, and score 2 alone
SCORES = [[1.0, 2.0, 4.0], [8.0, 16.0, 32.0, 64.0], [5.0]]
MEMBERS = [
    [(0, None), (1, torch.tensor([3, -1, 0])), (1, torch.tensor([1, 2, -1]))],
    [(2, torch.tensor([0]))],
]
TABLE = {
    "sum": [[81.0, 34.0, 12.0], [5.0]],
    "mean": [[27.0, 17.0, 6.0], [5.0]],
    "max": [[64.0, 32.0, 8.0], [5.0]],
    "first": [[1.0, 2.0, 4.0], [5.0]],
}


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_hand_computed(target: Target, reduction: str) -> None:
    scores = [torch.tensor(s, device=target.device) for s in SCORES]
    got = F.group_scores(scores, MEMBERS, reduction)
    assert [g.tolist() for g in got] == TABLE[reduction]
    made = F.group_members(MEMBERS, [3, 4, 1], target.device)
    again = F.group_scores(scores, made, reduction)
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("seed", range(20))
def test_random_groups_agree_with_a_loop(target: Target, seed: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, 400, (7,), generator=generator).tolist()
    scores = [torch.randn(n, generator=generator).to(target.device, dtype) for n in sizes]
    members = []
    for _ in range(4):
        roots = int(torch.randint(1, 300, (), generator=generator))
        group = []
        for tensor in torch.randint(0, 7, (5,), generator=generator).tolist():
            indices = torch.randint(-1, sizes[tensor], (roots,), generator=generator)
            group.append((tensor, indices.clamp(min=0) if not group else indices))
        members.append(group)
    for reduction in REDUCTIONS:
        got = F.group_scores(scores, members, reduction)
        for result, group in zip(got, members, strict=True):
            assert result.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            rows = torch.stack(
                [
                    torch.where(i < 0, torch.nan, scores[t].cpu().double()[i.clamp(min=0)])
                    for t, i in group
                ]
            )
            want = {
                "sum": rows.nansum(0),
                "mean": rows.nanmean(0),
                "max": rows.nan_to_num(nan=-torch.inf).amax(0),
                "first": rows[0],
            }[reduction]
            assert relative_error(result, want) <= target.tolerance, f"seed {seed} {reduction}"


def test_scores_of_one_pass_need_no_copy(target: Target) -> None:
    weights = [torch.randn(4, 3, device=target.device) for _ in range(2)]
    scores = F.filter_scores(weights)["l1"]
    (got,) = F.group_scores(scores, [[(0, None), (1, None)]], "sum")
    torch.testing.assert_close(got, scores[0] + scores[1])


@pytest.mark.parametrize("reduction", ["sum", "mean", "max"])
def test_a_nan_is_not_hidden(target: Target, reduction: str) -> None:
    for values in ([torch.nan, 1.0], [1.0, torch.nan]):
        scores = [torch.tensor([v], device=target.device) for v in values]
        (got,) = F.group_scores(scores, [[(0, None), (1, None)]], reduction)
        assert got.isnan().all()


def test_mixed_precisions_and_no_groups(target: Target) -> None:
    scores = [torch.ones(2, device=target.device), torch.ones(2, device=target.device).double()]
    (got,) = F.group_scores(scores, [[(0, None), (1, None)]], "sum")
    assert got.dtype == torch.float64
    assert got.tolist() == [2.0, 2.0]
    assert F.group_scores(scores, []) == []
    assert F.group_scores([], []) == []
    (empty,) = F.group_scores([scores[0][:0]], [[(0, None)]])
    assert empty.shape == (0,)


ONE = torch.ones(3)
WRONG = [
    (lambda: F.group_scores([ONE], [[]]), r"members\[0\] is empty"),
    (lambda: F.group_scores([ONE], [[(1, None)]]), r"names scores\[1\], but there are 1"),
    (lambda: F.group_scores([ONE], [[(0, torch.tensor([3]))]]), "run from 3 to 3, but it has 3"),
    (lambda: F.group_scores([ONE], [[(0, torch.tensor([-2]))]]), "run from -2 to -2"),
    (lambda: F.group_scores([ONE], [[(0, torch.tensor([-1]))]]), "root channel 0 .* has no score"),
    (lambda: F.group_scores([ONE], [[(0, ONE.long()[None])]]), r"have shape \(1, 3\)"),
    (
        lambda: F.group_scores([ONE], [[(0, None), (0, torch.tensor([1]))]]),
        "has 3 root channels by its first member, but 1",
    ),
    (lambda: F.group_scores([ONE[None]], []), r"scores\[0\] has shape \(1, 3\)"),
    (lambda: F.group_scores([ONE], [[(0, None)]], "product"), "unknown reduction 'product'"),
    (
        lambda: F.group_scores([ONE], F.group_members([[(0, None)]], [2])),
        r"lengths \(3,\), but the members were made for \(2,\)",
    ),
    (
        lambda: F.group_scores([ONE], F.group_members([[(0, None)]], [3], "meta")),
        "the members are on meta, but the scores are on cpu",
    ),
]


@pytest.mark.parametrize(("call", "message"), WRONG)
def test_wrong_arguments(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("entry", [1 << 32, 2, -1])
def test_a_wrong_table_never_reads_outside(target: Target, entry: int) -> None:
    scores = [torch.ones(2, device=target.device)]
    entries, starts = (torch.tensor(t, device=target.device) for t in ([entry], [0, 1]))
    if target.name == "cpu":
        with pytest.raises(RuntimeError, match="outside the scores"):
            target.namespace.group_scores(scores, entries, starts, "sum")
    else:
        assert target.namespace.group_scores(scores, entries, starts, "sum").isnan().all()


def test_opcheck_and_one_graph(target: Target) -> None:
    scores = [torch.rand(3, device=target.device), torch.rand(4, device=target.device)]
    made = F.group_members(MEMBERS[:1], [3, 4], target.device)
    arguments = (scores, made.entries, made.starts, "mean")
    torch.library.opcheck(target.namespace.group_scores.default, arguments)

    def reduce(*given: torch.Tensor) -> list[torch.Tensor]:
        return F.group_scores(list(given), made, "max")

    got = torch.compile(reduce, fullgraph=True, backend="aot_eager")(*scores)
    assert torch.equal(got[0], reduce(*scores)[0])


def test_the_reference_keeps_the_order_of_members() -> None:
    with ox.backend("reference"):
        scores = [torch.tensor([3.0]), torch.tensor([4.0])]
        (got,) = F.group_scores(scores, [[(1, None), (0, None)]], "first")
    assert got.tolist() == [4.0]
