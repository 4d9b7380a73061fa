from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from experiments.config import Config
from experiments.lab import Lab, criterion_of
from experiments.questions import cross
from orthoreg_ext.experiment.models import build_model
from orthoreg_ext.pruning import Criterion


def result(*history: tuple[str, list[int]]) -> Any:
    return SimpleNamespace(history=[{"layer": layer, "removed": gone} for layer, gone in history])


RARITY = {"a": [0.1, 0.9, 0.2, 0.8, 0.3, 0.4, 0.5, 0.6], "b": [0.4, 0.3, 0.2, 0.1]}


@pytest.mark.parametrize(
    ("history", "kept"),
    [
        ([("a", [0, 2])], 1.0),  # 1 and 3 are the rarest quarter of a
        ([("a", [1, 2])], 0.5),
        ([("a", [1, 3])], 0.0),
        ([("a", [1]), ("b", [1, 2])], 2 / 3),  # 0 is that of b
        ([("a", [1]), ("b", [0])], 1 / 3),
        ([("a", [1]), ("a", [3])], 0.0),  # two rounds of one layer
        ([("c", [0])], 1.0),  # a layer without convolutions
        ([], 1.0),
    ],
)
def test_the_share_of_rare_filters_that_are_left(
    history: list[tuple[str, list[int]]], kept: float
) -> None:
    assert cross.rare_kept(RARITY, result(*history)) == pytest.approx(kept)


def test_rare_is_what_no_other_filter_is_like() -> None:
    net = nn.Sequential(nn.Conv2d(1, 3, 2, bias=False), nn.Flatten(), nn.Linear(3, 2))
    with torch.no_grad():
        net[0].weight.copy_(
            torch.tensor([[1.0, 0, 0, 0], [-3.0, 4, 0, 0], [0, 0, 2, 0]]).view(3, 1, 2, 2)
        )
    found = cross.rarities(net)
    assert found["0"] == pytest.approx([1 - 0.6, 1 - 0.6, 1.0])
    assert list(found) == ["0"]  # no linear layer


def test_a_criterion_by_its_name() -> None:
    assert criterion_of("fisher") == "fisher"
    names = ["variety(fisher)", "variety(fisher, gate)", "variety( fisher ,gate )"]
    rows = [criterion_of(name) for name in names]
    assert all(isinstance(row, Criterion) for row in rows)
    assert [row.name for row in rows if isinstance(row, Criterion)] == [
        "variety(fisher, pairwise)",
        *["variety(fisher, gate, 0.5)"] * 2,
    ]


def test_units_are_every_combination_seed_by_seed(tiny: Callable[..., Config]) -> None:
    cuts = [
        {"criterion": ["l1", "fisher"], "ratio": [0.25, 0.5], "scope": ["local"]},
        {"criterion": ["l1"], "ratio": [0.75]},
    ]
    config = tiny(arms={"none": {}, "so": {"penalty": "so"}}, options={"cuts": cuts})
    nets, found = cross.stages(config)
    model = config.models[0]
    assert list(nets) == [
        {"model": model, "arm": arm, "seed": seed} for seed in (0, 1) for arm in ("none", "so")
    ]
    assert len(found) == 4 * 5
    assert [unit["cut"] for unit in found[:5]] == [
        {"criterion": "l1", "ratio": 0.25, "scope": "local"},
        {"criterion": "l1", "ratio": 0.5, "scope": "local"},
        {"criterion": "fisher", "ratio": 0.25, "scope": "local"},
        {"criterion": "fisher", "ratio": 0.5, "scope": "local"},
        {"criterion": "l1", "ratio": 0.75},
    ]
    assert [unit["seed"] for unit in found] == [0] * 10 + [1] * 10


def test_each_norm_has_the_convolution_in_front_of_it() -> None:
    net = build_model("resnet", num_classes=10, image_shape=(1, 8, 8), seed=0)
    pairs = cross._in_front(net)
    norms = [name for name, module in net.named_modules() if isinstance(module, nn.BatchNorm2d)]
    expected = {
        "norm": "stem",
        "block2_1.bn1": "block2_1.conv1",
        "block2_1.bn2": "block2_1.conv2",
        "block2_1.shortcut.1": "block2_1.shortcut.0",
    }
    assert expected.items() <= dict(zip(norms, pairs, strict=True)).items()


def test_a_network_and_its_cut_are_measured(lab: Lab) -> None:
    options = {**lab.config.options, "samples": 16, "ablate": 16}
    object.__setattr__(lab.config, "options", options)
    nets, cuts = cross.stages(lab.config)
    dense = cross.measure(lab, nets[0])
    assert 0 <= dense["accuracy"] <= 100
    assert dense["layers"].keys() == {"conv1", "conv2"}
    for values in dense["layers"].values():
        assert values.keys() == {"correlation", "gap", "floor", "ratio", "error"}
    cut = cross.measure(lab, cuts[0])
    assert cut.keys() == {"cut", "finetuned", "saved", "rare_kept"}
    assert cut["saved"]["filters"] == pytest.approx(10 / 30)  # 8 + 12 of them, and 10 classes
    assert [path.name[:4] for path in lab.folder.iterdir()] == ["net-"]  # its state is removed


def test_the_training_after_a_cut_has_batches_of_its_own(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr("experiments.lab.fit", lambda net, samples, how, **k: seen.append(how))
    lab.trained(lab.config.models[0], "none", 1)
    lab.finetuned(nn.Identity(), {"seed": 1})
    recipe = lab.config.recipe
    assert [how.epochs for how in seen] == [recipe.epochs, recipe.finetune_epochs]
    assert [how.lr for how in seen] == [recipe.lr, recipe.finetune_lr]
    assert seen[0].seed != seen[1].seed
    assert [how.weight_decay for how in seen] == [recipe.weight_decay] * 2


def test_the_cap_of_a_layer_is_the_recipes_where_the_cut_says_no_other(
    tiny: Callable[..., Config], lab: Lab
) -> None:
    object.__setattr__(lab, "config", tiny(recipe={"max_layer_ratio": 0.5}))
    net = lab.fresh(lab.config.models[0], 0)
    with pytest.raises(ValueError, match="max_layer_ratio"):
        lab.prune(net, "l1", 0.75)
    assert lab.prune(net, "l1", 0.75, max_layer_ratio=0.8).saved["filters"] == 15 / 30


@pytest.mark.parametrize(
    ("arm", "decay"),
    [
        ({}, 5e-4),
        ({"weight_decay": 0.0}, 0.0),
        ({"penalty": "so"}, 0.0),
        ({"penalty": "so", "weight_decay": 1e-3}, 1e-3),
    ],
)
def test_weight_decay_is_off_beside_a_penalty(
    tiny: Callable[..., Config], lab: Lab, arm: dict[str, Any], decay: float
) -> None:
    config = tiny(arms={"a": arm})
    object.__setattr__(lab, "config", config)
    assert lab.first(0, config.arms["a"]).weight_decay == decay
    term = lab.regularizer(lab.fresh(config.models[0], 0), config.arms["a"])
    assert (term is None) == ("penalty" not in arm)
