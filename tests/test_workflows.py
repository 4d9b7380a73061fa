"""The workflows of .github: they parse, call what exists, and hold together."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / ".github" / "workflows"
WORKFLOWS = sorted(FOLDER.glob("*.yml"))

Job = dict[str, Any]


def load(text: str) -> dict[str, Any]:
    yaml = pytest.importorskip("yaml", reason="pyyaml is not installed here")
    found: dict[str, Any] = yaml.safe_load(text)
    return found


def targets() -> set[str]:
    """What `make` can be asked for."""
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def problems(workflow: dict[str, Any]) -> list[str]:
    """What would only be seen on the server, one line each."""
    found = []
    jobs: dict[str, Job] = workflow["jobs"]
    for name, job in jobs.items():
        needs = job.get("needs", [])
        missing = {needs} if isinstance(needs, str) else set(needs)
        found += [f"{name} needs {other}, no job" for other in missing - set(jobs)]
        found += [f"{name} lacks {key}" for key in ("runs-on", "steps") if key not in job]
        matrix = set(job.get("strategy", {}).get("matrix", {}))
        used = set(re.findall(r"matrix\.(\w+)", str(job["steps"])))
        found += [f"{name} uses matrix.{key}, which it lacks" for key in used - matrix]
        for step in job["steps"]:
            if ("run" in step) == ("uses" in step):
                found.append(f"{name} has a step that neither runs nor uses, or does both: {step}")
            if "uses" in step and not re.fullmatch(r"[\w.-]+/[\w./-]+@[\w./-]+", step["uses"]):
                found.append(f"{name} uses {step['uses']}, expected owner/action@version")
            command = step.get("run", "")
            if "${{ github." in command:
                found.append(f"{name} pastes what others may choose into a shell: use env")
            called = re.findall(r"(?:^|[;&|]\s*)make ([a-z-]+)", command, re.MULTILINE)
            found += [f"{name} calls make {t}, no target" for t in set(called) - targets()]
            files = re.findall(r"(?:bash|python) ((?:\.ci|scripts)/\S+)", command)
            found += [f"{name} runs {f}, no file" for f in files if not (ROOT / f).exists()]
    return found


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflow_holds_together(path: Path) -> None:
    workflow = load(path.read_text())
    assert workflow["name"] == path.stem
    assert True in workflow  # YAML 1.1 reads the key `on` as true
    assert workflow["permissions"] == {"contents": "read"}
    assert "secrets." not in path.read_text()
    assert problems(workflow) == []


def test_there_are_workflows_for_changes_and_releases() -> None:
    assert {path.stem for path in WORKFLOWS} >= {"ci", "release"}
    calls = (FOLDER / "ci.yml").read_text()
    assert "bash .ci/run" in calls, "the server's gates are not those of the project"


def test_release_publishes_what_was_tried() -> None:
    jobs = load((FOLDER / "release.yml").read_text())["jobs"]
    assert jobs["try"]["needs"] == "build"
    for name in ("attach", "publish"):
        assert jobs[name]["needs"] == "try"
        assert jobs[name]["if"] == "github.ref_type == 'tag'"
    assert jobs["publish"]["environment"]["name"] == "pypi"
    assert jobs["publish"]["permissions"] == {"id-token": "write"}


def test_release_has_a_wheel_for_every_python_that_is_promised() -> None:
    jobs = load((FOLDER / "release.yml").read_text())["jobs"]
    tried = set(jobs["try"]["strategy"]["matrix"]["python"])
    environment = jobs["build"]["env"]
    built = re.findall(r"cp3(\d+)-cp3", f"{environment['PYTHON']} {environment['PYTHONS']}")
    assert tried == {f"3.{minor}" for minor in built}
    changes = load((FOLDER / "ci.yml").read_text())["jobs"]["pythons"]
    assert set(changes["strategy"]["matrix"]["python"]) == tried, "ci.yml tries other ones"
    oldest = re.search(r'requires-python = ">=(3\.\d+)"', (ROOT / "pyproject.toml").read_text())
    assert oldest is not None
    assert oldest[1] in tried


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"needs": "nobody"}, "needs nobody, no job"),
        ({"runs-on": None}, ""),
        ({"steps": [{"run": "make nothing"}]}, "calls make nothing, no target"),
        ({"steps": [{"run": "bash .ci/walk"}]}, "runs .ci/walk, no file"),
        ({"steps": [{"uses": "actions/checkout"}]}, "expected owner/action@version"),
        ({"steps": [{"name": "idle"}]}, "neither runs nor uses"),
        ({"steps": [{"run": "echo ${{ matrix.os }}"}]}, "matrix.os, which it lacks"),
        ({"steps": [{"run": "echo ${{ github.ref_name }}"}]}, "pastes what others may choose"),
    ],
)
def test_mistakes_are_seen(change: Job, expected: str) -> None:
    job = {"runs-on": "ubuntu", "steps": [{"run": "make test"}]} | change
    said = "\n".join(problems({"jobs": {"one": job}}))
    assert expected in said
    assert bool(said) == bool(expected)
