from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from experiments.config import Config
from experiments.lab import Lab
from experiments.questions import early
from experiments.questions.early import Mask
from experiments.training import Fit

OPTIONS = {"at": [0.05, 0.3, 1.0], "criterion": ["l1"], "ratio": [0.5], "masks": ["bn_scale"]}


@pytest.fixture
def asked(tiny: Callable[..., Config], lab: Lab) -> Lab:
    """A lab of the question: 10 epochs, then 4, with and without a regulariser."""
    document = {
        **tiny(recipe={"epochs": 10, "finetune_epochs": 4, "lr": 0.1}).document(),
        "question": "early",
        "arms": {"none": {}, "so": {"penalty": "so"}},
        "options": OPTIONS,
    }
    object.__setattr__(lab, "config", Config.of(document))
    return lab


@pytest.mark.parametrize("arm", ["none", "so"])
def test_the_budget_is_the_same_whenever_the_cut_is(
    asked: Lab, monkeypatch: pytest.MonkeyPatch, arm: str
) -> None:
    seen: list[tuple[Fit, bool, int]] = []

    def fit(net: Any, samples: Any, how: Fit, regularizer: Any = None, store: Any = None) -> None:
        width = net.get_submodule("conv1").weight.shape[0]
        seen.append((how, regularizer is not None, width))

    monkeypatch.setattr(early, "fit", fit)
    monkeypatch.setattr("experiments.lab.fit", fit)
    _, cuts = early.stages(asked.config)
    epochs = []
    for unit in [unit for unit in cuts if unit["arm"] == arm and unit["seed"] == 1]:
        seen.clear()
        found = early.measure(asked, unit)
        (first, regularised, width), (rest, still, left) = seen
        assert (width, left, regularised, still) == (8, left, arm == "so", False)
        assert found["epochs"] == first.epochs
        epochs.append((first.epochs, rest.epochs))
        late = unit["at"] == 1.0
        assert (first.lr, first.constant) == (0.1, not late)
        assert (rest.lr, rest.constant) == (0.05 if late else 0.1, False)
        assert (first.weight_decay, rest.weight_decay) == (0.0 if arm == "so" else 5e-4, 5e-4)
        assert (first.seed, rest.seed) == (1, 500_001)
    assert epochs == [(1, 13), (3, 11), (10, 4)]


def mask(*filters: int) -> Mask:
    return frozenset(("conv1", i) for i in filters)


def test_distances_are_shares_of_the_filters(asked: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 4 filters each mask takes 2: one that differs counts twice."""
    masks = [mask(0, 1), mask(0, 2), mask(0, 2), mask(2, 3), mask(2, 3), mask(2, 3)]
    drawn = iter(masks)

    def fit(net: Any, samples: Any, how: Fit, *, note: Any, regularizer: Any) -> None:
        assert (how.epochs, how.constant) == (10, True)
        for epoch in range(1, 7):
            note(epoch)

    monkeypatch.setattr(early, "_mask", lambda *args: next(drawn))
    monkeypatch.setattr(early, "fit", fit)
    watched, _ = early.stages(asked.config)
    found = early.measure(asked, watched[0])
    # against the four before: 0-1 is forgotten by the sixth
    assert found["distance"] == [None, 0.5, 0.5, 1.0, 1.0, 0.5]
    assert found["to_last"] == [1.0, 0.5, 0.5, 0.0, 0.0, 0.0]


def test_a_mask_is_what_the_cut_takes_and_changes_nothing(asked: Lab) -> None:
    net = asked.fresh(asked.config.models[0], 0)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    found = early._mask(asked, net, "l1", 0.5)
    assert all((value == before[key]).all() for key, value in net.state_dict().items())
    history = asked.prune(net, "l1", 0.5).history
    assert found == {(entry["layer"], i) for entry in history for i in entry["removed"]}
    assert len(found) == 10


def test_a_cut_and_a_watch_are_measured(tiny: Callable[..., Config], asked: Lab) -> None:
    config = Config.of({**asked.config.document(), "recipe": {"epochs": 2, "finetune_epochs": 1}})
    object.__setattr__(asked, "config", config)
    watched, cuts = early.stages(config)
    assert len(early.measure(asked, watched[0])["distance"]) == 2
    found = early.measure(asked, cuts[0])
    assert found.keys() == {"epochs", "dense", "cut", "finetuned", "saved"}
    assert found["saved"]["filters"] == pytest.approx(10 / 30)
