"""OrthoRegularizer: the term, both routes, layer selection, everything models do to layers."""

from __future__ import annotations

import copy
import math
import pickle
import warnings

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import orthoreg_ext as ox
import orthoreg_ext.functional as F
from tests.conftest import Target


class Net(nn.Module):
    """Every kind of layer that has filters."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 12, 3, padding=1, groups=2, bias=False)
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12, bias=False)
        self.up = nn.ConvTranspose2d(12, 6, 2, 2)
        self.fc = nn.Linear(6, 5)
        self.head = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.conv(x)).relu()
        x = self.up(self.depthwise(self.grouped(x).relu()).relu())
        return self.head(self.fc(x.mean((2, 3))).relu())


@pytest.fixture
def net(target: Target) -> Net:
    torch.manual_seed(0)
    return Net().to(target.device)


def by_formula(net: Net, name: str = "orthoreg") -> Tensor:
    """The default term of Net from the formulas, in float64 with plain autograd."""

    def penalty(matrix: Tensor) -> Tensor:
        small = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
        eye = torch.eye(len(small), dtype=matrix.dtype, device=matrix.device)
        if name == "orthoreg":
            return (small - eye).abs().sum()
        return ((small - eye) ** 2).sum() if name == "so" else ((small * (1 - eye)) ** 2).sum()

    def rows(weight: Tensor, bias: Tensor | None = None) -> Tensor:
        flat = weight.double().reshape(weight.shape[0], -1)
        return flat if bias is None else torch.cat([flat, bias.double()[:, None]], 1)

    matrices = [
        [rows(net.conv.weight, net.conv.bias)],
        list(rows(net.grouped.weight).chunk(2)),
        list(rows(net.depthwise.weight).chunk(12)),
        [rows(net.up.weight.transpose(0, 1), net.up.bias)],
        [rows(net.fc.weight)],
    ]
    sizes = [len(layer) * min(layer[0].shape) for layer in matrices]
    total = sum(math.sqrt(s) for s in sizes)
    parts = [
        math.sqrt(size) / total * sum(penalty(m) for m in layer)
        for size, layer in zip(sizes, matrices, strict=True)
    ]
    return 1e-2 * torch.stack(parts).sum()


@pytest.mark.parametrize("name", ["orthoreg", "so", "offdiag"])
def test_both_routes_equal_the_formula(net: Net, name: str) -> None:
    reg = ox.OrthoRegularizer(net, name)
    value = reg()
    want = by_formula(net, name)
    torch.testing.assert_close(value.double(), want)
    value.backward()
    by_loss = {k: p.grad for k, p in net.named_parameters()}
    net.zero_grad()
    want.backward()
    by_hand = {k: p.grad for k, p in net.named_parameters()}
    net.zero_grad()
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    reg.attach(optimizer)
    before = {k: p.detach().clone() for k, p in net.named_parameters()}
    optimizer.step()
    for key, parameter in net.named_parameters():
        if by_hand[key] is None:
            assert by_loss[key] is None
            assert torch.equal(parameter, before[key])
        else:
            torch.testing.assert_close(by_loss[key], by_hand[key], rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(parameter, before[key] - by_hand[key], rtol=1e-4, atol=1e-6)


def test_report_names_every_layer_and_every_skipped_one(net: Net) -> None:
    net.grouped.weight.requires_grad_(False)
    report = ox.OrthoRegularizer(net).report()
    assert [(r.name, r.kind, r.side, r.fan_in) for r in report] == [
        ("conv", "conv", "rows", 28),
        ("depthwise", "depthwise", "rows", 9),
        ("up", "transposed", "rows", 49),
        ("fc", "linear", "rows", 6),
    ]
    reasons = {s.name: s.reason for s in report.skipped}
    assert reasons == {
        "grouped": "frozen: its weight does not require a gradient",
        "head": "the classifier; name it in include= to regularise it",
    }
    assert sum(r.weight for r in report) == pytest.approx(1)
    text = str(report)
    assert all(name in text for name in ("conv", "head", "skipped: the classifier"))
    cosine = F.filter_correlation([net.conv.weight.detach()])[0].abs()
    want = (cosine.sum() - cosine.trace()) / (8 * 7)
    assert report[0].correlation == pytest.approx(float(want), rel=1e-5)
    assert math.isnan(report[1].correlation)


def test_include_and_exclude_select_by_pattern_and_function(net: Net) -> None:
    def names(**arguments: object) -> list[str]:
        return [r.name for r in ox.OrthoRegularizer(net, **arguments).report()]

    assert names(include="head") == ["head"]
    assert names(include=["*conv", "f*"]) == ["conv", "fc"]
    assert names(exclude="*d*") == ["conv", "up", "fc"]
    assert names(include=lambda name, module: isinstance(module, nn.Linear)) == ["fc", "head"]


def test_frozen_layers_stay_frozen_and_thawed_ones_come_back(net: Net) -> None:
    reg = ox.OrthoRegularizer(net)
    net.conv.requires_grad_(False)
    reg().backward()
    assert net.conv.weight.grad is None
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    reg.attach(optimizer)
    before = net.conv.weight.clone()
    optimizer.step()
    assert torch.equal(net.conv.weight, before)
    net.conv.requires_grad_(True)
    reg().backward()
    assert net.conv.weight.grad is not None


def test_replaced_parameters_are_seen(net: Net) -> None:
    reg = ox.OrthoRegularizer(net)
    reg()
    net.conv = nn.Conv2d(3, 5, 3).to(net.fc.weight.device)
    assert reg.report()[0].filters == 5
    net.conv.weight = nn.Parameter(net.conv.weight[:4].detach().clone())
    net.conv.bias = nn.Parameter(net.conv.bias[:4].detach().clone())
    assert reg.report()[0].filters == 4


def test_tied_weights_count_once(target: Target) -> None:
    first, second = nn.Linear(6, 6), nn.Linear(6, 6)
    second.weight = first.weight
    tied = nn.Sequential(first, second).to(target.device)
    reg = ox.OrthoRegularizer(tied, layer_weights="uniform", strength=1.0)
    torch.testing.assert_close(reg(), F.gram_penalty([first.weight])[0])
    assert reg.report().skipped[0].reason == "shares its weight with '0'"


def test_channels_last_model_keeps_its_layout(net: Net) -> None:
    want = ox.OrthoRegularizer(net)()
    net.to(memory_format=torch.channels_last)
    reg = ox.OrthoRegularizer(net)
    torch.testing.assert_close(reg(), want)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    reg.attach(optimizer)
    optimizer.step()
    assert net.conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert net.conv.weight.grad.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models(net: Net, dtype: torch.dtype) -> None:
    half = copy.deepcopy(net).to(dtype)
    value = ox.OrthoRegularizer(half)()
    assert value.dtype == torch.float32
    same = copy.deepcopy(half).float()
    torch.testing.assert_close(value, ox.OrthoRegularizer(same)())
    value.backward()
    assert half.conv.weight.grad.dtype == dtype


def test_autocast_leaves_the_term_in_float32(net: Net, target: Target) -> None:
    want = ox.OrthoRegularizer(net)()
    with torch.autocast(target.device.type, dtype=torch.bfloat16):
        value = ox.OrthoRegularizer(net)()
    assert torch.equal(value, want)


def test_accumulated_gradients_get_the_term_once_a_step(net: Net, target: Target) -> None:
    x = torch.randn(2, 3, 4, 4, device=target.device)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    reg = ox.OrthoRegularizer(net, strength=1.0)
    handle = reg.attach(optimizer)
    net(x).sum().backward()
    net(x).sum().backward()
    plain = net.fc.weight.grad.clone()
    optimizer.step()
    net.zero_grad()
    reg().backward()
    term = net.fc.weight.grad.clone()
    net.zero_grad()
    net(x).sum().backward()
    net(x).sum().backward()
    optimizer.step()
    torch.testing.assert_close(net.fc.weight.grad, plain + term)
    handle.remove()
    net.zero_grad()
    optimizer.step()
    assert net.fc.weight.grad is None


@pytest.mark.parametrize("fused", [False, True])
def test_grad_scaler_does_not_scale_the_term(net: Net, target: Target, fused: bool) -> None:
    x = torch.randn(2, 3, 4, 4, device=target.device)
    reg = ox.OrthoRegularizer(net, strength=1.0)
    (net(x).sum() + reg()).backward()
    want = net.fc.weight.detach() - net.fc.weight.grad
    net.zero_grad()
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0, fused=fused)
    reg.attach(optimizer)
    scaler = torch.amp.GradScaler(target.device.type, init_scale=1024.0)
    scaler.scale(net(x).sum()).backward()
    scaler.step(optimizer)
    torch.testing.assert_close(net.fc.weight.detach(), want, rtol=1e-4, atol=1e-5)


def test_each_of_two_optimizers_moves_its_own_layers(net: Net) -> None:
    reg = ox.OrthoRegularizer(net)
    first = torch.optim.SGD(net.conv.parameters(), lr=1.0)
    reg.attach(first)
    before = net.fc.weight.clone()
    first.step()
    assert torch.equal(net.fc.weight, before)
    assert net.fc.weight.grad is None
    assert net.conv.weight.grad is not None


def test_every_and_schedule_scale_the_term(net: Net) -> None:
    full = ox.OrthoRegularizer(net)().item()
    reg = ox.OrthoRegularizer(net, every=3, schedule=lambda step: 1.0 if step < 3 else 0.5)
    values = [reg().item() for _ in range(5)]
    assert values == pytest.approx([3 * full, 0, 0, 1.5 * full, 0])


def test_state_dict_continues_the_schedule(net: Net) -> None:
    reg = ox.OrthoRegularizer(net, every=3)
    reg()
    other = ox.OrthoRegularizer(net, every=3)
    other.load_state_dict(reg.state_dict())
    assert other.step == 1
    assert other().item() == 0.0
    with pytest.raises(ValueError, match="saved with every=3, but this regulariser has 1"):
        ox.OrthoRegularizer(net).load_state_dict(reg.state_dict())
    with pytest.raises(
        ValueError,
        match="state has no attached_steps, bias, every, layer_weights, layers, penalty, side",
    ):
        reg.load_state_dict({"step": 1})


def test_layer_weights_by_name_rule_and_dict(net: Net) -> None:
    def weights(rule: object) -> list[float]:
        return [r.weight for r in ox.OrthoRegularizer(net, layer_weights=rule).report()]

    assert weights("uniform") == [1.0] * 5
    assert weights("mean") == pytest.approx([1 / 64, 1 / 72, 1 / 12, 1 / 36, 1 / 25])
    assert weights({"fc": 3}) == [1.0, 1.0, 1.0, 1.0, 3.0]


def test_bias_can_be_left_out_or_taken_everywhere(net: Net) -> None:
    fan_in = lambda bias: [r.fan_in for r in ox.OrthoRegularizer(net, bias=bias).report()]  # noqa: E731
    assert fan_in("conv") == [28, 36, 9, 49, 6]
    assert fan_in(False) == [27, 36, 9, 48, 6]
    assert fan_in(True) == [28, 36, 9, 49, 7]


def test_huge_linear_layers_are_skipped_with_a_notice() -> None:
    model = nn.Sequential(nn.Linear(2049, 3000, device="meta"), nn.Linear(4, 3), nn.Linear(3, 2))
    with pytest.warns(
        UserWarning, match="layer '0' is skipped: its Gram matrix would be 2049 x 2049"
    ):
        reg = ox.OrthoRegularizer(model)
    assert [r.name for r in reg.report()] == ["1"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ox.OrthoRegularizer(model, include="1").report()[0].name == "1"


def test_parametrized_layer_is_reached_by_both_routes(target: Target) -> None:
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), nn.Linear(3, 2))
    model.to(target.device)
    reg = ox.OrthoRegularizer(model, "so")
    reg().backward()
    original = model[0].parametrizations.weight.original1
    want = original.grad.clone()
    model.zero_grad()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    reg.attach(optimizer)
    optimizer.step()
    torch.testing.assert_close(original.grad, want)


def test_nan_weights_reach_the_loss(net: Net) -> None:
    with torch.no_grad():
        net.conv.weight[0] = float("nan")
    assert ox.OrthoRegularizer(net)().isnan()


def test_training_makes_the_filters_orthonormal(target: Target) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Linear(4, 4)).to(target.device)
    reg = ox.OrthoRegularizer(model, "so", strength=0.1, layer_weights="uniform", bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    reg.attach(optimizer)
    before = reg.report()[0].correlation
    for _ in range(100):
        optimizer.zero_grad()
        optimizer.step()
    row = reg.report()[0]
    assert row.penalty < 1e-4
    assert row.correlation < before / 100


def test_closure_of_a_step_does_not_lose_the_term(net: Net, target: Target) -> None:
    x = torch.randn(2, 3, 4, 4, device=target.device)
    (net(x).sum() + ox.OrthoRegularizer(net, strength=1.0)()).backward()
    want = net.fc.weight.detach() - net.fc.weight.grad
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    ox.OrthoRegularizer(net, strength=1.0).attach(optimizer)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = net(x).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) is not None
    torch.testing.assert_close(net.fc.weight.detach(), want, rtol=1e-4, atol=1e-5)


def test_every_counts_the_steps_of_each_optimizer(net: Net) -> None:
    reg = ox.OrthoRegularizer(net, every=2)
    optimizers = [torch.optim.SGD(m.parameters(), lr=1.0) for m in (net.conv, net.fc)]
    for optimizer in optimizers:
        reg.attach(optimizer)
    for step in range(4):
        before = [net.conv.weight.clone(), net.fc.weight.clone()]
        for optimizer in optimizers:
            optimizer.zero_grad()
            optimizer.step()
        moved = [
            not torch.equal(b, a.weight) for b, a in zip(before, (net.conv, net.fc), strict=True)
        ]
        assert moved == [step % 2 == 0] * 2
    other = ox.OrthoRegularizer(net, every=2)
    other.load_state_dict(reg.state_dict())
    assert other.attach(torch.optim.SGD(net.conv.parameters(), lr=1.0)).step == 4


def test_weight_and_bias_of_different_optimizers_get_the_term_once(net: Net) -> None:
    reg = ox.OrthoRegularizer(net, strength=1.0)
    reg().backward()
    want = net.conv.weight.grad.clone(), net.conv.bias.grad.clone()
    net.zero_grad()
    weights = torch.optim.SGD([net.conv.weight], lr=0.0)
    biases = torch.optim.SGD([net.conv.bias], lr=0.0)
    reg.attach(weights)
    reg.attach(biases)
    weights.step()
    biases.step()
    torch.testing.assert_close(net.conv.weight.grad, want[0])
    torch.testing.assert_close(net.conv.bias.grad, want[1])


def test_detached_optimizer_can_be_attached_again(net: Net) -> None:
    reg = ox.OrthoRegularizer(net)
    for _ in range(3):
        optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
        reg.attach(optimizer).remove()
        reg.attach(optimizer)
        del optimizer


def test_optimizer_left_behind_by_replaced_parameters_warns(net: Net) -> None:
    reg = ox.OrthoRegularizer(net, include="fc")
    optimizer = torch.optim.SGD(net.fc.parameters(), lr=1.0)
    reg.attach(optimizer)
    net.fc.weight = nn.Parameter(net.fc.weight.detach().clone())
    net.fc.bias = nn.Parameter(net.fc.bias.detach().clone())
    with pytest.warns(
        UserWarning, match="the optimizer holds none of the regularised layers any more"
    ):
        optimizer.step()


def test_pickled_regulariser_is_attached_to_nothing(net: Net) -> None:
    reg = ox.OrthoRegularizer(net, strength=np.float32(0.5))
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    reg.attach(optimizer)
    other = pickle.loads(pickle.dumps(reg))
    torch.testing.assert_close(other(), reg())
    other.attach(torch.optim.SGD(other.model.parameters(), lr=1.0))
    assert reg.state_dict()["attached_steps"] == [0]


def test_schedule_that_gives_no_number_is_named(net: Net) -> None:
    with pytest.raises(ValueError, match=r"schedule\(0\) gave None, expected a finite number"):
        ox.OrthoRegularizer(net, schedule=lambda step: None)()


def test_a_step_that_fails_is_not_counted(net: Net) -> None:
    factors: list[float | None] = [None, 1.0]
    reg = ox.OrthoRegularizer(net, schedule=lambda step: factors[step])
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    reg.attach(optimizer)
    for step in (reg, optimizer.step):
        with pytest.raises(ValueError, match=r"schedule\(0\) gave None"):
            step()
    assert reg.state_dict()["attached_steps"] == [0]
    assert reg.step == 0


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"layer_weights": None}, "layer_weights is None, expected sqrt, uniform, mean or a dict"),
        ({"include": 5}, "include is 5, expected a name or pattern"),
        ({"exclude": [5]}, r"exclude is \[5\], expected a name or pattern"),
    ],
)
def test_what_chooses_no_layers_is_refused(net: Net, given, text: str) -> None:
    with pytest.raises(TypeError, match=text):
        ox.OrthoRegularizer(net, **given)


def test_bias_shared_by_layers_gets_both_gradients(target: Target) -> None:
    first, second = nn.Conv2d(64, 32, 3).to(target.device), nn.Conv2d(64, 32, 3).to(target.device)
    second.bias = first.bias
    model = nn.Sequential(first, second)
    torch.set_num_threads(2)
    reg = ox.OrthoRegularizer(model, "so", strength=1.0)
    reg().backward()
    want = first.bias.grad.clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    reg.attach(optimizer)
    for _ in range(5):
        optimizer.zero_grad()
        optimizer.step()
        torch.testing.assert_close(first.bias.grad, want)


def test_weights_that_hooks_recompute_are_skipped_with_the_remedy() -> None:
    pruned = prune.l1_unstructured(nn.Linear(4, 4), "weight", 2)
    reg = ox.OrthoRegularizer(nn.Sequential(pruned, nn.Linear(4, 4), nn.Linear(4, 2)))
    assert [r.name for r in reg.report()] == ["1"]
    assert "a forward hook recomputes its weight" in reg.report().skipped[0].reason


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_attached_route_in_half_precision_and_under_autocast(net: Net, target, dtype) -> None:
    half = copy.deepcopy(net).to(dtype)
    reg = ox.OrthoRegularizer(half, strength=1.0)
    reg().backward()
    want = half.fc.weight.grad.clone()
    half.zero_grad()
    optimizer = torch.optim.SGD(half.parameters(), lr=0.0)
    reg.attach(optimizer)
    with torch.autocast(target.device.type, dtype=torch.bfloat16):
        optimizer.step()
    assert half.fc.weight.grad.dtype == dtype
    torch.testing.assert_close(half.fc.weight.grad, want)


def test_term_compiles_with_the_loss_into_one_graph(net: Net, target: Target) -> None:
    reg = ox.OrthoRegularizer(net)
    x = torch.randn(2, 3, 4, 4, device=target.device)
    torch._dynamo.reset()
    step = torch.compile(lambda x: net(x).sum() + reg(), fullgraph=True, backend="aot_eager")
    net.eval()
    torch.testing.assert_close(step(x), net(x).sum() + reg())
    torch.testing.assert_close(step(x + 1), net(x + 1).sum() + reg())


BAD = [
    (
        lambda: ox.OrthoRegularizer(nn.ReLU()),
        "no layer is left to regularise .the model has no filters.",
    ),
    (
        lambda: ox.OrthoRegularizer(nn.Sequential(nn.Conv2d(1, 2, 3)), exclude="0"),
        "no layer is left to regularise .'0': excluded by exclude=.; name layers in include=",
    ),
    (
        lambda: ox.OrthoRegularizer(nn.Linear(3, 3), "ortho"),
        "unknown penalty 'ortho'; did you mean 'orthoreg'",
    ),
    (
        lambda: ox.OrthoRegularizer(nn.Linear(3, 3), strength=-1.0),
        "strength is -1.0, expected a finite number",
    ),
    (
        lambda: ox.OrthoRegularizer(nn.Linear(3, 3), strength="a"),
        "strength is 'a', expected a finite number",
    ),
    (
        lambda: ox.OrthoRegularizer(nn.Linear(3, 3), layer_weights={"": math.nan}),
        "layer_weights.''. is nan, expected a finite number",
    ),
    (lambda: ox.OrthoRegularizer(nn.Linear(3, 3), max_dim=0), "max_dim is 0, expected a positive"),
    (lambda: ox.OrthoRegularizer(nn.Linear(3, 3), every=0), "every is 0, expected a positive"),
    (
        lambda: ox.OrthoRegularizer(nn.Linear(3, 3), bias="linear"),
        "bias is 'linear', expected True, False or 'conv'",
    ),
    (
        lambda: ox.OrthoRegularizer(nn.Linear(3, 3), layer_weights="sqr"),
        "unknown layer_weights 'sqr'; did you mean 'sqrt'",
    ),
    (
        lambda: ox.OrthoRegularizer(nn.Sequential(nn.Linear(3, 3)), include="1"),
        "unknown layer in include= '1'",
    ),
    (
        lambda: ox.OrthoRegularizer(nn.Sequential(nn.Linear(3, 3)), layer_weights={"00": 1.0}),
        "unknown layer in layer_weights= '00'; did you mean '0'",
    ),
]


@pytest.mark.parametrize(("call", "message"), BAD, ids=[b[1][:30] for b in BAD])
def test_bad_arguments_are_named(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_attach_refuses_what_cannot_work() -> None:
    model = nn.Linear(3, 3)
    reg = ox.OrthoRegularizer(model)
    with pytest.raises(ValueError, match="the optimizer holds none of the regularised layers"):
        reg.attach(torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1))
    with pytest.raises(ValueError, match=r"LBFGS .* use loss \+ reg\(\) instead"):
        reg.attach(torch.optim.LBFGS(model.parameters()))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    reg.attach(optimizer)
    with pytest.raises(ValueError, match="attached to this optimizer already"):
        reg.attach(optimizer)


def test_steps_are_resumed_by_those_that_are_attached() -> None:
    net = nn.Linear(3, 3)
    reg = ox.OrthoRegularizer(net, include="*")
    first, second = (torch.optim.SGD(net.parameters(), lr=0.1) for _ in range(2))
    removed = reg.attach(first)
    removed.remove()
    attached = reg.attach(second)
    attached.step = 7
    state = reg.state_dict()
    attached.step = 0
    reg.load_state_dict(state)
    assert (removed.step, attached.step) == (0, 7)


def test_steps_that_wait_for_an_optimizer_are_saved_again() -> None:
    net = nn.Linear(3, 3)
    reg, optimizer = ox.OrthoRegularizer(net), torch.optim.SGD(net.parameters(), lr=0.1)
    reg.attach(optimizer).step = 7
    resumed = ox.OrthoRegularizer(net)
    resumed.load_state_dict(reg.state_dict())
    again = ox.OrthoRegularizer(net)
    again.load_state_dict(resumed.state_dict())
    assert again.attach(optimizer).step == 7


def test_factors_follow_the_precision_of_the_model() -> None:
    net = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 7), nn.Linear(7, 2))
    reg = ox.OrthoRegularizer(net)
    net.double()
    assert torch.equal(reg(), ox.OrthoRegularizer(net)())
