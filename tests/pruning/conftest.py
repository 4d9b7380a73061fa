from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("torch_pruning", reason="the pruning extra is not installed")


@pytest.fixture(scope="package", autouse=True)
def _one_thread() -> Iterator[None]:
    """The nets are tiny: a second thread only waits, ten times as long if the cores are busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(2, 3, 8, 8)
