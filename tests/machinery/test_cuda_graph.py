"""CUDA graphs: a captured training step repeats with the term (needs a GPU).

What can be seen without one (no copies from the host, nothing that a replay reads is freed) is in
tests/test_in_place.py.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

import orthoreg_ext as ox
from tests.machinery import net as model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


def stepped(net: nn.Module, route: str, name: str):
    """One training step without waiting for the GPU, and its inputs' memory."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    reg = ox.OrthoRegularizer(net, name, 1.0)
    if route == "attached":
        reg.attach(optimizer)
    x = torch.zeros(2, 3, 4, 4, device="cuda")

    def step() -> None:
        optimizer.zero_grad(set_to_none=False)
        loss = model.task(net, x)
        (loss + reg() if route == "added" else loss).backward()
        optimizer.step()

    return x, step


@pytest.mark.parametrize("route", ["added", "attached"])
@pytest.mark.parametrize("name", ["orthoreg", "frobenius", "mc", "srip", "ocnn"])
def test_replays_are_training_steps(route: str, name: str) -> None:
    found = []
    for captured in (False, True):
        net = model.make().cuda()
        x, step = stepped(net, route, name)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # a step like the captured one comes before the capture
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        if captured:
            with torch.cuda.graph(graph):
                step()
        for seed in range(3):
            x.copy_(model.batch(seed=seed))
            if captured:
                graph.replay()
            else:
                step()
        torch.cuda.synchronize()
        found.append(model.parameters(net))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


def test_reduce_overhead_captures_the_compiled_term() -> None:
    net = model.make().cuda()
    reg = ox.OrthoRegularizer(net, "so", 1.0)
    call = torch.compile(lambda: reg(), fullgraph=True, mode="reduce-overhead")
    for _ in range(4):
        torch.testing.assert_close(call().clone(), reg())
