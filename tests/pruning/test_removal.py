from __future__ import annotations

import copy
import importlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as f
from torch.optim import swa_utils

from orthoreg_ext.pruning import RoundError, equivalence, prune, removal
from orthoreg_ext.pruning.removal import Edit, commit, memory_format, take

from .nets import MLP, VGG, ResNet, Tied, batches, randomised

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, 1e-2),
    "amsgrad": lambda p: torch.optim.Adam(p, 1e-2, amsgrad=True),
    "fused": lambda p: torch.optim.AdamW(p, 1e-2, fused=True),
    "foreach": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, foreach=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 1e-2, momentum=0.9),
}


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int = 0) -> None:
    x, y = batches(seed=seed, count=1)[0]
    optimizer.zero_grad()
    f.cross_entropy(model(x), y).backward()
    optimizer.step()


def kept(result: Any) -> dict[str, list[int]]:
    """What stays of each layer, from the history."""
    stay = {layer.name: list(range(layer.before)) for layer in result.layers}
    for entry in result.history:
        stay[entry["layer"]] = [i for i in stay[entry["layer"]] if i not in entry["removed"]]
    return stay


def vgg_slices(stay: dict[str, list[int]]) -> dict[str, tuple[list[int], ...]]:
    """For each parameter of VGG the positions that stay, dimension by dimension."""
    flat = [4 * i + j for i in stay["conv3"] for j in range(4)]
    slices: dict[str, tuple[list[int], ...]] = {
        "conv1.weight": (stay["conv1"],),
        "conv2.weight": (stay["conv2"], stay["conv1"]),
        "conv3.weight": (stay["conv3"], stay["conv2"]),
        "fc1.weight": (stay["fc1"], flat),
        "fc1.bias": (stay["fc1"],),
        "fc2.weight": (list(range(4)), stay["fc1"]),
    }
    for i in (1, 2, 3):
        slices[f"bn{i}.weight"] = slices[f"bn{i}.bias"] = (stay[f"conv{i}"],)
    return slices


def sliced(tensor: Tensor, positions: tuple[list[int], ...]) -> Tensor:
    for dim, keep in enumerate(positions):
        tensor = tensor.index_select(dim, torch.tensor(keep))
    return tensor


@pytest.mark.parametrize("kind", sorted(OPTIMIZERS))
def test_optimizer_state_and_gradients_are_sliced_exactly(kind: str, x: Tensor) -> None:
    model = randomised(VGG())
    optimizer = OPTIMIZERS[kind](model.parameters())
    for seed in range(3):
        train_step(model, optimizer, seed)
    old = {name: (p.detach().clone(), p.grad.clone()) for name, p in model.named_parameters()}
    state = {name: copy.deepcopy(optimizer.state[p]) for name, p in model.named_parameters()}
    result = prune(model, x, criterion="l1", ratio=0.5, optimizer=optimizer)
    slices = vgg_slices(kept(result))
    live = dict(model.named_parameters())
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in live.values()]
    assert {id(p) for p in optimizer.state} == {id(p) for p in live.values()}
    for name, parameter in live.items():
        positions = slices.get(name, ())
        assert torch.equal(parameter, sliced(old[name][0], positions)), name
        assert torch.equal(parameter.grad, sliced(old[name][1], positions)), name
        now = optimizer.state[parameter]
        assert now.keys() == state[name].keys()
        for key, value in state[name].items():
            expected = sliced(value, positions) if value.shape == old[name][0].shape else value
            assert torch.equal(now[key], expected), (name, key)
    before = {name: p.detach().clone() for name, p in live.items()}
    train_step(model, optimizer, 7)
    assert not [name for name, p in live.items() if torch.equal(p, before[name])]


def test_untouched_parameters_keep_identity_and_state(x: Tensor) -> None:
    model = VGG()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    train_step(model, optimizer)
    weight, state = model.conv1.weight, optimizer.state[model.conv1.weight]
    prune(model, x, criterion="l1", ratio=0.4, ignored=["conv1"], optimizer=optimizer)
    assert model.conv1.weight is weight
    assert optimizer.state[weight] is state


