"""mc, srip and ocnn: hand-computed tables, the eigenvectors that are kept, the self-convolution."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradgradcheck
from torch.nn import functional as nnf

import orthoreg_ext as ox
import orthoreg_ext.functional as F
from tests.test_in_place import Operators

WHOLE = ("mc", "srip", "ocnn")
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]

# name, W, rows value, cols value, gradient of the rows value; worked out by hand
TABLE = [
    ("mc", [[1.0, 2.0]], 4.0, 5.0, [[2.0, 4.0]]),  # A = [4]; [[0, 2], [2, 3]]
    ("mc", [[2.0, 0.0], [1.0, 1.0]], 5.0, 5.0, [[5.0, 1.0], [2.0, 0.0]]),
    ("mc", [[1.0, 0.0], [1.0, 0.0]], 1.0, 1.0, [[1.0, 0.0], [1.0, 0.0]]),  # the first of equal rows
    ("srip", [[1.0, 2.0]], 16.0, 16.0, [[16.0, 32.0]]),
    ("srip", [[0.5, 0.0]], 0.5625, 1.0, [[-1.5, 0.0]]),  # the larger side: at least 1
    ("srip", [[2.0, 0.0], [0.0, 1.0]], 9.0, 9.0, [[24.0, 0.0], [0.0, 0.0]]),
    ("ocnn", [[1.0, 2.0]], 4.0, None, [[2.0, 4.0]]),
    ("ocnn", [[1.0, 0.0], [0.0, 1.0]], 0.0, None, [[0.0, 0.0], [0.0, 0.0]]),
]


@pytest.mark.parametrize(("name", "w", "rows", "cols", "grad"), TABLE)
def test_hand_computed(name, w, rows, cols, grad) -> None:
    weight = torch.tensor(w, requires_grad=True)
    value = F.gram_penalty([weight], name, side="rows")
    assert value.tolist() == pytest.approx([rows])
    if cols is not None:
        assert F.gram_penalty([weight], name, side="cols").tolist() == pytest.approx([cols])
    (got,) = torch.autograd.grad(value.sum(), weight)
    torch.testing.assert_close(got, torch.tensor(grad))
    F.add_gram_penalty_grad_([weight], name, strength=0.5, side="rows")
    torch.testing.assert_close(weight.grad, 0.5 * torch.tensor(grad))


@pytest.mark.parametrize("name", WHOLE)
def test_zero_and_exactly_orthonormal_filters_give_finite_gradients(name: str) -> None:
    for matrix in (torch.zeros(4, 6), torch.eye(4, 6), torch.eye(6, 4)):
        weight = matrix.clone().requires_grad_()
        value = F.gram_penalty([weight], name)
        (grad,) = torch.autograd.grad(value.sum(), weight)
        assert not grad.any(), grad
        orthonormal = bool(matrix.any()) and (name != "ocnn" or len(matrix) == 4)
        assert (value.item() == 0) is orthonormal


@pytest.mark.parametrize("name", WHOLE)
def test_layers_without_filters_or_entries(name: str) -> None:
    shapes = [(0, 4), (3, 0), (2, 3)]
    weights = [torch.ones(s, requires_grad=True) for s in shapes]
    values = F.gram_penalty(weights, name, side="rows")
    one = {"mc": 5.0, "srip": 25.0, "ocnn": 26**0.5}  # A = [[2, 3], [3, 2]]
    none = {"mc": 1.0, "srip": 1.0, "ocnn": 3**0.5}
    assert values.tolist() == pytest.approx([0.0, none[name], one[name]])
    grads = torch.autograd.grad(values.sum(), weights)
    assert [g.shape for g in grads] == [torch.Size(s) for s in shapes]


@pytest.mark.parametrize("name", WHOLE)
def test_nan_passes_through(name: str) -> None:
    weight = torch.randn(3, 4)
    weight[1, 2] = float("nan")
    weight.requires_grad_()
    values = F.gram_penalty([weight, torch.ones(2, 2)], name)
    assert values.isnan().tolist() == [True, False]
    assert torch.autograd.grad(values[0], weight)[0].isnan().any()


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_gradient_of_the_eigen_solver_has_no_numbers_where_the_value_is_none(poison) -> None:
    weight = torch.randn(3, 4)
    weight[1, 2] = poison
    weight.requires_grad_()
    value = F.gram_penalty([weight], "srip")
    (grad,) = torch.autograd.grad(value.sum(), weight)
    assert not value.isfinite().any()
    assert not grad.isfinite().any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", WHOLE)
def test_half_precision_is_computed_in_float32_and_keeps_its_layout(name: str, device) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        weight = (
            torch.randn(6, 4, 3, 3).to(device, dtype).contiguous(memory_format=torch.channels_last)
        )
        weight.requires_grad_()
        value = F.gram_penalty([weight], name)
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, F.gram_penalty([weight.float()], name))
        F.add_gram_penalty_grad_([weight], name, strength=1)
        assert weight.grad.dtype == dtype
        assert weight.grad.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", WHOLE)
def test_autocast_does_not_lower_the_precision(name: str) -> None:
    weight = torch.randn(16, 8, 3, 3, requires_grad=True)
    value = F.gram_penalty([weight], name)
    (want,) = torch.autograd.grad(value.sum(), weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = F.add_gram_penalty_grad_([weight], name, strength=1)
    assert torch.equal(got, value)
    assert torch.equal(weight.grad, want)


@pytest.mark.parametrize("name", ["mc", "srip", "ocnn"])
def test_second_derivatives(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4, 2, 2, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    assert gradgradcheck(lambda w: F.gram_penalty([w], name, side="rows"), weight)


@pytest.mark.parametrize("name", WHOLE)
def test_compiled_it_is_the_same(name: str) -> None:
    weight = torch.randn(4, 2, 3, 3)
    call = torch.compile(lambda w: F.gram_penalty([w], name), fullgraph=True, backend="eager")
    torch.testing.assert_close(call(weight), F.gram_penalty([weight], name))


# --- srip: the vectors


def by_vector(weight: Tensor, vector: Tensor, side: str = "rows") -> tuple[Tensor, Tensor]:
    leaf = weight.clone().requires_grad_()
    value = F.gram_penalty([leaf], "srip", side=side, vectors=[vector])
    return value.detach(), torch.autograd.grad(value.sum(), leaf)[0]


@pytest.mark.parametrize("side", ["rows", "cols"])
@pytest.mark.parametrize(
    "singular", [[0.2, 0.6, 0.9, 1.1, 1.2], [0.5, 0.8, 1.0, 1.5, 1.8]], ids=["below 1", "above 1"]
)
def test_a_kept_vector_converges_over_the_steps(side: str, singular: list[float]) -> None:
    generator = torch.Generator().manual_seed(1)
    turns = torch.randn(4, 5, 5, generator=generator, dtype=torch.float64)
    turns = torch.linalg.qr(turns).Q
    spread = torch.diag(torch.tensor(singular, dtype=torch.float64))
    weight = (turns[:2] @ spread @ turns[2:]).flatten(0, 1)
    groups = [2]
    leaf = weight.clone().requires_grad_()
    want = F.gram_penalty([leaf], "srip", side=side, groups=groups)
    (gradient,) = torch.autograd.grad(want.sum(), leaf)
    vector, errors = torch.ones(2, 5, dtype=torch.float64), []
    for _ in range(60):
        again = weight.clone().requires_grad_()
        value = F.gram_penalty([again], "srip", side=side, groups=groups, vectors=[vector])
        assert value.item() <= want.item() * (1 + 1e-12)
        errors.append(1 - value.item() / want.item())
    assert errors[0] > 1e-3
    assert errors[-1] < 1e-8
    got = torch.autograd.grad(value.sum(), again)[0]
    assert float((got - gradient).norm() / gradient.norm()) < 1e-3
    assert float(vector.norm(dim=1).sub(1).abs().max()) < 1e-12


def test_one_step_of_a_vector_by_hand() -> None:
    """A = diag(3, 0); u = (1, 1): A u = (3, 0), so u becomes (1, 0), and |A u|^2 = 9."""
    vector = torch.ones(1, 2)
    value, grad = by_vector(torch.tensor([[2.0, 0.0], [0.0, 1.0]]), vector)
    assert value.tolist() == pytest.approx([9.0])
    torch.testing.assert_close(vector, torch.tensor([[1.0, 0.0]]), atol=1e-5, rtol=0)
    torch.testing.assert_close(grad, torch.tensor([[24.0, 0.0], [0.0, 0.0]]), atol=1e-4, rtol=0)


def test_exactly_orthonormal_filters_leave_the_vector_as_it_is() -> None:
    vector = torch.full((1, 4), 0.5)
    value, grad = by_vector(torch.eye(4, 6), vector)
    assert value.tolist() == [0.0]
    assert not grad.any()
    assert torch.equal(vector, torch.full((1, 4), 0.5))


def test_weights_that_are_not_finite_leave_the_vector_as_it_is() -> None:
    vector = torch.full((1, 4), 0.5)
    for bad in (float("nan"), float("inf"), 1e15):  # whose norm overflows float32
        value, grad = by_vector(torch.eye(4, 6) * bad, vector)
        assert not value.isfinite().any()
        assert not grad.isfinite().all()
        assert torch.equal(vector, torch.full((1, 4), 0.5))


def test_an_eigenvector_that_is_no_longer_the_top_one_is_left() -> None:
    """A is diagonal: nothing but the kick leads from one axis to another."""
    weight = torch.diag(torch.tensor([2.0, 1.5, 1.0]))
    vector = torch.tensor([[1.0, 0.0, 0.0]])
    assert by_vector(weight, vector)[0].tolist() == pytest.approx([9.0])
    weight[0, 0] = 1.0  # now A u = 0
    for _ in range(3):
        value, _ = by_vector(weight, vector)
    assert value.tolist() == pytest.approx([1.5625])


def test_equal_eigenvalues_of_both_signs_give_a_subgradient() -> None:
    """Two equal unit filters: A = [[0, 1], [1, 0]], eigenvalues 1 and -1, and any u has |A u| = 1.

    The gradients are 4 u u^T W of (1, 1) / sqrt(2), 0 of the other one, and what lies between.
    """
    weight = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    value, grad = by_vector(weight, torch.tensor([[1.0, 0.2]]))
    assert value.tolist() == pytest.approx([1.0])
    share = grad[0, 0].item() / 4
    assert 0 < share < 1
    torch.testing.assert_close(grad, 4 * share * weight)


def small_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3, groups=2), nn.Linear(5, 4))


def test_a_regulariser_keeps_vectors_from_step_to_step() -> None:
    net = small_net()
    reg = ox.OrthoRegularizer(net, "srip", strength=1.0, layer_weights="uniform")
    true = [row.penalty for row in reg.report()]
    values = [reg().item() for _ in range(200)]
    assert values[-1] == pytest.approx(sum(true), rel=1e-5)


def test_vectors_survive_in_the_state() -> None:
    net = small_net()
    reg = ox.OrthoRegularizer(net, "srip", strength=1.0)
    for _ in range(3):
        reg()
    state = copy.deepcopy(reg.state_dict())
    want = [reg().item() for _ in range(2)]
    other = ox.OrthoRegularizer(net, "srip", strength=1.0)
    other.load_state_dict(state)
    assert [other().item() for _ in range(2)] == want
    assert {k: v.shape for k, v in state["vectors"].items()} == {"0": (1, 8), "1": (2, 3)}
    for wrong, text in (
        ({"0": torch.ones(1, 8)}, "state has the eigenvectors None of layer '1'"),
        ({**state["vectors"], "0": torch.ones(1, 7)}, r"\(1, 7\) of layer '0', .* has \(1, 8\)"),
    ):
        before = reg.state_dict()
        with pytest.raises(ValueError, match=text):
            reg.load_state_dict({**state, "vectors": wrong})
        assert reg.step == before["step"]
    for key, bad in (("step", None), ("step", -1), ("attached_steps", ["a"])):
        before = reg.state_dict()
        with pytest.raises(ValueError, match=r"state has the step number .*, expected an integer"):
            reg.load_state_dict({**state, key: bad})
        after = reg.state_dict()["vectors"]
        assert all(torch.equal(after[name], v) for name, v in before["vectors"].items())
    without = {key: value for key, value in state.items() if key != "vectors"}
    with pytest.raises(ValueError, match="state has no vectors"):
        reg.load_state_dict(without)


def test_vectors_of_a_copy_are_its_own() -> None:
    reg = ox.OrthoRegularizer(small_net(), "srip")
    for other in (copy.deepcopy(reg), pickle.loads(pickle.dumps(reg))):
        before = {k: v.clone() for k, v in reg.state_dict()["vectors"].items()}
        other()
        for key, value in reg.state_dict()["vectors"].items():
            assert torch.equal(value, before[key])


def test_a_pruned_layer_gets_a_new_vector_and_the_others_keep_theirs() -> None:
    net = small_net()
    reg = ox.OrthoRegularizer(net, "srip", strength=1.0, layer_weights="uniform")
    reg()
    before = reg.state_dict()["vectors"]
    net[0].weight = nn.Parameter(net[0].weight[:5].detach().clone())
    net[0].bias = nn.Parameter(net[0].bias[:5].detach().clone())
    after = reg.state_dict()["vectors"]
    assert after["0"].shape == (1, 5)
    assert torch.equal(after["1"], before["1"])
    for _ in range(300):
        value = reg()
    assert value.item() == pytest.approx(sum(r.penalty for r in reg.report()), rel=1e-5)


def test_vectors_that_a_cuda_graph_reads_live_as_long_as_the_parameters(monkeypatch) -> None:
    net = small_net()
    reg = ox.OrthoRegularizer(net, "srip")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    attachment = reg.attach(optimizer)
    monkeypatch.setattr("orthoreg_ext.attachment.is_capturing", lambda device: True)
    optimizer.step()
    held = [weakref.ref(vector) for vector in reg._plan.vectors().values()]
    assert len(held) == 2
    attachment.remove()
    del reg, optimizer, attachment
    gc.collect()
    assert all(ref() is not None for ref in held)
    del net
    gc.collect()
    assert all(ref() is None for ref in held)


def test_training_with_srip_brings_the_norm_down() -> None:
    net = small_net()
    reg = ox.OrthoRegularizer(net, "srip", strength=0.1, layer_weights="uniform", include="*")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    reg.attach(optimizer)
    before = sum(r.penalty for r in reg.report())
    for _ in range(300):
        optimizer.zero_grad()
        optimizer.step()
    rows = reg.report()
    assert sum(r.penalty for r in rows) < before / 50


# --- ocnn: the self-convolution


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("k", [1, 3, 5, 7])
def test_ocnn_is_the_convolution_of_the_kernels_whose_centre_is_the_gram(stride, k) -> None:
    kernels = torch.randn(5, 3, k, k, dtype=torch.float64, requires_grad=True)
    padding = (k - 1) // stride * stride
    out = nnf.conv2d(kernels, kernels, stride=stride, padding=padding)
    centre = (k - 1) // stride
    assert out.shape == (5, 5, 2 * centre + 1, 2 * centre + 1)
    rows = kernels.flatten(1)
    torch.testing.assert_close(out[:, :, centre, centre], rows @ rows.T)
    identity = torch.zeros_like(out)
    identity[:, :, centre, centre] = torch.eye(5)
    want = (out - identity).norm()
    got = F.gram_penalty([kernels], "ocnn", strides=[stride])
    torch.testing.assert_close(got[0], want)
    (a,), (b,) = torch.autograd.grad(got.sum(), kernels), torch.autograd.grad(want, kernels)
    torch.testing.assert_close(a, b)


@pytest.mark.parametrize("strides", [(1, 2), (2, 1), (3, 2), (2, 5)])
def test_ocnn_of_kernels_and_strides_that_are_no_squares(strides: tuple[int, int]) -> None:
    kernels = torch.randn(4, 2, 3, 5, dtype=torch.float64)
    padding = tuple((k - 1) // s * s for k, s in zip((3, 5), strides, strict=True))
    out = nnf.conv2d(kernels, kernels, stride=strides, padding=padding)
    out[:, :, out.shape[2] // 2, out.shape[3] // 2] -= torch.eye(4)
    got = F.gram_penalty([kernels], "ocnn", strides=[strides])
    torch.testing.assert_close(got[0], out.norm())


@pytest.mark.parametrize(("stride", "dilation"), [(1, 2), (2, 2), (2, 3), (4, 2), (3, 1)])
def test_a_dilated_convolution_is_the_one_with_zeros_between_its_taps(stride, dilation) -> None:
    layer = nn.Conv2d(3, 4, 3, stride=stride, dilation=dilation, bias=False).double()
    k = 2 * dilation + 1
    spread = torch.zeros(4, 3, k, k, dtype=torch.float64)
    spread[:, :, ::dilation, ::dilation] = layer.weight.detach()
    reg = ox.OrthoRegularizer(layer, "ocnn", strength=1.0, layer_weights="uniform")
    torch.testing.assert_close(reg(), F.gram_penalty([spread], "ocnn", strides=[stride])[0])


def test_linear_and_pointwise_layers_are_the_norm_of_the_gram_residual() -> None:
    weight = torch.randn(7, 4)
    want = F.gram_penalty([weight], "frobenius", side="rows")
    for same in (weight, weight[:, :, None, None]):
        torch.testing.assert_close(F.gram_penalty([same], "ocnn"), want)
    for stride in (2, 3):  # more than the kernel: no two shifts overlap but 0
        kernels = torch.randn(7, 4, 2, 2)
        want = F.gram_penalty([kernels], "frobenius", side="rows")
        torch.testing.assert_close(F.gram_penalty([kernels], "ocnn", strides=[stride]), want)


def test_groups_of_a_convolution_are_convolutions_of_their_own() -> None:
    kernels = torch.randn(6, 2, 3, 3, dtype=torch.float64)
    halves = [F.gram_penalty([part], "ocnn", strides=[2])[0] for part in kernels.chunk(2)]
    got = F.gram_penalty([kernels], "ocnn", strides=[2], groups=[2])[0]
    torch.testing.assert_close(got, torch.stack(halves).norm())


class Net(nn.Module):
    """Layers that a convolution's penalty takes, and others."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2)
        self.line = nn.Conv1d(3, 4, 3)
        self.up = nn.ConvTranspose2d(8, 4, 2)
        self.fc = nn.Linear(4, 5)
        self.head = nn.Linear(5, 2)


