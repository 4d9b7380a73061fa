"""Devices, and a call that is timed to its end on each of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def finished(call: Callable[[], object], device: str) -> Callable[[], None]:
    """The call, waiting for the device."""

    def run() -> None:
        call()
        if device == "cuda":
            torch.cuda.synchronize()

    return run
