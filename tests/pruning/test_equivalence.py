from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from orthoreg_ext.pruning import prune
from orthoreg_ext.pruning.equivalence import difference, full_precision

from .nets import VGG

NAN, INF = float("nan"), float("inf")


def switches() -> list[Any]:
    backends: Any = torch.backends
    cuda = [backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn]
    return [*cuda, backends.mkldnn.matmul, backends.mkldnn.conv, backends.mkldnn.rnn]


def readable(read: Callable[[], Any]) -> Any:
    try:
        return read()
    except RuntimeError as error:  # the user's mixture, which is to come back too
        return type(error)


def precision() -> list[Any]:
    """Every switch for reduced precision, the old ones first."""
    old = [torch.get_float32_matmul_precision, lambda: torch.backends.cuda.matmul.allow_tf32]
    old.append(lambda: torch.backends.cudnn.allow_tf32)
    everything = [torch.backends.fp32_precision, *(s.fp32_precision for s in switches())]
    return [*map(readable, old), *everything]


@pytest.fixture
def _default_precision() -> Iterator[None]:
    before = [switch.fp32_precision for switch in switches()]
    yield
    torch.backends.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = True
    for switch, value in zip(switches(), before, strict=True):
        switch.fp32_precision = value


def nothing() -> None:
    pass


def high() -> None:
    torch.set_float32_matmul_precision("high")


def medium() -> None:
    torch.set_float32_matmul_precision("medium")


def only_the_new_switch() -> None:
    torch.backends.cuda.matmul.fp32_precision = "tf32"


def both_kinds() -> None:
    torch.set_float32_matmul_precision("high")
    torch.backends.cuda.matmul.fp32_precision = "ieee"


def one_of_cudnn() -> None:
    torch.backends.cudnn.conv.fp32_precision = "ieee"


def all_backends() -> None:
    torch.backends.fp32_precision = "tf32"


CHOICES = [nothing, high, medium, only_the_new_switch, both_kinds, one_of_cudnn, all_backends]


@pytest.mark.usefixtures("_default_precision")
@pytest.mark.parametrize("choose", CHOICES)
def test_the_check_runs_in_full_precision_and_restores_the_users(
    choose: Callable[[], None], x: Tensor
) -> None:
    model, seen = VGG(), []
    choose()
    before = precision()
    model.fc1.register_forward_pre_hook(lambda *_: seen.append(precision()))
    prune(model, x, criterion="l1", ratio=0.5)
    assert precision() == before
    full = [values for values in seen if values[4:] == ["ieee"] * 6]
    assert len(full) == 2  # the masked and the pruned model; tracing runs in any precision
    for values in full:  # the old switches agree, but where the user's mixture was unreadable
        for old, want, was in zip(values, ["highest", False, False], before, strict=False):
            assert old == want or old is was is RuntimeError


@pytest.mark.usefixtures("_default_precision")
def test_what_is_inherited_from_all_backends_stays_so() -> None:
    torch.backends.fp32_precision = "tf32"
    with full_precision():
        pass
    torch.backends.fp32_precision = "ieee"
    assert torch.backends.cuda.matmul.fp32_precision == "ieee"


@pytest.mark.usefixtures("_default_precision")
def test_a_failing_forward_restores_the_precision_too() -> None:
    high()
    before = precision()
    with pytest.raises(ZeroDivisionError), full_precision():
        raise ZeroDivisionError
    assert precision() == before


def test_the_other_flags_of_cudnn_stay_the_users(x: Tensor) -> None:
    model, seen = VGG(), []
    cudnn = torch.backends.cudnn
    model.fc1.register_forward_pre_hook(
        lambda *_: seen.append((cudnn.enabled, cudnn.benchmark, cudnn.deterministic))
    )
    with cudnn.flags(enabled=False, benchmark=True, deterministic=True):
        prune(model, x, criterion="l1", ratio=0.5)
    assert set(seen) == {(False, True, True)}


@pytest.mark.parametrize(
    ("expected", "actual", "problem"),
    [
        ([1.0, 2.0], [1.0, 2.0003], None),  # of 2.0: 1.5e-4
        ([1.0, 2.0], [1.0, 2.0005], "off by 0.0005 where its largest value is 2"),
        ([0.0, 0.0], [0.0, 1e-9], "off by 1e-09 where its largest value is 0"),
        ([1.0, 2.0], [1.0, NAN], "NaN or infinite in other places"),
        ([1.0, NAN], [1.0, 2.0], "NaN or infinite in other places"),
        ([NAN, 2.0], [1.0, NAN], "NaN or infinite in other places"),
        ([NAN, NAN], [NAN, NAN], None),
        ([NAN, 2.0], [NAN, 2.0], None),
        ([NAN, 2.0], [NAN, 2.1], "off by 0.1 where its largest value is 2"),
        ([INF, 2.0], [INF, 2.0], None),
        ([INF, 2.0], [INF, 3.0], "off by 1 where"),  # infinity is no scale
        ([INF, 2.0], [-INF, 2.0], "NaN or infinite in other places"),
        ([INF, 2.0], [NAN, 2.0], "NaN or infinite in other places"),
        ([1.0, 2.0], [1.0, INF], "NaN or infinite in other places"),
        ([], [], None),
    ],
)
def test_outputs_are_equal_up_to_rounding_and_nan_for_nan(
    expected: list[float], actual: list[float], problem: str | None
) -> None:
    found = difference([torch.tensor(expected)], [torch.tensor(actual)])
    if problem is None:
        assert found is None
    else:
        assert found is not None
        assert problem in found
