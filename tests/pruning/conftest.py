from __future__ import annotations

import pytest
import torch

pytest.importorskip("torch_pruning", reason="the pruning extra is not installed")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(2, 3, 8, 8)
