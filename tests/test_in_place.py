"""Prepared gradients: the same numbers as the call, whatever happens to parameters in between."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import orthoreg_ext as ox
from tests.conftest import LEAVING_OUT, NAMES, Layers, Target, random_layers


class Operators(TorchDispatchMode):
    """Records every operator that runs."""

    # what copies from the host, or reads a number on it
    HOST = ("aten::index.", "aten::index_put", "aten::lift_fresh", "aten::scalar_tensor")
    HOST += ("aten::_local_scalar_dense", "aten::item", "aten::nonzero", "aten::is_nonzero")

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        name = f"{func._schema.name}.{func._schema.overload_name}"
        result = func(*args, **kwargs)
        if name.startswith(("aten::_to_copy", "aten::copy_")):
            tensors = [t for t in (result, *args) if isinstance(t, Tensor)]
            moved = len({t.device for t in tensors}) > 1
            name += " between devices" if moved else ""
        self.names.append(name)
        return result

    def from_host(self) -> list[str]:
        """Those that a captured or never waiting step must not have."""
        return [n for n in self.names if n.startswith(self.HOST) or n.endswith("between devices")]


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
    offsets = [float(i) for i in range(count)]
    name = NAMES[seed % len(NAMES)]
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    targets = []
    if seed % 3 == 0:
        targets = [torch.rand(len(w), dtype=compute).to(target.device) for w in layers.weights]
    columns = [int(name in LEAVING_OUT and not targets) * (seed + i) % 2 for i in range(count)]
    fixed = (layers.groups, columns, offsets, name, "3xtf32")
    of_rows = (masks, targets)
    number = ops.prepare_gram_penalty(layers.weights, layers.biases, *of_rows, *fixed)
    tensors = [*layers.weights, *layers.biases]
    for step in range(3):
        coefficients = torch.rand(count, dtype=compute).to(target.device)
        grads = [torch.full_like(t, step) for t in tensors]
        same = [t.clone(memory_format=torch.preserve_format) for t in grads]
        want = ops.add_gram_penalty_grad_(
            *(layers.weights, layers.biases, *of_rows, grads[:count], grads[count:]),
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
            self.weights, self.biases, self.masks, [], *self.fixed
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
            *(self.weights, self.biases, self.masks, []),
            *(grads[:2], [grads[2], self.biases[1]]),
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
    plain = (prepared.weights, prepared.biases, [], [], [1, 1], [0, 0], [0.0, 0.0])
    with pytest.raises(RuntimeError, match="no precision is named 'fp8'"):
        prepared.ops.prepare_gram_penalty(*plain, "so", "fp8")
    for name in ("sow", ""):
        with pytest.raises(RuntimeError, match=f"no compiled penalty is named '{name}'"):
            prepared.ops.prepare_gram_penalty(*plain, name, "ieee")


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
    parts = [part.prepared for term in terms for part in term._parts]
    return [prepared._number for prepared in parts if prepared is not None]


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


# --- a step stays on the device


MODELS: dict[str, Callable[[Net], object]] = {
    "all kinds": lambda net: None,  # with a transposed convolution, which goes through autograd
    "all in place": lambda net: setattr(net, "up", nn.Identity()),
    "partly frozen": lambda net: (
        net.fc.weight.requires_grad_(False),
        net.conv.bias.requires_grad_(False),
    ),
    "partly double": lambda net: (net.grouped.double(), net.second.double()),
    "parametrized": lambda net: nn.utils.parametrizations.weight_norm(net.fc),
}
TERMS: dict[str, dict[str, Any]] = {
    "constant": {},
    "schedule": {"schedule": lambda step: 1.0 + step},
    "every": {"every": 2},
    "numpy": {"schedule": lambda step: np.float32(1.0 + step)},
}


@pytest.mark.parametrize("loss_scale", [None, 8.0])
@pytest.mark.parametrize("term", TERMS)
@pytest.mark.parametrize("model", MODELS)
def test_steps_copy_nothing_from_the_host(
    net: Net, target: Target, model: str, term: str, loss_scale: float | None
) -> None:
    MODELS[model](net)
    reg = ox.OrthoRegularizer(net, **TERMS[term])
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, fused=True)
    if loss_scale is not None:  # as GradScaler leaves it for a fused optimizer
        optimizer.grad_scale = torch.full((), loss_scale, device=target.device)
    reg.attach(optimizer)
    for _ in range(2):
        optimizer.step()  # prepares, and creates gradients
    with Operators() as seen:
        for _ in range(4):
            optimizer.step()
    assert any("add_prepared_gram_penalty_grad_" in name for name in seen.names)
    assert not seen.from_host()


def test_operators_that_wait_are_seen() -> None:
    """The net of the tests here has no holes: what the steps must not do, it catches."""
    tensor = torch.arange(4.0)
    for call in (
        lambda: tensor[[0, 2]],
        lambda: torch.tensor([1.0, 2.0]),
        lambda: tensor.sum().item(),
        lambda: bool(tensor.sum() > 1),
        lambda: tensor[tensor > 1],
        lambda: tensor.to("meta"),
    ):
        with Operators() as seen:
            call()
        assert seen.from_host(), seen.names
    with Operators() as seen:
        _ = tensor.double() * 2.0 + tensor[1:3].sum()
    assert not seen.from_host()


def test_constant_steps_only_add(net: Net) -> None:
    MODELS["all in place"](net)
    reg = ox.OrthoRegularizer(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, fused=True)
    reg.attach(optimizer)
    optimizer.step()
    with Operators() as seen:
        reg._add_gradient(optimizer, 1)
    assert [name.split("::")[1] for name in seen.names] == ["add_prepared_gram_penalty_grad_."]


# --- CUDA graphs, as far as they can be seen without one (scripts/gpu_properties.py captures some)


def multiplications(reg: ox.OrthoRegularizer, optimizer: torch.optim.Optimizer) -> int:
    """The scales that a step computes; the net is all in place."""
    with Operators() as seen:
        reg._add_gradient(optimizer, 1)
    return sum(name.startswith("aten::mul.") for name in seen.names)


def capture(monkeypatch: pytest.MonkeyPatch, capturing: bool) -> None:
    monkeypatch.setattr("orthoreg_ext.attachment.is_capturing", lambda device: capturing)


def test_a_captured_step_computes_its_own_scale(net: Net, monkeypatch) -> None:
    MODELS["all in place"](net)
    reg = ox.OrthoRegularizer(net, strength=1.0)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    reg.attach(optimizer)
    for first_capturing in (False, True):
        reg._prepared.clear()
        capture(monkeypatch, first_capturing)
        assert multiplications(reg, optimizer) == 1
        capture(monkeypatch, True)  # reads no cache: a later step may replace it
        assert multiplications(reg, optimizer) == 1
        capture(monkeypatch, False)  # what a capture made was never computed, so it is not kept
        assert multiplications(reg, optimizer) == int(first_capturing)
        assert multiplications(reg, optimizer) == 0
    capture(monkeypatch, True)
    check(net, reg, optimizer)


def test_what_a_replay_reads_lives_as_long_as_its_parameters(target: Target, monkeypatch) -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ConvTranspose2d(8, 4, 2), nn.Linear(4, 4))
    net.to(target.device)[0].double()
    reg = ox.OrthoRegularizer(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    attachment = reg.attach(optimizer)
    capture(monkeypatch, True)
    optimizer.step()
    parts = [part for term in reg._prepared[optimizer].terms for part in term._parts]
    held = [weakref.ref(part.coefficients) for part in parts]
    assert len(held) == 2
    attachment.remove()
    del parts, reg, optimizer, attachment
    gc.collect()
    assert all(ref() is not None for ref in held)
    del net
    gc.collect()
    assert all(ref() is None for ref in held)


def test_steps_on_the_cpu_ask_no_gpu(net: Net, monkeypatch) -> None:
    def asked() -> bool:
        raise AssertionError("asked a GPU whether it captures")

    if net.fc.weight.is_cuda:
        pytest.skip("there it has to ask")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", asked)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    ox.OrthoRegularizer(net).attach(optimizer)
    optimizer.step()


def test_copies_inside_a_capture_are_refused_with_the_remedy(net: Net, monkeypatch) -> None:
    reg = ox.OrthoRegularizer(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    reg.attach(optimizer)
    monkeypatch.setattr("orthoreg_ext.plan.is_capturing", lambda device: True)
    with pytest.raises(RuntimeError, match="run a step like the captured one before the capture"):
        optimizer.step()
    monkeypatch.undo()
    with ox.backend("reference"):
        check(net, reg, optimizer)
