"""OrthoReg against tables written by hand, and against a cut that is written out."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import orthoreg_ext as ox
from orthoreg_ext.pruning.methods import OrthoReg

from ..nets import ResNet, batches
from .loops import (
    batch,
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

DATA = [batch(100), batch(101)]


def make(model: nn.Module, optimizer: torch.optim.Optimizer, **settings: object) -> OrthoReg:
    arguments = {"ortho_epochs": 2, "retrain_epochs": 2, "data": DATA, **settings}
    return OrthoReg(model, example(), optimizer=optimizer, **arguments)


def widths(model: nn.Sequential) -> tuple[int, int]:
    return model[0].out_channels, model[3].out_channels


def test_the_phases_of_one_round() -> None:
    model = small_net()
    optimizer = sgd(model)
    method = make(model, optimizer, retrain_epochs=1)
    table = []
    while not method.done:
        phase = method.phase
        decay, hooks = optimizer.param_groups[0]["weight_decay"], hooks_of(model, optimizer)
        table.append((phase.name, phase.round, phase.epoch, phase.epochs, decay, hooks))
        train_epoch(model, optimizer, method)
        table[-1] += (sum(widths(model)),)
    assert table == [
        ("regularise", 1, 0, 2, 0.0, 1, 14),
        ("regularise", 1, 1, 2, 0.0, 1, 7),
        ("retrain", 1, 0, 1, 1e-3, 0, 7),
    ]
    result = method.finish()
    assert sum(widths(model)) == 7
    assert {entry["round"] for entry in result.history} == {1}
    assert method.phase.name == "done"


def test_rounds_follow_the_harmonic_split_and_end_without_the_regulariser() -> None:
    # 14 filters, p = 0.5, N = 2: 1/3 after the first round (4 of 14), then 1/2 (7 of 14)
    model = small_net()
    optimizer = sgd(model)
    method = make(model, optimizer, rounds=2, ortho_epochs=1, retrain_epochs=[2, 1])
    assert method.shares == pytest.approx([1 / 3, 1 / 2])
    table = []
    while not method.done:
        name, number = method.phase.name, method.phase.round
        train_epoch(model, optimizer, method, steps=1)
        table.append((name, number, sum(widths(model)), hooks_of(model, optimizer)))
    assert table == [
        ("regularise", 1, 10, 0),
        ("retrain", 1, 10, 0),
        ("retrain", 1, 10, 1),  # the regulariser of the second round is on
        ("regularise", 2, 7, 0),
        ("retrain", 2, 7, 0),
    ]
    assert optimizer.param_groups[0]["weight_decay"] == 1e-3


def test_thresholds_are_shares_of_the_original() -> None:
    model = small_net()
    optimizer = sgd(model)
    method = make(model, optimizer, thresholds=[0.15, 0.3, 0.6], ortho_epochs=1, retrain_epochs=0)
    left = []
    while not method.done:
        train_epoch(model, optimizer, method, steps=1)
        left.append(sum(widths(model)))
    assert left == [14 - 2, 14 - 4, 14 - 8]
    assert method.finish().settings["ratio"] == 0.6


def test_the_published_epochs_are_the_defaults() -> None:
    model = small_net()
    one = OrthoReg(model, example(), optimizer=sgd(model), data=DATA)
    assert (one.ortho_epochs, one.retrain_epochs) == (25, [140])
    one.close()
    three = OrthoReg(model, example(), optimizer=sgd(model), data=DATA, rounds=3)
    assert (three.ortho_epochs, three.retrain_epochs) == (25, [80, 80, 100])
    assert three.regularizer.strength == 1e-2


def test_the_cut_is_the_lowest_fisher_of_the_whole_net() -> None:
    model = small_net()
    optimizer = sgd(model)
    method = make(model, optimizer)
    train_epoch(model, optimizer, method)
    for _ in range(3):
        step(model, optimizer, method)
    twin = copy.deepcopy(model).eval()  # the score, written out: mean gradient, eval mode, bias
    x, y = (torch.cat(parts) for parts in zip(*DATA, strict=True))
    for p in twin.parameters():
        p.grad = None
    nn.functional.cross_entropy(twin(x), y).backward()
    scores = torch.cat(
        [
            ((c.weight * c.weight.grad).flatten(1).sum(1) + c.bias * c.bias.grad).square()
            for c in (twin[0], twin[3])
        ]
    )
    lowest = set(scores.argsort()[:7].tolist())
    method.after_epoch()
    removed = {e["layer"]: e["removed"] for e in method.engine.history}
    assert set(removed.get("0", [])) | {6 + i for i in removed.get("3", [])} == lowest


def test_a_step_is_the_term_in_the_loss_without_decay() -> None:
    model = small_net()
    twin = copy.deepcopy(model)
    optimizer, other = sgd(model, weight_decay=0.1), sgd(twin, weight_decay=0.0)
    method = make(model, optimizer, strength=0.05)
    step(model, optimizer, method)
    term = ox.OrthoRegularizer(twin, strength=0.05)
    x, y = batch(0)
    (nn.functional.cross_entropy(twin.train()(x), y) + term()).backward()
    other.step()
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, msg=name)


def test_weight_decay_of_every_group_comes_back() -> None:
    model = small_net()
    groups = [
        {"params": model[0].parameters(), "weight_decay": 0.1},
        {"params": model[1:].parameters(), "weight_decay": 0.2},
    ]
    optimizer = torch.optim.SGD(groups, lr=0.01)
    method = make(model, optimizer)
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0, 0]
    method.close()
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.1, 0.2]
    kept = make(model, optimizer, keep_weight_decay=True)
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.1, 0.2]
    kept.finish()
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.1, 0.2]
    assert hooks_of(model, optimizer) == 0


@pytest.mark.parametrize("stop", [1, 2, 5])
def test_a_resumed_run_ends_alike(stop: int) -> None:
    # 1: amid the first phase; 2: the first retraining; 5: amid the second phase
    check_resume(
        small_net,
        lambda m, o: make(m, o, rounds=2, retrain_epochs=2),
        total=32,
        at=4 * stop + 1,
    )


def test_an_early_finish_cuts_what_is_left() -> None:
    model = small_net()
    optimizer = sgd(model)
    method = make(model, optimizer, rounds=2)
    train_epoch(model, optimizer, method)
    result = method.finish()
    assert sum(widths(model)) == 7
    assert method.done
    assert method.finish() is result
    check_optimizer(model, optimizer)
    assert hooks_of(model, optimizer) == 0
    assert optimizer.param_groups[0]["weight_decay"] == 1e-3


def test_a_failed_cut_does_not_count_its_epoch() -> None:
    model = small_net()
    optimizer = sgd(model)
    method = make(model, optimizer, ortho_epochs=1)
    step(model, optimizer, method)
    with torch.no_grad():
        saved = model[3].weight[0, 0, 0, 0].item()
        model[3].weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="loss of batch 0 is nan"):
        method.after_epoch()
    assert (method.epochs, widths(model)) == (0, (6, 8))
    with torch.no_grad():
        model[3].weight[0, 0, 0, 0] = saved
    method.after_epoch()
    assert sum(widths(model)) == 7


def test_coupled_layers_and_frozen_ones() -> None:
    torch.manual_seed(0)
    model = ResNet()
    model.layer2.requires_grad_(False)
    frozen = copy.deepcopy(model.layer2.state_dict())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.05, 0.9)
    x = torch.randn(2, 3, 8, 8)
    data = batches()
    method = OrthoReg(
        model, x, optimizer=optimizer, data=data, ortho_epochs=1, retrain_epochs=0, ratio=0.4
    )
    model.train()
    nn.functional.cross_entropy(model(data[0][0]), data[0][1]).backward()
    optimizer.step()
    method.after_epoch()
    method.finish()
    assert model.layer2.conv1.out_channels == 12  # fully frozen: stays
    assert (
        torch.equal(
            model.layer2.conv1.weight,
            frozen["conv1.weight"][:, : model.layer2.conv1.in_channels],
        )
        or model.layer2.conv1.in_channels < 8
    )
    assert not model.layer2.conv2.weight.requires_grad
    assert model.stem.out_channels == model.layer1.conv2.out_channels
    model(x)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"data": None}, "needs data="),
        ({"ortho_epochs": 0}, "ortho_epochs is 0"),
        ({"retrain_epochs": [1, 2]}, "retrain_epochs has 2 entries"),
        ({"retrain_epochs": -1}, "retrain_epochs is -1"),
        ({"thresholds": [10, 50]}, "expected shares in"),
        ({"thresholds": [0.5, 0.3]}, "larger than the one before"),
        ({"thresholds": [0.5], "ratio": 0.5}, "leave both out"),
        ({"thresholds": []}, "expected one a round"),
        ({"rounds": 0}, "rounds is 0"),
        ({"ratio": 0.99}, "would empty a layer"),
        ({"data": iter(DATA), "rounds": 2}, "can be read once"),
        ({"optimizer": None}, "needs optimizer="),
        ({"criterion": "l3"}, "unknown criterion"),
        ({"regularizer": ox.OrthoRegularizer(small_net())}, "of another model"),
    ],
)
def test_bad_arguments_change_nothing(arguments: dict, message: str) -> None:
    model = small_net()
    optimizer = sgd(model)
    settings = {"data": DATA, "optimizer": optimizer, **arguments}
    with refused(message, model, optimizer):
        OrthoReg(model, example(), **settings)


def test_an_optimizer_that_trains_something_else_is_refused() -> None:
    model = small_net()
    optimizer = sgd(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="holds none of the regularised layers"):
        make(model, optimizer)
    assert hooks_of(model, optimizer) == 0


def test_a_regulariser_that_is_attached_already_is_refused() -> None:
    model = small_net()
    optimizer = sgd(model)
    term = ox.OrthoRegularizer(model)
    attachment = term.attach(optimizer)
    with pytest.raises(ValueError, match="attached to this optimizer already"):
        make(model, optimizer, regularizer=term)
    assert optimizer.param_groups[0]["weight_decay"] == 1e-3
    attachment.remove()


def test_a_refused_second_optimizer_leaves_the_first_alone() -> None:
    model = small_net()
    first = torch.optim.SGD(model[:3].parameters(), 0.1, weight_decay=0.1)
    second = torch.optim.SGD(model[3:].parameters(), 0.1, weight_decay=0.1)
    term = ox.OrthoRegularizer(model)
    attachment = term.attach(second)
    with pytest.raises(ValueError, match="attached to this optimizer already"):
        OrthoReg(model, example(), data=DATA, optimizer=[first, second], regularizer=term)
    assert hooks_of(model, first) == 0
    assert first.param_groups[0]["weight_decay"] == 0.1
    attachment.remove()
    both = OrthoReg(model, example(), data=DATA, optimizer=[first, second], regularizer=term)
    assert (hooks_of(model, first), hooks_of(model, second)) == (1, 1)
    both.close()
    assert (hooks_of(model, first), hooks_of(model, second)) == (0, 0)


def test_weight_decay_comes_back_when_the_optimizer_was_loaded_first() -> None:
    model = small_net()
    optimizer = sgd(model)
    method = make(model, optimizer)
    state, moments = method.state_dict(), optimizer.state_dict()
    fresh = small_net()
    other = sgd(fresh)
    other.load_state_dict(moments)  # with the weight decay of the phase, 0
    resumed = make(fresh, other)
    resumed.load_state_dict(state)
    assert other.param_groups[0]["weight_decay"] == 0
    resumed.finish()
    assert other.param_groups[0]["weight_decay"] == 1e-3


def test_a_state_of_other_parameter_groups_is_refused_before_anything_is_cut() -> None:
    model = small_net()
    method = make(model, sgd(model), ortho_epochs=1, rounds=2, retrain_epochs=0)
    method.after_epoch()  # the first cut; the regulariser of round two is on
    state = method.state_dict()
    fresh = small_net()
    parts = [{"params": fresh[:3].parameters()}, {"params": fresh[3:].parameters()}]
    other = make(fresh, torch.optim.SGD(parts, 0.1), ortho_epochs=1, rounds=2, retrain_epochs=0)
    with pytest.raises(ValueError, match="parameter groups"):
        other.load_state_dict(state)
    assert widths(fresh) == (6, 8)


def test_rules_of_prune_hold(x: torch.Tensor) -> None:
    model = ResNet()
    copied = copy.deepcopy(model)
    optimizer = sgd(model)
    method = OrthoReg(
        model,
        x,
        data=batches(),
        optimizer=optimizer,
        ratio=0.4,
        target="macs",
        round_to=2,
        ignored=["layer1.conv1"],
        ema=copied,
    )
    result = method.finish()
    assert result.after.macs <= 0.6 * result.before.macs
    assert model.layer1.conv1.out_channels == 10
    assert all(layer.after % 2 == 0 for layer in result.layers)
    shapes = [p.shape for p in model.parameters()]
    assert [p.shape for p in copied.parameters()] == shapes
