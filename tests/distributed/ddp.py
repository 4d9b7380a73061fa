"""DDP, with and without shard=True, equals one process; the ranks stay bit-equal."""

from __future__ import annotations

import copy
import pickle
from functools import partial
from unittest import mock

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import orthoreg_ext as ox
from orthoreg_ext import sharing
from orthoreg_ext.distributed import Flat
from tests.distributed import nets

WAYS = [(attach, shard) for attach in (False, True) for shard in (False, True)]


def regularizer(shard: bool = False, **options: object):
    options = {"strength": 0.05, "max_dim": 64, **options}
    return lambda model: ox.OrthoRegularizer(model, shard=shard, **options)


def both(attach: bool, shard: bool, rank: int, ranks: int, **options: object) -> None:
    accumulate = options.pop("accumulate", 1)
    model = nets.net()
    run = partial(nets.trained, attach=attach, accumulate=accumulate, steps=4)
    run(
        regularizer(shard, **options),
        model=model,
        forward=DistributedDataParallel(model),
        share=(rank, ranks),
    )
    nets.assert_same_on_all_ranks(list(model.parameters()))
    single = run(regularizer(**options))
    nets.assert_close(model, single)
    if not options.get("strength", 1):
        return
    without = run(regularizer(strength=0.0))
    with pytest.raises(AssertionError):  # the term is large enough to be seen
        nets.assert_close(model, without, 1e-4)


def check_training_equals_one_process(rank: int, ranks: int) -> None:
    for attach, shard in WAYS:
        both(attach, shard, rank, ranks)


def check_accumulated_gradients(rank: int, ranks: int) -> None:
    for attach, shard in WAYS:
        both(attach, shard, rank, ranks, accumulate=2)


def check_every_and_schedule(rank: int, ranks: int) -> None:
    for attach, shard in WAYS:
        both(attach, shard, rank, ranks, every=2, schedule=lambda step: 1.0 / (1 + step))


def check_every_penalty(rank: int, ranks: int) -> None:
    all_of_them = ("so", "frobenius", "cosine", "gor", "mc", "srip", "ocnn")
    for penalty in all_of_them if ranks == 2 else ("gor", "srip"):
        for attach in (False, True):
            both(attach, True, rank, ranks, penalty=penalty)


def check_layer_selection_and_bias(rank: int, ranks: int) -> None:
    for attach in (False, True):
        both(attach, True, rank, ranks, bias=True, layer_weights="uniform", side="rows")
        both(attach, True, rank, ranks, include=["conv1"])  # fewer layers than ranks


def check_value_is_that_of_the_whole_term(rank: int, ranks: int) -> None:
    model = nets.net()
    for penalty in ("orthoreg", "srip"):
        values = [ox.OrthoRegularizer(model, penalty, shard=shard)() for shard in (False, True)]
        assert torch.equal(*values)
        assert values[1].requires_grad
    reg = ox.OrthoRegularizer(model, "srip", shard=True)
    with torch.inference_mode():
        assert not reg().requires_grad
    reg().backward()  # as if nothing had been
    nets.assert_same_on_all_ranks(list(reg.state_dict()["vectors"].values()))


def check_each_rank_computes_its_layers_only(rank: int, ranks: int) -> None:
    model = nets.net()
    reg = ox.OrthoRegularizer(model, shard=True, include="*")
    seen: list[int] = []
    call = ox.functional.gram_penalty

    def counted(weights, **rest):
        seen.append(len(weights))
        return call(weights, **rest)

    with mock.patch.object(ox.functional, "gram_penalty", counted):
        reg()
    counts: list[object] = [None] * ranks
    dist.all_gather_object(counts, sum(seen))
    assert sum(counts) == 6
    assert max(counts) < 6
    assert min(counts) >= 1


def check_the_mean_over_the_ranks_is_the_gradient(rank: int, ranks: int) -> None:
    """Also without DDP: every rank has a gradient of every parameter of the term."""
    model, single = nets.net(), nets.net()
    ox.OrthoRegularizer(model, shard=True)().backward()
    ox.OrthoRegularizer(single)().backward()
    for mine, whole in zip(model.parameters(), single.parameters(), strict=True):
        assert (mine.grad is None) == (whole.grad is None)
        if whole.grad is not None:
            dist.all_reduce(mine.grad)
            assert torch.allclose(mine.grad / ranks, whole.grad, rtol=1e-6, atol=1e-9)


def check_eigenvectors_are_known_to_all(rank: int, ranks: int) -> None:
    for attach in (False, True):
        model = nets.net()
        reg = ox.OrthoRegularizer(model, "srip", shard=True)
        optimizer = nets.sgd(model)
        before = reg.state_dict()["vectors"]
        if attach:
            reg.attach(optimizer)
            for parameter in model.parameters():
                parameter.grad = torch.randn_like(parameter)
            optimizer.step()
            optimizer.step()
        else:
            reg()
        after = reg.state_dict()["vectors"]
        assert any(not torch.equal(before[name], after[name]) for name in after)
        if attach:
            for name in after.keys() - {"depthwise"}:  # whose are of one entry, 1 or -1
                assert not torch.equal(before[name], after[name]), name
        nets.assert_same_on_all_ranks(list(after.values()))


