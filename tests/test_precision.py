"""Which products the kernels are told to take: the table, the switch, torch's own switches."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

import orthoreg_ext as ox
import orthoreg_ext.functional as F
from orthoreg_ext.precision import ENVIRONMENT, PRECISIONS, selected
from tests.conftest import Target

MATMUL = torch.backends.cuda.matmul


@pytest.fixture(autouse=True)
def _torchs_switches(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Starts from torch's defaults, in every spelling, and goes back to what was there."""
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    before = torch.backends.fp32_precision, MATMUL.fp32_precision
    torch.backends.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    yield
    torch.backends.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    torch.backends.fp32_precision, MATMUL.fp32_precision = before


def old_and_new_disagree() -> None:
    torch.set_float32_matmul_precision("high")
    torch.backends.mkldnn.matmul.fp32_precision = "ieee"


SWITCHES = [
    (lambda: None, "3xtf32"),
    (lambda: torch.set_float32_matmul_precision("high"), "mixed"),
    (lambda: torch.set_float32_matmul_precision("medium"), "mixed-bf16"),
    (lambda: setattr(MATMUL, "fp32_precision", "tf32"), "mixed"),
    (lambda: setattr(MATMUL, "fp32_precision", "ieee"), "3xtf32"),
    (lambda: setattr(MATMUL, "allow_tf32", True), "mixed"),
    (old_and_new_disagree, "mixed"),
]


@pytest.mark.parametrize(("switch", "name"), SWITCHES, ids=range(len(SWITCHES)))
def test_torchs_switch_decides_where_nothing_is_chosen(switch, name: str) -> None:
    switch()
    assert selected() == name


def test_torchs_inherited_switch_decides_too() -> None:
    MATMUL.fp32_precision = "none"
    torch.backends.fp32_precision = "tf32"
    assert selected() == "mixed"
    torch.backends.fp32_precision = "ieee"
    assert selected() == "3xtf32"


def test_torchs_switch_never_lowers_the_gram_matrix() -> None:
    for switch, name in SWITCHES:
        switch()
        assert PRECISIONS[name].gram == "3xtf32"


def test_block_beats_environment_beats_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT, "ieee")
    torch.set_float32_matmul_precision("high")
    assert selected() == "ieee"
    with ox.precision("tf32"):
        assert selected() == "tf32"
        with ox.precision("bf16"):
            assert selected() == "bf16"
        assert selected() == "tf32"
    assert selected() == "ieee"


def test_block_ends_with_an_error() -> None:
    with pytest.raises(KeyError), ox.precision("tf32"):
        raise KeyError
    assert selected() == "3xtf32"


def test_unknown_names_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="unknown precision 'tf23'; did you mean 'tf32'"):
        ox.precision("tf23").__enter__()
    monkeypatch.setenv(ENVIRONMENT, "fp8")
    with pytest.raises(ValueError, match="unknown precision in ORTHOREG_EXT_PRECISION= 'fp8'"):
        F.gram([torch.ones(2, 2)])


def test_environment_variable_holds_for_the_process() -> None:
    script = "from orthoreg_ext.precision import selected; print(selected())"
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, ENVIRONMENT: "mixed"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "mixed"


@pytest.mark.parametrize("name", sorted(PRECISIONS))
def test_operators_know_every_name(target: Target, name: str) -> None:
    weight = torch.randn(8, 20, device=target.device, requires_grad=True)
    with ox.precision(name):
        F.gram([weight])
        F.gram_penalty([weight]).sum().backward()
        F.add_gram_penalty_grad_([weight], strength=1.0)
    assert weight.grad.isfinite().all()


def test_operators_refuse_other_names(target: Target) -> None:
    weight, empty = torch.ones(2, 3, device=target.device), torch.ones(0, device=target.device)
    with pytest.raises(RuntimeError, match="no precision is named 'fp8'"):
        target.namespace.gram([weight], [empty], [1], [0], "fp8")
    with pytest.raises(RuntimeError, match="no precision is named 'fp8'"):
        target.namespace.gram_penalty([weight], [empty], [], [], [1], [0], [0.0], "so", "fp8")


class Calls:
    """Stands in for the operators and writes down the precision that each is called with."""

    def __init__(self, operators: object) -> None:
        self._operators = operators
        self.precisions: list[tuple[str, str]] = []

    def __getattr__(self, name: str) -> object:
        def call(*arguments: object) -> object:
            self.precisions.append((name, arguments[-1]))
            return getattr(self._operators, name)(*arguments)

        return call


def test_every_call_gets_the_chosen_precision(target, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls(target.namespace)
    monkeypatch.setattr(torch.ops, target.namespace.name, calls)
    weight = torch.randn(4, 6, device=target.device, requires_grad=True)
    with ox.precision("mixed"):
        F.gram([weight])
    torch.set_float32_matmul_precision("medium")
    F.gram_penalty([weight])
    torch.set_float32_matmul_precision("highest")
    F.add_gram_penalty_grad_([weight], strength=1.0)
    assert calls.precisions == [
        ("gram", "mixed"),
        ("gram_penalty", "mixed-bf16"),
        ("add_gram_penalty_grad_", "3xtf32"),
    ]


def test_backward_takes_the_precision_of_its_forward(target: Target) -> None:
    """The autograd context of the forward holds it; the backward runs outside of the block."""
    weight = torch.randn(4, 6, device=target.device, requires_grad=True)
    with ox.precision("tf32"):
        value = F.gram_penalty([weight])
    seen: list[str] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if "gram_penalty_grad" in func.__name__:
                seen.append(args[-1])
            return func(*args, **(kwargs or {}))

    with Watch(), ox.precision("ieee"):
        value.sum().backward()
    assert seen == ["tf32"]


@pytest.mark.parametrize("chosen", [None, "tf32"])
def test_choice_compiles_into_one_graph(target: Target, chosen: str | None) -> None:
    weight = torch.randn(4, 6, device=target.device, requires_grad=True)
    seen: list[str] = []

    def watch(graph: torch.fx.GraphModule, _: object) -> object:
        seen.extend(
            node.args[-1] for node in graph.graph.nodes if "gram_penalty" in str(node.target)
        )
        return graph.forward

    def term(weight: torch.Tensor) -> torch.Tensor:
        return F.gram_penalty([weight]).sum()

    torch._dynamo.reset()
    compiled = torch.compile(term, fullgraph=True, backend=watch)
    with ox.precision(chosen) if chosen else ox.backend(target.name):
        torch.testing.assert_close(compiled(weight), term(weight))
    assert seen == [chosen or "3xtf32"]
    with ox.precision("mixed"):
        compiled(weight)
    assert seen == [chosen or "3xtf32", "mixed"]
