"""Pruning on many ranks: each scores its own data, and all make the cut that one process makes."""

from __future__ import annotations

from collections.abc import Iterator
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as f
from torch.nn.parallel import DistributedDataParallel

import orthoreg_ext as ox
from orthoreg_ext.distributed import Flat, among
from orthoreg_ext.pruning import calibration, engine, latency
from orthoreg_ext.pruning.rules import Rules
from tests.distributed import nets
from tests.pruning.nets import ResNet, randomised

EXAMPLE = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(9))

Batches = list[tuple[Tensor, Tensor]]


def resnet(seed: int = 4) -> nn.Module:
    torch.manual_seed(seed)
    return randomised(ResNet(), seed=seed).eval()


def plain_net() -> nn.Module:
    """Without BatchNorm, whose statistics would be those of a rank's part."""
    torch.manual_seed(3)
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 10, 3), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(10, 4)),
    )


def batches(count: int = 3, seed: int = 0) -> Batches:
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(8, 3, 8, 8, generator=generator),
            torch.randint(4, (8,), generator=generator),
        )
        for _ in range(count)
    ]


def own(data: Batches, rank: int, ranks: int) -> Batches:
    """Every rank has other samples; the last one has none of the last batch."""
    kept = data if rank < ranks - 1 else data[:-1]
    parts = [nets.part(batch, rank, ranks) for batch in kept]
    if rank == 0:  # which has those of the last one instead
        parts.append(nets.part(data[-1], ranks - 1, ranks))
    return parts


def assert_as_one(model: nn.Module, single: nn.Module) -> None:
    nets.assert_close(model, single)
    assert sum(p.numel() for p in model.parameters()) < 4000
    nets.assert_same_on_all_ranks(list(model.parameters()))


def alone(run: object, *arguments: object, **options: object) -> object:
    with among(None):
        return run(*arguments, **options)  # type: ignore[operator]


def check_data_criteria(rank: int, ranks: int) -> None:
    for criterion in ("fisher", "taylor", "bn_taylor", "grasp", "rdt", "group_fisher"):
        model, single = resnet(), resnet()
        options = {"criterion": criterion, "ratio": 0.4}
        found = ox.pruning.prune(model, EXAMPLE, data=own(batches(), rank, ranks), **options)
        wanted = alone(ox.pruning.prune, single, EXAMPLE, data=batches(), **options)
        assert found.history == wanted.history, criterion
        assert_as_one(model, single)


def check_without_the_sum_the_cuts_differ(rank: int, ranks: int) -> None:
    """And are refused everywhere, before anything is removed: what the sum is for."""

    def nothing(flat: Flat, group: object) -> None:
        pass

    model = resnet()
    before = [parameter.clone() for parameter in model.parameters()]
    data = own(batches(), rank, ranks)
    with (
        mock.patch.object(Flat, "sum", nothing),
        pytest.raises(RuntimeError, match=r"the cuts differ between the ranks.*Nothing was rem"),
    ):
        ox.pruning.prune(model, EXAMPLE, data=data, criterion="taylor_sq", ratio=0.4)
    assert all(map(torch.equal, model.parameters(), before))


def check_gradients_that_are_there(rank: int, ranks: int) -> None:
    model, single = resnet(), resnet()
    (x, y), *_ = batches()
    f.cross_entropy(single(x), y).backward()
    x, y = nets.part((x, y), rank, ranks)
    f.cross_entropy(model(x), y).backward()
    found = ox.pruning.prune(model, EXAMPLE, criterion="fisher", ratio=0.4)
    wanted = alone(ox.pruning.prune, single, EXAMPLE, criterion="fisher", ratio=0.4)
    assert found.history == wanted.history


def check_one_class_a_rank(rank: int, ranks: int) -> None:
    """Data sorted by class is fine, as long as the ranks together have several."""
    (x, y), *_ = batches(1)
    ordered = x, torch.arange(8) % ranks
    mine = [nets.part(ordered, rank, ranks)]
    found = ox.pruning.prune(resnet(), EXAMPLE, data=mine, ratio=0.3)
    wanted = alone(ox.pruning.prune, resnet(), EXAMPLE, data=[ordered], ratio=0.3)
    assert found.history == wanted.history
    empty = [] if rank else [ordered]
    found = ox.pruning.prune(resnet(), EXAMPLE, data=empty, ratio=0.3, criterion="group_fisher")
    assert len({str(h) for h in gathered(found.history)}) == 1
    with pytest.raises(ValueError, match="one class only"):
        ox.pruning.prune(resnet(), EXAMPLE, data=[(x, torch.zeros_like(y))], ratio=0.3)
    with pytest.raises(ValueError, match="data is empty"):
        ox.pruning.prune(resnet(), EXAMPLE, data=[], ratio=0.3)


