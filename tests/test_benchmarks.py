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
from benchmarks import compare
from benchmarks.baselines import OURS, REGULARISE, SCORE
from benchmarks.interleaved import Spread, host_seconds, measure
from benchmarks.models import MODELS, QUICK, flops_needed, random_weights, tiny
from orthoreg_ext.build_info import compiled, reason
from tests.test_compile_gate import script

ROOT = Path(__file__).resolve().parent.parent
exercise = script("scripts/gpu_exercise.py")
# These compile with inductor, for which a test has no time; scripts/gpu_check.sh runs them.
SLOW = ("compile", "compile-both")
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
    assert set(OURS.values()) <= set(REGULARISE) | set(SCORE)
    assert {way.computes for way in (*REGULARISE.values(), *SCORE.values())} == set(OURS)


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
    exact = compare.exact_gradients(weights, way.computes)
    error = compare.relative_error(got, exact)
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
    assert set(QUICK) <= set(MODELS)


def test_calls_are_timed_in_turn() -> None:
    seen: list[str] = []
    calls = {name: lambda name=name: seen.append(name) for name in "ab"}
    times = measure(calls, "cpu", 0.0, least=0.0, rounds=(3, 40))
    assert [len(v) for v in times.values()] == [3, 3]
    # two to warm up and to see how long they take, then rounds that begin with another one
    assert "".join(seen) == "aabb" + "ab" + "ba" + "ab"
    assert Spread.of([3.0]) == Spread(3.0, 3.0, 3.0)
    assert Spread.of([1.0, 2.0, 3.0]).median == 2.0


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
    assert (
        compare.relative_error([w.grad for w in weights], [2.0 * g.double() for g in once]) < 1e-6
    )


def test_the_host_time_is_a_median_of_some_calls() -> None:
    seen: list[int] = []
    assert 0 < host_seconds(lambda: seen.append(1), "cpu", budget=0.0) < 1
    assert len(seen) == 3
    host_seconds(lambda: seen.append(1), "cpu", budget=60.0, most=10)
    assert len(seen) == 13


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
    case = compare.Case("tiny", ways=("orthoreg_ext", "eager", "orthoreg_ext-graph"))
    with ox.backend("cpu"):
        result = compare.run_case(case, "cpu", 0.0)
    assert result["left_out"] == {"orthoreg_ext-graph": "CUDA graphs need a GPU"}
    assert result["failed"] == []
    row = result["rows"]["eager"]
    assert row["times_ours"]["median"] > 0
    assert row["host_us"] > 0
    assert result["layers"] == len(tiny())
    assert 0 < row["gradient_error"] < 1e-5
    assert "times_ours" not in result["rows"]["orthoreg_ext"]
    text = compare.table(result)
    assert "orthoreg_ext-graph" in text
    assert "host us" in text
    assert json.loads(json.dumps(result)) == result | {"ways": list(case.ways)}


def test_an_own_way_that_fails_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("nothing works\nat all")

    monkeypatch.setattr(functional, "add_gram_penalty_grad_", broken)
    with ox.backend("reference"):
        case = compare.Case("tiny", ways=("orthoreg_ext", "closed"))
        result = compare.run_case(case, "cpu", 0.0)
    assert result["failed"] == ["orthoreg_ext"]
    assert result["left_out"] == {"orthoreg_ext": "RuntimeError: nothing works"}
    assert list(result["rows"]) == ["closed"]


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
