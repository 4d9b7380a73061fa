"""In the pruners of Torch-Pruning, with a regulariser, and in a script of a user."""

from __future__ import annotations

import copy
import difflib
import itertools
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as f

import orthoreg_ext as ox

tp = pytest.importorskip("torch_pruning", reason="pip install orthoreg_ext[pruning]")
from orthoreg_ext.integrations.torch_pruning import (  # noqa: E402
    FusedMagnitudeImportance,
    FusedTaylorImportance,
    OrthoRegImportance,
    VarietyImportance,
    with_orthoreg,
)
from tests.integrations.torch_pruning_nets import (  # noqa: E402
    agree,
    with_gradients,
)

pytestmark = pytest.mark.filterwarnings("ignore:Unwrapped parameters detected")

EXAMPLE = Path(__file__).parents[2] / "examples" / "torch_pruning_user.py"


@pytest.mark.parametrize("pruner", ["BasePruner", "GroupNormPruner", "GrowingRegPruner"])
@pytest.mark.parametrize("name", ["resnet", "grouped", "dense", "resnet18"])
def test_every_pruner_cuts_what_it_cuts_with_its_own(name: str, pruner: str) -> None:
    taylor = tp.importance.GroupTaylorImportance(), FusedTaylorImportance()
    magnitude = tp.importance.GroupMagnitudeImportance(), FusedMagnitudeImportance()
    for importances in (taylor, magnitude):
        cuts = []
        for importance in importances:
            model, x = with_gradients(name)
            made = getattr(tp.pruner, pruner)(
                *(model, x, importance), global_pruning=True, pruning_ratio=0.3, iterative_steps=2,
                ignored_layers=[model.fc], out_channel_groups={}, in_channel_groups={},
            )  # fmt: skip
            made.step()
            made.step()
            cuts.append([p.detach() for p in model.parameters()])
        for a, b in zip(*cuts, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize(
    "importance", [OrthoRegImportance(), VarietyImportance(), FusedTaylorImportance(batchnorm=True)]
)
@pytest.mark.parametrize("pruner", ["BasePruner", "BNScalePruner", "GroupNormPruner"])
def test_the_others_work_in_every_pruner(importance: Any, pruner: str) -> None:
    model, x = with_gradients("resnet")
    made = getattr(tp.pruner, pruner)(model, x, importance, ignored_layers=[model.fc])
    made.step()
    assert model.layer1.conv1.out_channels == 5
    assert model(x).shape == (1, 4)


def penalty(model: nn.Module, strength: float) -> Tensor:
    """strength * sum_l sqrt(m_l) / sum sqrt(m) * sum |G_l - I|, of all but the classifier."""
    layers = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))][:-1]
    terms, sizes = [], []
    for layer in layers:
        w = layer.weight.flatten(1)
        if layer.bias is not None:
            w = torch.cat([w, layer.bias[:, None]], 1)
        smaller = w @ w.T if len(w) <= w.shape[1] else w.T @ w
        terms.append((smaller - torch.eye(len(smaller))).abs().sum())
        sizes.append(len(smaller) ** 0.5)
    return strength * sum(t * s for t, s in zip(terms, sizes, strict=True)) / sum(sizes)


def digits() -> Iterator[tuple[Tensor, Tensor]]:
    data = pytest.importorskip("sklearn.datasets").load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    yield from itertools.cycle(
        (images[i], torch.tensor(data.target)[i]) for i in order[:1280].split(64)
    )


def small_net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        *(nn.Conv2d(1, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(12, 20, 3, padding=1, bias=False), nn.BatchNorm2d(20), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(20, 10)),
    )


