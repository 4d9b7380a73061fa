"""TorchScript: traces hold plain PyTorch, scripts are refused."""

from __future__ import annotations

import io
import warnings

import pytest
import torch
from torch import Tensor, nn

import orthoreg_ext as ox
import orthoreg_ext.functional as F
from tests.machinery import net as model


@pytest.fixture(autouse=True)
def _quiet() -> None:
    warnings.simplefilter("ignore")  # it is deprecated, and shapes become constants of a trace


def test_a_trace_is_right_and_needs_no_operator_of_ours() -> None:
    def function(w: Tensor) -> tuple[Tensor, ...]:
        scores = F.filter_scores([w], criteria=("l1", "l2"))
        return F.gram_penalty([w]), F.gram([w])[0], scores["l2"][0]

    w = torch.randn(5, 7, generator=torch.Generator().manual_seed(0), requires_grad=True)
    traced = torch.jit.trace(function, (w,))
    assert "orthoreg::" not in str(traced.graph)
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    traced = torch.jit.load(file)
    got, want = traced(3 * w), function(3 * w)
    torch.testing.assert_close(got, want)
    first, second = (torch.autograd.grad(f[0].sum(), w)[0] for f in (got, want))
    torch.testing.assert_close(first, second)


def test_a_script_that_needs_the_regulariser_is_refused_by_name() -> None:
    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(3, 3)
            self.reg = ox.OrthoRegularizer(self.net)

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x).sum() + self.reg()

    with pytest.raises(RuntimeError, match=r"has no attribute 'reg'.*OrthoRegularizer"):
        torch.jit.script(Loss())


def test_a_model_with_a_regulariser_is_traced_without_it() -> None:
    net = model.make()
    net.reg = ox.OrthoRegularizer(net)
    x = model.batch()
    torch.testing.assert_close(torch.jit.trace(net, x)(x), net(x))
