"""Nets and data that every rank makes alike, and the run of one process that they are held to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as f

import orthoreg_ext as ox

SAMPLES = 16


class Net(nn.Module):
    """Layers of all kinds, one that shares nothing with another in size, and one without use."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.grouped = nn.Conv2d(8, 12, 3, padding=1, groups=2)
        self.up = nn.ConvTranspose2d(12, 6, 2)
        self.fc = nn.Linear(6, 9)
        self.head = nn.Linear(9, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = f.relu(self.grouped(f.relu(self.depthwise(f.relu(self.conv1(x))))))
        return self.head(f.relu(self.fc(f.relu(self.up(x)).mean((2, 3)))))


def net(seed: int = 0, dtype: torch.dtype = torch.float32) -> Net:
    torch.manual_seed(seed)
    return Net().to(dtype)


def data(step: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    x = torch.randn(SAMPLES, 3, 6, 6, generator=generator).to(dtype)
    return x, torch.randint(4, (SAMPLES,), generator=generator)


def part(batch: tuple[Tensor, Tensor], rank: int, ranks: int) -> tuple[Tensor, Tensor]:
    x, y = batch
    return x[rank::ranks], y[rank::ranks]


def sgd(model: nn.Module, **options: Any) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, **options)


def trained(
    make: Callable[..., ox.OrthoRegularizer],
    *,
    attach: bool,
    steps: int = 3,
    model: nn.Module | None = None,
    forward: nn.Module | None = None,
    share: tuple[int, int] = (0, 1),
    accumulate: int = 1,
) -> nn.Module:
    """A few steps of training: in one process, or on one rank with its part of every batch."""
    model = net() if model is None else model
    forward = model if forward is None else forward
    optimizer, reg = sgd(model), make(model)
    if attach:
        reg.attach(optimizer)
    for step in range(steps):
        optimizer.zero_grad()
        batches = [data(step * accumulate + i) for i in range(accumulate)]
        for i, batch in enumerate(batches):
            x, y = part(batch, *share)
            last = i + 1 == accumulate
            with _quiet(forward, last):
                loss = f.cross_entropy(forward(x), y) / accumulate
                if not attach:
                    loss = loss + reg() / accumulate
                loss.backward()
        optimizer.step()
    return model


def _quiet(forward: nn.Module, last: bool) -> Any:
    import contextlib

    wrapped = isinstance(forward, nn.parallel.DistributedDataParallel)
    return forward.no_sync() if wrapped and not last else contextlib.nullcontext()


def assert_close(model: nn.Module, other: nn.Module, tolerance: float = 1e-6) -> None:
    expected = dict(other.named_parameters())
    for name, parameter in model.named_parameters():
        wanted = expected[name].detach()
        error = float((parameter.detach() - wanted).norm() / wanted.norm())
        assert error <= tolerance, f"{name} differs by {error:.2e}"


def assert_same_on_all_ranks(tensors: list[Tensor]) -> None:
    """Bit for bit."""
    flat = torch.cat([t.detach().flatten().double() for t in tensors])
    found = [torch.empty_like(flat) for _ in range(dist.get_world_size())]
    dist.all_gather(found, flat)
    for rank, other in enumerate(found):
        assert torch.equal(other, found[0]), f"rank {rank} differs from rank 0"
