from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as f
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils import prune as torch_prune

import orthoreg_ext.pruning as pruning
from orthoreg_ext.pruning import RoundError, prune

from .nets import IMAGE, MLP, VGG, Grouped, ResNet, Shuffled, Tied, batches, randomised


def removed_by_layer(result: pruning.PruneResult) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for entry in result.history:
        found.setdefault(entry["layer"], []).extend(entry["removed"])
    return found


def silenced(model: nn.Module, filters: dict[str, list[int]]) -> nn.Module:
    """The unpruned model with filters of conv + BatchNorm pairs set to zero."""
    model = copy.deepcopy(model)
    norms = {"stem": "bn", "conv1": "bn1", "conv2": "bn2", "0": "1"}
    for name, gone in filters.items():
        head, _, last = name.rpartition(".")
        norm = model.get_submodule(f"{head}.{norms[last]}" if head else norms[last])
        for module in (model.get_submodule(name), norm):
            module.weight.data[gone] = 0
            if module.bias is not None:
                module.bias.data[gone] = 0
    return model


@pytest.mark.parametrize("criterion", ["l1", "fisher", "bn_scale"])
@pytest.mark.parametrize("scope", ["global", "local"])
def test_the_pruned_resnet_is_the_masked_original(criterion: str, scope: str, x: Tensor) -> None:
    model = randomised(ResNet()).eval()
    original = copy.deepcopy(model)
    result = prune(model, x[:1], criterion=criterion, scope=scope, ratio=0.5, data=batches())
    expected = silenced(original, removed_by_layer(result))(x)
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    assert (original(x) - expected).abs().max() > 1e-3  # the mask does something


@pytest.mark.parametrize("name", sorted(IMAGE))
@pytest.mark.parametrize("scope", ["global", "local"])
def test_every_kind_of_layer_is_cut_and_trains_on(name: str, scope: str, x: Tensor) -> None:
    model = randomised(IMAGE[name]())
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    model(x).pow(2).mean().backward()
    optimizer.step()
    limits = {"scope": scope, "ratio": 0.4, "max_layer_ratio": 0.6}
    result = prune(model, x, criterion="l1", optimizer=optimizer, **limits)
    assert result.after.filters < result.before.filters
    assert result.after.params < result.before.params
    assert result.after.macs < result.before.macs
    for layer in result.layers:
        module: Any = model.get_submodule(layer.name)
        assert layer.after == getattr(module, "out_channels", None) or module.out_features
    json.dumps(result.history)
    # every remaining parameter is trained by the optimizer that was there
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.zero_grad()
    # in eval mode: behind a BatchNorm in train mode a bias has no gradient
    model.eval()(torch.randn(8, 3, 8, 8)).pow(2).mean().backward()
    optimizer.step()
    same = [name for name, p in model.named_parameters() if torch.equal(p, before[name])]
    assert not same


def test_the_ratio_counts_prunable_filters(x: Tensor) -> None:
    result = prune(VGG(), x, criterion="l1", ratio=0.5)
    assert result.before.filters - result.after.filters == 23  # of 8 + 12 + 16 + 10
    result = prune(VGG(), x, criterion="l1", ratio=0.5, ignored=["fc1"])
    assert result.before.filters - result.after.filters == 18


@pytest.mark.parametrize("rounds", [1, 2, 3, 5])
@pytest.mark.parametrize("scope", ["global", "local"])
def test_rounds_together_remove_the_ratio(rounds: int, scope: str, x: Tensor) -> None:
    model, seen = VGG(), []
    result = prune(
        model,
        x,
        ratio=0.75,
        data=batches(),
        rounds=rounds,
        scope=scope,
        between_rounds=lambda m, k: seen.append((m is model, k)),
    )
    gone = {"global": 34, "local": 6 + 9 + 12 + 7}[scope]
    assert result.before.filters - result.after.filters == gone
    assert seen == [(True, k) for k in range(1, rounds)]
    by_round = {entry["round"] for entry in result.history}
    assert by_round == set(range(1, rounds + 1))
    for layer, indices in removed_by_layer(result).items():
        assert len(set(indices)) == len(indices), layer  # numbered as in the unpruned layer


