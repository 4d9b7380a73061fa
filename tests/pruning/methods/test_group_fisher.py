"""GroupFisher against masks that are differentiated, and against its schedule."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as f

from orthoreg_ext.pruning import count
from orthoreg_ext.pruning.methods import GroupFisher

from ..nets import Concat, Grouped, ResNet, Separable, Tied, Transposed
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
)


def make(model: nn.Module, optimizer: torch.optim.Optimizer, **settings: object) -> GroupFisher:
    return GroupFisher(model, example(), **{"optimizer": optimizer, "every": 2, **settings})


def ranked(method: GroupFisher) -> list[Tensor]:
    """The scores of each group, by the position of its first layer."""
    groups = method.engine.structure.prunable
    return [s for _, s in sorted(zip([g.name for g in groups], method.scores(), strict=True))]


def widths(model: nn.Sequential) -> tuple[int, int]:
    return model[0].out_channels, model[3].out_channels


def masked_fisher(model: nn.Sequential, x: Tensor, y: Tensor) -> list[Tensor]:
    """sum_n (d L_n / d m_n)^2 by masks m on what the second and the third layer read."""
    twin = copy.deepcopy(model).train()
    masks = [torch.ones(len(x), c.out_channels, requires_grad=True) for c in (twin[0], twin[3])]
    h = twin[2](twin[1](twin[0](x))) * masks[0][:, :, None, None]
    h = twin[5](twin[4](twin[3](h))).mean((2, 3)) * masks[1]
    grads = torch.autograd.grad(f.cross_entropy(twin[8](h), y, reduction="sum"), masks)
    return [g.square().sum(0).double() for g in grads]


def test_the_sums_are_those_of_masks_and_run_over_steps() -> None:
    model = small_net()
    optimizer = sgd(model)
    method = make(model, optimizer, freed="nothing", every=9)
    total = [torch.zeros(6).double(), torch.zeros(8).double()]
    for number in range(3):
        found = masked_fisher(model, *batch(number))
        total = [a + b for a, b in zip(total, found, strict=True)]
        step(model, optimizer, method)
        for score, expected in zip(ranked(method), total, strict=True):
            torch.testing.assert_close(score, expected, rtol=1e-4, atol=1e-9)


def test_passes_of_one_step_are_of_different_samples() -> None:
    model = small_net()
    x, y = batch(0)
    method = make(model, sgd(model), freed="nothing")
    model.eval()  # so that batches do not act on each other
    f.cross_entropy(model(x), y).backward()
    method.before_step()
    whole = ranked(method)
    model2 = small_net().eval()
    other = make(model2, sgd(model2), freed="nothing")
    for part in (slice(0, 3), slice(3, 8)):
        f.cross_entropy(model2(x[part]), y[part]).backward()
        with torch.no_grad():
            model2(x)  # a look at the validation set between
    other.before_step()
    for a, b in zip(whole, ranked(other), strict=True):
        torch.testing.assert_close(a, b)


class Residual(nn.Module):
    """The stem is read by `inner` and, with what `inner` adds, by `last`; both read one unit."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 5, 3, padding=1)
        self.inner = nn.Conv2d(5, 5, 3, padding=1)
        self.last = nn.Linear(5, 4)

    def forward(self, x: Tensor, masks: Tensor | None = None) -> Tensor:
        x = f.relu(self.stem(x))
        y = x + self.inner(x if masks is None else x * masks[:, :, None, None])
        y = f.relu(y).mean((2, 3))
        return self.last(y if masks is None else y * masks)


def test_the_sum_over_coupled_layers_is_inside_the_square() -> None:
    model = Residual()
    x, y = batch(3)
    masks = torch.ones(8, 5, requires_grad=True)
    loss = f.cross_entropy(model(x, masks), y, reduction="sum")
    expected = torch.autograd.grad(loss, masks)[0].square().sum(0).double()
    method = GroupFisher(model, x, freed="nothing")
    f.cross_entropy(model(x), y).backward()
    method.before_step()
    (found,) = ranked(method)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-9)


