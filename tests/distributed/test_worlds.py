"""Many processes equal one: every check of the modules below on 2 and on 4 ranks, over gloo."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.distributed import world

CHECKS = tuple(f"tests.distributed.{name}" for name in ("ddp", "sharded", "pruned"))

needs_gloo = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="torch was built without torch.distributed over gloo",
)


@needs_gloo
@pytest.mark.parametrize("ranks", [2, 4])
def test_many_processes_are_as_one(ranks: int, tmp_path: Path) -> None:
    failures = world.run(ranks, CHECKS, tmp_path)
    assert not failures, "\n\n".join(failures)


@needs_gloo
def test_a_failing_check_is_seen(tmp_path: Path) -> None:
    failures = world.run(2, ["tests.distributed.planted"], tmp_path)
    assert any("planted on rank 1" in failure for failure in failures)
