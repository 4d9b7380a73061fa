"""Attachment by hand, and optimizers whose step would not run the hook."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import orthoreg_ext as ox


def make() -> tuple[nn.Module, torch.optim.Optimizer, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Flatten(), nn.Linear(24, 4))
    return model, torch.optim.SGD(model.parameters(), 0.1), torch.randn(5, 3, 4, 4)


def test_term_by_hand_can_be_inside_the_clipping() -> None:
    found = []
    for by_hand in (True, False):
        model, optimizer, x = make()
        reg = ox.OrthoRegularizer(model, strength=0.5)
        attachment = reg.attach(optimizer, hook=False) if by_hand else None
        for _ in range(3):
            optimizer.zero_grad()
            loss = model(x).square().mean()
            (loss if attachment else loss + reg()).backward()
            if attachment:
                attachment.add()
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
        if attachment:
            assert attachment.step == 3
            assert reg.state_dict()["attached_steps"] == [3]
        found.append([p.detach() for p in model.parameters()])
    for ours, plain in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-6, atol=1e-7)


def test_add_says_when_it_cannot() -> None:
    model, optimizer, _ = make()
    reg = ox.OrthoRegularizer(model)
    with pytest.raises(RuntimeError, match="hook=False"):
        reg.attach(optimizer).add()
    reg = ox.OrthoRegularizer(model)
    attachment = reg.attach(optimizer, hook=False)
    attachment.remove()
    with pytest.raises(RuntimeError, match="attach it again"):
        attachment.add()
    del optimizer
    attachment = reg.attach(torch.optim.SGD(model.parameters(), 0.1), hook=False)
    with pytest.raises(RuntimeError, match="gone"):
        attachment.add()


class Wrapper(torch.optim.Optimizer):
    """An optimizer around another one that is an optimizer in name only, as timm's Lookahead."""

    def __init__(self, inside: torch.optim.Optimizer) -> None:
        self.inside = inside

    @property
    def param_groups(self):
        return self.inside.param_groups

    def step(self, closure=None):
        return self.inside.step(closure)


def test_optimizer_that_runs_no_hooks_is_refused_and_names_the_one_inside() -> None:
    model, optimizer, _ = make()
    wrapper = Wrapper(optimizer)
    reg = ox.OrthoRegularizer(model)
    with pytest.raises(ValueError, match=r"Wrapper runs no hooks.*optimizer\.inside"):
        reg.attach(wrapper)
    del wrapper.inside
    wrapper.other = optimizer
    reg.attach(wrapper.other)


def test_concerns_tells_the_optimizers_of_the_layers() -> None:
    model, optimizer, _ = make()
    reg = ox.OrthoRegularizer(model)
    assert reg.concerns(optimizer)
    assert not reg.concerns(torch.optim.SGD(model[2].parameters(), 0.1))
