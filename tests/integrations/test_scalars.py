"""Scalars of a regulariser in TensorBoard and in a function like wandb.log."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import orthoreg_ext as ox
from orthoreg_ext.integrations.scalars import ScalarLogger
from tests.integrations.examples import EXAMPLES, MARK, run_example


def make_regularizer(**settings: Any) -> ox.OrthoRegularizer:
    """Two filters with a cosine of 0.6 and a norm of 5, and one filter alone: a hand's table."""
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[5.0, 0.0], [3.0, 4.0]]))  # G = [[25, 15], [15, 25]]
        model[1].weight.copy_(torch.tensor([[1.0, 1.0]]))  # G = [[2]]
    arguments = {"include": "*", "layer_weights": {"0": 0.5, "1": 2.0}, "bias": False, **settings}
    return ox.OrthoRegularizer(model, **arguments)


def test_values_of_a_table_by_hand() -> None:
    log = ScalarLogger(make_regularizer(), log=lambda scalars, step: None, per_layer=True)
    assert log() == pytest.approx(
        {
            "orthoreg/penalty": 0.5 * (24 + 15 + 15 + 24) + 2.0 * 1,
            "orthoreg/correlation": 0.6,
            "orthoreg/penalty/0": 78.0,
            "orthoreg/penalty/1": 1.0,
            "orthoreg/correlation/0": 0.6,
        },
        rel=1e-6,
    )


def test_every_so_many_steps_to_a_function_like_that_of_wandb() -> None:
    written: list[tuple[set[str], int]] = []

    def wandb_log(data: dict[str, Any], step: int | None = None, commit: bool = True) -> None:
        written.append((set(data), step))

    log = ScalarLogger(make_regularizer(), log=wandb_log, every=3, prefix="filters/")
    results = [log() for _ in range(7)]
    tags = {"filters/penalty", "filters/correlation"}
    assert written == [(tags, 0), (tags, 3), (tags, 6)]
    assert [bool(r) for r in results] == [True, False, False, True, False, False, True]
    assert log(9)
    assert not log(10)
    assert not log()  # 11
    assert log()
    assert [step for _, step in written] == [0, 3, 6, 9, 12]


def test_scalars_reach_tensorboard(tmp_path: Path) -> None:
    tensorboard = pytest.importorskip("torch.utils.tensorboard")
    regularizer = make_regularizer()
    optimizer = torch.optim.SGD(regularizer.model.parameters(), 1e-3)
    regularizer.attach(optimizer)
    expected = []
    with tensorboard.SummaryWriter(tmp_path) as writer:
        log = ScalarLogger(regularizer, add_scalar=writer.add_scalar, every=2, per_layer=True)
        for step in range(5):
            if step % 2 == 0:
                report = regularizer.report()
                expected.append((step, math.fsum(r.weight * r.penalty for r in report)))
            log()
            optimizer.step()
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    read = events.EventAccumulator(str(tmp_path))
    read.Reload()
    assert set(read.Tags()["scalars"]) == {
        *("orthoreg/penalty", "orthoreg/correlation"),
        *("orthoreg/penalty/0", "orthoreg/penalty/1", "orthoreg/correlation/0"),
    }
    found = [(e.step, e.value) for e in read.Scalars("orthoreg/penalty")]
    assert [step for step, _ in found] == [0, 2, 4]
    for (_, value), (_, other) in zip(found, expected, strict=True):
        assert value == pytest.approx(other, rel=1e-6)
    assert expected[0][1] > expected[-1][1], "the term did nothing"


def test_layers_without_a_pair_of_filters_have_no_correlation() -> None:
    log = ScalarLogger(make_regularizer(include="1", layer_weights="uniform"), log=print)
    assert log.measure() == pytest.approx({"orthoreg/penalty": 1.0})


def test_wrong_arguments_are_refused() -> None:
    regularizer = make_regularizer()
    with pytest.raises(TypeError, match="one of them"):
        ScalarLogger(regularizer)
    with pytest.raises(TypeError, match="one of them"):
        ScalarLogger(regularizer, log=print, add_scalar=print)
    with pytest.raises(TypeError, match=r"pass writer\.add_scalar"):
        ScalarLogger(regularizer, add_scalar=object())
    with pytest.raises(ValueError, match="every is 0"):
        ScalarLogger(regularizer, log=print, every=0)


def test_example_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torch.utils.tensorboard")
    pytest.importorskip("sklearn")
    printed = run_example("log_scalars.py", capsys, str(tmp_path))
    assert "mean |cos|" in printed
    assert list(tmp_path.glob("events.*"))
    marked = [line for line in (EXAMPLES / "log_scalars.py").open() if MARK in line]
    assert len(marked) == 3  # the import, the logger, its call