def test_ocnn_takes_strides_from_the_layers_and_skips_what_is_no_2d_convolution() -> None:
    net = Net()
    reg = ox.OrthoRegularizer(net, "ocnn", strength=1.0, layer_weights="uniform")
    report = reg.report()
    assert [(r.name, r.fan_in, r.side) for r in report] == [("conv", 27, "rows"), ("fc", 4, "rows")]
    reasons = {s.name: s.reason for s in report.skipped}
    for name, kind in (("line", "Conv1d"), ("up", "ConvTranspose2d")):
        assert reasons[name] == (
            f"penalty 'ocnn' is of 2-D convolutions and linear layers, not of {kind}"
        )
    want = F.gram_penalty([net.conv.weight, net.fc.weight], "ocnn", strides=[2, 1])
    torch.testing.assert_close(reg(), want.sum())
    with pytest.raises(ValueError, match=r"no layer is left to regularise .* not of Conv1d"):
        ox.OrthoRegularizer(net, "ocnn", include="line")
    with pytest.raises(ValueError, match="bias is True, but a bias has no part in penalty 'ocnn'"):
        ox.OrthoRegularizer(net, "ocnn", bias=True)
    with pytest.raises(ValueError, match="penalty 'ocnn' compares filters: side cannot be 'cols'"):
        ox.OrthoRegularizer(net, "ocnn", side="cols")


# --- on an optimizer


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", WHOLE)
def test_attached_it_adds_the_gradient_of_the_term(name: str, device: str) -> None:
    net = small_net().to(device)
    term, attached = (ox.OrthoRegularizer(net, name, strength=0.7) for _ in range(2))
    term().backward()
    want = [None if p.grad is None else p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    attached.attach(optimizer)
    optimizer.step()
    for parameter, gradient in zip(net.parameters(), want, strict=True):
        if gradient is None:
            assert parameter.grad is None
        else:
            torch.testing.assert_close(parameter.grad, gradient)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", WHOLE)
def test_an_attached_step_reads_nothing_on_the_host(name: str, device: str) -> None:
    net = small_net().to(device)
    reg = ox.OrthoRegularizer(net, name)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    reg.attach(optimizer)
    optimizer.step()
    with Operators() as seen:
        optimizer.step()
    assert len(seen.names) > 5
    assert not seen.from_host()
