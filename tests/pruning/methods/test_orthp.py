from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from orthoreg_ext.pruning import OrthP, orthogonalise, prune

from ..nets import IMAGE, MLP, ResNet, randomised
from .loops import Small, check_optimizer, gone, ordered, sgd, step


def matrices(module: Any) -> list[Tensor]:
    """The filter matrices of a layer, [n, k] for each group, written out anew."""
    weight = module.weight.detach().double()
    if isinstance(module, nn.ConvTranspose2d):
        o, i = module.out_channels // module.groups, module.in_channels // module.groups
        return [
            torch.stack([weight[g * i : (g + 1) * i, j].flatten() for j in range(o)])
            for g in range(module.groups)
        ]
    groups = getattr(module, "groups", 1)
    n = len(weight) // groups
    return [weight[g * n : (g + 1) * n].flatten(1) for g in range(groups)]


def off_identity(matrix: Tensor, gain: float = 1.0) -> float:
    """How far the smaller Gram matrix is from gain^2 times the identity."""
    small = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
    return float((small - gain**2 * torch.eye(len(small), dtype=small.dtype)).abs().max())


def filters_of(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, (nn.Linear, nn.modules.conv._ConvNd))]


def test_a_hand_made_matrix() -> None:
    layer = nn.Linear(3, 2, bias=False)
    layer.weight.data = torch.tensor([[3.0, 4.0, 0.0], [3.0, 4.0, -2.0]])
    assert orthogonalise(layer) == [""]
    expected = torch.tensor([[0.6, 0.8, 0.0], [0.0, 0.0, -1.0]])  # Gram and Schmidt
    torch.testing.assert_close(layer.weight.data, expected)
    orthogonalise(layer, gain=2.0)
    torch.testing.assert_close(layer.weight.data, 2 * expected)


@pytest.mark.parametrize("name", sorted(IMAGE))
@pytest.mark.parametrize("gain", [1.0, 1.5])
def test_every_layer_is_orthonormal_after_the_cut(name: str, gain: float, x: Tensor) -> None:
    model = randomised(IMAGE[name]())
    optimizer = sgd(model, 1e-2)
    step(model, optimizer, None)
    method = OrthP(model, x, optimizer=optimizer, ratio=0.4, gain=gain)
    assert method.done
    twin = copy.deepcopy(model)
    result = method.finish()
    expected = prune(twin, x, criterion="l1", scope="local", ratio=0.4)
    assert result.history == expected.history
    for module in filters_of(model):
        assert max(off_identity(matrix, gain) for matrix in matrices(module)) < 1e-5
    for (name_, ours), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        if ours.dim() == 1:
            assert torch.equal(ours, theirs), name_  # biases and norms stay
    check_optimizer(model, optimizer)
    step(model, optimizer, None)
    assert all(p.isfinite().all() for p in model.parameters())


def test_the_state_of_replaced_weights_is_dropped(x: Tensor) -> None:
    for kind in (torch.optim.SGD, torch.optim.Adam):
        model = Small()
        settings = {"lr": 0.1, "momentum": 0.9} if kind is torch.optim.SGD else {"lr": 0.1}
        optimizer = kind(model.parameters(), **settings)
        step(model, optimizer, None)
        OrthP(model, x, optimizer=optimizer).finish()
        assert model.conv1.weight not in optimizer.state
        assert model.conv1.bias in optimizer.state
        step(model, optimizer, None)
        assert max(off_identity(m) for m in matrices(model.conv1)) < 2  # no leap from old state
        check_optimizer(model, optimizer)


def test_a_linear_network_of_square_layers_is_an_isometry() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(12, 12, bias=False) for _ in range(6)))
    OrthP(model, torch.randn(2, 12), ratio=0.5).finish()
    jacobian = torch.autograd.functional.jacobian(model, torch.randn(12))
    singular = torch.linalg.svdvals(jacobian)
    assert (singular[:6] - 1).abs().max() < 1e-5  # as many as the narrowest layer has filters
    assert model[2].weight.shape == (6, 6)


def test_a_matrix_without_full_rank_keeps_its_filters() -> None:
    layer = nn.Conv2d(2, 4, 3, bias=False)
    layer.weight.data[1] = layer.weight.data[0]  # rank 3
    layer.weight.data[3] = -2 * layer.weight.data[0]  # rank 2
    orthogonalise(layer)
    assert off_identity(*matrices(layer)) < 1e-6  # with sign(0) = 0 two filters would be zero
    tall = nn.Linear(3, 5, bias=False)
    tall.weight.data[:, 1] = tall.weight.data[:, 0]
    orthogonalise(tall)
    assert off_identity(*matrices(tall)) < 1e-6


