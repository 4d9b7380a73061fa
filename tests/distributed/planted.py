"""A check that fails on one rank: the world has to say so."""

from __future__ import annotations


def check_that_fails(rank: int, ranks: int) -> None:
    assert rank != 1, f"planted on rank {rank}"