def check_epoch(plain: nn.Module, model: nn.Module, pruner: Any, data: Any, hooked: Any) -> None:
    """Trains both nets side by side, and compares each penalty, gradient and new weight."""
    optimizer = torch.optim.SGD(plain.parameters(), 0.05, momentum=0.9)
    seen: list[Tensor] = []
    hooked.register_step_pre_hook(
        lambda *_: seen.extend(p.grad.clone() for p in model.parameters())
    )
    for images, labels in itertools.islice(data, 20):
        for net in (plain, model):
            net.train().zero_grad()
        term = penalty(plain, 3e-2)
        agree(pruner.regularizer().detach(), term.detach())
        (f.cross_entropy(plain(images), labels) + term).backward()
        for m in plain.modules():
            if isinstance(m, nn.BatchNorm2d):  # the pruner's own
                m.weight.grad += 1e-3 * m.weight.detach().sign()
        optimizer.step()

        f.cross_entropy(model(images), labels).backward()
        pruner.regularize(model)
        seen.clear()
        hooked.step()
        for p, q, slope in zip(plain.parameters(), model.parameters(), seen, strict=True):
            agree(slope, p.grad)
            agree(q.detach(), p.detach())
            q.data.copy_(p.data)  # each step is compared, not what becomes of rounding


@pytest.mark.parametrize("route", ["regularize", "attach"])
def test_training_is_that_of_a_plain_loop(route: str) -> None:
    model, data = small_net(), digits()
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    hooked = optimizer if route == "attach" else None
    wrapped = with_orthoreg(tp.pruner.BNScalePruner, hooked, strength=3e-2)
    pruner = wrapped(
        *(model, torch.ones(1, 1, 8, 8), OrthoRegImportance()),
        reg=1e-3,
        ignored_layers=[model[-1]],
    )
    check_epoch(copy.deepcopy(model), model, pruner, data, optimizer)
    images, labels = next(data)
    model.eval().zero_grad()
    f.cross_entropy(model(images), labels).backward()
    pruner.step()
    assert model[4].out_channels == 10
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    if route == "attach":
        pruner.attach(optimizer)
    check_epoch(copy.deepcopy(model), model, pruner, data, optimizer)


@pytest.mark.parametrize("pruner", ["GroupNormPruner", "GrowingRegPruner"])
def test_regularisers_that_score_every_step_do_what_they_did(pruner: str) -> None:
    slopes = []
    for importance in (tp.importance.GroupMagnitudeImportance(), FusedMagnitudeImportance()):
        model, x = with_gradients("resnet")
        made = getattr(tp.pruner, pruner)(model, x, importance)
        for _ in range(2):
            made.regularize(model)
            for parameter in model.parameters():
                parameter.data.sub_(parameter.grad, alpha=0.1)  # unseen by version counters
        slopes.append([p.grad for p in model.parameters()])
    for a, b in zip(*slopes, strict=True):
        agree(a, b)


@pytest.mark.parametrize("pruner", ["GroupNormPruner", "GrowingRegPruner", "BNScalePruner"])
def test_the_pruners_own_regularisation_stays(pruner: str) -> None:
    slopes = []
    for wrapped in (False, True):
        model, x = with_gradients("resnet")
        base = getattr(tp.pruner, pruner)
        made = (with_orthoreg(base, penalty="so", strength=0.5) if wrapped else base)(
            model, x, FusedMagnitudeImportance()
        )
        made.regularize(model)
        if not wrapped:
            (ox.OrthoRegularizer(model, "so", 0.5)()).backward()
        slopes.append([p.grad for p in model.parameters()])
    for a, b in zip(*slopes, strict=True):
        agree(a, b)


def test_base_pruners_take_the_loss() -> None:
    model, x = with_gradients("mlp")
    before = model.fc1.weight.grad.clone()
    made = with_orthoreg(tp.pruner.BasePruner)(model, x, FusedMagnitudeImportance())
    made.regularize(model, torch.tensor(0.0))
    assert not torch.equal(model.fc1.weight.grad, before)
    assert type(made).__name__ == "OrthoRegBasePruner"
    assert isinstance(made, tp.pruner.BasePruner)


def test_frozen_layers_stay_without_gradient() -> None:
    model, x = with_gradients("mlp")
    made = with_orthoreg(tp.pruner.BasePruner)(model, x, FusedMagnitudeImportance())
    model.fc1.weight.requires_grad_(False).grad = None
    model.fc2.weight.grad = None
    made.regularize(model, None)
    assert model.fc1.weight.grad is None
    assert model.fc2.weight.grad is not None


