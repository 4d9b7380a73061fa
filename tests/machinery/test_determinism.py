"""torch.use_deterministic_algorithms: nothing is refused, and runs repeat bit for bit."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import orthoreg_ext as ox
import orthoreg_ext.functional as F
from orthoreg_ext.penalties import PENALTIES
from tests.machinery import net as model

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    torch.use_deterministic_algorithms(True)
    yield request.param
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("name", "threads"),
    [
        *((name, 1) for name in PENALTIES if PENALTIES[name].counts is None and name != "srip"),
        ("orthoreg", 2),
    ],
)
def test_training_repeats_bit_for_bit(device: str, name: str, threads: int) -> None:
    found = []
    torch.set_num_threads(threads)
    for _ in range(2):
        net = model.make().to(device)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
        reg, attached = (ox.OrthoRegularizer(net, name, 1.0) for _ in range(2))
        attached.attach(optimizer)
        for step in range(3):
            optimizer.zero_grad()
            (model.task(net, model.batch(seed=step).to(device)) + reg()).backward()
            optimizer.step()
        found.append(model.parameters(net))
    torch.testing.assert_close(*found, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["srip", "tpp"])
def test_values_and_gradients_repeat_bit_for_bit(device: str, name: str) -> None:
    found = []
    for _ in range(2):
        made = torch.randn(40, 4, 3, 3, generator=torch.Generator().manual_seed(0))
        weight = made.to(device).requires_grad_()
        marked = {"pruned": [torch.arange(9)]} if name == "tpp" else {}
        value = F.gram_penalty([weight], name, **marked)
        found.append([value, *torch.autograd.grad(value.sum(), weight)])
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_scores_repeat_bit_for_bit(device: str) -> None:
    found = []
    for _ in range(2):
        made = torch.randn(40, 4, 3, 3, generator=torch.Generator().manual_seed(0))
        weight = made.to(device)
        fisher = [torch.zeros_like(weight)]
        scores = F.filter_scores([weight], [weight], ("l1", "taylor"), dim=(0, 1))
        pair = [*scores[0]["taylor"], *scores[1]["l1"]]
        diagonal = F.accumulate_fisher_([weight], [weight], fisher)["fisher_diag"]
        grouped = F.group_scores(diagonal, [[(0, None)]])
        found.append([*pair, *diagonal, *grouped, *fisher, *F.filter_distances([weight])])
    torch.testing.assert_close(*found, rtol=0, atol=0)
