"""EarlyBird against masks and distances written by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import orthoreg_ext as ox
from orthoreg_ext.pruning.methods import EarlyBird

from ..nets import ResNet
from .loops import (
    check_optimizer,
    check_resume,
    example,
    hooks_of,
    refused,
    sgd,
    small_net,
    step,
    train_epoch,
)

# |gamma| of the 6 + 8 channels after each epoch, by the units that are lowest
FIRST = [0, 1, 2, 6, 7, 8, 9]  # 3 of the first layer, 4 of the second


def make(model: nn.Module, optimizer: torch.optim.Optimizer, **settings: object) -> EarlyBird:
    return EarlyBird(model, example(), optimizer=optimizer, **settings)


def set_lowest(model: nn.Sequential, lowest: list[int]) -> None:
    gammas = torch.ones(14)
    gammas[lowest] = torch.linspace(-0.2, 0.1, len(lowest))
    with torch.no_grad():
        model[1].weight.copy_(gammas[:6])
        model[4].weight.copy_(gammas[6:])


def test_the_ticket_is_drawn_when_five_masks_agree() -> None:
    # 14 units; two units change places between masks a and b: distance 2/14 > 0.1
    other = [0, 1, 3, 6, 7, 8, 9]
    far = [0, 1, 3, 6, 7, 8, 10]
    a, b, c = FIRST, other, far
    table = [  # the mask after each epoch, its distances to the window, the ticket
        (a, [], None),
        (b, [2 / 14], None),
        (a, [0, 2 / 14], None),
        (a, [0, 2 / 14, 0], None),
        (a, [0, 2 / 14, 0, 0], None),  # five masks, but one is too far
        (a, [2 / 14, 0, 0, 0], None),
        (a, [0, 0, 0, 0], 7),
        (c, [0, 0, 0, 0], 7),  # drawn is drawn
    ]
    model = small_net()
    method = make(model, sgd(model))
    for mask, distances, ticket in table:
        set_lowest(model, mask)
        method.after_epoch()
        assert method.distances == pytest.approx(distances)
        assert (method.ticket, method.done) == (ticket, ticket is not None)
    result = method.finish()  # by the ticket, not by what the scales are now
    assert [(e["layer"], e["removed"]) for e in result.history] == [
        ("0", [0, 1, 2]),
        ("3", [0, 1, 2, 3]),
    ]


def test_a_distance_at_the_limit_is_near_enough() -> None:
    model = small_net()
    method = make(model, sgd(model), window=2, distance=2 / 14)
    set_lowest(model, FIRST)
    method.after_epoch()
    set_lowest(model, [0, 1, 3, 6, 7, 8, 9])
    method.after_epoch()
    assert method.ticket == 2


def test_without_a_ticket_it_gives_up_and_cuts_what_is_lowest_now() -> None:
    model = small_net()
    method = make(model, sgd(model), duration=2)
    for _ in range(2):
        assert not method.done
        set_lowest(model, FIRST)
        method.after_epoch()
    assert method.done
    assert method.ticket is None
    set_lowest(model, [3, 4, 5, 10, 11, 12, 13])
    removed = {e["layer"]: e["removed"] for e in method.finish().history}
    assert removed == {"0": [3, 4, 5], "3": [4, 5, 6, 7]}


def test_the_slimming_gradient() -> None:
    model = small_net()
    method = make(model, sgd(model), strength=0.5)
    set_lowest(model, [])
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([1.0, -2.0, 0.0, 3.0, -1e-9, 1.0]))
    model[1].weight.grad = torch.full((6,), 0.25)
    model[4].weight.grad = None
    method.before_step()
    expected = torch.tensor([0.75, -0.25, 0.25, 0.75, -0.25, 0.75])
    torch.testing.assert_close(model[1].weight.grad, expected)
    assert model[4].weight.grad is None
    model[1].weight.requires_grad_(False)
    method.before_step()
    torch.testing.assert_close(model[1].weight.grad, expected)


def test_nothing_is_added_once_the_ticket_is_drawn() -> None:
    model = small_net()
    method = make(model, sgd(model), strength=0.5, window=2)
    for _ in range(2):
        method.after_epoch()
    assert method.ticket == 2
    model[1].weight.grad = torch.zeros(6)
    method.before_step()
    assert not model[1].weight.grad.any()


def test_orthoreg_beside_it_ends_with_the_ticket() -> None:
    model = small_net()
    optimizer = sgd(model)
    term = ox.OrthoRegularizer(model)
    method = make(model, optimizer, window=2, distance=1, regularizer=term)
    assert (hooks_of(model, optimizer), optimizer.param_groups[0]["weight_decay"]) == (1, 0)
    for _ in range(2):
        train_epoch(model, optimizer, method, steps=1)
    assert method.ticket == 2
    assert (hooks_of(model, optimizer), optimizer.param_groups[0]["weight_decay"]) == (0, 1e-3)
    method.finish()
    check_optimizer(model, optimizer)


@pytest.mark.parametrize("orthogonal", [False, True])
def test_a_resumed_run_ends_alike(orthogonal: bool) -> None:
    def build(model: nn.Module, optimizer: torch.optim.Optimizer) -> EarlyBird:
        term = ox.OrthoRegularizer(model) if orthogonal else None
        return make(model, optimizer, window=3, strength=0.1, duration=6, regularizer=term)

    check_resume(small_net, build, total=24, at=9)
    check_resume(small_net, build, total=24, at=21)


def test_coupled_channels_go_together_and_momentum_follows() -> None:
    torch.manual_seed(0)
    model = ResNet()
    optimizer = sgd(model)
    x = torch.randn(2, 3, 8, 8)
    method = EarlyBird(model, x, optimizer=optimizer, window=2, ratio=0.3)
    for target in range(2):
        model.train()
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), torch.tensor([0, target])).backward()
        method.before_step()
        optimizer.step()
        method.after_step()
        method.after_epoch()
    method.finish()
    check_optimizer(model, optimizer)
    assert model.stem.out_channels == model.layer1.conv2.out_channels
    model(x)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"distance": -1}, "distance is -1"),
        ({"window": 1}, "window is 1"),
        ({"strength": float("nan")}, "strength is nan"),
        ({"duration": 0}, "duration is 0"),
        ({"criterion": "fisher"}, "needs gradients"),
        ({"ratio": 1.5}, "ratio is 1.5"),
        ({"optimizer": None, "regularizer": "own"}, "optimizer holds none"),
    ],
)
def test_bad_arguments_change_nothing(arguments: dict, message: str) -> None:
    model = small_net()
    optimizer = sgd(model)
    if arguments.get("regularizer") == "own":
        arguments = {**arguments, "regularizer": ox.OrthoRegularizer(model)}
    with refused(message, model, optimizer):
        EarlyBird(model, example(), **{"optimizer": optimizer, **arguments})


def test_a_net_without_batch_norm_is_refused() -> None:
    model = small_net(norm=False)
    with pytest.raises(ValueError, match="BatchNorm"):
        make(model, sgd(model))


def test_a_state_of_other_settings_is_refused() -> None:
    model = small_net()
    state = make(model, sgd(model)).state_dict()
    with pytest.raises(ValueError, match="settings"):
        make(model, sgd(model), distance=0.2).load_state_dict(state)
    begun = make(model, sgd(model))
    step(model, sgd(model), begun)
    with pytest.raises(ValueError, match="begun already"):
        begun.load_state_dict(state)