def test_history_counts_filters_of_the_unpruned_layer(x: Tensor) -> None:
    model = MLP()
    model.fc1.weight.data = torch.arange(20.0)[:, None].expand(20, 12).clone() + 1
    result = prune(model, torch.randn(2, 12), criterion="l1", ratio=0.5, rounds=2, ignored=["fc2"])
    assert result.history == [
        {"round": 1, "layer": "fc1", "removed": [0, 1, 2, 3, 4, 5], "filters": 14},
        {"round": 2, "layer": "fc1", "removed": [6, 7, 8, 9], "filters": 10},
    ]


@pytest.mark.parametrize("round_to", [2, 4])
@pytest.mark.parametrize("name", ["vgg", "resnet", "separable", "grouped", "concat"])
def test_remaining_channels_are_multiples_of_round_to(name: str, round_to: int, x: Tensor) -> None:
    result = prune(IMAGE[name](), x, criterion="l1", ratio=0.4, round_to=round_to)
    assert result.after.filters < result.before.filters
    for layer in result.layers:
        assert layer.after == layer.before or layer.after % round_to == 0


def test_grouped_convolutions_keep_equal_groups(x: Tensor) -> None:
    model = Grouped()
    prune(model, x, criterion="l2", ratio=0.5)
    conv = model.conv2
    assert conv.groups == 4
    assert conv.in_channels % 4 == conv.out_channels % 4 == 0
    assert conv.weight.shape[:2] == (conv.out_channels, conv.in_channels // 4)


def test_no_group_loses_more_than_the_cap(x: Tensor) -> None:
    model = VGG()
    model.conv3.weight.data *= 1e-3  # everything would go
    best = model.conv3.weight.detach().abs().flatten(1).sum(1).topk(4).indices.sort().values
    result = prune(model, x, criterion="l1", ratio=0.3, max_layer_ratio=0.75)
    kept = sorted(set(range(16)) - set(removed_by_layer(result)["conv3"]))
    assert kept == best.tolist()


@pytest.mark.parametrize(("ratio", "cap"), [(0.3, 0.9), (0.8, 0.9), (0.9, 0.95)])
def test_without_a_cap_it_is_nine_tenths_or_half_of_what_the_ratio_leaves(
    x: Tensor, ratio: float, cap: float
) -> None:
    first = nn.Conv2d(3, 40, 3)
    first.weight.data *= 1e-3  # all of it would go
    model = nn.Sequential(first, nn.Conv2d(40, 160, 3), nn.Conv2d(160, 5, 3))
    result = prune(model, x, criterion="l1", ratio=ratio)
    assert result.settings["max_layer_ratio"] == pytest.approx(cap)
    assert first.out_channels == round(40 * (1 - cap))


def test_ignored_may_be_names_modules_or_containers(x: Tensor) -> None:
    model = ResNet()
    result = prune(model, x, criterion="l1", ratio=0.3, ignored=["layer2", model.layer1.conv1])
    widths = {layer.name: (layer.before, layer.after) for layer in result.layers}
    stay = ("layer1.conv1", "layer2.conv1", "layer2.conv2", "layer2.short.0", "layer3.conv2", "fc")
    assert all(before == after for name in stay for before, after in [widths[name]])
    reasons = {layer.name: layer.reason for layer in result.layers}
    assert reasons["layer3.conv2"] == "'layer2.conv2' is ignored"


def test_frozen_groups_are_left_alone_and_named(x: Tensor) -> None:
    model = VGG()
    model.conv2.requires_grad_(False)
    result = prune(model, x, criterion="l1", ratio=0.5)
    layer = next(layer for layer in result.layers if layer.name == "conv2")
    assert (layer.before, layer.after) == (12, 12)
    assert layer.reason == "every layer is frozen (requires_grad=False)"
    assert "every layer is frozen" in result.table()
    assert not model.conv2.weight.requires_grad


def test_frozen_parameters_of_cut_layers_stay_frozen(x: Tensor) -> None:
    model = ResNet()
    model.layer1.conv2.requires_grad_(False)  # stem, in the same group, is not frozen
    model.bn.requires_grad_(False)
    model.fc.weight.requires_grad_(False)
    wanted = {name: p.requires_grad for name, p in model.named_parameters()}
    prune(model, x, criterion="fisher", ratio=0.5, data=batches(), scope="local")
    assert model.layer1.conv2.out_channels < 8
    assert {name: p.requires_grad for name, p in model.named_parameters()} == wanted


def test_scoring_and_tracing_leave_statistics_modes_and_random_state(x: Tensor) -> None:
    model = randomised(VGG()).train()
    model.bn2.eval()
    model.register_forward_pre_hook(lambda m, a: (random.random(), torch.rand(1))[0] and None)
    model.fc2.weight.grad = torch.ones_like(model.fc2.weight)
    stats = {n: b.clone() for n, b in model.named_buffers()}
    python_state, torch_state = random.getstate(), torch.get_rng_state()
    result = prune(model, x, data=batches(), ratio=0.5)
    gone = removed_by_layer(result)
    for conv, bn in (("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3")):
        keep = [i for i in range(len(stats[f"{bn}.running_mean"])) if i not in gone[conv]]
        for name in ("running_mean", "running_var"):
            assert torch.equal(getattr(model.get_submodule(bn), name), stats[f"{bn}.{name}"][keep])
        assert int(model.get_submodule(bn).num_batches_tracked) == 0
    assert (model.training, model.bn1.training, model.bn2.training) == (True, True, False)
    assert random.getstate() == python_state
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert torch.equal(model.fc2.weight.grad, torch.ones_like(model.fc2.weight))
    assert model.conv1.weight.grad is None


def test_tied_layers_stay_tied(x: Tensor) -> None:
    model = Tied()
    prune(model, x, criterion="l1", ratio=0.5)
    assert model.a.weight is model.b.weight
    assert model.a.out_channels == model.b.out_channels == model.a.weight.shape[0] < 8


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtypes_are_kept(dtype: torch.dtype, x: Tensor) -> None:
    model = ResNet().to(dtype)
    prune(model, x.to(dtype), criterion="l2", ratio=0.5)
    assert {p.dtype for p in model.parameters()} == {dtype}


def test_the_same_call_gives_the_same_model(x: Tensor) -> None:
    first, second = randomised(ResNet()), randomised(ResNet())
    second.load_state_dict(first.state_dict())
    one, two = (prune(m, x, data=batches(), rounds=2) for m in (first, second))
    assert one.history == two.history
    assert torch.equal(first.eval()(x), second.eval()(x))


def test_a_pruned_model_can_be_pruned_again(x: Tensor) -> None:
    model = ResNet()
    one = prune(model, x, criterion="l1", ratio=0.3)
    two = prune(model, x, criterion="l1", ratio=0.3)
    assert two.before == one.after
    assert two.after.filters < one.after.filters


def unchanged(model: nn.Module, before: dict[str, Any]) -> bool:
    same = {name: id(p) for name, p in model.named_parameters()} == before["ids"]
    return same and all(torch.equal(t, before["state"][n]) for n, t in model.state_dict().items())


def snapshot(model: nn.Module) -> dict[str, Any]:
    return {
        "ids": {name: id(p) for name, p in model.named_parameters()},
        "state": {name: t.clone() for name, t in model.state_dict().items()},
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 0.0}, r"ratio is 0.0, expected a number in \(0, 1\)"),
        ({"ratio": 1}, r"ratio is 1, expected a number in \(0, 1\)"),
        ({"ratio": float("nan")}, "ratio is nan"),
        ({"ratio": 0.95}, r"would empty a layer .*: it asks for 43 of 46 prunable filters.*conv1"),
        ({"ratio": 0.01}, "removes nothing"),
        (
            {"ratio": 0.96, "scope": "local", "max_layer_ratio": 0.95},
            "above max_layer_ratio=0.95",
        ),
        ({"ratio": 0.8, "round_to": 8}, "would empty a layer.*round_to=8"),
        ({"criterion": "fischer"}, "unknown criterion 'fischer'; did you mean 'fisher'"),
        ({"target": "flops"}, "unknown target 'flops'"),
        ({"target": "mac"}, "unknown target 'mac'; did you mean 'macs'"),
        ({"rescore_every": 0}, "rescore_every is 0, expected None or an integer of at least 1"),
        ({"rescore_every": True}, "rescore_every is True, expected None or an integer"),
        (
            {"scope": "one_at_a_time", "target": "latency"},
            "scope='one_at_a_time' would measure anew .* use scope='global' with rounds",
        ),
        ({"scope": "globl"}, "unknown scope 'globl'; did you mean 'global'"),
        ({"group_reduction": "summ"}, "unknown group_reduction 'summ'; did you mean 'sum'"),
        ({"normalize": "maxx"}, "unknown normalize 'maxx'; did you mean 'max'"),
        ({"ignored": ["conv_1"]}, "unknown layer in ignored 'conv_1'; did you mean 'conv1'"),
        ({"ignored": [nn.Conv2d(1, 1, 1)]}, "ignored: Conv2d is not a module of this model"),
        ({"rounds": 0}, "rounds is 0, expected an integer of at least 1"),
        ({"round_to": 0}, "round_to is 0, expected an integer of at least 1"),
        ({"max_layer_ratio": 0}, r"max_layer_ratio is 0, expected a number in \(0, 1\]"),
        ({"ignored": ["conv1", "conv2", "conv3", "fc1"]}, "no layer .* can be pruned.*is ignored"),
        (
            {"optimizer": torch.optim.SGD([nn.Parameter(torch.ones(1))], 0.1)},
            r"optimizer \(SGD\) holds no parameter of the model",
        ),
        ({"ema": MLP()}, "ema is not a copy of the model: 'bn1.bias'"),
    ],
)
def test_bad_arguments_are_named_before_anything_changes(
    options: dict[str, Any], message: str, x: Tensor
) -> None:
    model = VGG()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        prune(model, x, **{"criterion": "l1", **options})
    assert unchanged(model, before)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (3, "model is int, expected a torch.nn.Module"),
        (nn.DataParallel(VGG()), r"wrapped in DataParallel: pass model.module"),
        (torch.compile(VGG()), "model is compiled: pass the module you compiled"),
    ],
)
def test_wrapped_models_are_refused(model: Any, message: str, x: Tensor) -> None:
    with pytest.raises(TypeError, match=message):
        prune(model, x, criterion="l1")


