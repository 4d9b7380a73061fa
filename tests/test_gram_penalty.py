"""gram, gram_penalty and add_gram_penalty_grad_: values, gradients, layouts, precisions."""

from __future__ import annotations

import pytest
import torch

import orthoreg_ext as ox
import orthoreg_ext.functional as F
from orthoreg_ext.penalties import PENALTIES, Penalty
from tests.conftest import Layers, Target, random_layers, relative_error
from tests.test_in_place import Operators

NAMES = sorted(PENALTIES)
SIDES = ("rows", "cols", "small")
CASES = 500
ROUNDING = {torch.float16: 2**-11, torch.bfloat16: 2**-8}  # of a stored gradient


def released(weight: torch.Tensor, bias: torch.Tensor | None, columns: bool) -> torch.Tensor:
    """OrthoReg's penalty of one layer, from its formula: entrywise L1 of the Gram residual."""
    matrix = weight.reshape(weight.shape[0], -1)
    if bias is not None:
        matrix = torch.cat([matrix, bias[:, None]], 1)
    product = matrix.T @ matrix if columns else matrix @ matrix.T
    return (product - torch.eye(len(product), dtype=matrix.dtype)).abs().sum()


# name, W, rows value, cols value, gradient of the rows value; worked out by hand
TABLE = [
    ("orthoreg", [[1.0, 2.0]], 4.0, 7.0, [[2.0, 4.0]]),
    ("orthoreg", [[2.0, 0.0], [0.0, 1.0]], 3.0, 3.0, [[4.0, 0.0], [0.0, 0.0]]),
    ("so", [[1.0, 2.0]], 16.0, 17.0, [[16.0, 32.0]]),
    ("so", [[1.0], [1.0]], 2.0, 1.0, [[4.0], [4.0]]),
    ("offdiag", [[1.0, 2.0], [1.0, 0.0]], 2.0, 8.0, [[4.0, 0.0], [4.0, 8.0]]),
]


@pytest.mark.parametrize(("name", "w", "rows", "cols", "grad"), TABLE)
def test_hand_computed(target: Target, name, w, rows, cols, grad) -> None:
    weight = torch.tensor(w, device=target.device, requires_grad=True)
    value = F.gram_penalty([weight], name, side="rows")
    assert value.tolist() == [rows]
    assert F.gram_penalty([weight], name, side="cols").tolist() == [cols]
    (got,) = torch.autograd.grad(value.sum(), weight)
    assert got.tolist() == grad
    F.add_gram_penalty_grad_([weight], name, strength=0.5, side="rows")
    assert weight.grad.tolist() == [[0.5 * x for x in row] for row in grad]