def test_parameter_groups_keep_their_members_and_options(x: Tensor) -> None:
    model = VGG()
    decay = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.SGD(
        [{"params": decay, "weight_decay": 0.1}, {"params": plain, "lr": 0.5}], lr=0.1
    )
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    prune(model, x, criterion="l1", ratio=0.5, optimizer=optimizer)
    first, second = optimizer.param_groups
    assert {p.dim() for p in first["params"]} == {2, 4}
    assert {p.dim() for p in second["params"]} == {1}
    assert (first["weight_decay"], second["lr"]) == (0.1, 0.5)
    train_step(model, optimizer)
    scheduler.step()
    assert first["lr"] == pytest.approx(0.01)


def test_several_optimizers_are_rebound(x: Tensor) -> None:
    model = VGG()
    convs = [p for n, p in model.named_parameters() if n.startswith("conv")]
    rest = [p for n, p in model.named_parameters() if not n.startswith("conv")]
    pair = [OPTIMIZERS["sgd"](convs), OPTIMIZERS["adamw"](rest)]
    prune(model, x, criterion="l1", ratio=0.5, optimizer=pair)
    held = {id(p) for o in pair for g in o.param_groups for p in g["params"]}
    assert held == {id(p) for p in model.parameters()}


def test_optimizer_state_that_cannot_follow_is_refused(x: Tensor) -> None:
    model = VGG()
    optimizer = torch.optim.Adafactor(model.parameters())
    train_step(model, optimizer)
    with pytest.raises(ValueError, match=r"optimizer \(Adafactor\) keeps .* cannot follow"):
        prune(model, x, criterion="l1", optimizer=optimizer)
    with pytest.raises(TypeError, match=r"optimizer is str, expected a torch.optim.Optimizer"):
        prune(model, x, criterion="l1", optimizer=["adam"])  # type: ignore[list-item]