def test_a_frozen_model_has_nothing_to_prune(x: Tensor) -> None:
    with pytest.raises(ValueError, match=r"no layer of this model can be pruned. .*frozen"):
        prune(VGG().requires_grad_(False), x, criterion="l1")


def test_parametrized_layers_are_refused_with_the_remedy(x: Tensor) -> None:
    model = VGG()
    parametrizations.spectral_norm(model.conv2)
    before = snapshot(model)
    message = "layer 'conv2': 'weight' is parametrized.*parametrize.remove_parametrizations"
    with pytest.raises(ValueError, match=message):
        prune(model, x, criterion="l1")
    assert unchanged(model, before)
    parametrize.remove_parametrizations(model.conv2, "weight")
    prune(model, x, criterion="l1")


@pytest.mark.parametrize("register", [parametrizations.weight_norm, parametrizations.orthogonal])
def test_parametrized_layers_without_a_bias_are_not_taken_as_frozen(
    register: Any, x: Tensor
) -> None:
    model = VGG()
    register(model.conv2)
    options = {"criterion": "l1", "ignored": ["conv1"]}  # its inputs stay in any case
    with pytest.raises(ValueError, match="layer 'conv2': 'weight' is parametrized"):
        prune(model, x, **options)
    model.conv2.requires_grad_(False)
    result = prune(model, x, **options)
    reasons = {layer.name: layer.reason for layer in result.layers}
    assert reasons["conv2"] == "every layer is frozen (requires_grad=False)"


