"""What CONTRIBUTING.md writes as examples works."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from orthoreg_ext.pruning import Criterion, prune, scores
from orthoreg_ext.pruning.methods.checks import positive, steps
from orthoreg_ext.pruning.methods.method import Method

from .loops import Small, added, check_resume, gone, ordered

GUIDE = Path(__file__).parents[3] / "CONTRIBUTING.md"


def written() -> Any:
    text = GUIDE.read_text().partition("# orthoreg_ext/pruning/methods/")[2].partition("```")[0]
    lines = [line[1:] for line in text.splitlines() if line.startswith("+")]
    assert 10 < len(lines) <= 20
    names: dict[str, Any] = {"Method": Method, "positive": positive, "steps": steps, "torch": torch}
    exec("\n".join(lines), names)
    return names["Decay"]


def test_the_example_decays_prunes_and_resumes(x: Tensor) -> None:
    decay = written()
    rules = {"criterion": "l1", "scope": "local"}
    model = ordered(Small())
    method = decay(model, x, strength=0.5, duration=2, **rules)
    found = added(model, method)["conv1.weight"]
    torch.testing.assert_close(found[:2], 0.5 * model.conv1.weight.detach()[:2])
    assert not found[2:].any()
    method.after_step()
    assert not method.done
    method.before_step()
    method.after_step()
    assert method.done
    assert gone(method.finish()) == {"conv1": [0, 1], "conv2": [0, 1, 2]}
    check_resume(Small, lambda m, o: decay(m, x, optimizer=o, **rules), total=6, at=3)


def test_the_row_of_a_criterion_scores(x: Tensor) -> None:
    text = GUIDE.read_text().partition("**A new criterion**")[2].partition("```diff")[2]
    lines = [line[1:].strip() for line in text.partition("```")[0].splitlines() if line]
    assert 0 < len(lines) <= 20
    row = eval("".join(lines).rstrip(","), vars(scores))
    assert isinstance(row, Criterion)
    model = Small()
    model.conv1.weight.data[2] *= 1e-3
    model.conv2.weight.data[[1, 4]] *= 1e-3
    result = prune(model, x, criterion=row, scope="local", ratio=0.34)
    assert gone(result) == {"conv1": [2], "conv2": [1, 4]}
