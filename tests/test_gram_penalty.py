"""gram, gram_penalty and add_gram_penalty_grad_: values, gradients, layouts, precisions."""

from __future__ import annotations

import pytest
import torch

import orthoreg_ext as ox
import orthoreg_ext.functional as F
from orthoreg_ext.penalties import PENALTIES, Penalty
from tests.conftest import (
    LEAVING_OUT,
    NAMES,
    Layers,
    Target,
    gradient_error,
    gradient_floor,
    penalty_arguments,
    random_layers,
    random_targets,
    relative_error,
)
from tests.test_in_place import Operators

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
    ("frobenius", [[1.0, 2.0]], 4.0, 4.1231056256, [[2.0, 4.0]]),
    ("frobenius", [[1.0, 0.0], [0.0, 1.0]], 0.0, 0.0, [[0.0, 0.0], [0.0, 0.0]]),
    ("offdiag", [[1.0, 2.0], [1.0, 0.0]], 2.0, 8.0, [[4.0, 0.0], [4.0, 8.0]]),
    ("cosine", [[3.0, 4.0], [2.0, 0.0]], 0.72, 1.3846153846, [[0.3072, -0.2304], [0.0, 0.96]]),
]


@pytest.mark.parametrize(("name", "w", "rows", "cols", "grad"), TABLE)
def test_hand_computed(target: Target, name, w, rows, cols, grad) -> None:
    weight = torch.tensor(w, device=target.device, requires_grad=True)
    value = F.gram_penalty([weight], name, side="rows")
    assert value.tolist() == pytest.approx([rows])
    assert F.gram_penalty([weight], name, side="cols").tolist() == pytest.approx([cols])
    (got,) = torch.autograd.grad(value.sum(), weight)
    torch.testing.assert_close(got.cpu(), torch.tensor(grad))
    F.add_gram_penalty_grad_([weight], name, strength=0.5, side="rows")
    torch.testing.assert_close(weight.grad.cpu(), 0.5 * torch.tensor(grad))


# marked filters, W, value, gradient
MARKED = [
    ([], [[1.0, 2.0], [1.0, 0.0]], 0.0, [[0.0, 0.0], [0.0, 0.0]]),
    ([0], [[1.0, 2.0], [1.0, 0.0]], 27.0, [[24.0, 40.0], [4.0, 8.0]]),
    ([1], [[1.0, 2.0], [1.0, 0.0]], 3.0, [[4.0, 0.0], [8.0, 8.0]]),
]


@pytest.mark.parametrize(("marked", "w", "value", "grad"), MARKED)
def test_tpp_counts_the_pairs_of_marked_filters(target: Target, marked, w, value, grad) -> None:
    """G = [[5, 1], [1, 1]]."""
    weight = torch.tensor(w, device=target.device, requires_grad=True)
    got = F.gram_penalty([weight], "tpp", pruned=[torch.tensor(marked, dtype=torch.int64)])
    assert got.tolist() == [value]
    assert torch.autograd.grad(got.sum(), weight)[0].tolist() == grad


def test_tpp_is_the_block_form_of_its_source(target: Target) -> None:
    """P the marked, K the kept rows: dP = 4 P W^T W, dK = 4 K P^T P, without the factor 1 / n^2."""
    weight = torch.randn(7, 5, dtype=torch.float64, device=target.device, requires_grad=True)
    marked = torch.tensor([1, 4, 5], device=target.device)
    kept = torch.tensor([0, 2, 3, 6], device=target.device)
    F.add_gram_penalty_grad_([weight], "tpp", strength=1, pruned=[marked])
    w = weight.detach()
    p, k = w[marked], w[kept]
    torch.testing.assert_close(weight.grad[marked], 4 * p @ w.T @ w)
    torch.testing.assert_close(weight.grad[kept], 4 * k @ p.T @ p)