def test_old_style_weight_norm_is_refused_with_the_remedy(x: Tensor) -> None:
    model = VGG()
    torch_prune.random_unstructured(model.conv1, "weight", 0.3)
    with pytest.raises(ValueError, match="layer 'conv1': 'weight' is computed from other tensors"):
        prune(model, x, criterion="l1")


def test_an_operation_the_graph_misreads_is_found_and_undone(x: Tensor) -> None:
    model = Shuffled()
    before = snapshot(model)
    with pytest.raises(
        RuntimeError, match=r"does not compute what it did.*at conv1\. The model was"
    ):
        prune(model, x, criterion="l1", ratio=0.5, round_to=2)
    assert unchanged(model, before)
    prune(model, x, criterion="l1", ratio=0.5, ignored=["conv1"])


class ChannelMean(VGG):
    def forward(self, x: Tensor) -> Tensor:
        x = f.relu(self.bn1(self.conv1(x)))
        x = f.max_pool2d(f.relu(self.bn2(self.conv2(x * x.mean(1, keepdim=True)))), 2)
        x = f.max_pool2d(f.relu(self.bn3(self.conv3(x))), 2)
        return self.fc2(f.relu(self.fc1(x.flatten(1))))


def test_verify_can_be_turned_off_for_means_over_channels(x: Tensor) -> None:
    options = {"criterion": "l1", "scope": "local", "ratio": 0.5}
    with pytest.raises(RuntimeError, match="pass verify=False"):
        prune(ChannelMean(), x, **options)
    result = prune(ChannelMean(), x, **options, verify=False)
    assert result.after.filters < result.before.filters


