"""What needs one process: how layers are dealt, and what is refused."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from torch import nn

import orthoreg_ext as ox
from orthoreg_ext import distributed
from orthoreg_ext.distributed import Flat, among, current, together
from orthoreg_ext.sharing import deal


@pytest.mark.parametrize(
    ("costs", "ranks", "owners"),
    [
        ([5, 4, 3, 3, 3], 2, [0, 1, 1, 0, 1]),  # 8 and 10: the best is 9, Graham allows 12
        ([1, 1, 1, 1], 2, [0, 1, 0, 1]),
        ([1, 9, 1, 1], 2, [1, 0, 1, 1]),
        ([2, 3], 4, [1, 0]),  # more ranks than layers
        ([7, 7, 7], 1, [0, 0, 0]),
        ([0, 0, 0], 2, [0, 0, 0]),
        ([], 2, []),
    ],
)
def test_the_most_costly_layer_goes_to_the_idlest_rank(
    costs: list[int], ranks: int, owners: list[int]
) -> None:
    assert deal(costs, ranks) == owners


@pytest.mark.parametrize("seed", range(5))
def test_no_rank_has_more_than_four_thirds_of_the_best(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    costs = torch.randint(1, 100, (7,), generator=generator).tolist()
    owners = deal(costs, 2)
    busiest = max(sum(c for c, o in zip(costs, owners, strict=True) if o == r) for r in (0, 1))
    halves = [
        sum(c for i, c in enumerate(costs) if mask >> i & 1) for mask in range(2 ** len(costs))
    ]
    best = min(max(half, sum(costs) - half) for half in halves)
    assert best <= busiest <= best * 4 / 3


def test_costs_are_those_of_gram_matrix_and_gradient() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 16, 1, bias=False), nn.Linear(4, 2))

    def costs(penalty: str, **options: object) -> list[int]:
        reg = ox.OrthoRegularizer(model, penalty, include="*", **options)
        return [cost for term in reg._plan.terms for cost in term.costs]

    assert costs("orthoreg") == [8 * 28 * 8, 16 * 8 * 8, 2 * 4 * 2]
    assert costs("so", side="rows") == [8 * 28 * 8, 16 * 8 * 16, 2 * 4 * 2]
    assert costs("srip") == [8 * 28, 16 * 8, 2 * 4]  # no Gram matrix
    assert costs("ocnn") == [8 * 27 * 8 * 25, 16 * 8 * 16, 2 * 4 * 2]  # 5 x 5 shifts


@pytest.mark.parametrize("penalty", ["orthoreg", "srip", "ocnn"])
def test_two_ranks_have_half_the_work_of_a_network_each(penalty: str) -> None:
    widths = [8] * 4 + [16] * 4 + [32] * 4 + [64] * 4  # those of a ResNet-18, an eighth of them
    layers = [nn.Conv2d(i, o, 3) for i, o in pairwise([3, *widths])]
    reg = ox.OrthoRegularizer(nn.Sequential(*layers), penalty)
    costs = [cost for term in reg._plan.terms for cost in term.costs]
    owners = deal(costs, 2)
    first = sum(cost for cost, owner in zip(costs, owners, strict=True) if owner == 0)
    assert 0.49 < first / sum(costs) < 0.51


def test_a_buffer_keeps_shapes_types_and_memory_order() -> None:
    like = [
        torch.zeros(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
        torch.zeros(3, dtype=torch.float64),
        torch.zeros(4, 2).t(),
        torch.zeros(0, 2),
        torch.zeros(()),
    ]
    flat = Flat(like)
    for i, (view, tensor) in enumerate(zip(flat.views, like, strict=True)):
        assert (view.shape, view.dtype) == (tensor.shape, tensor.dtype)
        assert view.numel() == 0 or view.stride() == tensor.stride()
        view.fill_(i + 1)
    for i, view in enumerate(flat.views):  # none writes into another
        assert torch.equal(view, torch.full_like(view, i + 1))
    flat.clear()
    assert not any(bool(view.any()) for view in flat.views)


def test_sharing_needs_a_process_group() -> None:
    with pytest.raises(RuntimeError, match=r"init_process_group\(\) first, or leave shard out"):
        ox.OrthoRegularizer(nn.Linear(3, 3), shard=True)


def test_a_wrapped_model_keeps_its_names() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    assert ox.OrthoRegularizer(nn.DataParallel(model), include="0").model is model


def test_one_process_asks_nobody() -> None:
    assert current() is None
    with among(None):
        assert current() is None
    with together("something") as notes:
        notes.append(1)
    assert notes == [1]
    tensor = torch.ones(2)
    distributed.sum_over_ranks([tensor])
    assert torch.equal(tensor, torch.ones(2))
    assert distributed.mean_of_ranks([tensor])[0] is tensor
    assert distributed.mean_over_ranks(2.0) == 2.0


def test_flat_parameters_are_known_by_their_marks() -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    model[0].weight._fsdp_flattened = True
    with pytest.raises(TypeError, match=r"module '0'.*fully_shard"):
        ox.OrthoRegularizer(model)


def test_a_copy_is_dealt_anew() -> None:
    reg = ox.OrthoRegularizer(nn.Sequential(nn.Linear(3, 3)))
    assert copy.deepcopy(reg)._shares is None