def gathered(value: object) -> list[object]:
    found: list[object] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def check_an_error_of_one_rank_is_one_of_all(rank: int, ranks: int) -> None:
    data: list[object] = [*batches()]
    if rank == 1:
        data.append("no pair")
    kind, text = (ValueError, "batch 3 is a str") if rank == 1 else (RuntimeError, "on rank 1")
    model = resnet()
    with pytest.raises(kind, match=text):
        ox.pruning.prune(model, EXAMPLE, data=data, ratio=0.3)
    f.cross_entropy(model(batches()[0][0]), batches()[0][1]).backward()
    if rank == 1:
        model.zero_grad()
    with pytest.raises((ValueError, RuntimeError), match="has no gradient"):
        ox.pruning.prune(model, EXAMPLE, ratio=0.3)
    model = resnet()
    if rank == 1:
        with torch.no_grad():
            model.stem.weight[0] = torch.nan
    with pytest.raises((ValueError, RuntimeError), match="NaN"):
        ox.pruning.prune(model, EXAMPLE, criterion=ORDER, ratio=0.3)


def check_an_argument_that_one_rank_refuses_is_refused_by_all(rank: int, ranks: int) -> None:
    wrong = ranks - 1
    name, much = ("l0", 0.999) if rank == wrong else ("l1", 0.5)
    model = resnet()
    for act in (
        lambda: ox.pruning.prune(model, EXAMPLE, criterion=name, ratio=0.5),
        lambda: ox.pruning.prune(model, EXAMPLE, criterion="l1", ratio=much),
        lambda: ox.pruning.prune(model, EXAMPLE, criterion="l1", ratio=much, target="macs"),
        lambda: ox.pruning.sensitivity(model, EXAMPLE, batches(), criterion=name),
        lambda: ox.pruning.OrthoReg(model, EXAMPLE, criterion=name),
    ):
        kind = ValueError if rank == wrong else RuntimeError
        with pytest.raises(
            kind, match="l0|99|greater" if rank == wrong else f"failed on rank {wrong}"
        ):
            act()
    nets.assert_close(model, resnet())


ORDER = ox.pruning.Criterion(
    "order",
    "the number of the unit",
    lambda evidence: [
        torch.arange(len(g.units), dtype=torch.float64) for g in evidence.structure.prunable
    ],
)


def check_a_cut_that_fails_on_one_rank_is_taken_back_on_all(rank: int, ranks: int) -> None:
    model = resnet()
    before = dict(model.named_parameters())
    commit = engine.checked_commit

    def failing(*arguments: object) -> None:
        if rank == 1:
            raise RuntimeError("the outputs differ")
        commit(*arguments)

    with (
        mock.patch.object(engine, "checked_commit", failing),
        pytest.raises(RuntimeError, match="the outputs differ"),
    ):
        ox.pruning.prune(model, EXAMPLE, criterion="l1", ratio=0.3)
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    direct = engine.Engine(model, EXAMPLE, Rules(criterion="l1"))  # as the methods do
    units = direct.select(direct.score(), 0.3)
    with (
        mock.patch.object(engine, "checked_commit", failing),
        pytest.raises(RuntimeError, match="the outputs differ"),
    ):
        direct.remove(units)
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    assert not direct.history


def check_ranks_with_other_weights_are_refused(rank: int, ranks: int) -> None:
    model = resnet(seed=rank)
    with pytest.raises(RuntimeError, match=r"the cuts differ.*among\(None\)"):
        ox.pruning.prune(model, EXAMPLE, criterion="l1", ratio=0.3)
    if rank == 0:
        alone(ox.pruning.prune, model, EXAMPLE, criterion="l1", ratio=0.3)  # waits for nobody
    pair = dist.new_group([0, 1])
    with among(pair if rank < 2 else None):
        ox.pruning.prune(resnet(), EXAMPLE, criterion="l1", ratio=0.3)


def check_a_wrapped_model_is_refused(rank: int, ranks: int) -> None:
    with pytest.raises(TypeError, match=r"pass model\.module on every rank, and wrap the pruned"):
        ox.pruning.prune(DistributedDataParallel(resnet()), EXAMPLE, criterion="l1")


def check_latency(rank: int, ranks: int) -> None:
    """Every rank measures other times, and all cut the same."""
    whole = sum(p.numel() for p in resnet().parameters())

    def ratio(before: nn.Module, after: nn.Module, inputs: Tensor) -> tuple[float, str]:
        left = sum(p.numel() for p in after.parameters()) / whole
        return left ** (1 + rank), "quiet"  # as if this machine were another one

    with mock.patch.object(latency, "time_ratio", ratio):
        found = ox.pruning.prune(
            resnet(), EXAMPLE, criterion="l1", ratio=0.4, target="latency", verify=False
        )
    assert len({str(h) for h in gathered(found.history)}) == 1


def check_sensitivity(rank: int, ranks: int) -> None:
    data = own(batches(), rank, ranks)
    found = ox.pruning.sensitivity(resnet(), EXAMPLE, data, ratios=(0.5,), verify=False)
    wanted = alone(
        ox.pruning.sensitivity, resnet(), EXAMPLE, batches(), ratios=(0.5,), verify=False
    )
    assert torch.allclose(found.values, wanted.values, rtol=1e-6)