def check_frozen_and_unused_parameters(rank: int, ranks: int) -> None:
    """A frozen bias stays; a layer that the forward leaves out still gets its term."""

    def make() -> nn.Module:
        model = nets.net()
        model.conv1.bias.requires_grad_(False)
        model.grouped.weight.requires_grad_(False)
        model.unused = nn.Conv2d(3, 5, 3)
        return model

    for attach, shard in WAYS:
        model = make()
        forward = DistributedDataParallel(model, find_unused_parameters=attach)
        run = partial(nets.trained, attach=attach)
        options = {"side": "rows", "include": "*"}
        run(regularizer(shard, **options), model=model, forward=forward, share=(rank, ranks))
        single = run(regularizer(**options), model=make())
        nets.assert_close(model, single)
        nets.assert_same_on_all_ranks(list(model.parameters()))
        assert torch.equal(model.conv1.bias, make().conv1.bias)
        assert not torch.equal(model.unused.weight, make().unused.weight)


def check_replaced_parameters_are_dealt_anew(rank: int, ranks: int) -> None:
    model = nets.net()
    reg = ox.OrthoRegularizer(model, "srip", shard=True)
    reg()
    model.conv1 = nn.Conv2d(3, 5, 3, padding=1)
    model.depthwise = nn.Conv2d(5, 8, 3, padding=1)
    with torch.no_grad():
        for parameter in model.parameters():
            dist.broadcast(parameter, 0)
    other = ox.OrthoRegularizer(model, "srip")
    other.load_state_dict({**other.state_dict(), "vectors": reg.state_dict()["vectors"]})
    assert torch.equal(reg(), other())


def check_parametrized_and_half_precision(rank: int, ranks: int) -> None:
    for dtype in (torch.float64, torch.bfloat16):
        models = [nets.net(dtype=dtype) for _ in range(2)]
        for model, shard in zip(models, (True, False), strict=True):
            nn.utils.parametrizations.weight_norm(model.fc)
            optimizer = nets.sgd(model)
            reg = ox.OrthoRegularizer(model, shard=shard, strength=0.1)
            reg.attach(optimizer)
            generator = torch.Generator().manual_seed(3)
            for parameter in model.parameters():
                grad = torch.randn(parameter.shape, generator=generator).to(dtype)
                parameter.grad = grad if parameter.dim() < 4 else None  # both ways
            optimizer.step()
        nets.assert_same_on_all_ranks(list(models[0].parameters()))
        nets.assert_close(models[0], models[1], 1e-12 if dtype is torch.float64 else 1e-2)


def check_memory_order_survives(rank: int, ranks: int) -> None:
    model = nets.net().to(memory_format=torch.channels_last)
    optimizer = nets.sgd(model)
    ox.OrthoRegularizer(model, shard=True).attach(optimizer)
    optimizer.step()
    assert model.conv1.weight.grad.stride() == model.conv1.weight.stride()


def check_ranks_with_other_gradients_keep_them(rank: int, ranks: int) -> None:
    """What is exchanged is the term alone: no rank's gradient is written over."""
    model, other = nets.net(), nets.net()
    for one, shard in ((model, True), (other, False)):
        optimizer = nets.sgd(one)
        ox.OrthoRegularizer(one, shard=shard, strength=0.1).attach(optimizer)
        for parameter in one.parameters():
            parameter.grad = torch.full_like(parameter, rank + 1.0)
        optimizer.step()
    nets.assert_close(model, other)


def check_a_wrapped_model_is_unwrapped(rank: int, ranks: int) -> None:
    model = nets.net()
    reg = ox.OrthoRegularizer(DistributedDataParallel(model), include="conv1")
    assert reg.model is model
    assert [row.name for row in reg.report()] == ["conv1"]


def check_a_subgroup(rank: int, ranks: int) -> None:
    groups = [dist.new_group([r]) for r in range(ranks)]
    pair = dist.new_group([0, 1])
    model = nets.net(seed=rank)  # ranks that are not in the group need not agree
    alone = ox.OrthoRegularizer(model, shard=True, process_group=groups[rank])
    assert torch.equal(alone(), ox.OrthoRegularizer(model)())
    if rank < 2:
        reg = ox.OrthoRegularizer(nets.net(), shard=True, process_group=pair)
        assert torch.equal(reg(), ox.OrthoRegularizer(nets.net())())
    else:
        with pytest.raises(RuntimeError, match="is not in process_group"):
            ox.OrthoRegularizer(model, shard=True, process_group=pair)
    with pytest.raises(ValueError, match="shard=True"):
        ox.OrthoRegularizer(model, process_group=groups[rank])