def test_a_failure_in_a_later_round_keeps_the_rounds_before(x: Tensor) -> None:
    model = VGG()

    def spoil(model: nn.Module, _: int) -> None:
        model.conv2.weight.data[0] = torch.nan

    with pytest.raises(RoundError, match=r"round 2 of 3 failed: .*layer 'conv2'") as caught:
        prune(model, x, criterion="l1", ratio=0.5, rounds=3, between_rounds=spoil)
    result = caught.value.result
    assert {entry["round"] for entry in result.history} == {1}
    assert result.after.filters == sum(layer.after for layer in result.layers)
    assert model(x).shape == (2, 4)


@pytest.mark.parametrize("failing", [1, 2])
def test_a_failure_between_rounds_keeps_the_rounds_before(failing: int, x: Tensor) -> None:
    model, twin = VGG(), VGG()
    twin.load_state_dict(model.state_dict())

    def train(model: nn.Module, number: int) -> None:
        if number == failing:
            model.conv3 = nn.Identity()  # a model that does not run any more
            raise LookupError("no more data")

    message = rf"between_rounds failed after round {failing} of 3 \(LookupError: no more data\)"
    options = {"criterion": "l1", "ratio": 0.5, "rounds": 3}
    with pytest.raises(RoundError, match=message) as caught:
        prune(model, x, between_rounds=train, **options)
    assert isinstance(caught.value.__cause__, LookupError)
    history = prune(twin, x, **options).history
    result = caught.value.result
    assert result.history == [entry for entry in history if entry["round"] <= failing]
    last = {entry["layer"]: entry["filters"] for entry in result.history}
    assert last.items() <= {layer.name: layer.after for layer in result.layers}.items()
    assert result.after.filters == sum(layer.after for layer in result.layers)


def test_the_rounds_before_a_failure_can_be_saved(x: Tensor, tmp_path: Path) -> None:
    model, fresh = VGG(), VGG()

    def train(model: nn.Module, _: int) -> None:
        raise LookupError("no more data")

    with pytest.raises(RoundError) as caught:
        prune(model, x, criterion="l1", ratio=0.5, rounds=2, between_rounds=train)
    caught.value.result.save(tmp_path / "out")
    again = pruning.replay(fresh, x, tmp_path / "out")
    assert torch.equal(model.eval()(x), again.eval()(x))


def test_a_layer_replaced_between_rounds_is_named(x: Tensor) -> None:
    def widen(model: nn.Module, _: int) -> None:
        model.conv3 = nn.Conv2d(model.conv3.in_channels, 40, 3, padding=1)

    message = r"round 1 of 2.*'conv3'.*its shape was changed from outside"
    with pytest.raises(RoundError, match=message) as caught:
        prune(VGG(), x, criterion="l1", ratio=0.5, rounds=2, between_rounds=widen)
    assert {entry["round"] for entry in caught.value.result.history} == {1}


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_between_rounds_passes_unchanged(stop: type[BaseException], x: Tensor) -> None:
    model, error = VGG(), stop("enough")

    def train(model: nn.Module, _: int) -> None:
        raise error

    with pytest.raises(stop) as caught:
        prune(model, x, criterion="l1", ratio=0.5, rounds=2, between_rounds=train)
    assert caught.value is error
    assert model(x).shape == (2, 4)


