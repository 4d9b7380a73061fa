"""Weights that are sharded themselves: right gradients, or a refusal that names the layer."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn import functional as f

import orthoreg_ext as ox
from tests.distributed import nets

STEPS = 3
OPTIONS = {"strength": 0.05, "include": "*", "bias": True}


def fsdp_net(ranks: int, nested: bool) -> nn.Module:
    """Seven, nine and five filters: no number that the ranks divide."""
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(3, 7, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(7, 9, 3),
        nn.Flatten(),
        nn.Linear(144, 5),
    )
    if nested:
        fully_shard(model[2])
    return model


def steps(model: nn.Module, penalty: str, attach: bool, share: tuple[int, int], before: bool):
    optimizer = nets.sgd(model)
    reg = ox.OrthoRegularizer(model, penalty, **OPTIONS)
    if attach:
        reg.attach(optimizer)
    values = []
    for step in range(STEPS):
        optimizer.zero_grad()
        x, y = nets.part(nets.data(step), *share)
        early = reg() if before and not attach else 0
        loss = f.cross_entropy(model(x), y)
        if not attach:
            term = early if before else reg()
            values.append(float(term.detach()))
            loss = loss + term
        loss.backward()
        optimizer.step()
    return values


def assert_equals(model: nn.Module, other: nn.Module) -> None:
    expected = dict(other.named_parameters())
    for name, parameter in model.named_parameters():
        whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        wanted = expected[name].detach()
        error = float((whole.detach() - wanted).norm() / wanted.norm())
        assert error <= 1e-6, f"{name} differs by {error:.2e}"


def check_fully_shard(rank: int, ranks: int) -> None:
    for penalty in ("orthoreg", "srip"):
        for attach, before in ((False, False), (False, True), (True, False)):
            for nested in (False, True) if ranks == 2 else (True,):
                model = fsdp_net(ranks, nested)
                fully_shard(model)
                found = steps(model, penalty, attach, (rank, ranks), before)
                single = fsdp_net(ranks, False)
                wanted = steps(single, penalty, attach, (0, 1), before)
                assert found == pytest.approx(wanted, rel=1e-6)
                assert_equals(model, single)


def check_a_report_of_sharded_layers(rank: int, ranks: int) -> None:
    model = fsdp_net(ranks, False)
    wanted = ox.OrthoRegularizer(model, **OPTIONS).report()
    fully_shard(model)
    assert str(ox.OrthoRegularizer(model, **OPTIONS).report()) == str(wanted)


def check_tensor_parallelism(rank: int, ranks: int) -> None:
    mesh = init_device_mesh("cpu", (ranks,))
    for attach in (False, True):
        models = []
        for parallel in (True, False):
            torch.manual_seed(2)
            model = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 8))
            if parallel:
                plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
                parallelize_module(model, mesh, plan)
            optimizer = nets.sgd(model)
            reg = ox.OrthoRegularizer(model, **OPTIONS)
            if attach:
                reg.attach(optimizer)
            for _ in range(STEPS):
                optimizer.zero_grad()
                loss = model(torch.linspace(-1, 1, 48).view(4, 12)).square().sum()
                (loss if attach else loss + reg()).backward()
                optimizer.step()
            models.append(model)
        assert isinstance(models[0][0].weight, DTensor)
        assert_equals(*models)


def check_sharing_what_is_sharded_is_refused(rank: int, ranks: int) -> None:
    model = fsdp_net(ranks, False)
    fully_shard(model)
    reg = ox.OrthoRegularizer(model, shard=True)
    with pytest.raises(TypeError, match=r"layer '0' is a DTensor.*leave shard out"):
        reg()
    with pytest.raises(TypeError, match="is sharded"):
        ox.pruning.prune(model, torch.randn(1, 3, 6, 6), criterion="l1")


def check_layers_gathered_at_the_step_are_refused(rank: int, ranks: int) -> None:
    model = fsdp_net(ranks, False)
    fully_shard(model)
    optimizer = nets.sgd(model)
    ox.OrthoRegularizer(model, **OPTIONS).attach(optimizer)
    model(torch.randn(2, 3, 6, 6))  # and no backward: the root's layers stay gathered
    with pytest.raises(RuntimeError, match=r"layer '0' is gathered.*reshard\(\)"):
        optimizer.step()
    model.reshard()
    optimizer.step()


def check_flat_parameters_are_refused(rank: int, ranks: int) -> None:
    for originals in (False, True):
        model = nets.net()
        reg = ox.OrthoRegularizer(model)
        wrapped = FullyShardedDataParallel(
            model, use_orig_params=originals, device_id=torch.device("cpu")
        )
        with pytest.raises(TypeError, match=r"FullyShardedDataParallel.*fully_shard"):
            ox.OrthoRegularizer(wrapped)
        with pytest.raises(TypeError, match="FullyShardedDataParallel"):
            reg()  # wrapped from outside since
