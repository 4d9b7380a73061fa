"""Tables, figures and the README come from records alone; the suite has every question."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import (
    bench_memory,
    bench_methods,
    bench_penalty,
    bench_scaling,
    bench_scores,
    bench_training_step,
    readme,
    report,
)
from benchmarks.baselines import REGULARISE
from benchmarks.conftest import cases_of
from benchmarks.engine import WORK, Case
from benchmarks.models import NINE
from benchmarks.recording import RESULTS, Recorder
from benchmarks.tables import QUESTIONS, all_tables, summaries
from orthoreg_ext.build_info import compiled, reason
from orthoreg_ext.machine import describe, processor, slug_of
from tests.test_cli import make

ROOT = Path(__file__).resolve().parent.parent
FILES = (
    bench_penalty,
    bench_scores,
    bench_training_step,
    bench_methods,
    bench_memory,
    bench_scaling,
)


def spread(median: float) -> dict[str, float]:
    return {"median": median, "low": 0.5 * median, "high": 2 * median}


def row(ms: float, ratio: float | None = None, **more: Any) -> dict[str, Any]:
    to = {"to": more.pop("to", "orthoreg_ext")}
    known = {"computes": "so", "meaning": "", "host_us": None, "error": 2e-7, "share": spread(0.75)}
    return {**known, "ms": spread(ms), "ratio": ratio and {**to, **spread(ratio)}, **more}


def case(model: str, question: str, rows: dict[str, Any], **more: Any) -> dict[str, Any]:
    plain = {"work": "regularise", "matmul": "highest", "ways": list(rows), "base": ""}
    about = {"layers": 3, "flops_needed": 10**9, "bytes": 10**7, "left_out": {}, "failed": []}
    about |= {"rounds": 7, "rejected": 2, "state": "quiet"}
    about["ceiling"] = {"name": "sgemm", "meaning": "torch.mm", "rate": 2e11}
    return {"model": model, "question": question, **plain, **about, "rows": rows, **more}


def results() -> dict[str, Any]:
    machine = {"name": "Some CPU, 2 cores, avx2", "slug": "some-cpu", "device": "cpu", "threads": 2}
    machine |= {"emulated": False, "torch": "2.13.0", "orthoreg_ext": "0.1.0"}
    step = {"ceiling": None, "work": "step", "flops_needed": None, "bytes": None, "layers": None}
    alone = {"computes": "term", "to": "plain", "share": None}
    timed = [
        case(
            "vgg13",
            "penalty",
            {
                "orthoreg_ext": row(50),
                "orthoreg_ext-attached": row(40),
                "eager": row(200, 4),
            },
        ),
        case(
            "resnet50",
            "penalty",
            {"orthoreg_ext": row(100), "eager": row(700, 7)},
            flops_needed=4 * 10**9,
            state="contended",
        ),
        case(
            "resnet50",
            "scores",
            {
                "orthoreg_ext": row(4),
                "orthoreg_ext-both": row(6),
                "eager": row(20, 5),
                "eager-both": row(48, 8, to="orthoreg_ext-both"),
            },
        ),
        case(
            "resnet56",
            "step",
            {
                "plain": row(900, share=None),
                "orthoreg_ext-attached": row(909, 1.01, to="plain", share=None),
                "orthoreg_ext-alone": row(9, 0.01, **alone),
                "eager-alone": row(45, 0.05, **alone),
            },
            **step,
        ),
        case(
            "resnet56",
            "methods",
            {"plain": row(900, share=None), "orthoreg_ext-tpp": row(9, 0.01, **alone)},
            **(step | {"work": "method"}),
        ),
        case("n=64", "scaling", {"orthoreg_ext": row(0.1), "eager": row(0.9, 9)}),
        case("n=256", "scaling", {"orthoreg_ext": row(1.0), "eager": row(9, 9)}),
    ]
    memory = {"orthoreg_ext": {"computes": "so", "meaning": "", "extra_mb": 25.0}}
    held = {"model": "resnet50", "work": "memory", "matmul": "highest", "question": "memory"}
    held |= {"ways": ["orthoreg_ext", "eager"], "rows": memory, "layers": 54, "failed": []}
    held |= {"left_out": {"eager": "no room"}, "weights_mb": 102.0, "gram_mb": 25.0, "base": ""}
    limits = {
        "sgemm": {"meaning": "torch.mm", "rate": 2e11, "unit": "flop/s"},
        "read": {"meaning": "torch.sum", "rate": 3e10, "unit": "byte/s"},
    }
    return {"machine": machine, "ceilings": limits, "cases": [*timed, held], "not_reached": ["x"]}


def test_every_question_has_its_files_models_and_baselines() -> None:
    full = {file.__name__: cases_of(file, True, "cpu") for file in FILES}
    assert {c.question for cases in full.values() for c in cases} == set(QUESTIONS)
    penalty = [c for c in full["benchmarks.bench_penalty"] if c.question == "penalty"]
    assert {*NINE, "adalora_7b", "resnext50", "mobilenet_v2"} == {c.model for c in penalty}
    named = {"orthoreg-repo", "eager", "closed", "closed-small", "compile", "foreach_mm"}
    assert named <= set(next(c.ways for c in penalty if c.model == "resnet50"))
    scores = [c for c in full["benchmarks.bench_scores"] if c.question == "importance"]
    assert "torch-pruning" in scores[0].ways
    for file in FILES:
        quick, every = cases_of(file, False, "cpu"), cases_of(file, True, "cpu")
        assert {c.model for c in quick} <= {c.model for c in every}
        for each in (*quick, *every):
            known = REGULARISE if each.work == "memory" else WORK[each.work].ways(each.model)
            assert set(each.ways) <= set(known), each
            assert not each.base or each.base in each.ways


def test_tables_are_made_of_json_alone() -> None:
    record = json.loads(json.dumps(results()))
    text = summaries(record)
    for question in QUESTIONS.keys() - {"penalties", "importance"}:
        assert QUESTIONS[question] in text
    vgg = next(line for line in text.splitlines() if line.startswith("  vgg13"))
    expected = "vgg13 orthoreg_ext 50 (25-100) 75 % 2e-07 4 (2-8) 7"
    assert vgg.split() == expected.split()
    step = next(line for line in text.splitlines() if line.startswith("  resnet56"))
    assert "1 (-49.5-102)" in step  # 1.01 of the step is 1 % more; its middle half likewise
    assert "5 (2.5-10)" in step  # the term alone
    assert "7!" in text
    assert "do not trust the line" in text
    assert "no time was left for: x" in text
    full = all_tables(record)
    assert "eager left out: no room" in full
    assert "THE MACHINE WAS BUSY" in full


def test_the_report_writes_small_files_that_depend_on_the_records_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "records.json").write_text(json.dumps(results()))
    assert report.main([str(tmp_path / "records.json"), "--out", str(tmp_path / "a")]) == 0
    assert report.main([str(tmp_path / "records.json"), "--out", str(tmp_path / "b")]) == 0
    names = ["cost.svg", "results.json", "roofline.svg", "scaling.svg", "step.svg", "tables.txt"]
    folder = tmp_path / "a" / "some-cpu"
    assert sorted(p.name for p in folder.iterdir()) == names
    for path in folder.iterdir():
        assert path.read_text() == (tmp_path / "b" / "some-cpu" / path.name).read_text()
        assert path.stat().st_size < 200_000
    assert QUESTIONS["penalty"] in capsys.readouterr().out
    assert ">vgg13<" in (folder / "roofline.svg").read_text()


def test_later_files_replace_the_same_cases(tmp_path: Path) -> None:
    first, second = results(), results()
    second["cases"] = second["cases"][:1]
    second["cases"][0]["rounds"] = 99
    both = report.joined([first, second])
    assert len(both["cases"]) == len(first["cases"])
    assert both["cases"][0]["rounds"] == 99


def test_a_case_with_more_ways_replaces_one_with_fewer() -> None:
    few, many = results(), results()
    few["cases"] = [case("vgg13", "penalty", {"orthoreg_ext": row(50)})]
    many["cases"] = [case("vgg13", "penalty", {"orthoreg_ext": row(40), "eager": row(200, 5)})]
    assert report.joined([few, many])["cases"] == many["cases"]
    assert report.joined([many, few])["cases"] == many["cases"] + few["cases"]


@pytest.mark.parametrize(
    ("change", "text"),
    [({"slug": "another"}, "of several machines"), ({"emulated": True}, "mean nothing")],
)
def test_times_that_do_not_belong_together_are_refused(
    change: dict[str, Any], text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = copy.deepcopy(results())
    other["machine"] |= change
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    for path, record in zip(paths, (results(), other), strict=True):
        path.write_text(json.dumps(record))
    assert report.main([*map(str, paths), "--out", str(tmp_path / "out")]) == 2
    assert text in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_readme_is_what_the_command_makes_of_the_results() -> None:
    for path, text in readme.files(ROOT, RESULTS).items():
        assert path.read_text() == text, f"{path.name}: run python -m benchmarks.readme"
    assert (readme.NONE in (ROOT / "README.md").read_text()) is (readme.load(RESULTS) == [])


def test_the_readme_block_has_each_machine_and_says_what_was_disturbed(tmp_path: Path) -> None:
    assert readme.block([]) == readme.NONE
    assert readme.block(readme.load(tmp_path)) == readme.NONE
    text = readme.block([results()])
    assert "| vgg13 | 2e-07 | 40 (20-80) | 50 (25-100) | 75 % | 4 (2-8) | - | - | - |" in text
    assert "| resnet50 (machine was busy) | 2e-07 | - | 100 (50-200) |" in text
    assert "| 7 (3.5-14) (machine was busy) |" in text
    assert "| resnet50 | 2e-07 | 4 (2-8) | 75 % | 5 (2.5-10) | 6 (3-12) | 75 % | 8 (4-16) |" in text
    assert "| resnet56 | 900 (450-1.8e+03) | 1 % | 5 % |" in text
    assert "docs/figures/some-cpu-cost.svg" in text
    apart = results()  # compare.py compiles in a case of its own
    apart["cases"].append(
        case("vgg13", "penalty", {"orthoreg_ext": row(51), "compile": row(99, 2)})
    )
    text = readme.block([apart])
    assert "| vgg13 | 2e-07 | 40 (20-80) | 50 (25-100) | 75 % | 4 (2-8) | 2 (1-4) | - | - |" in text
    assert text.count("vgg13") == 1
    page = f"before\n{readme.BEGIN}\nold\n{readme.END}\nafter\n"
    again = readme.rewritten(page, [results()])
    assert again == readme.rewritten(again, [results()])
    assert again.startswith("before\n")
    assert again.endswith("after\n")
    assert "old" not in again
    with pytest.raises(ValueError, match=r"README\.md has no lines"):
        readme.rewritten("nothing", [])


def test_the_figure_is_copied_beside_the_readme(tmp_path: Path) -> None:
    folder = tmp_path / "results" / "some-cpu"
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(results()))
    (folder / "cost.svg").write_text("<svg/>")
    (tmp_path / "README.md").write_text(f"{readme.BEGIN}{readme.END}")
    made = readme.files(tmp_path, tmp_path / "results")
    assert made[tmp_path / "docs" / "figures" / "some-cpu-cost.svg"] == "<svg/>"


def test_time_is_shared_among_the_cases_that_are_left(tmp_path: Path) -> None:
    recorder = Recorder(results()["machine"], tmp_path / "new" / "r", 3, 90.0)
    assert recorder.share() == pytest.approx(30, abs=1)
    assert recorder.share() == pytest.approx(45, abs=1)
    recorder.add(results()["cases"][0])
    recorder.skip("the last")
    assert json.loads((tmp_path / "new" / "r.json").read_text())["not_reached"] == ["the last"]
    assert "vgg13" in (tmp_path / "new" / "r.txt").read_text()
    assert Recorder({}, tmp_path / "r", 3, 0.0).share() is None


def test_machines_are_named_by_their_hardware(tmp_path: Path) -> None:
    assert slug_of("NVIDIA H200") == "nvidia-h200"
    assert slug_of("AMD EPYC, 2 cores, avx512") == "amd-epyc-2-cores-avx512"
    xeon = "Intel(R) Xeon(R) Platinum 8488C CPU @ 2.40GHz, 8 cores, avx2"
    assert slug_of(xeon) == "intel-xeon-platinum-8488c-8-cores-avx2"
    (tmp_path / "cpuinfo").write_text("processor : 0\nmodel name\t: Some CPU\nmodel name\t: x\n")
    assert processor(tmp_path / "cpuinfo") == "Some CPU"
    assert processor(tmp_path / "missing")
    text = json.dumps(describe("cpu")).lower()
    assert os.uname().nodename.lower() not in text


@pytest.mark.slow
def test_a_session_runs_a_case_and_writes_records(tmp_path: Path) -> None:
    pytest.importorskip("pytest_benchmark")
    if not compiled:
        pytest.skip(reason)
    chosen = "benchmarks/bench_scaling.py::bench_cost_by_shape[n=16-highest]"
    command = [sys.executable, "-m", "pytest", chosen, "-q", "-p", "no:cacheprovider"]
    command += ["--device", "cpu", "--budget", "4"]
    command += ["--records", str(tmp_path / "r"), "--benchmark-json", str(tmp_path / "b.json")]
    # a worker of xdist would measure nothing
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / "r.json").read_text())
    assert [case["model"] for case in record["cases"]] == ["n=16"]
    assert set(record["ceilings"]) == {"sgemm", "read"}
    kept = json.loads((tmp_path / "b.json").read_text())
    assert kept["benchmarks"][0]["extra_info"]["record"] == record["cases"][0]
    assert "node" not in kept["machine_info"]


@pytest.mark.parametrize(("full", "flag"), [("", False), ("0", False), ("1", True)])
def test_make_bench_ends_in_the_report(full: str, flag: bool) -> None:
    done = make("-n", "bench", f"FULL={full}", "BENCH_ARGS=--budget 9")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.partition("pytest benchmarks")[2]
    assert ("--full" in lines) is flag
    assert "--budget 9" in lines
    assert "-m benchmarks.report build/bench/records.json" in lines


def test_a_case_knows_its_question() -> None:
    assert Case("vgg13", question="penalty").title == "regularise vgg13, float32 matmul 'highest'"