def test_the_schedule() -> None:
    # 14 filters, half of them: one after every second step, done after step 14
    model = small_net()
    optimizer = sgd(model)
    method = make(model, optimizer, freed="memory")
    left, sums = 14, [torch.zeros(6), torch.zeros(8)]
    while not method.done:
        found = masked_fisher(model, *batch(method.steps))
        sums = [a + b for a, b in zip(sums, found, strict=True)]
        before = widths(model)
        step(model, optimizer, method)
        if method.steps % 2:  # a channel is 36 numbers of 4 bytes, for each of two examples
            for score, expected in zip(ranked(method), sums, strict=True):
                torch.testing.assert_close(score, expected.double() / 288, rtol=1e-3, atol=1e-9)
        else:
            left -= 1
            least = torch.cat(sums).argmin().item()
            expected = (
                (before[0] - 1, before[1]) if least < before[0] else (before[0], before[1] - 1)
            )
            assert widths(model) == expected
            sums = [torch.zeros(width) for width in expected]
        assert sum(widths(model)) == left
        check_optimizer(model, optimizer)
    assert method.steps == 14
    assert hooks_of(model, optimizer) == 0
    result = method.finish()
    assert {entry["round"] for entry in result.history} == set(range(1, 8))
    step(model, optimizer, method)
    assert sum(widths(model)) == 7


def test_what_is_freed() -> None:
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 8, 1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )
    x = torch.randn(1, 2, 6, 6)
    f.cross_entropy(model(x), torch.zeros(1).long()).backward()
    scores = {}
    for freed in ("nothing", "memory", "macs"):
        method = GroupFisher(model, x, freed=freed)
        f.cross_entropy(model(x), torch.zeros(1).long()).backward()
        scores[freed] = ranked(method)
        method.close()
    # bytes written: 6 x 6 and 3 x 3 positions
    # MACs: 36 * 2 * 9 of its own and 9 * 8 behind; 9 * 6 of its own and 4 behind
    for i, (memory, macs) in enumerate([(4 * 36, 36 * 18 + 9 * 8), (4 * 9, 9 * 6 + 4)]):
        torch.testing.assert_close(scores["memory"][i], scores["nothing"][i] / memory)
        torch.testing.assert_close(scores["macs"][i], scores["nothing"][i] / macs)


def test_the_share_of_filters_is_rounded_down_as_prune_does() -> None:
    model = small_net()
    optimizer = sgd(model)
    method = make(model, optimizer, ratio=0.3, every=1)
    while not method.done:
        step(model, optimizer, method)
    assert sum(widths(model)) == 14 - 4  # of 4.2


@pytest.mark.parametrize("target", ["params", "macs", "memory"])
def test_other_targets(target: str) -> None:
    model = small_net()
    optimizer = sgd(model)
    before = getattr(count(model, example()), target)
    method = make(model, optimizer, target=target, ratio=0.4, every=1)
    shares = [0.0]
    while not method.done:
        step(model, optimizer, method)
        shares.append(1 - getattr(count(model, example()), target) / before)
        assert method.share == pytest.approx(shares[-1])
    assert shares[-2] < 0.4 <= shares[-1]
    method.finish()


def test_an_early_finish_takes_what_is_left_by_the_sums() -> None:
    model = small_net()
    optimizer = sgd(model)
    method = make(model, optimizer, every=4)
    for _ in range(5):
        step(model, optimizer, method)
    assert sum(widths(model)) == 13
    method.finish()
    assert sum(widths(model)) == 7
    assert hooks_of(model, optimizer) == 0
    check_optimizer(model, optimizer)


def test_finish_without_a_gradient_says_so_and_leaves_no_hook() -> None:
    model = small_net()
    optimizer = sgd(model)
    method = make(model, optimizer)
    with pytest.raises(ValueError, match="train at least one step"):
        method.finish()
    assert widths(model) == (6, 8)
    assert hooks_of(model, optimizer) == 0


def test_a_loop_without_backward_passes_is_told() -> None:
    model = small_net()
    optimizer = sgd(model)
    method = make(model, optimizer)
    method.before_step()
    method.after_step()
    method.before_step()
    with pytest.raises(ValueError, match="no finite gradient was seen in 2 steps"):
        method.after_step()
    assert hooks_of(model, optimizer) == 0