@pytest.mark.parametrize("shape", [(4, 9), (9, 4), (4, 4)])
def test_filters_of_zeros_stay_zero(shape: tuple[int, int]) -> None:
    layer = nn.Linear(shape[1], shape[0], bias=False)
    layer.weight.data[[1, 2]] = 0
    orthogonalise(layer)
    assert not layer.weight.data[[1, 2]].any()
    live = layer.weight.detach().double()[[i for i in range(shape[0]) if i not in (1, 2)]]
    assert off_identity(live) < 1e-6
    layer.weight.data.zero_()
    orthogonalise(layer)
    assert not layer.weight.data.any()


def test_depthwise_filters_keep_their_direction() -> None:
    layer = nn.Conv2d(4, 4, 3, groups=4, bias=False)
    before = layer.weight.detach().clone()
    orthogonalise(layer)
    norms = before.flatten(1).norm(dim=1).view(4, 1, 1, 1)
    torch.testing.assert_close(layer.weight.data, before / norms)


def test_channels_last_and_half_precision_stay() -> None:
    layer = nn.Conv2d(4, 6, 3).to(torch.bfloat16, memory_format=torch.channels_last)
    pointer = layer.weight.data_ptr()
    orthogonalise(layer)
    assert layer.weight.dtype == torch.bfloat16
    assert layer.weight.data_ptr() == pointer
    assert layer.weight.is_contiguous(memory_format=torch.channels_last)
    assert off_identity(*matrices(layer)) < 0.02
    double = nn.Linear(4, 6).double()
    orthogonalise(double)
    assert off_identity(*matrices(double)) < 1e-14


def test_the_gain_can_be_a_nonlinearity() -> None:
    layer = nn.Linear(8, 3)
    orthogonalise(layer, gain="relu")
    assert off_identity(*matrices(layer), gain=2**0.5) < 1e-6


def test_only_the_named_layers_that_train_are_touched(x: Tensor) -> None:
    model = randomised(ResNet())
    model.layer1.conv1.requires_grad_(False)
    before = {name: p.clone() for name, p in model.named_parameters()}
    assert orthogonalise(model, layers=["layer1", model.fc]) == ["layer1.conv2", "fc"]
    changed = [n for n, p in model.named_parameters() if not torch.equal(p, before[n])]
    assert changed == ["layer1.conv2.weight", "fc.weight"]


def test_it_is_the_last_step_of_any_removal(x: Tensor) -> None:
    model = randomised(ResNet())
    optimizer = sgd(model)
    step(model, optimizer, None)
    prune(model, x, criterion="l2", ratio=0.4, optimizer=optimizer)
    orthogonalise(model, optimizer=optimizer)
    assert max(off_identity(m) for layer in filters_of(model) for m in matrices(layer)) < 1e-5
    check_optimizer(model, optimizer)


def test_a_finished_run_resumes(x: Tensor) -> None:
    model = randomised(ResNet())
    method = OrthP(model, x, gain="relu")
    assert not json.loads(json.dumps(method.state_dict()))["finished"]
    method.finish()
    state = json.loads(json.dumps(method.state_dict()))
    other = ResNet()
    again = OrthP(other, x, gain="relu")
    again.load_state_dict(state)
    other.load_state_dict(model.state_dict())
    assert again.finish().history == method.finish().history
    assert torch.equal(model.eval()(x), other.eval()(x))


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"gain": 0}, ValueError, "gain is 0"),
        ({"gain": "rulu"}, ValueError, "rulu"),
        ({"layers": ["conv3"]}, ValueError, "did you mean 'conv1'|did you mean 'conv2'"),
        ({"layers": "conv1"}, TypeError, "put the one in a list"),
        ({"optimizer": 3}, TypeError, "optimizer is int"),
    ],
)
def test_wrong_arguments_change_nothing(
    arguments: dict[str, Any], error: type[Exception], match: str, x: Tensor
) -> None:
    model = Small()
    before = copy.deepcopy(model.state_dict())
    for call in (lambda: orthogonalise(model, **arguments), lambda: OrthP(model, x, **arguments)):
        with pytest.raises(error, match=match):
            call()
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_what_cannot_be_made_orthonormal_is_left_alone(x: Tensor) -> None:
    model = ordered(Small())
    method = OrthP(model, x)
    model.fc.weight.data[0, 0] = float("nan")
    before = copy.deepcopy(model.state_dict())
    for call in (lambda: orthogonalise(model), method.finish):
        with pytest.raises(ValueError, match="'fc' has weights that are NaN or infinite"):
            call()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(before[name], tensor, equal_nan=True)
    parametrized = MLP()
    parametrizations.weight_norm(parametrized.fc2)
    with pytest.raises(ValueError, match=r"'fc2'.*remove_parametrizations"):
        orthogonalise(parametrized)


def test_the_set_is_the_lowest_of_each_layer(x: Tensor) -> None:
    assert gone(OrthP(ordered(Small()), x).finish()) == {"conv1": [0, 1], "conv2": [0, 1, 2]}