def test_what_a_penalty_cannot_take_is_refused(target: Target) -> None:
    weight = torch.randn(3, 2, device=target.device)
    with pytest.raises(ValueError, match=r"penalty 'tpp' is .*: pass pruned="):
        F.gram_penalty([weight], "tpp")
    for arguments in ({"pruned": [torch.tensor([0])]}, {"pruned": [None]}):
        with pytest.raises(ValueError, match="penalty 'tpp' and side='cols' exclude each other"):
            F.gram_penalty([weight], "tpp", side="cols", **arguments)
    with pytest.raises(ValueError, match="targets and side='cols' exclude each other"):
        F.gram_penalty([weight], "so", side="cols", targets=[2.0])
    for name in ("offdiag", "cosine", "tpp"):
        with pytest.raises(ValueError, match=f"penalty '{name}' .* has no target for the norms"):
            F.gram_penalty([weight], name, targets=[2.0], pruned=[torch.tensor([0])])
    for wrong, error, text in (
        (2.0, TypeError, "targets must be a sequence"),
        ([2.0, 1.0], ValueError, "targets"),
        (["1"], TypeError, r"targets\[0\] must be a number or a real tensor \[3\]"),
        ([float("nan")], ValueError, r"targets\[0\] is nan, expected a finite number"),
        ([torch.ones(2)], ValueError, r"targets\[0\] has shape \(2,\) .* expected \[3\]"),
        ([torch.ones(3, requires_grad=True).to(target.device)], ValueError, "detach it"),
    ):
        with pytest.raises(error, match=text):
            F.gram_penalty([weight], "so", targets=wrong)
    for indices in ([3], [-1], [[1]]):
        with pytest.raises(ValueError, match=r"pruned\[0\] is .* indices from 0 to 2"):
            F.gram_penalty([weight], "so", pruned=[torch.tensor(indices)])
    with pytest.raises(ValueError, match=r"targets\[0\] is 1e\+40, expected a finite"):
        F.gram_penalty([weight], "so", targets=[1e40])
    with pytest.raises(TypeError, match="pruned must be a sequence"):
        F.gram_penalty([weight], "so", pruned=torch.tensor([0]))


def test_cosines_of_nearly_dead_filters(target: Target) -> None:
    """Those whose squared norm is no normal number count as zeros; others are exact."""
    weight = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).to(target.device)
    for scale, counts in ((1e-18, True), (1e-21, False), (1e-30, False)):
        scaled = weight.clone()
        scaled[0] *= scale
        alone = weight if counts else weight[1:]
        for backend in (target.name, "reference"):
            leaf = scaled.clone().requires_grad_()
            with ox.backend(backend):
                value = F.gram_penalty([leaf], "cosine", side="rows")
                (grad,) = torch.autograd.grad(value.sum(), leaf)
                want = F.gram_penalty([alone.double()], "cosine", side="rows")
            torch.testing.assert_close(value.double(), want, rtol=1e-5, atol=0)
            assert torch.isfinite(grad).all()
            assert bool(grad[0].any()) is counts


def test_roots_beyond_the_precision_have_no_gradient(target: Target) -> None:
    """NaN, not 0: the step would silently do nothing."""
    weight = (3e19 * torch.ones(2, 3)).to(target.device).requires_grad_()
    value = F.gram_penalty([weight], "frobenius")
    assert not torch.isfinite(value).any()
    assert torch.autograd.grad(value.sum(), weight)[0].isnan().all()
    F.add_gram_penalty_grad_([weight], "frobenius", strength=1)
    assert weight.grad.isnan().all()


def test_marks_may_be_missing_for_layers_that_take_autograd(target: Target) -> None:
    weight = torch.randn(4, 3, device=target.device, requires_grad=True)
    for layer in (weight, weight.t(), torch.randn(3, 4, device=target.device)):
        value = F.add_gram_penalty_grad_([layer], "tpp", strength=1, pruned=[None])
        assert value.tolist() == [0.0]
    assert not weight.grad.any()


