"""Prepared gradients: the same numbers as the call, whatever happens to parameters in between."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import orthoreg_ext as ox
from orthoreg_ext.penalties import PENALTIES
from tests.conftest import Layers, Target, random_layers

NAMES = sorted(PENALTIES)


def dense_layers(seed: int, target: Target, dtype: torch.dtype = torch.float32) -> Layers:
    """Random layers as the operators take them: filters dense, empty biases for none."""
    layers = random_layers(seed, target.device, dtype, budget=60_000, requires_grad=False)
    layers.weights = [
        w if w[0].is_contiguous() or w.dim() == 4 else w.contiguous() for w in layers.weights
    ]
    layers.biases = [
        w.new_empty(0) if b is None else b
        for w, b in zip(layers.weights, layers.biases, strict=True)
    ]
    return layers


def random_masks(layers: Layers, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    masks = []
    for i, weight in enumerate(layers.weights):
        mask = torch.rand(len(weight), generator=generator) < 0.3
        masks.append((mask if i % 2 else mask[:0]).to(weight.device))
    return masks


@pytest.mark.parametrize("seed", range(40))
def test_prepared_equals_the_call_bit_for_bit(target: Target, seed: int) -> None:
    dtype = [torch.float32, torch.float64, torch.bfloat16, torch.float16][seed % 4]
    layers = dense_layers(seed, target, dtype)
    masks = random_masks(layers, seed) if seed % 2 else []
    count, ops = len(layers.weights), target.namespace
    columns = [(seed + i) % 2 for i in range(count)]
    offsets = [float(i) for i in range(count)]
    fixed = (layers.groups, columns, offsets, NAMES[seed % 3], "3xtf32")
    number = ops.prepare_gram_penalty(layers.weights, layers.biases, masks, *fixed)
    tensors = [*layers.weights, *layers.biases]
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    for step in range(3):
        coefficients = torch.rand(count, dtype=compute).to(target.device)
        grads = [torch.full_like(t, step) for t in tensors]
        same = [t.clone(memory_format=torch.preserve_format) for t in grads]
        want = ops.add_gram_penalty_grad_(
            *(layers.weights, layers.biases, masks, grads[:count], grads[count:]),
            *(coefficients, *fixed),
        )
        got = ops.add_prepared_gram_penalty_grad_(
            number, [g for g in same if g.numel()], coefficients
        )
        assert torch.equal(got, want), f"seed {seed}"
        assert all(torch.equal(a, b) for a, b in zip(same, grads, strict=True)), f"seed {seed}"
        for weight in layers.weights:
            weight.mul_(0.5)
    ops.release_prepared(number)


class Prepared:
    """Two prepared layers, with a bias and a mask."""

    def __init__(self, target: Target) -> None:
        self.ops = target.namespace
        self.device = target.device
        self.weights = [torch.randn(4, 3, 2, 2, device=target.device), self.randn(5, 6)]
        self.biases = [self.randn(4), self.randn(0)]
        self.masks = [torch.zeros(0, dtype=torch.bool), torch.arange(5) % 2 == 0]
        self.masks = [m.to(target.device) for m in self.masks]
        self.fixed = ([1, 1], [0, 1], [0.0, 0.0], "so", "ieee")
        self.number = self.ops.prepare_gram_penalty(
            self.weights, self.biases, self.masks, *self.fixed
        )
        self.grads = [torch.zeros_like(t) for t in (*self.weights, self.biases[0])]

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device)

    def add(self) -> Tensor:
        return self.ops.add_prepared_gram_penalty_grad_(
            self.number, self.grads, torch.ones(2, device=self.device)
        )

    def call(self) -> tuple[Tensor, list[Tensor]]:
        grads = [torch.zeros_like(t) for t in (*self.weights, self.biases[0])]
        values = self.ops.add_gram_penalty_grad_(
            *(self.weights, self.biases, self.masks, grads[:2], [grads[2], self.biases[1]]),
            *(torch.ones(2, device=self.device), *self.fixed),
        )
        return values, grads


@pytest.fixture
def prepared(target: Target) -> Prepared:
    return Prepared(target)


def test_new_memory_of_the_same_form_is_followed(prepared: Prepared) -> None:
    prepared.add()
    for tensor in (*prepared.weights, prepared.biases[0]):
        tensor.data = torch.randn_like(tensor)
    prepared.masks[1].data = torch.tensor([True, False, True, True, False]).to(prepared.device)
    prepared.grads = [torch.zeros_like(g) for g in prepared.grads]
    values, grads = prepared.call()
    assert torch.equal(prepared.add(), values)
    assert all(torch.equal(a, b) for a, b in zip(prepared.grads, grads, strict=True))


def set_data(tensor: Tensor, data: Tensor) -> None:
    tensor.data = data


def set_grad(prepared: Prepared, index: int, grad: Tensor) -> None:
    prepared.grads[index] = grad.to(prepared.device)


CHANGES: dict[str, Callable[[Prepared], object]] = {
    "fewer filters": lambda p: set_data(p.weights[1], p.weights[1][:4]),
    "another shape": lambda p: set_data(p.weights[1], p.weights[1].view(5, 3, 2)),
    "another order": lambda p: set_data(
        p.weights[0], p.weights[0].contiguous(memory_format=torch.channels_last)
    ),
    "another stride": lambda p: set_data(p.weights[1], p.randn(5, 8)[:, :6]),
    "another type": lambda p: set_data(p.weights[1], p.weights[1].double()),
    "another device": lambda p: set_data(p.weights[1], p.weights[1].cpu()),
    "a shorter bias": lambda p: set_data(p.biases[0], p.biases[0][:3]),
    "a shorter mask": lambda p: set_data(p.masks[1], p.masks[1][:4]),
    "gradient in another order": lambda p: set_grad(
        p, 0, torch.zeros(4, 3, 2, 2).contiguous(memory_format=torch.channels_last)
    ),
    "gradient of another type": lambda p: set_grad(p, 1, torch.zeros(5, 6).bfloat16()),
    "gradient of another shape": lambda p: set_grad(p, 1, torch.zeros(4, 6)),
    "overlapping gradient": lambda p: set_grad(p, 1, torch.zeros(1, 6).expand(5, 6)),
    "sparse gradient": lambda p: set_grad(p, 1, torch.zeros(5, 6).to_sparse()),
    "bias gradient of another type": lambda p: set_grad(p, 2, torch.zeros(4).double()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_no_longer_fits_writes_nothing(prepared: Prepared, change: str) -> None:
    if change == "another device" and prepared.device.type == "cpu":
        pytest.skip("a tensor on the CPU takes no memory but the CPU's without a GPU")
    before = list(prepared.grads)
    CHANGES[change](prepared)
    assert prepared.add().numel() == 0
    assert not any(g.any() for g in before)


def test_wrong_number_of_gradients_is_refused(prepared: Prepared) -> None:
    prepared.grads.append(torch.zeros(1, device=prepared.device))
    with pytest.raises(RuntimeError, match="expected 3 gradients, got 4"):
        prepared.add()


def test_coefficients_are_checked(prepared: Prepared) -> None:
    with pytest.raises(RuntimeError, match=r"coefficients must be a contiguous \[2\]"):
        prepared.ops.add_prepared_gram_penalty_grad_(
            prepared.number, prepared.grads, torch.ones(3, device=prepared.device)
        )


def test_use_after_release_is_a_clear_error(prepared: Prepared) -> None:
    prepared.ops.release_prepared(prepared.number)
    prepared.ops.release_prepared(prepared.number)  # no error: finalizers may come late
    with pytest.raises(RuntimeError, match=r"no prepare_gram_penalty returned .* prepare again"):
        prepared.add()


def test_unknown_names_are_refused_when_preparing(prepared: Prepared) -> None:
    plain = (prepared.weights, prepared.biases, [], [1, 1], [0, 0], [0.0, 0.0])
    with pytest.raises(RuntimeError, match="no precision is named 'fp8'"):
        prepared.ops.prepare_gram_penalty(*plain, "so", "fp8")
    with pytest.raises(RuntimeError, match="no compiled penalty is named 'sow'"):
        prepared.ops.prepare_gram_penalty(*plain, "sow", "ieee")


def test_opcheck_of_the_prepared_operator(prepared: Prepared) -> None:
    torch.library.opcheck(
        prepared.ops.add_prepared_gram_penalty_grad_.default,
        (prepared.number, prepared.grads, torch.ones(2, device=prepared.device)),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


# --- the attached route, which prepares


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.grouped = nn.Conv2d(8, 12, 3, groups=2)
        self.up = nn.ConvTranspose2d(12, 6, 2)
        self.fc = nn.Linear(6, 5)
        self.second = nn.Linear(5, 6)
        self.head = nn.Linear(6, 4)


@pytest.fixture
def net(target: Target) -> Net:
    torch.manual_seed(0)
    return Net().to(target.device)


def check(net: Net, reg: ox.OrthoRegularizer, optimizer: torch.optim.Optimizer) -> None:
    """One step adds the gradient of the term, by autograd, to what the parameters hold."""
    stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
    held = {k: None if p.grad is None else p.grad.clone() for k, p in net.named_parameters()}
    grads = torch.autograd.grad(
        reg(), [p for p in net.parameters() if p.requires_grad], allow_unused=True
    )
    found = iter(grads)
    term = {k: next(found) if p.requires_grad else None for k, p in net.named_parameters()}
    optimizer.step()
    for key, parameter in net.named_parameters():
        want = held[key]
        if term[key] is not None and id(parameter) in stepped:
            want = term[key] if want is None else want.to(parameter.dtype) + term[key]
        if want is None:
            assert parameter.grad is None, key
        else:
            torch.testing.assert_close(parameter.grad, want, rtol=1e-4, atol=1e-6, msg=key)


def replace_parameter(net: Net, optimizer: torch.optim.Optimizer) -> None:
    net.fc.weight = nn.Parameter(torch.randn_like(net.fc.weight))
    optimizer.add_param_group({"params": [net.fc.weight]})


def replace_module(net: Net, optimizer: torch.optim.Optimizer) -> None:
    net.fc = nn.Linear(6, 5).to(net.fc.weight.device)
    optimizer.add_param_group({"params": list(net.fc.parameters())})


def add_module(net: Net, optimizer: torch.optim.Optimizer) -> None:
    net.conv.add_module("inner", nn.Conv2d(3, 4, 3).to(net.fc.weight.device))
    optimizer.add_param_group({"params": list(net.conv.inner.parameters())})


def prune(net: Net, optimizer: torch.optim.Optimizer) -> None:
    """In place: the same parameters, but of other shapes; narrowing keeps their addresses."""
    for parameter in (net.fc.weight, net.fc.bias):
        parameter.grad = None
        parameter.data = parameter.data[:4]


def parametrize(net: Net, optimizer: torch.optim.Optimizer) -> None:
    nn.utils.parametrizations.weight_norm(net.fc)
    optimizer.add_param_group({"params": list(net.fc.parametrizations.parameters())})


def new_memory(net: Net, optimizer: torch.optim.Optimizer) -> None:
    for parameter in net.parameters():
        parameter.data = torch.randn_like(parameter)
        parameter.grad = torch.randn_like(parameter)


def drop_grads(net: Net, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad(set_to_none=True)


def drop_one_grad(net: Net, optimizer: torch.optim.Optimizer) -> None:
    net.conv.bias.grad = None


def freeze(net: Net, optimizer: torch.optim.Optimizer) -> None:
    net.fc.weight.requires_grad_(False)


def freeze_bias(net: Net, optimizer: torch.optim.Optimizer) -> None:
    net.conv.bias.requires_grad_(False)


def channels_last(net: Net, optimizer: torch.optim.Optimizer) -> None:
    net.to(memory_format=torch.channels_last)


def turn_grad(net: Net, optimizer: torch.optim.Optimizer) -> None:
    net.fc.weight.grad = torch.randn_like(net.fc.weight).t().contiguous().t()


def double(net: Net, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    net.double()


def double_one(net: Net, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    net.fc.double()


def disown(net: Net, optimizer: torch.optim.Optimizer) -> None:
    kept = [p for p in net.parameters() if p is not net.fc.weight and p is not net.conv.bias]
    optimizer.param_groups[0]["params"] = kept


def disown_the_last(net: Net, optimizer: torch.optim.Optimizer) -> None:
    del optimizer.param_groups[0]["params"][-4:]


def disown_one_for_another(net: Net, optimizer: torch.optim.Optimizer) -> None:
    params = optimizer.param_groups[0]["params"]
    index = next(i for i, p in enumerate(params) if p is net.fc.weight)
    params[index] = nn.Parameter(torch.zeros_like(net.fc.weight))


def share(net: Net, optimizer: torch.optim.Optimizer) -> None:
    net.extra = nn.Conv2d(3, 8, 3).to(net.fc.weight.device)
    net.extra.bias = net.conv.bias
    optimizer.add_param_group({"params": [net.extra.weight]})


MUTATIONS = [
    *(replace_parameter, replace_module, add_module, prune, parametrize, new_memory, drop_grads),
    *(drop_one_grad, freeze, freeze_bias, channels_last, turn_grad, double, double_one, disown),
    *(disown_the_last, disown_one_for_another, share),
]


@pytest.mark.parametrize("mutate", MUTATIONS, ids=[m.__name__ for m in MUTATIONS])
def test_steps_see_what_happened_to_the_model(net: Net, mutate) -> None:
    reg = ox.OrthoRegularizer(net, strength=1.0)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    reg.attach(optimizer)
    for _ in range(2):
        check(net, reg, optimizer)
    mutate(net, optimizer)
    for _ in range(3):
        check(net, reg, optimizer)


def test_steps_prepare_once(net: Net) -> None:
    reg = ox.OrthoRegularizer(net, schedule=lambda step: 1.0 + step)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    reg.attach(optimizer)
    optimizer.step()
    first = reg._prepared[optimizer]
    for mutate in (drop_grads, new_memory):
        mutate(net, optimizer)
        optimizer.step()
    assert reg._prepared[optimizer] is first


def test_two_optimizers_keep_their_own(net: Net) -> None:
    reg = ox.OrthoRegularizer(net, strength=1.0)
    rest = [p for n, p in net.named_parameters() if not n.startswith("fc")]
    optimizers = [torch.optim.SGD(p, lr=0.0) for p in (list(net.fc.parameters()), rest)]
    for optimizer in optimizers:
        reg.attach(optimizer)
    for _ in range(3):
        for optimizer in optimizers:
            check(net, reg, optimizer)
    first, second = (reg._prepared[optimizer] for optimizer in optimizers)
    assert first is not second


def test_backend_and_precision_are_those_of_the_step(net: Net, target: Target) -> None:
    reg = ox.OrthoRegularizer(net, strength=1.0)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    reg.attach(optimizer)
    check(net, reg, optimizer)
    first = reg._prepared[optimizer]
    with ox.backend("reference"):
        check(net, reg, optimizer)
        assert reg._prepared[optimizer] is not first
    with ox.precision("ieee"):
        check(net, reg, optimizer)
        assert reg._prepared[optimizer]._settings.precision == "ieee"
    check(net, reg, optimizer)


def numbers(reg: ox.OrthoRegularizer, optimizer: torch.optim.Optimizer) -> list[int]:
    terms = reg._prepared[optimizer].terms
    return [prepared._number for term in terms for _, prepared in term._parts]


def test_nothing_is_kept_for_an_optimizer_that_is_gone(net: Net, target: Target) -> None:
    reg = ox.OrthoRegularizer(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    reg.attach(optimizer)
    optimizer.step()
    (number,) = numbers(reg, optimizer)
    del optimizer
    gc.collect()
    with pytest.raises(RuntimeError, match="which was released"):
        target.namespace.add_prepared_gram_penalty_grad_(
            number, [], torch.ones(1, device=target.device)
        )


def test_copies_prepare_for_themselves(net: Net) -> None:
    reg = ox.OrthoRegularizer(net, strength=1.0)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    reg.attach(optimizer)
    optimizer.step()
    for other in (copy.deepcopy(reg), pickle.loads(pickle.dumps(reg))):
        mine = torch.optim.SGD(other.model.parameters(), lr=0.0)
        other.attach(mine)
        for _ in range(2):
            check(other.model, other, mine)
    check(net, reg, optimizer)
