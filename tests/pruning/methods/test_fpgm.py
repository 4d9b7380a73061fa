"""FPGM against distances computed by hand, and against its schedule."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from orthoreg_ext.pruning.methods import FPGM

from ..nets import ResNet, Separable
from .loops import (
    check_optimizer,
    check_resume,
    example,
    refused,
    sgd,
    small_net,
    step,
    train_epoch,
)


def line(positions: list[float]) -> nn.Sequential:
    """A layer with one weight a filter: distances are differences."""
    net = nn.Sequential(nn.Conv2d(1, len(positions), 1), nn.ReLU(), nn.Conv2d(len(positions), 2, 1))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor(positions).view(-1, 1, 1, 1))
    return net


def make(model: nn.Module, optimizer: torch.optim.Optimizer, **settings: object) -> FPGM:
    return FPGM(model, example(), **{"optimizer": optimizer, "duration": 6, **settings})


def chosen_on(positions: list[float], **settings: float) -> set[int]:
    net = line(positions)
    FPGM(net, torch.ones(1, 1, 2, 2), **settings)
    left = net[0].weight.flatten().tolist()
    assert all(w in (0, p) for w, p in zip(left, torch.tensor(positions).tolist(), strict=True))
    return {i for i, w in enumerate(left) if w == 0}


def test_the_set_on_a_line() -> None:
    # sums of the distances: 1: 1 + 3 + 4 + 8 = 16, 2: 13, 4: 11, 5: 12, 9: 24
    assert chosen_on([1, 2, 4, 5, 9], ratio=0.2, norm_ratio=0) == {2}
    assert chosen_on([1, 2, 4, 5, 9], ratio=0.4, norm_ratio=0) == {2, 3}
    # 1 goes by its norm; of the others 2: 2 + 3 + 7 = 12, 4: 8, 5: 8, 9: 16
    assert chosen_on([1, 2, 4, 5, 9], ratio=0.6, norm_ratio=0.2) == {0, 2, 3}


def test_distances_are_to_those_that_the_norms_leave() -> None:
    # to all: 0.1: 30.9, 0.2: 30.5, 0.3: 30.3, 6: 30.4, 10: 38.4, 15: 53.4 -> 0.3
    # without the first three: 6: 4 + 9, 10: 4 + 5, 15: 9 + 5 -> 10
    positions = [0.1, 0.2, 0.3, 6.0, 10.0, 15.0]
    assert chosen_on(positions, ratio=0.17, norm_ratio=0) == {2}
    assert chosen_on(positions, ratio=0.67, norm_ratio=0.5) == {0, 1, 2, 4}


def written_out(weight: Tensor, small: int, total: int) -> set[int]:
    rows = weight.detach().flatten(1).double()
    first = rows.norm(dim=1).argsort()[:small].tolist()
    rest = [i for i in range(len(rows)) if i not in first]
    sums = {i: sum(float((rows[i] - rows[j]).norm()) for j in rest) for i in rest}
    return set(first) | set(sorted(rest, key=sums.__getitem__)[: total - small])


def zero_filters(weight: Tensor) -> set[int]:
    return {i for i, row in enumerate(weight) if not row.any()}


def test_the_schedule() -> None:
    # 6 and 8 filters, ratio 0.5: 3 and 4 go, of them 1 and 1 (floor of 0.2 * 6, 0.2 * 8) by norm
    model = small_net()
    optimizer = sgd(model)
    sets = [written_out(model[0].weight, 1, 3), written_out(model[3].weight, 1, 4)]
    method = make(model, optimizer, norm_ratio=0.2, every=2)
    for epoch in range(1, 7):
        assert not method.done
        for _ in range(3):
            step(model, optimizer, method)
            zero = [zero_filters(model[0].weight), zero_filters(model[3].weight)]
            assert zero == sets, "held at zero, momentum or not"
        if epoch == 2:  # other filters go now, and those have momentum
            with torch.no_grad():
                for i, live in ((0, 6), (3, 8)):
                    new = next(iter(set(range(live)) - sets[i // 3]))
                    model[i].weight[list(sets[i // 3])] = 3 * torch.randn(model[i].weight[0].shape)
                    model[i].weight[new] *= 1e-3
        if epoch % 2 == 0:
            sets = [written_out(model[0].weight, 1, 3), written_out(model[3].weight, 1, 4)]
        method.after_epoch()
    assert method.done
    assert model[1].bias.all(), "norms are left alone"
    zero = [zero_filters(model[0].weight), zero_filters(model[3].weight)]
    removed = {e["layer"]: set(e["removed"]) for e in method.finish().history}
    assert [removed["0"], removed["3"]] == sets == zero
    check_optimizer(model, optimizer)
    assert not zero_filters(model[0].weight)
    assert not zero_filters(model[3].weight)


def test_gradients_are_masked() -> None:
    model = small_net()
    method = make(model, sgd(model), ratio=0.5)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    method.before_step()
    assert zero_filters(model[0].weight.grad) == zero_filters(model[0].weight)
    assert model[1].weight.grad.all()
    assert model[0].bias.grad.all()
    assert model[8].weight.grad.all()


def test_silent_channels_compute_nothing_so_that_removal_changes_nothing() -> None:
    model = small_net()
    optimizer = sgd(model)
    method = make(model, optimizer, silence=True)
    for _ in range(3):
        train_epoch(model, optimizer, method)
    model.eval()
    before = model(example())
    method.finish()
    torch.testing.assert_close(model(example()), before)


def test_a_resumed_run_ends_alike() -> None:
    check_resume(small_net, lambda m, o: make(m, o, norm_ratio=0.2, every=2), total=20, at=5)
    check_resume(small_net, lambda m, o: make(m, o, silence=True), total=16, at=9)


@pytest.mark.parametrize("net", [ResNet, Separable])
def test_coupled_layers_and_frozen_ones(net: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = net()
    last = model.layer3.conv1 if net is ResNet else model.multiply
    last.weight.requires_grad_(False)
    frozen = last.weight.clone()
    optimizer = sgd(model)
    x = torch.randn(4, 3, 8, 8)
    method = FPGM(model, x, optimizer=optimizer, ratio=0.4)
    for _ in range(2):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), torch.arange(4)).backward()
        method.before_step()
        optimizer.step()
        method.after_step()
        method.after_epoch()
    assert torch.equal(last.weight, frozen)
    coupled = (model.stem, model.layer1.conv2) if net is ResNet else (model.stem, model.depth)
    assert zero_filters(coupled[0].weight) == zero_filters(coupled[1].weight) != set()
    method.finish()
    check_optimizer(model, optimizer)
    model(x)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"norm_ratio": 0.5}, "norm_ratio is 0.5"),
        ({"norm_ratio": -0.1}, "norm_ratio is -0.1"),
        ({"every": 0}, "every is 0"),
        ({"duration": 0}, "duration is 0"),
        ({"criterion": "l1"}, "leave criterion out"),
        ({"ratio": None}, "ratio is None"),
        ({"ratio": 0.96}, "above max_layer_ratio"),
    ],
)
def test_bad_arguments_change_nothing(arguments: dict, message: str) -> None:
    model = small_net()
    optimizer = sgd(model)
    with refused(message, model, optimizer):
        make(model, optimizer, **arguments)


def test_weights_that_are_not_finite_are_refused() -> None:
    model = small_net()
    with torch.no_grad():
        model[3].weight[2] = float("nan")
    with pytest.raises(ValueError, match="'3'"):
        make(model, sgd(model))
    assert model[0].weight.all()
