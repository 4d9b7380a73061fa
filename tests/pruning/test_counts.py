from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from orthoreg_ext.pruning import Counts, count

from .nets import MLP, VGG, Tied, Transposed, TwoInputs


def test_counts_by_hand(x: Tensor) -> None:
    # conv1 8x27, conv2 12x72, conv3 16x108, fc1 10x64, fc2 4x10; maps of 8x8, 8x8, 4x4
    weights = 8 * 27 + 12 * 72 + 16 * 108 + 10 * 64 + 4 * 10
    macs = 64 * (8 * 27 + 12 * 72) + 16 * 16 * 108 + 640 + 40
    params = weights + 2 * (8 + 12 + 16) + 14
    statistics = 4 * 2 * 36 + 3 * 8  # running mean and variance, three int64 counters
    maps = 4 * (64 * 8 + 64 * 12 + 16 * 16 + 10 + 4)
    assert count(VGG(), x[:1]) == Counts(50, params, macs, 4 * params + statistics + maps)
    assert count(VGG(), x) == Counts(50, params, 2 * macs, 4 * params + statistics + 2 * maps)


def test_transposed_and_grouped_convolutions_by_hand(x: Tensor) -> None:
    model = Transposed()
    down, up = 16 * 8 * 27, 16 * 8 * 12 * 4  # 4x4 outputs; 4x4 inputs
    grouped, out = 64 * 12 * 4 * 9, 64 * 3 * 8  # 8x8 inputs of 12 channels to 4 outputs each
    assert count(model, x[:1]).macs == down + up + grouped + out
    assert count(model, x[:1]).filters == 8 + 12 + 8 + 3


def test_shared_parameters_count_once_and_calls_each(x: Tensor) -> None:
    counts = count(Tied(), x[:1])
    assert counts.filters == 8 + 8 + 8 + 4
    assert counts.macs == 64 * (8 * 27 + 2 * 8 * 72 + 2 * 64) + 32
    assert counts.memory == 4 * (counts.params + 64 * 8 * 5 + 4)  # five maps of four layers


def test_several_inputs() -> None:
    inputs = {"image": torch.randn(1, 3, 4, 4), "vector": torch.randn(1, 5)}
    assert count(TwoInputs(), inputs).macs == 16 * 8 * 27 + 40 + 160 + 40


def test_counting_changes_nothing(x: Tensor) -> None:
    model = VGG().train()
    state = {name: t.clone() for name, t in model.state_dict().items()}
    rng = torch.get_rng_state()
    count(model, x)
    assert model.training
    assert torch.equal(rng, torch.get_rng_state())
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    assert not any(m._forward_hooks for m in model.modules())


def test_hooks_are_removed_when_the_model_fails() -> None:
    model = nn.Sequential(MLP())
    message = "example_inputs: the model's forward failed on them: RuntimeError: mat1 and mat2"
    with pytest.raises(ValueError, match=message) as caught:
        count(model, torch.randn(2, 5))
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert not any(m._forward_hooks for m in model.modules())


def test_what_is_no_model_is_named(x: Tensor) -> None:
    model: Any = None
    with pytest.raises(TypeError, match=r"model is NoneType, expected a torch.nn.Module"):
        count(model, x)
