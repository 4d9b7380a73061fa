"""`orthoreg bench`: a table for one's own model, and one line for bad input."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from orthoreg_ext import cli
from orthoreg_ext.bench import CRITERIA, bench, formula_scores, formula_term, table
from orthoreg_ext.penalties import PENALTIES
from orthoreg_ext.regularizer import OrthoRegularizer
from tests.test_cli import one_line

MODELS = """
import torch
from torch import nn

def net():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=2), nn.Flatten(), nn.Linear(8, 4)
    )

def argument(width):
    return nn.Linear(width, width)

def number():
    return 7

def empty():
    return nn.ReLU()

def frozen():
    return nn.Linear(3, 3).requires_grad_(False)

def huge():
    raise MemoryError
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module of the user's, in the folder where the command is called."""
    (tmp_path / "my_nets.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "my_nets", raising=False)
    return "my_nets"


def test_it_times_the_layers_of_ones_own_model(
    mine: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "bench.json"
    command = ["bench", f"{mine}:net", "--seconds", "0.1", "--device", "cpu", "--json", str(out)]
    assert cli.main(command) == 0
    text = capsys.readouterr().out
    result = json.loads(out.read_text())
    assert text.strip() == table(result).strip()  # the table is made of the JSON
    assert (result["regularised"], result["scored"]) == (2, 3)
    assert result["left_out"] == {"3": "the classifier; name it in include= to regularise it"}
    assert [list(case["rows"]) for case in result["cases"]] == [
        ["reg.attach(optimizer)", "loss + reg()", "plain PyTorch"],
        ["filter_scores", "plain PyTorch"],
        ["filter_scores", "plain PyTorch"],
    ]
    for case in result["cases"]:
        assert case["rounds"] >= 3
        assert case["rows"][case["base"]]["ratio"] is None
        assert case["rows"]["plain PyTorch"]["ratio"]["median"] > 0


@pytest.mark.parametrize("name", ["vgg", "resnet"])
def test_the_packages_own_models_have_names(name: str) -> None:
    assert bench(name, seconds=0.01)["model"] == name


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["resnt"], "unknown model 'resnt'; did you mean 'resnet'"),
        (["no_such_module:net"], "cannot import 'no_such_module'"),
        (["my_nets:nett"], "unknown factory in my_nets 'nett'; did you mean 'net'"),
        (["my_nets:argument"], "(missing a required argument: 'width'); its factory is called"),
        (["my_nets:number"], "model 'my_nets:number' returned int; expected a torch.nn.Module"),
        (["my_nets:empty"], "name a MODEL with convolutions or linear layers"),
        (["my_nets:frozen"], "model 'my_nets:frozen': no layer is left to regularise"),
        (["vgg", "--penalty", "ortho"], "unknown penalty 'ortho'; did you mean 'orthoreg'"),
        (["vgg", "--penalty", "tpp"], "--penalty 'tpp' is about filters to prune"),
        (["vgg", "--seconds", "0"], "--seconds is 0.0; expected a positive number"),
        (["vgg", "--threads", "0"], "--threads is 0; expected a positive number"),
        (["vgg", "--device", "tpu"], "argument --device: invalid choice: 'tpu'"),
        (["vgg", "--json", "none/b.json"], "--json: there is no folder 'none'; make it first"),
        ([], "the following arguments are required: MODEL"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], text: str, mine: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = cli.main(["bench", *arguments])
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    assert text in one_line(capsys.readouterr().err)


def test_too_little_memory_is_a_failure(mine: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", f"{mine}:huge"]) == 1
    error = one_line(capsys.readouterr().err)
    assert "the memory does not suffice for MODEL" in error
    assert "--resume" not in error


def test_it_needs_no_optional_package(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "for name in ('rich', 'matplotlib', 'sklearn', 'PIL', 'safetensors', 'torch_pruning'):\n"
        "    sys.modules[name] = None\n"
        "from orthoreg_ext.cli import main\n"
        "sys.exit(main(['bench', 'resnet', '--seconds', '0.01', '--device', 'cpu']))\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_a_busy_machine_is_said() -> None:
    result = bench("resnet", seconds=0.01)
    result["cases"][0] |= {"state": "contended"}
    assert "THE MACHINE WAS BUSY" in table(result)


@pytest.mark.parametrize("penalty", [n for n, row in PENALTIES.items() if row.counts is None])
def test_plain_pytorch_computes_the_same_term(penalty: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 40, 3), nn.Conv2d(40, 8, 3, groups=2, bias=False), nn.Linear(9, 7)
    ).double()
    regularizer = OrthoRegularizer(model, penalty, 1.0, include="*")
    leaves = [p for p in model.parameters() if p is not model[2].bias]
    term = formula_term(regularizer._current().terms, penalty)
    plain = torch.autograd.grad(term, leaves, materialize_grads=True)
    own = torch.autograd.grad(regularizer(), leaves, materialize_grads=True)
    # each of the two has made one more step with the eigenvectors
    tolerance = 1e-2 if "vectors" in PENALTIES[penalty].takes else 1e-9
    for a, b in zip(plain, own, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_scores_are_in_the_order_that_is_said() -> None:
    weight, grad = torch.tensor([[1.0, -2.0]]), torch.tensor([[3.0, 1.0]])
    scores = [value.tolist() for value in formula_scores([weight], [grad], (0, 1))]
    assert len(scores) == 2 * len(CRITERIA)
    assert [value for (value,) in scores[:5]] == pytest.approx([3, 5**0.5, 1, 13, 5])
    assert scores[5] == [1.0, 2.0]  # l1 of the inputs
