"""EPruner against exemplars that can be seen, and against scikit-learn called as its authors do."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from orthoreg_ext.pruning.methods import EPruner

from ..nets import Grouped, ResNet, Separable
from .loops import (
    check_optimizer,
    check_resume,
    example,
    refused,
    sgd,
    small_net,
    step,
)

cluster = pytest.importorskip("sklearn.cluster")


def clustered(width: int = 9, clusters: int = 3) -> nn.Sequential:
    """Two layers whose filters lie around a few centres; the first of each is the centre."""
    torch.manual_seed(0)
    net = small_net()
    net[0] = nn.Conv2d(3, width, 3, padding=1)
    net[1] = nn.BatchNorm2d(width)
    net[3] = nn.Conv2d(width, 8, 3, padding=1)
    with torch.no_grad():
        for conv in (net[0], net[3]):
            centres = torch.randn(clusters, *conv.weight.shape[1:])
            for i in range(len(conv.weight)):
                noise = 0.05 * torch.randn(conv.weight.shape[1:])
                conv.weight[i] = centres[i % clusters] + (noise if i >= clusters else 0)
    return net


def removed(result: object) -> dict[str, set[int]]:
    return {e["layer"]: set(e["removed"]) for e in result.history}


def test_exemplars_stay_and_their_kin_goes() -> None:
    model = clustered()
    optimizer = sgd(model)
    step(model, optimizer, EPruner(model, example()))  # momentum
    model = clustered()
    optimizer = sgd(model)
    method = EPruner(model, example(), optimizer=optimizer)
    assert method.done
    weights = {i: model[i].weight.detach().clone() for i in (0, 3)}
    result = method.finish()
    assert (model[0].out_channels, model[3].out_channels) == (3, 3)
    for layer, gone in removed(result).items():
        stay = sorted(set(range(len(weights[int(layer)]))) - gone)
        assert {i % 3 for i in stay} == {0, 1, 2}, "one of each cluster"
        if layer == "0":  # an exemplar is a filter as it was
            torch.testing.assert_close(model[0].weight, weights[0][stay])
    check_optimizer(model, optimizer)
    model(example())


@pytest.mark.parametrize("beta", [1.0, 1.2, 3.0])
def test_the_set_is_that_of_the_released_call(beta: float) -> None:
    torch.manual_seed(3)
    model = small_net()
    expected = {}
    for name, conv in (("0", model[0]), ("3", model[3])):
        rows = conv.weight.detach().flatten(1).double().numpy()
        similar = -((rows[:, None] - rows[None]) ** 2).sum(-1)
        fitted = cluster.AffinityPropagation(
            preference=np.median(similar, axis=0) * beta, random_state=0
        ).fit(rows)
        expected[name] = set(range(len(rows))) - set(fitted.cluster_centers_indices_.tolist())
    found = removed(EPruner(model, example(), beta=beta).finish())
    assert found == {name: gone for name, gone in expected.items() if gone}


def test_a_larger_beta_leaves_fewer_and_may_differ_by_layer() -> None:
    left = []
    for beta in (0.4, 1.0, 3.0):
        model = small_net()
        EPruner(model, example(), beta=beta, betas={"3": 3.0}).finish()
        left.append((model[0].out_channels, model[3].out_channels))
    assert left[0][0] > left[1][0] >= left[2][0]
    assert len({second for _, second in left}) == 1


def test_limits_leave_some_that_are_no_exemplars() -> None:
    model = clustered()
    result = EPruner(model, example(), round_to=4).finish()
    assert (model[0].out_channels, model[3].out_channels) == (4, 4)
    assert all(len(gone) for gone in removed(result).values())
    model = clustered()
    EPruner(model, example(), max_layer_ratio=0.34).finish()
    assert (model[0].out_channels, model[3].out_channels) == (6, 6)


@pytest.mark.parametrize("net", [ResNet, Separable, Grouped])
def test_coupled_filters_are_compared_as_one_vector(net: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = net()
    optimizer = sgd(model)
    x = torch.randn(2, 3, 8, 8)
    EPruner(model, x, optimizer=optimizer, beta=2.0).finish()
    check_optimizer(model, optimizer)
    model(x)
    if net is ResNet:
        stay = model.stem.out_channels
        assert stay == model.layer1.conv2.out_channels < 8


def test_a_coupled_set_by_hand() -> None:
    # stem, layer1.conv2 of a ResNet write the same 8 channels: exemplars of the joined filters
    torch.manual_seed(1)
    model = ResNet()
    joined = torch.cat([model.stem.weight.flatten(1), model.layer1.conv2.weight.flatten(1)], 1)
    rows = joined.detach().double().numpy()
    similar = -((rows[:, None] - rows[None]) ** 2).sum(-1)
    fitted = cluster.AffinityPropagation(
        affinity="precomputed", preference=np.median(similar, axis=0) * 1.2, random_state=0
    ).fit(similar)
    stay = set(fitted.cluster_centers_indices_.tolist())
    assert 0 < len(stay) < 8
    found = removed(EPruner(model, torch.randn(2, 3, 8, 8), beta=1.2).finish())
    assert found["stem"] == found["layer1.conv2"] == set(range(8)) - stay


def test_batch_norms_start_afresh_where_asked() -> None:
    for fresh in (False, True):
        model = clustered()
        optimizer = sgd(model)
        with torch.no_grad():
            model[1].weight.fill_(3)
            model[1].running_mean.fill_(2)
        method = EPruner(model, example(), optimizer=optimizer, reset_norms=fresh)
        step(model, optimizer, method)
        momentum = optimizer.state[model[1].weight]["momentum_buffer"].any()
        assert momentum
        method.finish()
        assert bool((model[1].weight == 1).all()) is fresh
        assert bool((model[1].running_mean == 0).all()) is fresh
        assert (model[1].weight in optimizer.state) is not fresh
        check_optimizer(model, optimizer)


def test_the_choice_is_the_same_in_every_run() -> None:
    state = np.random.get_state()[1].copy()
    first, second = (removed(EPruner(small_net(), example(), beta=1.2).finish()) for _ in range(2))
    assert first == second
    assert (np.random.get_state()[1] == state).all()


def test_frozen_layers_stay() -> None:
    model = clustered()
    model[3].requires_grad_(False)
    EPruner(model, example()).finish()
    assert (model[0].out_channels, model[3].out_channels) == (3, 8)


def test_a_resumed_run_ends_alike() -> None:
    check_resume(
        small_net,
        lambda m, o: EPruner(m, example(), optimizer=o, betas={"0": 1.0}),
        total=8,
        at=5,
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"beta": 0}, "beta is 0"),
        ({"betas": {"3": -1}}, r"betas\['3'\] is -1"),
        ({"betas": {"4": 1.0}}, "unknown layer in betas '4'"),
        ({"ratio": 0.5}, "leave ratio out"),
        ({"criterion": "l1"}, "leave criterion out"),
        ({"scope": "global"}, "leave scope out"),
    ],
)
def test_bad_arguments_change_nothing(arguments: dict, message: str) -> None:
    model = small_net()
    optimizer = sgd(model)
    with refused(message, model, optimizer):
        EPruner(model, example(), optimizer=optimizer, **arguments)


def test_keeping_all_is_an_error_that_says_so() -> None:
    model = small_net()
    with pytest.raises(ValueError, match="keeps every filter"):
        EPruner(model, example(), beta=1e-6).finish()
    assert (model[0].out_channels, model[3].out_channels) == (6, 8)


def test_weights_that_are_not_finite_are_refused() -> None:
    model = small_net()
    with torch.no_grad():
        model[3].weight[2] = float("nan")
    with pytest.raises(ValueError, match=r"layer '3'.*NaN"):
        EPruner(model, example()).finish()
    assert (model[0].out_channels, model[3].out_channels) == (6, 8)