def loop(rank: int, ranks: int, attach: bool) -> nn.Module:
    """Train, prune, wrap again, train: the loop of docs/howto/distributed.md."""

    def wrapped(model: nn.Module) -> nn.Module:
        return model if ranks == 1 else DistributedDataParallel(model)

    model = plain_net()
    optimizer = nets.sgd(model)
    reg = ox.OrthoRegularizer(model, strength=0.05, shard=ranks > 1)
    if attach:
        reg.attach(optimizer)
    for round_ in range(2):
        forward = wrapped(model)
        for batch in batches(2, seed=round_):
            x, y = nets.part(batch, rank, ranks)
            optimizer.zero_grad()
            loss = f.cross_entropy(forward(x), y)
            (loss if attach else loss + reg()).backward()
            optimizer.step()
        if round_ == 0:
            data = [nets.part(batch, rank, ranks) for batch in batches()]
            ox.pruning.prune(model, EXAMPLE, data=data, ratio=0.3, optimizer=optimizer)
    return model


def check_the_loop_of_training_and_pruning(rank: int, ranks: int) -> None:
    for attach in (False, True):
        model = loop(rank, ranks, attach)
        assert_as_one(model, alone(loop, 0, 1, attach))


def check_orthoreg_method(rank: int, ranks: int) -> None:
    def run(rank: int, ranks: int) -> nn.Module:
        model = plain_net()
        optimizer = nets.sgd(model, weight_decay=1e-3)
        method = ox.pruning.OrthoReg(
            *(model, EXAMPLE),
            data=[nets.part(batch, rank, ranks) for batch in batches()],
            optimizer=optimizer,
            regularizer=ox.OrthoRegularizer(model, shard=ranks > 1),
            ratio=0.4,
            rounds=2,
            ortho_epochs=1,
            retrain_epochs=1,
        )
        while not method.done:
            forward = model if ranks == 1 else DistributedDataParallel(model)  # anew after a cut
            for batch in batches(2, seed=method.epochs):
                x, y = nets.part(batch, rank, ranks)
                optimizer.zero_grad()
                f.cross_entropy(forward(x), y).backward()
                method.before_step()
                optimizer.step()
                method.after_step()
            method.after_epoch()
        method.finish()
        return model

    assert_as_one(run(rank, ranks), alone(run, 0, 1))


def check_group_fisher_method(rank: int, ranks: int) -> None:
    def run(rank: int, ranks: int) -> nn.Module:
        model = plain_net()
        optimizer = nets.sgd(model)
        method = ox.pruning.GroupFisher(model, EXAMPLE, every=2, ratio=0.25, optimizer=optimizer)
        forward, step = wrapped(model, ranks), 0
        while not method.done:
            x, y = nets.part(batches(1, seed=step)[0], rank, ranks)
            optimizer.zero_grad()
            f.cross_entropy(forward(x), y).backward()
            method.before_step()
            optimizer.step()
            rounds = method.engine.rounds
            method.after_step()
            if method.engine.rounds > rounds:  # the parameters are others
                forward = wrapped(model, ranks)
            step += 1
        method.finish()
        return model

    assert_as_one(run(rank, ranks), alone(run, 0, 1))


def check_a_pruner_of_torch_pruning_that_regularizes(rank: int, ranks: int) -> None:
    """After DDP has averaged: with shard=True, too, each rank gets the whole gradient."""
    import torch_pruning as tp

    from orthoreg_ext.integrations.torch_pruning import with_orthoreg

    model, single = plain_net(), plain_net()
    for net, shard in ((model, True), (single, False)):
        pruner = with_orthoreg(tp.pruner.BasePruner, shard=shard)
        made = pruner(net, EXAMPLE, tp.importance.MagnitudeImportance())
        made.regularize(net, None)
        for parameter in net.parameters():
            if parameter.grad is not None:
                parameter.data.sub_(parameter.grad)
    nets.assert_close(model, single)
    nets.assert_same_on_all_ranks(list(model.parameters()))


def wrapped(model: nn.Module, ranks: int) -> nn.Module:
    return model if ranks == 1 else DistributedDataParallel(model)


def check_a_generator_of_batches(rank: int, ranks: int) -> None:
    def read() -> Iterator[tuple[Tensor, Tensor]]:
        yield from own(batches(), rank, ranks)

    parameters = dict(resnet().named_parameters())
    model = resnet()
    parameters = {"stem.weight": model.stem.weight}
    found = calibration.mean_gradients(model, parameters, read())
    with among(None):
        wanted = calibration.mean_gradients(model, parameters, batches())
    error = (found["stem.weight"] - wanted["stem.weight"]).norm() / wanted["stem.weight"].norm()
    assert float(error) < 1e-6