def test_a_pass_that_overflows_is_left_out() -> None:
    model = small_net()
    optimizer = sgd(model)
    method = make(model, optimizer, freed="nothing", every=9)
    step(model, optimizer, method)
    before = [score.clone() for score in ranked(method)]
    (model(batch(1)[0]).sum() * float("inf")).backward()
    method.before_step()
    for a, b in zip(before, ranked(method), strict=True):
        assert torch.equal(a, b)


class Folded(nn.Module):
    """Reads every pixel as a sample of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1)
        self.conv2 = nn.Conv2d(6, 6, 3, padding=1)
        self.fc1 = nn.Linear(6, 8)
        self.fc2 = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = f.relu(self.conv2(f.relu(self.conv1(x))))
        h = f.relu(self.fc1(h.movedim(1, -1).flatten(0, 2)))
        return self.fc2(h).unflatten(0, (len(x), -1)).mean(1)


def test_samples_that_cannot_be_told_apart_are_refused_at_once() -> None:
    model = Folded()
    with pytest.raises(ValueError, match="samples cannot be told apart"):
        make(model, sgd(model))
    assert hooks_of(model, sgd(model)) == 0


def test_a_failed_removal_takes_the_hooks_off() -> None:
    model = small_net()
    optimizer = sgd(model)
    method = make(model, optimizer)
    step(model, optimizer, method)
    optimizer.state[model[0].weight]["odd"] = torch.zeros(3)
    with pytest.raises(ValueError, match="odd"):
        step(model, optimizer, method)
    assert widths(model) == (6, 8)
    assert hooks_of(model, optimizer) == 0


def test_the_model_computes_the_same_with_the_hooks_on() -> None:
    model = small_net().eval()
    x, y = batch(0)
    f.cross_entropy(model(x), y).backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    method = make(model, sgd(model))
    f.cross_entropy(model(x), y).backward()
    for p, grad in zip(model.parameters(), grads, strict=True):
        assert torch.equal(p.grad, grad)
    method.close()


@pytest.mark.parametrize("at", [1, 4, 7])
def test_a_resumed_run_ends_alike(at: int) -> None:
    # amid an interval, and right after a removal
    check_resume(small_net, make, total=12, at=at)
    check_resume(small_net, lambda m, o: make(m, o, every=3, freed="macs"), total=12, at=at)


@pytest.mark.parametrize("net", [ResNet, Separable, Grouped, Concat, Tied, Transposed])
def test_coupled_layers(net: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = net()
    optimizer = sgd(model, lr=0.01)
    x = torch.randn(4, 3, 8, 8)
    method = GroupFisher(model, x, optimizer=optimizer, ratio=0.3, every=1)
    while not method.done:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        method.before_step()
        optimizer.step()
        method.after_step()
    method.finish()
    check_optimizer(model, optimizer)
    assert torch.isfinite(model(x)).all()


def test_frozen_layers_stay() -> None:
    model = small_net()
    model[3].requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1, 0.9)
    method = make(model, optimizer, every=1)
    while not method.done:
        step(model, optimizer, method)
    assert widths(model) == (3, 8)
    assert not model[3].weight.requires_grad


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"every": 0}, "every is 0"),
        ({"target": "latency"}, "unknown target 'latency'"),
        ({"target": "flops"}, "unknown target 'flops'"),
        ({"freed": "time"}, "unknown freed 'time'"),
        ({"ratio": 1}, "ratio is 1"),
        ({"ratio": 0.99}, "would empty a layer"),
        ({"ratio": 0.999, "target": "macs"}, "target='macs' cannot be reached"),
        ({"ratio": 0.999, "target": "params"}, "target='params' cannot be reached"),
        ({"criterion": "l1"}, "leave criterion out"),
        ({"scope": "local"}, "leave scope out"),
    ],
)
def test_bad_arguments_change_nothing(arguments: dict, message: str) -> None:
    model = small_net()
    optimizer = sgd(model)
    with refused(message, model, optimizer):
        make(model, optimizer, **arguments)