def test_looking_at_the_term_counts_no_step_of_regularize() -> None:
    model, x = with_gradients("mlp")
    made = with_orthoreg(tp.pruner.BasePruner, every=2)(model, x, FusedMagnitudeImportance())
    changed = []
    for _ in range(4):
        made.regularizer()  # logged, at every step
        before = model.fc1.weight.grad.clone()
        made.regularize(model, None)
        changed.append(not torch.equal(model.fc1.weight.grad, before))
    assert changed == [True, False, True, False]


@pytest.mark.parametrize("how", ["removed", "gone", "cut"])
def test_regularize_adds_the_term_again_when_no_optimizer_does(how: str) -> None:
    model, x = with_gradients("mlp")
    made = with_orthoreg(tp.pruner.BasePruner)(model, x, FusedMagnitudeImportance())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    attachment = made.attach(optimizer)
    before = model.fc1.weight.grad.clone()
    made.regularize(model, None)
    assert torch.equal(model.fc1.weight.grad, before)
    if how == "removed":
        attachment.remove()
    elif how == "gone":
        del optimizer
    else:
        model.fc1 = nn.Linear(model.fc1.in_features, model.fc1.out_features)
        model.fc2 = nn.Linear(model.fc2.in_features, model.fc2.out_features)
        model.fc1.weight.grad = before.clone()
    made.regularize(model, None)
    assert not torch.equal(model.fc1.weight.grad, before)


def test_pruners_share_no_dicts() -> None:
    wrapped = with_orthoreg(tp.pruner.BasePruner)
    grouped = wrapped(*with_gradients("grouped"), FusedMagnitudeImportance())
    plain = wrapped(*with_gradients("mlp"), FusedMagnitudeImportance())
    assert grouped.in_channel_groups
    assert plain.in_channel_groups == {}
    given: dict[Any, int] = {}
    model, x = with_gradients("grouped")
    kept = wrapped(model, x, FusedMagnitudeImportance(), in_channel_groups=given)
    assert kept.in_channel_groups is given


def test_what_is_no_pruner_class_is_refused() -> None:
    model, x = with_gradients("mlp")
    made = tp.pruner.BasePruner(model, x, FusedMagnitudeImportance())
    for wrong in (made, nn.Linear, "BasePruner"):
        with pytest.raises(TypeError, match=r"with_orthoreg\(tp.pruner.BasePruner\)\(model"):
            with_orthoreg(wrong)
    with pytest.raises(ValueError, match="unknown penalty"):
        with_orthoreg(tp.pruner.BasePruner, penalty="orto")(model, x, FusedMagnitudeImportance())


def plain_script(lines: list[str]) -> list[str]:
    """The example with its marked lines taken back."""
    found: list[str] = []
    for line in lines:
        if line.startswith("# was: "):
            found[-1] = line.removeprefix("# was: ")
        elif not line.endswith("# added"):
            found.append(line)
    return found


def test_the_example_is_a_plain_script_but_for_two_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("sklearn", reason="pip install orthoreg_ext[cli]")
    lines = EXAMPLE.read_text().splitlines()
    plain = plain_script(lines)
    assert "orthoreg_ext.integrations" not in "\n".join(plain)
    code = [line for line in lines if not line.startswith("# was: ")]
    changes = [d for d in difflib.ndiff(plain, code) if d[0] in "+-"]
    assert [d[0] for d in changes].count("+") <= 2
    assert [d[0] for d in changes].count("-") == 1
    (tmp_path / "plain.py").write_text("\n".join(plain))
    for script in (EXAMPLE, tmp_path / "plain.py"):
        runpy.run_path(str(script), run_name="__main__")
        printed = capsys.readouterr().out.splitlines()
        assert [line.split(":")[0] for line in printed] == ["trained", "pruned", "fine-tuned"]
        right = [float(line.split()[1]) for line in printed]
        assert right[0] > 90
        assert right[2] > 85