@pytest.mark.parametrize("seed", range(CASES))
def test_random_layers_agree_with_the_reference_in_float64(target: Target, seed: int) -> None:
    """Values, gradients, added gradients and Gram matrices; every fifth case mixes precisions."""
    large = seed % 25 == 0
    torch.set_num_threads(2 if large else 1)
    layers = random_layers(
        seed,
        target.device,
        None if seed % 5 == 4 else torch.float32,
        count=2 if large else None,
        budget=40_000_000 if large else 60_000,
    )
    oracle = layers.double()
    name, side = NAMES[seed % 3], SIDES[seed // 3 % 3]
    coefficients = torch.rand(len(layers.weights), generator=torch.Generator().manual_seed(seed))
    values = F.gram_penalty(penalty=name, side=side, **layers.arguments())
    weighed = (values * coefficients.to(values)).sum()
    grads = torch.autograd.grad(weighed, layers.parameters())
    with ox.backend("reference"):
        want = F.gram_penalty(penalty=name, side=side, **oracle.arguments())
        want_grams = F.gram(side=side, **oracle.arguments())
    want_grads = torch.autograd.grad((want * coefficients).sum(), oracle.parameters())
    assert relative_error(values, want) <= target.tolerance, f"seed {seed}"
    for parameter, got, expected in zip(layers.parameters(), grads, want_grads, strict=True):
        assert got.dtype == parameter.dtype
        tolerance = target.tolerance + ROUNDING.get(got.dtype, 0)
        assert relative_error(got, expected) <= tolerance, f"seed {seed} {got.dtype}"
    added = F.add_gram_penalty_grad_(
        penalty=name,
        side=side,
        strength=0.5,
        coefficients=coefficients.to(target.device),
        **layers.arguments(),
    )
    assert relative_error(added, want * coefficients) <= target.tolerance
    for parameter, expected in zip(layers.parameters(), want_grads, strict=True):
        tolerance = target.tolerance + ROUNDING.get(parameter.dtype, 0)
        assert relative_error(parameter.grad, 0.5 * expected) <= tolerance, f"seed {seed}"
    for got, expected in zip(F.gram(side=side, **layers.arguments()), want_grams, strict=True):
        assert relative_error(got, expected) <= target.tolerance, f"seed {seed}"


@pytest.mark.parametrize("seed", range(30))
def test_orthoreg_is_the_released_formula(target: Target, seed: int) -> None:
    layers = random_layers(2000 + seed, target.device, torch.float64, count=3, budget=30_000)
    layers.groups = [1] * 3
    for side in ("rows", "cols"):
        values = F.gram_penalty(side=side, **layers.arguments())
        oracle = layers.double()
        want = torch.stack(
            [
                released(w, b, side == "cols")
                for w, b in zip(oracle.weights, oracle.biases, strict=True)
            ]
        )
        assert relative_error(values, want) <= 1e-12
        got = torch.autograd.grad(values.sum(), layers.parameters())
        expected = torch.autograd.grad(want.sum(), oracle.parameters())
        for a, b in zip(got, expected, strict=True):
            assert relative_error(a, b) <= 1e-12


def test_gram_of_both_sides_and_groups(target: Target) -> None:
    layers = random_layers(7, target.device, count=5, budget=100_000)
    for side in SIDES:
        for i, gram in enumerate(F.gram(side=side, **layers.arguments())):
            oracle = layers.double()
            matrix = oracle.weights[i].flatten(1)
            if oracle.biases[i] is not None:
                matrix = torch.cat([matrix, oracle.biases[i][:, None]], 1)
            pieces = torch.stack(matrix.chunk(layers.groups[i]))
            rows = side == "rows" or (side == "small" and pieces.shape[1] <= pieces.shape[2])
            want = pieces @ pieces.mT if rows else pieces.mT @ pieces
            want = want if layers.groups[i] > 1 else want[0]
            assert gram.shape == want.shape
            assert relative_error(gram, want) <= target.tolerance
            assert torch.equal(gram, gram.mT)


def test_so_values_of_the_two_sides_differ_by_n_minus_k(target: Target) -> None:
    weight = torch.randn(12, 5, device=target.device, dtype=torch.float64)
    rows, cols = (F.gram_penalty([weight], "so", side=s) for s in ("rows", "cols"))
    torch.testing.assert_close(
        rows - cols, torch.tensor([7.0], dtype=torch.float64, device=target.device)
    )
    small = F.gram_penalty([weight], "so", side="small")
    torch.testing.assert_close(small, cols)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("side", SIDES)
def test_pruned_filters_leave_the_gram_matrix(target: Target, name: str, side: str) -> None:
    weight = torch.randn(9, 6, device=target.device, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(9, device=target.device, dtype=torch.float64, requires_grad=True)
    mask = torch.zeros(9, dtype=torch.bool, device=target.device)
    mask[[1, 4, 8]] = True
    side = side if side != "small" else "cols"
    for pruned in (mask, mask.nonzero().flatten()):
        value = F.gram_penalty([weight], name, side=side, pruned=[pruned], biases=[bias])
        kept = F.gram_penalty([weight[~mask]], name, side=side, biases=[bias[~mask]])
        torch.testing.assert_close(value, kept)
        got = torch.autograd.grad(value.sum(), [weight, bias])
        want = torch.autograd.grad(kept.sum(), [weight, bias])
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)
            assert not a[mask].any()
    F.add_gram_penalty_grad_([weight], name, strength=1, side=side, pruned=[mask], biases=[bias])
    torch.testing.assert_close(weight.grad, want[0])


@pytest.mark.parametrize("seed", range(60))
def test_pruned_filters_of_random_layers_are_left_out(target: Target, seed: int) -> None:
    """Against the layers without those filters; the gradients of the pruned ones stay as they were.

    In a group of n filters of which p are pruned, p rows leave W: groups prune the same number here
    so that what is left still splits evenly.
    """
    generator = torch.Generator().manual_seed(seed)
    layers = random_layers(seed, target.device, budget=60_000)
    name, side = NAMES[seed % 3], ("rows", "cols")[seed // 3 % 2]
    pruned, kept = [], Layers(groups=layers.groups)
    for weight, bias, groups in zip(layers.weights, layers.biases, layers.groups, strict=True):
        n = weight.shape[0] // groups
        mask = torch.zeros(groups, n, dtype=torch.bool)
        for row in mask:
            row[torch.randperm(n, generator=generator)[: n * (seed % 7) // 7]] = True
        mask = mask.flatten().to(target.device)
        pruned.append(mask if mask.any() or seed % 2 else None)
        kept.weights.append(weight.detach()[~mask].double().requires_grad_())
        kept.biases.append(None if bias is None else bias.detach()[~mask].double().requires_grad_())
    values = F.gram_penalty(penalty=name, side=side, pruned=pruned, **layers.arguments())
    with ox.backend("reference"):
        want = F.gram_penalty(penalty=name, side=side, **kept.arguments())
    assert relative_error(values, want) <= target.tolerance, f"seed {seed}"
    grads = torch.autograd.grad(values.sum(), layers.parameters())
    want_grads = torch.autograd.grad(want.sum(), kept.parameters())
    for parameter in layers.parameters():
        parameter.grad = torch.full_like(parameter, 3)
    added = F.add_gram_penalty_grad_(
        penalty=name, side=side, strength=1, pruned=pruned, **layers.arguments()
    )
    assert torch.equal(added, values)
    masks = [*pruned, *(m for m, b in zip(pruned, layers.biases, strict=True) if b is not None)]
    for parameter, mask, got, expected in zip(
        layers.parameters(), masks, grads, want_grads, strict=True
    ):
        mask = parameter.new_zeros(len(parameter), dtype=torch.bool) if mask is None else mask
        assert relative_error(got[~mask], expected) <= target.tolerance, f"seed {seed}"
        assert not got[mask].any()
        assert (parameter.grad[mask] == 3).all()
        torch.testing.assert_close(parameter.grad, 3 + got)


@pytest.mark.parametrize("name", NAMES)
def test_layer_of_pruned_filters_has_the_value_of_none(target: Target, name: str) -> None:
    weight = torch.randn(5, 3, device=target.device, requires_grad=True)
    mask = torch.ones(5, dtype=torch.bool, device=target.device)
    for side, want in (("rows", 0.0), ("cols", 0.0 if name == "offdiag" else 3.0)):
        value = F.gram_penalty([weight], name, side=side, pruned=[mask])
        assert value.tolist() == [want]
        assert not torch.autograd.grad(value.sum(), weight)[0].any()


@pytest.mark.parametrize("side", ["rows", "cols"])
def test_pruned_filters_are_not_read(target: Target, side: str) -> None:
    weight = torch.randn(40, 50, device=target.device)
    mask = torch.arange(40, device=target.device) % 3 == 0
    want = F.gram_penalty([weight[~mask]], side=side)
    weight[mask] = float("nan")
    weight.requires_grad_()
    for backend in (target.name, "reference"):
        with ox.backend(backend):
            value = F.gram_penalty([weight], side=side, pruned=[mask])
            (grad,) = torch.autograd.grad(value.sum(), weight)
        torch.testing.assert_close(value, want)
        assert torch.equal(grad.isnan().any(1), torch.zeros_like(mask))
        assert not grad[mask].any()


@pytest.mark.parametrize("name", NAMES)
def test_masked_layers_are_written_in_place(
    target: Target, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_autograd(*_: object, **__: object) -> None:
        raise AssertionError("a masked layer went through autograd")

    weight = torch.randn(9, 6, device=target.device, requires_grad=True)
    value = F.gram_penalty([weight], name, pruned=[torch.tensor([2, 3])])
    (want,) = torch.autograd.grad(value.sum(), weight)
    monkeypatch.setattr(F, "gram_penalty", no_autograd)
    F.add_gram_penalty_grad_([weight], name, strength=1, pruned=[torch.tensor([2, 3])])
    assert torch.equal(weight.grad, want)


@pytest.mark.parametrize("name", NAMES)
def test_zero_and_exactly_orthonormal_filters_give_finite_gradients(target: Target, name) -> None:
    for weight in (torch.zeros(4, 6), torch.eye(4, 6), torch.eye(6, 4)):
        weight = weight.to(target.device).requires_grad_()
        value = F.gram_penalty([weight], name)
        (grad,) = torch.autograd.grad(value.sum(), weight)
        assert torch.isfinite(value).all()
        assert torch.equal(grad, torch.zeros_like(grad))


@pytest.mark.parametrize("name", NAMES)
def test_nan_passes_through(target: Target, name: str) -> None:
    weight = torch.ones(3, 4, device=target.device)
    weight[1, 2] = float("nan")
    weight.requires_grad_()
    value = F.gram_penalty([weight], name)
    assert value.isnan().all()
    (grad,) = torch.autograd.grad(value.sum(), weight)
    assert grad.isnan().any()


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    layers = random_layers(11, torch.device("cpu"), budget=2_000_000, count=5)
    results = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        value = F.gram_penalty(**layers.arguments())
        results.append((value, *torch.autograd.grad(value.sum(), layers.parameters())))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_channels_last_keeps_its_layout_and_needs_no_copy(target: Target) -> None:
    weight = torch.randn(8, 5, 3, 3, device=target.device)
    weight = weight.contiguous(memory_format=torch.channels_last).requires_grad_()
    (grad,) = torch.autograd.grad(F.gram_penalty([weight]).sum(), weight)
    assert grad.is_contiguous(memory_format=torch.channels_last)
    F.add_gram_penalty_grad_([weight], strength=1)
    assert weight.grad.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(weight.grad, grad)


def test_gradient_is_added_to_what_is_there(target: Target) -> None:
    weight = torch.randn(8, 20, device=target.device, requires_grad=True)
    weight.grad = torch.ones_like(weight)
    F.add_gram_penalty_grad_([weight], strength=2.0)
    (grad,) = torch.autograd.grad(F.gram_penalty([weight]).sum(), weight)
    torch.testing.assert_close(weight.grad, 1 + 2 * grad)


def test_frozen_weight_gives_its_value_and_gets_no_gradient(target: Target) -> None:
    frozen = torch.randn(4, 6, device=target.device)
    free = torch.randn(4, 6, device=target.device, requires_grad=True)
    values = F.add_gram_penalty_grad_([frozen, free], strength=1)
    torch.testing.assert_close(values, F.gram_penalty([frozen, free]).detach())
    assert frozen.grad is None
    assert free.grad is not None


def test_refused_masks_write_no_gradient(target: Target) -> None:
    weights = [torch.randn(4, 6, device=target.device, requires_grad=True) for _ in range(2)]
    with pytest.raises(ValueError, match="pruned has 1 entries, expected 2"):
        F.add_gram_penalty_grad_(weights, strength=1, pruned=[None])
    with pytest.raises(TypeError, match=r"pruned\[1\] must be a bool mask"):
        F.add_gram_penalty_grad_(weights, strength=1, pruned=[None, [0]])
    assert all(w.grad is None for w in weights)


def test_tensors_of_a_call_stay_on_the_device(target: Target) -> None:
    """Views, frozen weights and float64 between the others: no index, no number leaves the host."""

    def weights() -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(3)
        drawn = [torch.randn(4 + i, 6, generator=generator) for i in range(6)]
        moved = [
            w.to(target.device, torch.float64 if i in (1, 4) else None) for i, w in enumerate(drawn)
        ]
        return [w.requires_grad_(i != 2) for i, w in enumerate(moved)]

    def call(leaves: list[torch.Tensor], strength: object, coefficients: object) -> torch.Tensor:
        taken = [w.t() if i == 3 else w for i, w in enumerate(leaves)]
        return F.add_gram_penalty_grad_(taken, strength=strength, coefficients=coefficients)

    numbers = [0.5, 1.0, 2.0, 3.0, 0.25, 1.5]
    expected, leaves = weights(), weights()
    want = call(expected, 0.5, numbers)
    strength = torch.full((), 0.5, device=target.device)
    coefficients = torch.tensor(numbers, device=target.device)
    with Operators() as seen:
        got = call(leaves, strength, coefficients)
        call(leaves, 0.5, coefficients)
    assert len(seen.names) > 5
    assert not seen.from_host()
    torch.testing.assert_close(got, want)
    for leaf, other in zip(leaves, expected, strict=True):
        if other.grad is None:
            assert leaf.grad is None
        else:
            torch.testing.assert_close(leaf.grad, 2 * other.grad)


def test_a_bare_tensor_is_no_list_of_weights(target: Target) -> None:
    weight = torch.randn(6, 3, 3, 3, device=target.device, requires_grad=True)
    with pytest.raises(TypeError, match="put the tensor in a list"):
        F.add_gram_penalty_grad_(weight, strength=1.0)
    assert weight.grad is None


def test_strength_is_one_number_without_a_graph(target: Target) -> None:
    weight = torch.randn(4, 6, device=target.device, requires_grad=True)
    turned = torch.randn(6, 4, device=target.device, requires_grad=True)
    strength = torch.ones((), device=target.device, requires_grad=True)
    for _ in range(2):
        F.add_gram_penalty_grad_([weight, turned.t()], strength=strength * 2)
    assert strength.grad is None
    before = weight.grad.clone()
    with pytest.raises(ValueError, match=r"strength has shape \(2, 1\), expected a number"):
        F.add_gram_penalty_grad_([weight, turned.t()], strength=torch.ones(2, 1))
    assert torch.equal(weight.grad, before)


def test_same_weight_twice_counts_twice(target: Target) -> None:
    weight = torch.randn(4, 6, device=target.device, requires_grad=True)
    F.add_gram_penalty_grad_([weight, weight], strength=1)
    (grad,) = torch.autograd.grad(F.gram_penalty([weight]).sum(), weight)
    torch.testing.assert_close(weight.grad, 2 * grad)


def test_autocast_does_not_lower_the_precision(target: Target) -> None:
    weight = torch.randn(32, 256, device=target.device, requires_grad=True)
    want = F.gram_penalty([weight], "so")
    for name in (target.name, "reference"):
        with ox.backend(name), torch.autocast(target.device.type, dtype=torch.bfloat16):
            value = F.gram_penalty([weight], "so")
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, want)


def test_empty_list_gives_empty_results(target: Target) -> None:
    assert F.gram([]) == []
    assert F.gram_penalty([]).shape == (0,)
    assert F.add_gram_penalty_grad_([], strength=1).shape == (0,)


def test_weights_without_filters_or_entries(target: Target) -> None:
    shapes = [(0, 4), (3, 0), (2, 3)]
    weights = [torch.ones(s, device=target.device, requires_grad=True) for s in shapes]
    values = F.gram_penalty(weights, "so", side="rows")
    assert values.tolist() == [0.0, 3.0, (3 - 1) ** 2 * 2 + 2 * 9.0]
    grads = torch.autograd.grad(values.sum(), weights)
    assert [g.shape for g in grads] == [torch.Size(s) for s in shapes]


def test_correlation_and_distances(target: Target) -> None:
    weight = torch.tensor([[3.0, 0.0], [0.0, 2.0], [1.0, 1.0], [0.0, 0.0]], device=target.device)
    half = 0.5**0.5
    cosine = [[1, 0, half, 0], [0, 1, half, 0], [half, half, 1, 0], [0, 0, 0, 0]]
    torch.testing.assert_close(F.filter_correlation([weight])[0].cpu(), torch.tensor(cosine))
    torch.testing.assert_close(F.filter_distances([weight])[0], torch.cdist(weight, weight))


def test_layers_beyond_one_launch(target: Target) -> None:
    weights = [torch.randn(2, 3, device=target.device) for _ in range(700)]
    values = F.gram_penalty(weights, "so")
    with ox.backend("reference"):
        want = F.gram_penalty(weights, "so")
    torch.testing.assert_close(values, want)


def test_penalty_without_a_functor_runs_on_the_reference(
    target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    cube = Penalty(
        name="cube",
        formula="sum |G - I|^3",
        source="this test",
        identity=True,
        value=lambda r: r.abs() ** 3,
        slope=lambda r: 3 * r * r.abs(),
        curvature=lambda r: 6 * r.abs(),
        compiled=False,
    )
    monkeypatch.setitem(PENALTIES, "cube", cube)
    weight = torch.tensor([[1.0, 2.0]], device=target.device, requires_grad=True)
    assert F.gram_penalty([weight], "cube").tolist() == [64.0]
    F.add_gram_penalty_grad_([weight], "cube", strength=1)
    assert weight.grad.tolist() == [[96.0, 192.0]]


def test_results_repeat_bit_for_bit(target: Target) -> None:
    layers: Layers = random_layers(5, target.device, count=4)
    runs = []
    for _ in range(2):
        value = F.gram_penalty(**layers.arguments())
        runs.append((value, *torch.autograd.grad(value.sum(), layers.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