def test_between_rounds_may_train(x: Tensor) -> None:
    model = VGG()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)

    def train(model: nn.Module, _: int) -> None:
        model.train()
        for inputs, target in batches():
            optimizer.zero_grad()
            f.cross_entropy(model(inputs), target).backward()
            optimizer.step()

    prune(model, x, data=batches(), ratio=0.6, rounds=3, between_rounds=train, optimizer=optimizer)
    live = {id(p) for p in model.parameters()}
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == live
    assert {id(p) for p in optimizer.state} <= live


def test_the_table_has_every_layer_and_the_totals(x: Tensor) -> None:
    result = prune(VGG(), x, criterion="l1", ratio=0.5)
    lines = result.table().splitlines()
    assert [line.split()[0] for line in lines] == [
        "layer", "conv1", "conv2", "conv3", "fc1", "fc2", "filters", "params", "macs", "memory",
    ]  # fmt: skip
    assert lines[-4].split() == ["filters", "50", "27", "46.0%"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"between_rounds": 3}, "between_rounds is 3, expected a function between_rounds"),
        ({"between_rounds": 3, "rounds": 2}, "between_rounds is 3, expected a function"),
        ({"loss": 3}, r"loss is 3, expected a function loss\(output, target\) or None"),
        ({"optimizer": 3}, "optimizer is int, expected a torch.optim.Optimizer"),
        ({"optimizer": [3]}, "optimizer is int, expected a torch.optim.Optimizer"),
    ],
)
def test_arguments_of_the_wrong_type_are_named_before_anything_changes(
    options: dict[str, Any], message: str, x: Tensor
) -> None:
    model = VGG()
    before = snapshot(model)
    with pytest.raises(TypeError, match=message):
        prune(model, x, criterion="l1", **options)
    assert unchanged(model, before)


@pytest.mark.parametrize("inputs", [torch.ones(2, 5, 8, 8), None, {"y": torch.ones(1)}, (1, 2)])
def test_example_inputs_on_which_the_model_fails_are_named(inputs: Any) -> None:
    model = VGG()
    before = snapshot(model)
    message = "example_inputs: the model's forward failed on them: "
    with pytest.raises(ValueError, match=message) as caught:
        prune(model, inputs, criterion="l1")
    assert caught.value.__cause__ is not None
    assert unchanged(model, before)


def test_inference_mode_is_refused_before_anything_changes(x: Tensor) -> None:
    model = VGG()
    before = snapshot(model)
    with torch.inference_mode(), pytest.raises(RuntimeError, match="leave inference_mode"):
        prune(model, x, criterion="l1")
    assert unchanged(model, before)
    with torch.no_grad():
        prune(model, x, criterion="l1")
    assert not model.conv1.weight.is_inference()


class Dropping(VGG):
    """Random in eval mode, behind a layer that is cut: the masks differ in shape."""

    def forward(self, x: Tensor) -> Tensor:
        x = f.dropout(f.relu(self.bn1(self.conv1(x))), 0.5, training=True)
        x = f.max_pool2d(f.relu(self.bn2(self.conv2(x))), 2)
        x = f.max_pool2d(f.relu(self.bn3(self.conv3(x))), 2)
        return self.fc2(f.relu(self.fc1(x.flatten(1))))


def test_a_random_forward_is_named_and_not_the_dependency_graph(x: Tensor) -> None:
    model = randomised(Dropping())
    before, states = snapshot(model), (random.getstate(), torch.get_rng_state())
    with pytest.raises(RuntimeError, match=r"random in eval mode.*verify=False") as caught:
        prune(model, x, criterion="l1", ratio=0.5, scope="local")
    assert "dependency graph" not in str(caught.value)
    assert unchanged(model, before)
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])
    prune(model, x, criterion="l1", ratio=0.5, scope="local", verify=False)
    assert model(x).shape == (2, 4)


class Fixed(VGG):
    def forward(self, x: Tensor) -> Tensor:
        assert self.conv1.out_channels == 8, "eight channels"
        return super().forward(x)


def test_a_cut_that_breaks_the_forward_is_not_blamed_on_the_inputs(x: Tensor) -> None:
    options: dict[str, Any] = {"criterion": "l1", "ratio": 0.5, "scope": "local"}
    model = Fixed()
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="its forward pass fails: eight channels"):
        prune(model, x, **options)
    assert unchanged(model, before)
    with pytest.raises(RuntimeError, match=r"does not run on example_inputs .*eight channels"):
        prune(model, x, **options, verify=False)