def check_ranks_that_differ_are_refused(rank: int, ranks: int) -> None:
    model = nets.net()
    if rank == ranks - 1:
        model.conv1 = nn.Conv2d(3, 7, 3)
    reg = ox.OrthoRegularizer(model, shard=True)
    with pytest.raises(
        RuntimeError, match=f"'conv1' of 8 x 27 and a bias on rank 0.* rank {ranks - 1}"
    ):
        reg()
    other = ox.OrthoRegularizer(nets.net(), "so" if rank else "orthoreg", shard=True)
    with pytest.raises(RuntimeError, match="'orthoreg', side='small', every=1 on rank 0"):
        other()
    for first, last, found in (
        (
            {"strength": 0.1},
            {"strength": 0.2},
            "strength=0.1, a factor of 0.1 in this step on rank 0",
        ),
        (
            {"every": 3, "schedule": halved},
            {"every": 3},
            "a factor of 0.015 in this step on rank 0",
        ),
        ({"layer_weights": "sqrt"}, {"layer_weights": "mean"}, "'conv1' with the weight"),
        (
            {},
            {"bias": False},
            "'conv1' of 8 x 27 and a bias on rank 0, but layer 'conv1' of 8 x 27",
        ),
    ):
        for attach in (False, True):
            model = nets.net()
            reg = ox.OrthoRegularizer(model, shard=True, **(last if rank else first))
            optimizer = nets.sgd(model)
            if attach:
                reg.attach(optimizer)
            with pytest.raises(RuntimeError, match=found):
                optimizer.step() if attach else reg()


def check_a_copy_shares_with_the_same_ranks(rank: int, ranks: int) -> None:
    pair = dist.new_group([0, 1])
    for group in (None, pair):
        if group is not None and rank > 1:
            continue
        reg = ox.OrthoRegularizer(nets.net(), shard=True, process_group=group)
        reg()
        copied = copy.deepcopy(reg)
        with mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as spied:
            assert torch.equal(copied(), reg())
        assert {call.kwargs["group"] for call in spied.call_args_list} == {
            group or dist.group.WORLD
        }
        if group is None:
            assert torch.equal(pickle.loads(pickle.dumps(reg))(), reg())
        else:
            with pytest.raises(TypeError, match="make it anew, or leave process_group out"):
                pickle.dumps(reg)


def halved(step: int) -> float:
    return 0.5


def check_a_resumed_run(rank: int, ranks: int) -> None:
    """The state of one rank serves any number of them."""
    make = regularizer(shard=True, penalty="srip", schedule=halved)
    model = nets.net()
    reg, optimizer = make(model), nets.sgd(model)
    reg.attach(optimizer)
    optimizer.step()
    state = reg.state_dict()
    box = [state if rank == 0 else None]
    dist.broadcast_object_list(box, 0)
    resumed = regularizer(penalty="srip", schedule=halved)(model)
    resumed.load_state_dict(box[0])
    nets.assert_same_on_all_ranks(list(resumed.state_dict()["vectors"].values()))
    again = nets.sgd(model)
    assert resumed.attach(again).step == 1


def check_a_compiled_loss(rank: int, ranks: int) -> None:
    """The shared term stands between two graphs; one graph alone is refused."""
    if ranks > 2:
        return  # the compiler takes seconds in each process
    model = nets.net()
    reg = ox.OrthoRegularizer(model, shard=True)

    def loss(x: torch.Tensor) -> torch.Tensor:
        return model.conv1(x).square().mean() + reg()

    x, _ = nets.data()
    found = torch.compile(loss, backend="eager")(x)
    assert torch.allclose(found, loss(x), rtol=1e-6)
    torch.compiler.reset()
    with pytest.raises(Exception, match="the ranks talk with shard=True"):
        torch.compile(loss, backend="eager", fullgraph=True)(x)


def check_planted_bugs_are_seen(rank: int, ranks: int) -> None:
    """Without the exchange, the factor of the ranks, or the other ranks' zeros, checks fail."""

    def nothing(flat: Flat, group: object) -> None:
        pass

    for planted in (
        lambda: both(True, True, rank, ranks),
        lambda: check_value_is_that_of_the_whole_term(rank, ranks),
    ):
        with mock.patch.object(Flat, "sum", nothing), pytest.raises(AssertionError):
            planted()

    plain = sharing._Whole.backward

    def unscaled(ctx, grad):
        ctx.ranks = 1
        return plain(ctx, grad)

    with (
        mock.patch.object(sharing._Whole, "backward", staticmethod(unscaled)),
        pytest.raises(AssertionError),
    ):
        both(False, True, rank, ranks)