def test_autograd_notices_what_is_written_in_place(target: Target) -> None:
    weight = torch.randn(4, 3, device=target.device, requires_grad=True)
    weight.grad = torch.ones_like(weight)
    factor = torch.ones_like(weight, requires_grad=True)
    product = (weight.grad * factor).sum()
    F.add_gram_penalty_grad_([weight], "so", strength=1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


@pytest.mark.parametrize("seed", range(60))
def test_targets_of_random_layers(target: Target, seed: int) -> None:
    """Some layers with masks, too: a pruned filter's target is 0."""
    layers = random_layers(500 + seed, target.device, budget=60_000)
    name = ("orthoreg", "so")[seed % 2]
    arguments: dict[str, object] = {"targets": random_targets(layers.weights, seed)}
    if seed % 3 == 0:
        arguments["pruned"] = [torch.arange(0, len(w), 3) for w in layers.weights]
    side = ("rows", "small")[seed // 2 % 2]
    values = F.gram_penalty(penalty=name, side=side, **arguments, **layers.arguments())
    want = torch.stack(
        [
            _with_targets(name, w, b, g, t, seed % 3 == 0)
            for w, b, g, t in zip(
                *(layers.double().weights, layers.double().biases, layers.groups),
                arguments["targets"],
                strict=True,
            )
        ]
    )
    # sides: with a target the rows, without one what was asked for
    plain = [i for i, t in enumerate(arguments["targets"]) if t is None]
    aimed = [i for i in range(len(values)) if i not in plain]
    assert relative_error(values[aimed], want[aimed]) <= target.tolerance
    grads = torch.autograd.grad(values.sum(), layers.parameters())
    oracle = layers.double()
    with ox.backend("reference"):
        again = F.gram_penalty(penalty=name, side=side, **arguments, **oracle.arguments())
    assert relative_error(values, again) <= target.tolerance
    want_grads = torch.autograd.grad(again.sum(), oracle.parameters())
    added = F.add_gram_penalty_grad_(
        penalty=name, side=side, strength=0.5, **arguments, **layers.arguments()
    )
    assert torch.equal(added, values)
    floors = gradient_floor(name, side, oracle, arguments["targets"])
    for parameter, got, expected, floor in zip(
        layers.parameters(), grads, want_grads, floors, strict=True
    ):
        assert gradient_error(got, expected, floor) <= target.tolerance, f"seed {seed}"
        torch.testing.assert_close(parameter.grad, 0.5 * got)


def _with_targets(name, weight, bias, groups, target, masked) -> torch.Tensor:
    """From the formula, rows only."""
    matrix = weight.detach().flatten(1)
    if bias is not None:
        matrix = torch.cat([matrix, bias.detach()[:, None]], 1)
    wanted = torch.ones(len(matrix), dtype=torch.float64)
    if target is not None:
        wanted = torch.as_tensor(target).double().cpu().expand(len(matrix)).clone()
    if masked:
        matrix[::3] = 0
        wanted[::3] = 0
    total = torch.zeros((), dtype=torch.float64)
    for rows, aim in zip(matrix.chunk(groups), wanted.chunk(groups), strict=True):
        rest = rows @ rows.T - torch.diag(aim)
        total += (rest.abs() if name == "orthoreg" else rest.square()).sum()
    return total


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
    name, side = NAMES[seed % len(NAMES)], SIDES[seed // len(NAMES) % 3]
    chosen = penalty_arguments(name, side, layers.weights, seed)
    coefficients = torch.rand(len(layers.weights), generator=torch.Generator().manual_seed(seed))
    values = F.gram_penalty(**chosen, **layers.arguments())
    weighed = (values * coefficients.to(values)).sum()
    grads = torch.autograd.grad(weighed, layers.parameters())
    with ox.backend("reference"):
        of_oracle = penalty_arguments(name, side, oracle.weights, seed)
        want = F.gram_penalty(**of_oracle, **oracle.arguments())
        want_grams = F.gram(side=side, **oracle.arguments())
    want_grads = torch.autograd.grad((want * coefficients).sum(), oracle.parameters())
    assert relative_error(values, want) <= target.tolerance, f"seed {seed}"
    floors = [f * float(coefficients.max()) for f in gradient_floor(name, side, oracle)]
    for parameter, got, expected, floor in zip(
        layers.parameters(), grads, want_grads, floors, strict=True
    ):
        assert got.dtype == parameter.dtype
        tolerance = target.tolerance + ROUNDING.get(got.dtype, 0)
        assert gradient_error(got, expected, floor) <= tolerance, f"seed {seed} {got.dtype}"
    added = F.add_gram_penalty_grad_(
        **chosen,
        strength=0.5,
        coefficients=coefficients.to(target.device),
        **layers.arguments(),
    )
    assert relative_error(added, want * coefficients) <= target.tolerance
    for parameter, expected, floor in zip(layers.parameters(), want_grads, floors, strict=True):
        tolerance = target.tolerance + ROUNDING.get(parameter.dtype, 0)
        error = gradient_error(parameter.grad, 0.5 * expected, 0.5 * floor)
        assert error <= tolerance, f"seed {seed}"
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


@pytest.mark.parametrize("name", LEAVING_OUT)
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
    name, side = LEAVING_OUT[seed % len(LEAVING_OUT)], ("rows", "cols")[seed // 4 % 2]
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
    floors = iter(gradient_floor(name, side, kept, masked=True))
    for parameter, mask, got, expected in zip(
        layers.parameters(), masks, grads, want_grads, strict=True
    ):
        mask = parameter.new_zeros(len(parameter), dtype=torch.bool) if mask is None else mask
        assert gradient_error(got[~mask], expected, next(floors)) <= target.tolerance, (
            f"seed {seed}"
        )
        assert not got[mask].any()
        assert (parameter.grad[mask] == 3).all()
        torch.testing.assert_close(parameter.grad, 3 + got)


@pytest.mark.parametrize("name", LEAVING_OUT)
def test_layer_of_pruned_filters_has_the_value_of_none(target: Target, name: str) -> None:
    weight = torch.randn(5, 3, device=target.device, requires_grad=True)
    mask = torch.ones(5, dtype=torch.bool, device=target.device)
    left = 3.0 if PENALTIES[name].diagonal == "target" else 0.0
    left = left**0.5 if PENALTIES[name].root else left
    for side, want in (
        ("rows", 0.0),
        ("cols", left),
    ):
        value = F.gram_penalty([weight], name, side=side, pruned=[mask])
        assert value.tolist() == pytest.approx([want])
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
        value = F.gram_penalty([weight], **penalty_arguments(name, "small", [weight]))
        (grad,) = torch.autograd.grad(value.sum(), weight)
        assert torch.isfinite(value).all()
        if name in LEAVING_OUT:  # the others drive norms to 0
            assert torch.equal(grad, torch.zeros_like(grad))


@pytest.mark.parametrize("name", NAMES)
def test_nan_passes_through(target: Target, name: str) -> None:
    weight = torch.ones(3, 4, device=target.device)
    weight[1, 2] = float("nan")
    weight.requires_grad_()
    chosen = penalty_arguments(name, "small", [weight])
    if "pruned" in chosen:
        chosen["pruned"] = [torch.tensor([1])]
    value = F.gram_penalty([weight], **chosen)
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


@pytest.mark.parametrize("name", sorted(PENALTIES))
def test_definition_and_kernels_agree_where_there_are_no_filters_or_entries(
    target: Target, name: str
) -> None:
    for shape in ((0, 4), (3, 0), (0, 0)):
        weight = torch.ones(shape, device=target.device)
        marked = [torch.zeros(shape[0], dtype=torch.bool, device=target.device)]
        for side in ("rows", "small"):
            value = F.gram_penalty([weight], name, side=side, pruned=marked)
            with ox.backend("reference"):
                want = F.gram_penalty([weight], name, side=side, pruned=marked)
            assert torch.equal(value, want), (shape, side)


@pytest.mark.parametrize("name", ["frobenius", "ocnn"])
def test_a_root_is_right_where_its_square_overflows(target: Target, name: str) -> None:
    """Or plainly no number (the kernels): a gradient divided by infinity would be 0."""
    weight = (1e12 * torch.randn(4, 6)).to(target.device).requires_grad_()
    wide = weight.detach().double().requires_grad_()
    want = F.gram_penalty([wide], name)
    (slope,) = torch.autograd.grad(want.sum(), wide)
    for backend in (target.name, "reference"):
        with ox.backend(backend):
            value = F.gram_penalty([weight], name)
            weight.grad = None
            F.add_gram_penalty_grad_([weight], name, strength=1.0)
        (grad,) = torch.autograd.grad(value.sum(), weight)
        if name == "frobenius" and backend != "reference":
            assert not any(found.isfinite().any() for found in (value, grad, weight.grad))
            continue
        torch.testing.assert_close(value, want.float())
        torch.testing.assert_close(grad, slope.float(), rtol=1e-4, atol=0)
        torch.testing.assert_close(weight.grad, slope.float(), rtol=1e-4, atol=0)


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
        gradient="6 |G - I| (G - I) W",
        source="this test",
        code="none",
        diagonal="target",
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
