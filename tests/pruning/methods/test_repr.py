"""RePr against cosines by hand, its schedule, and the geometry of what comes back."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from orthoreg_ext.pruning.methods import RePr
from orthoreg_ext.pruning.methods.repr import orthogonal_rows

from ..nets import Grouped, ResNet, Separable, Transposed
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


def make(model: nn.Module, optimizer: torch.optim.Optimizer, **settings: object) -> RePr:
    schedule = {"whole_epochs": 2, "dropped_epochs": 1, "rounds": 2}
    return RePr(model, example(), **{"optimizer": optimizer, **schedule, **settings})


def zero_filters(weight: Tensor) -> set[int]:
    return {i for i, row in enumerate(weight) if not row.any()}


def zeros(model: nn.Module) -> int:
    return len(zero_filters(model[0].weight)) + len(zero_filters(model[3].weight))


def test_the_most_correlated_filters_of_all_layers_go() -> None:
    # plane: directions 0, 30, 90 degrees and 0 again (a copy, longer)
    # sums of |cos| of the others: 0: .866 + 0 + 1; 30: .866 + .5 + .866; 90: 0 + .5 + 0; copy as 0
    # over n = 4: .467, .558, .125, .467; the second layer is orthonormal: 0
    net = nn.Sequential(
        nn.Conv2d(2, 4, 1), nn.ReLU(), nn.Conv2d(4, 3, 1), nn.ReLU(), nn.Conv2d(3, 2, 1)
    )
    angles = torch.tensor([0.0, 30.0, 90.0, 0.0]).deg2rad()
    with torch.no_grad():
        rows = torch.stack([angles.cos(), angles.sin()], 1)
        rows[3] *= 5
        net[0].weight.copy_(rows.view(4, 2, 1, 1))
        net[2].weight.copy_(torch.eye(4)[:3].view(3, 4, 1, 1))
    x = torch.ones(1, 2, 2, 2)
    method = RePr(net, x, ratio=3 / 7, whole_epochs=1, dropped_epochs=1, rounds=1)
    method.after_epoch()
    assert zero_filters(net[0].weight) == {0, 1, 3}
    assert net[0].weight[2].any()


def test_the_schedule() -> None:
    model = small_net()  # 14 filters, 30 %: 4
    optimizer = sgd(model)
    method = make(model, optimizer)
    table = []
    while not method.done:
        for _ in range(3):
            step(model, optimizer, method)
            dead = zeros(model)
        method.after_epoch()
        table.append((method.epochs, dead, len(method.dropped), zeros(model)))
    assert table == [
        (1, 0, 0, 0),
        (2, 0, 4, 4),  # dropped
        (3, 4, 0, 0),  # held at zero for an epoch, then brought back
        (4, 0, 0, 0),
        (5, 0, 4, 4),
        (6, 4, 4, 4),  # the last ones stay, and go
    ]
    model.eval()
    before = model(example())
    removed = sum(len(e["removed"]) for e in method.finish().history)
    assert removed == 4
    assert zeros(model) == 0
    torch.testing.assert_close(model(example()), before)
    check_optimizer(model, optimizer)


def test_dropped_filters_are_silent_and_get_no_gradient() -> None:
    model = small_net()
    optimizer = sgd(model)
    method = make(model, optimizer, whole_epochs=1, ratio=0.5)
    train_epoch(model, optimizer, method)
    first = list(zero_filters(model[0].weight))
    assert first
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    method.before_step()
    for p in (model[0].weight, model[0].bias, model[1].weight, model[1].bias):
        assert not p[first].any()
        assert not p.grad[first].any()
    assert model[8].weight.grad.all()


def test_what_comes_back_is_orthogonal_to_what_stayed_and_to_what_it_was() -> None:
    model = small_net()
    optimizer = sgd(model)
    method = make(model, optimizer, whole_epochs=1, ratio=0.5)
    for _ in range(3):
        step(model, optimizer, method)
    old = {i: model[i].weight.detach().clone() for i in (0, 3)}
    norms = {i: (model[i].weight.clone(), model[i].bias.clone()) for i in (1, 4)}
    method.after_epoch()
    gone = {i: list(zero_filters(model[i].weight)) for i in (0, 3)}
    for _ in range(3):
        step(model, optimizer, method)
    method.after_epoch()
    for layer, back in gone.items():
        weight = model[layer].weight.detach().flatten(1).double()
        kept = [i for i in range(len(weight)) if i not in back]
        new = weight[back]
        assert len(back)
        length = weight[kept].norm(dim=1).mean()
        torch.testing.assert_close(new @ new.T, torch.eye(len(back)).double() * length**2)
        assert (new @ weight[kept].T).abs().max() < 1e-5
        assert (new @ old[layer].flatten(1).double()[back].T).abs().max() < 1e-5
        scale, shift = norms[layer + 1]
        torch.testing.assert_close(model[layer + 1].weight[back], scale[back])
        torch.testing.assert_close(model[layer + 1].bias[back], shift[back])
        assert (model[layer + 1].running_var[back] == 1).all()


def test_with_zero_inputs_the_net_computes_the_same_after_they_come_back() -> None:
    model = small_net()
    optimizer = sgd(model)
    method = make(model, optimizer, whole_epochs=1, zero_inputs=True)
    train_epoch(model, optimizer, method)
    for _ in range(3):
        step(model, optimizer, method)
    model.eval()
    before = model(example())
    method.after_epoch()
    assert zeros(model) == 0
    torch.testing.assert_close(model(example()), before)


def test_the_statistics_of_a_frozen_norm_stay() -> None:
    model = small_net()
    model[1].requires_grad_(False).running_mean.fill_(0.5)
    model[4].running_mean.fill_(0.5)
    optimizer = sgd(model)
    method = make(model, optimizer, whole_epochs=1, ratio=0.6)
    for _ in range(2):
        method.after_epoch()
    assert (model[1].running_mean == 0.5).all()
    assert (model[4].running_mean == 0).any()


def test_orthogonal_rows_of_any_rank() -> None:
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(3, 6, generator=generator, dtype=torch.float64)
    deficient = torch.cat([rows, 2 * rows[:1], rows[1:2] - rows[2:], torch.zeros(1, 6)])
    found = orthogonal_rows(deficient, 5, generator)
    assert found.shape == (3, 6)  # 6 - rank 3
    torch.testing.assert_close(found @ found.T, torch.eye(3, dtype=torch.float64))
    assert (found @ rows.T).abs().max() < 1e-12
    assert orthogonal_rows(torch.zeros(2, 4, dtype=torch.float64), 4, generator).shape == (4, 4)
    assert orthogonal_rows(torch.eye(4, dtype=torch.float64), 2, generator).shape == (0, 4)


def test_a_full_layer_gets_noise() -> None:
    torch.manual_seed(0)
    # 6 filters of 2 entries: the four that stay span everything
    net = nn.Sequential(nn.Conv2d(2, 6, 1), nn.ReLU(), nn.Conv2d(6, 2, 1))
    method = RePr(net, torch.ones(1, 2, 2, 2), whole_epochs=1, dropped_epochs=1, ratio=0.4)
    method.after_epoch()
    dropped = list(zero_filters(net[0].weight))
    assert len(dropped) == 2
    method.after_epoch()
    new = net[0].weight[dropped]
    assert torch.isfinite(new).all()
    assert new.all()
    assert new.abs().max() <= 1 / 2**0.5


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_resumed_run_ends_alike(stop: int) -> None:
    # 2: amid the epochs without the dropped ones
    check_resume(small_net, make, total=24, at=4 * stop + 1)
    check_resume(lambda: small_net(norm=False), make, total=20, at=4 * stop + 1)


def test_an_early_finish_removes_the_worst_of_now() -> None:
    model = small_net()
    method = make(model, sgd(model))
    result = method.finish()
    assert sum(len(e["removed"]) for e in result.history) == 4


@pytest.mark.parametrize("net", [ResNet, Separable, Grouped, Transposed])
def test_every_kind_of_layer_comes_back(net: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = net()
    optimizer = sgd(model, lr=0.01)
    x = torch.randn(4, 3, 8, 8)
    frozen = next(m for m in reversed(list(model.modules())) if isinstance(m, nn.Conv2d)).weight
    frozen.requires_grad_(False)
    before = frozen.clone()
    method = RePr(model, x, optimizer=optimizer, whole_epochs=1, dropped_epochs=1, rounds=2)
    for epoch in range(4):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        method.before_step()
        optimizer.step()
        method.after_step()
        method.after_epoch()
        dead = [
            i
            for m in model.modules()
            if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d))
            and m.weight.requires_grad
            and m.weight.dim() == 4
            for i in zero_filters(
                m.weight.transpose(0, 1)
                if isinstance(m, nn.ConvTranspose2d) and m.groups == 1
                else m.weight
            )
        ]
        assert bool(dead) == (epoch != 1)
    assert torch.equal(frozen, before)
    method.finish()
    check_optimizer(model, optimizer)
    assert torch.isfinite(model(x)).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"whole_epochs": 0}, "whole_epochs is 0"),
        ({"dropped_epochs": 0}, "dropped_epochs is 0"),
        ({"rounds": 0}, "rounds is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"criterion": "l1"}, "leave criterion out"),
        ({"ratio": None}, "ratio is None"),
        ({"ratio": 0.99}, "would empty a layer"),
    ],
)
def test_bad_arguments_change_nothing(arguments: dict, message: str) -> None:
    model = small_net()
    optimizer = sgd(model)
    with refused(message, model, optimizer):
        make(model, optimizer, **arguments)


def test_the_published_numbers_are_the_defaults() -> None:
    method = RePr(small_net(), example())
    settings = (method.ratio, method.whole_epochs, method.dropped_epochs, method.rounds)
    assert settings == (0.3, 20, 10, 3)


def test_noise_does_not_touch_the_random_state_of_the_loop() -> None:
    model = small_net()
    method = make(model, sgd(model), whole_epochs=1)
    method.after_epoch()
    state = torch.get_rng_state()
    method.after_epoch()
    assert torch.equal(torch.get_rng_state(), state)