@pytest.mark.parametrize("wrapped", [False, True])
def test_an_averaged_copy_is_cut_alike(wrapped: bool, x: Tensor) -> None:
    model = randomised(ResNet())
    ema: Any = swa_utils.AveragedModel(model) if wrapped else copy.deepcopy(model)
    copied = ema.module if wrapped else ema
    for parameter in copied.parameters():
        parameter.data *= 0.5
    twin = copy.deepcopy(copied)
    result = prune(model, x, criterion="l1", ratio=0.5, ema=ema)
    alone = prune(twin, x, criterion="l1", ratio=0.5)  # scaling changes no ranking by l1
    assert alone.history == result.history
    for (name, a), b in zip(copied.state_dict().items(), twin.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_channels_last_is_kept(x: Tensor) -> None:
    model = randomised(ResNet()).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    train_step(model, optimizer)
    prune(model, x, criterion="l1", ratio=0.5, optimizer=optimizer)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 4:
            format_ = torch.channels_last
            assert parameter.is_contiguous(memory_format=format_), name
            assert memory_format(parameter) is format_ or parameter.shape[1:] == (1, 1, 1), name
            assert optimizer.state[parameter]["momentum_buffer"].is_contiguous(
                memory_format=format_
            ), name


@pytest.mark.parametrize(
    ("shape", "format_"),
    [
        ((6, 5, 3, 3), torch.channels_last),
        ((6, 5, 1, 1), torch.channels_last),
        ((6, 1, 3, 3), torch.channels_last),
        ((6, 5, 3, 3), torch.contiguous_format),
        ((6, 5, 1, 1), torch.contiguous_format),
        ((6, 1, 3, 3), torch.contiguous_format),
        ((6, 5, 2, 2, 2), torch.channels_last_3d),
        ((6, 5, 2), torch.contiguous_format),
    ],
)
def test_slices_keep_the_strides_of_their_format(
    shape: tuple[int, ...], format_: torch.memory_format
) -> None:
    tensor = torch.empty(shape, memory_format=format_).normal_()
    part = take(tensor, {0: torch.tensor([0, 2, 5])})
    assert torch.equal(part, tensor[[0, 2, 5]])
    assert part.stride() == torch.empty(part.shape, memory_format=format_).stride()


def test_attributes_of_parameters_survive(x: Tensor) -> None:
    model = VGG()
    model.conv1.weight.no_decay = True  # type: ignore[attr-defined]
    prune(model, x, criterion="l1", ratio=0.5, scope="local")
    assert model.conv1.weight.no_decay is True


def everything(model: nn.Module, optimizer: Any) -> tuple[Any, ...]:
    """Identities and contents of all that a removal replaces."""
    tensors = {n: (id(p), p.detach().clone(), p.grad) for n, p in model.named_parameters()}
    buffers = {n: (id(b), b.clone()) for n, b in model.named_buffers()}
    sizes = {n: repr(m) for n, m in model.named_modules()}
    params = [id(p) for g in optimizer.param_groups for p in g["params"]]
    state = {id(p): {k: id(v) for k, v in s.items()} for p, s in optimizer.state.items()}
    return tensors, buffers, sizes, params, state


def assert_same(before: tuple[Any, ...], after: tuple[Any, ...]) -> None:
    for old, new in zip(before[:2], after[:2], strict=True):
        assert old.keys() == new.keys()
        for name in old:
            assert old[name][0] == new[name][0], name
            assert torch.equal(old[name][1], new[name][1]), name
    assert before[2:] == after[2:]


@pytest.mark.parametrize("place", [0, 1, 10, 25, "last"])
def test_a_failure_during_removal_restores_everything(
    place: Any, monkeypatch: pytest.MonkeyPatch, x: Tensor
) -> None:
    model = randomised(VGG())
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    train_step(model, optimizer)
    original = removal.removal_edits

    def fail() -> None:
        raise MemoryError("simulated")

    def spoiled(*args: Any, **kwargs: Any) -> list[Edit]:
        edits = original(*args, **kwargs)
        at = len(edits) if place == "last" else place
        return [*edits[:at], Edit("the simulated one", fail, lambda: None), *edits[at:]]

    module = importlib.import_module("orthoreg_ext.pruning.engine")
    monkeypatch.setattr(module, "removal_edits", spoiled)
    before = everything(model, optimizer)
    with pytest.raises(RuntimeError, match=r"failed at the simulated one .*the model was restored"):
        prune(model, x, criterion="l1", ratio=0.5, optimizer=optimizer)
    assert_same(before, everything(model, optimizer))
    train_step(model, optimizer)


def test_an_interrupt_during_removal_restores_everything(
    monkeypatch: pytest.MonkeyPatch, x: Tensor
) -> None:
    model = randomised(VGG())
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    train_step(model, optimizer)
    calls = iter(range(100))
    original = equivalence.outputs_of

    def interrupted(*args: Any, **kwargs: Any) -> list[Tensor]:
        if next(calls) == 1:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(equivalence, "outputs_of", interrupted)
    before = everything(model, optimizer)
    with pytest.raises(KeyboardInterrupt):
        prune(model, x, criterion="l1", ratio=0.5, optimizer=optimizer)
    assert_same(before, everything(model, optimizer))


def test_commit_undoes_in_reverse_order() -> None:
    log: list[str] = []

    def fail() -> None:
        raise ValueError("no")

    edits = [Edit(n, lambda n=n: log.append(n), lambda n=n: log.append(f"-{n}")) for n in "ab"]
    with pytest.raises(RuntimeError, match=r"removal failed at c \(no\)"):
        commit([*edits, Edit("c", fail, lambda: log.append("-c"))])
    assert log == ["a", "b", "-c", "-b", "-a"]


def test_sizes_of_modules_follow(x: Tensor) -> None:
    model = Tied()
    prune(model, x, criterion="l1", ratio=0.5, scope="local")
    assert (model.stem.out_channels, model.a.in_channels, model.fc.in_features) == (4, 4, 4)
    assert model.stem.weight.shape == (4, 3, 3, 3)
    mlp = MLP()
    prune(mlp, torch.randn(2, 12), criterion="l1", ratio=0.5, scope="local")
    assert repr(mlp.fc2) == "Linear(in_features=10, out_features=8, bias=True)"


def test_optimizer_state_is_checked_again_in_every_round(x: Tensor) -> None:
    model = VGG()
    optimizer = torch.optim.Adafactor(model.parameters())  # its state appears with the first step

    def train(model: nn.Module, _: int) -> None:
        train_step(model, optimizer)

    options = {"criterion": "l1", "ratio": 0.5, "rounds": 2, "optimizer": optimizer}
    with pytest.raises(RoundError, match=r"round 2 of 2 failed: optimizer \(Adafactor\) keeps"):
        prune(model, x, between_rounds=train, **options)
    train_step(model, optimizer)
