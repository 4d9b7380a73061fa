"""The baselines compute what they are compared for, and the comparison says what it measured."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import orthoreg_ext as ox
import orthoreg_ext.functional as functional
from benchmarks import compare, engine, grouped, memory
from benchmarks.baselines import OURS, REGULARISE
from benchmarks.ceilings import Ceiling
from benchmarks.methods import METHODS
from benchmarks.models import (
    MODELS,
    NINE,
    SWEEPS,
    flops_needed,
    groups_of,
    random_weights,
    shapes_of,
    tiny,
)
from benchmarks.scoring import IMPORTANCE, SCORE
from benchmarks.steps import STEP, training
from benchmarks.tables import case_table
from orthoreg_ext.build_info import compiled, reason
from orthoreg_ext.timing import Timing
from tests.test_compile_gate import script

ROOT = Path(__file__).resolve().parent.parent
exercise = script("scripts/gpu_exercise.py")
# These compile with inductor, for which a test has no time; scripts/gpu_check.sh runs them.
SLOW = ("compile", "compile-both")
WAYS = {**REGULARISE, **SCORE, **IMPORTANCE, **STEP}
# Of the gradient in float32; bf16 keeps two digits.
TOLERANCE = {"foreach_mm": 2e-2}


@pytest.fixture(autouse=True)
def _default_precision() -> object:
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


def test_the_baselines_have_the_names_that_are_promised() -> None:
    named = {"orthoreg-repo", "eager", "closed", "closed-small", "compile", "foreach_mm", "pyg-lib"}
    assert named | {"orthoreg_ext", "orthoreg_ext-attached"} <= set(REGULARISE)
    assert set(OURS.values()) <= set(WAYS)
    assert {"torch-pruning", "torch-pruning-magnitude"} <= set(IMPORTANCE)
    tables = (REGULARISE, SCORE, IMPORTANCE)
    computed = {way.computes for table in tables for way in table.values()}
    alone = {"offdiag", "cosine", "so masked", "orthoreg masked", "tpp masked"}
    assert computed - set(OURS) == alone


@pytest.mark.parametrize("name", [n for n in REGULARISE if n not in SLOW])
def test_every_way_gives_the_gradient_of_what_it_computes(name: str) -> None:
    way = REGULARISE[name]
    if missing := way.why_not("cpu"):
        pytest.skip(missing)
    weights = random_weights(tiny(), "cpu")
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    returned = way.prepare(weights)()
    got = list(returned) if returned else [w.grad for w in weights]
    exact = engine.exact_gradients(weights, way.computes)
    error = engine.relative_error(got, exact)
    assert error < TOLERANCE.get(name, 1e-5)
    assert error > 0  # it did not compare a thing with itself


@pytest.mark.parametrize(
    ("model", "layers", "gflops"),
    [("vgg13", 11, 13.5), ("resnet56", 58, 0.14), ("resnet50", 54, 38.7), ("vit_b16", 50, 199)],
)
def test_models_have_the_published_layers(model: str, layers: int, gflops: float) -> None:
    shapes = MODELS[model]()
    assert len(shapes) == layers
    assert flops_needed(shapes) / 1e9 == pytest.approx(gflops, rel=0.03)
    assert set(NINE) <= set(MODELS)
    assert len(NINE) == 9


def test_adalora_is_448_factors_and_groups_are_matrices_of_their_own() -> None:
    assert MODELS["adalora_7b"]() == [(12, 4096)] * 448
    shapes = MODELS["resnext50"]()
    groups = groups_of("resnext50", shapes)
    assert groups.count(32) == 16
    assert shapes[2] == (128, 4, 3, 3)
    # 32 matrices of 4 x 36: 3 * 4^2 * 36 flops each
    assert flops_needed(shapes[2:3], groups[2:3]) == 32 * 3 * 16 * 36
    assert len(SWEEPS) == 18
    assert shapes_of("n=64") == [(64, 64, 3, 3)]


@pytest.mark.parametrize("name", ["orthoreg_ext", "eager", "closed-small"])
def test_grouped_ways_agree_with_float64(name: str) -> None:
    weights, groups = random_weights([(8, 3, 3, 3), (6, 5), (6, 1, 3, 3)], "cpu"), [2, 1, 6]
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    grouped.ways(groups)[name].prepare(weights)()
    exact = grouped.exact_gradients(weights, groups)
    assert 0 < engine.relative_error([w.grad for w in weights], exact) < 1e-5


@pytest.mark.parametrize("name", [n for n in SCORE if not n.startswith("compile")])
def test_every_way_scores_alike(name: str) -> None:
    case = engine.Case("tiny", "score", ways=(name,))
    prepared = engine.prepare(case, "cpu")
    assert prepared.failed == []
    assert 0 < prepared.errors[name] < 1e-5


def test_attaching_plans_once_and_adds_at_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    if not compiled:
        pytest.skip(reason)
    weights = random_weights(tiny(), "cpu")
    for weight in weights:
        weight.grad = torch.zeros_like(weight)

    def planned_again(*_: object, **__: object) -> None:
        raise AssertionError("it took the call that plans")

    monkeypatch.setattr(functional, "add_gram_penalty_grad_", planned_again)
    with ox.backend("cpu"):
        call = REGULARISE["orthoreg_ext-attached"].prepare(weights)
        call()
        once = [w.grad.clone() for w in weights]
        call()
    assert engine.relative_error([w.grad for w in weights], [2.0 * g.double() for g in once]) < 1e-6


def test_the_exercise_compares_signs_only_where_they_are_certain() -> None:
    runs = [*exercise.quick_runs(), *exercise.all_runs(emulated=False)]
    signed = {(r.dtype, r.shapes) for r in runs if r.shapes and "orthoreg" in r.penalties}
    assert (torch.float32, exercise.SMALL) in signed
    assert not any(shapes == exercise.LARGE for _, shapes in signed)
    for dtype, shapes in signed:
        nearest = exercise.nearest_to_zero(exercise.random_layers(shapes, dtype, "cpu", 0))
        assert nearest > (1e-12 if dtype == torch.float64 else exercise.CERTAIN), (dtype, shapes)


def test_a_case_is_a_table_with_ratios_and_errors() -> None:
    if not compiled:
        pytest.skip(reason)
    case = engine.Case("tiny", ways=("orthoreg_ext", "eager", "orthoreg_ext-graph"))
    with ox.backend("cpu"):
        prepared = engine.prepare(case, "emulated")  # no ceiling: it takes seconds
        result = engine.timed(prepared, 0.0)
    assert result["left_out"] == {"orthoreg_ext-graph": "CUDA graphs need a GPU"}
    assert result["failed"] == []
    row = result["rows"]["eager"]
    assert row["ratio"]["to"] == "orthoreg_ext"
    assert row["ratio"]["median"] > 0
    assert result["layers"] == len(tiny())
    assert result["rounds"] >= 3
    assert 0 < row["error"] < 1e-5
    assert result["rows"]["orthoreg_ext"]["ratio"] is None
    text = case_table(result)
    assert "orthoreg_ext-graph" in text
    assert "host us" in text
    assert json.loads(json.dumps(result)) == result


def test_the_share_is_the_rate_needed_over_that_of_the_ceiling_in_the_same_round(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def timing(calls: dict[str, object], *_: object, **__: object) -> Timing:
        assert list(calls) == ["eager", "sgemm"]
        return Timing({"eager": [2.0, 4.0], "sgemm": [0.5, 1.0]}, 0, "quiet")

    monkeypatch.setattr(engine, "measure", timing)
    prepared = engine.prepare(engine.Case("tiny", ways=("eager",)), "emulated")
    prepared.ceiling, prepared.needed = Ceiling("sgemm", "", lambda: None, amount=8.0), 16.0
    result = engine.timed(prepared, 0.0)
    # 16 flops in 2 s beside 8 flops in 0.5 s: 8 of 16 flop/s
    assert result["rows"]["eager"]["share"] == {"median": 0.5, "low": 0.5, "high": 0.5}
    assert result["ceiling"]["rate"] == pytest.approx(8 / 0.75)


def test_an_own_way_that_fails_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("nothing works\nat all")

    monkeypatch.setattr(functional, "add_gram_penalty_grad_", broken)
    with ox.backend("reference"):
        case = engine.Case("tiny", ways=("orthoreg_ext", "closed"))
        result = engine.run_case(case, "emulated", 0.0)
    assert result["failed"] == ["orthoreg_ext"]
    assert result["left_out"] == {"orthoreg_ext": "RuntimeError: nothing works"}
    assert list(result["rows"]) == ["closed"]


def test_a_training_step_is_compared_with_one_without_a_term() -> None:
    case = engine.Case("tiny", "step", ways=tuple(STEP), base="plain")
    result = engine.run_case(case, "cpu", 0.0)
    assert (result["failed"], result["left_out"]) == ([], {})
    assert {n for n, row in result["rows"].items() if row["ratio"]} == set(STEP) - {"plain"}


@pytest.mark.parametrize("name", ["tpp", "greg1"])
def test_a_method_and_the_loop_beside_it_add_the_same(name: str) -> None:
    added = []
    for way in (f"orthoreg_ext-{name}", f"eager-{name}"):
        subject = training("tiny", "cpu")
        call = METHODS[way].prepare(subject)
        for parameter in subject.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        call()
        added.append([p.grad for p in subject.model.parameters()])
    assert sum(float(g.abs().sum()) for g in added[0] if g is not None) > 0
    torch.testing.assert_close(added[0], added[1], rtol=1e-4, atol=1e-7)


def test_importances_are_timed_on_a_network() -> None:
    pytest.importorskip("torch_pruning")
    case = engine.Case("tiny", "groups", ways=tuple(IMPORTANCE))
    result = engine.run_case(case, "cpu", 0.0)
    assert (result["failed"], result["left_out"]) == ([], {})
    to = {n: row["ratio"]["to"] for n, row in result["rows"].items() if row["ratio"]}
    assert to == {
        "torch-pruning": "orthoreg_ext-taylor",
        "torch-pruning-magnitude": "orthoreg_ext-l2",
    }


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_extra_memory_is_that_of_one_call() -> None:
    # in a process of its own: this one may hold memory that earlier tests gave back
    lines = (
        "from benchmarks import memory, models",
        "models.SWEEPS['large'] = [(1500, 1500)]",
        "print(memory.extra_bytes('large', 'eager', 'cpu'))",
    )
    command = [sys.executable, "-c", "; ".join(lines)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert float(done.stdout) > memory.gram_bytes([(1500, 1500)]) == 9e6
    case = engine.Case("n=64", "memory", ways=("eager", "orthoreg_ext-graph"), question="memory")
    found = memory.run_case(case, "cpu")
    assert found["rows"]["eager"]["extra_mb"] >= 0
    assert found["left_out"] == {"orthoreg_ext-graph": "CUDA graphs need a GPU"}
    assert found["failed"] == []


def test_what_does_not_fit_is_left_out_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SWEEPS, "huge", [(10**9, 8)])
    if memory.why_not("n=16", "eager", "cpu"):
        pytest.skip("this machine has less than 2 GB")
    assert "it needs more than 8" in memory.why_not("huge", "eager", "cpu")


def test_the_comparison_writes_after_every_case_and_stops_in_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if not compiled:
        pytest.skip(reason)
    planned = [
        engine.Case("tiny", ways=("eager",), question="penalty"),
        engine.Case("tiny", "score", ways=("eager",), question="scores"),
    ]
    monkeypatch.setattr(compare, "cases", lambda models: planned)
    monkeypatch.setattr(
        compare, "run_case", lambda *given: engine.run_case(given[0], "emulated", 0)
    )
    command = ["compare", "--device", "cpu", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [*command, "--budget", "60"])
    assert compare.main() == 0
    record = json.loads((tmp_path / "comparison.json").read_text())
    assert [case["work"] for case in record["cases"]] == ["regularise", "score"]
    assert record["not_reached"] == []
    assert "eager" in (tmp_path / "comparison.txt").read_text()
    assert not set(record["machine"]) & {"node", "host", "hostname"}

    monkeypatch.setattr(sys, "argv", [*command, "--budget", "0"])
    assert compare.main() == 0
    record = json.loads((tmp_path / "comparison.json").read_text())
    assert record["not_reached"] == [case.title for case in planned]
    assert "not reached: regularise tiny" in capsys.readouterr().out


# scripts/gpu_check.sh where there is no GPU


def gpu_check(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(ROOT / "scripts" / "gpu_check.sh")],
        capture_output=True,
        text=True,
        env={**os.environ, "OUT": str(folder), "PYTHON": sys.executable, **environment},
    )


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="there may be a GPU")
def test_gpu_check_says_that_there_is_no_gpu(tmp_path: Path) -> None:
    done = gpu_check(tmp_path / "out")
    assert done.returncode == 1
    assert "no NVIDIA GPU on this machine" in done.stderr
    assert not (tmp_path / "out").exists()


def test_gpu_check_runs_chosen_stages_and_marks_what_is_emulated(tmp_path: Path) -> None:
    done = gpu_check(tmp_path, EMULATED="1", STAGES="info")
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "all-emulated.tar.gz",
        "info-emulated.log",
        "summary-emulated.txt",
    ]
    summary = (tmp_path / "summary-emulated.txt").read_text()
    assert "EMULATED: no GPU was used" in summary
    assert "info: passed" in summary
    assert "there is no stage 'tests'" in gpu_check(tmp_path, EMULATED="1", STAGES="tests").stderr


def test_gpu_check_leaves_out_what_it_has_no_time_for(tmp_path: Path) -> None:
    done = gpu_check(tmp_path, EMULATED="1", STAGES="info", TOTAL_SECONDS="5")
    assert done.returncode == 1
    assert "info: LEFT OUT: no time" in (tmp_path / "summary-emulated.txt").read_text()
    assert 'for the rest: STAGES="info"' in done.stdout


def test_the_shares_of_all_stages_fit_into_the_total() -> None:
    text = (ROOT / "scripts" / "gpu_check.sh").read_text()
    shares = {name: int(value) for name, value in re.findall(r"\[(\w+)\]=(\d+)", text)}
    order = re.search(r'^order="([\w ]+)"$', text, re.MULTILINE)
    total = re.search(r"echo 3600 \|\| echo (\d+)\)", text)
    assert order is not None
    assert total is not None
    assert sorted(shares) == sorted(order[1].split())
    assert sum(shares.values()) + 20 <= int(total[1])
