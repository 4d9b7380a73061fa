"""The tiled CUDA kernels: every product, tile size, side, slice and mask, run by the emulator.

On a machine with a GPU the same tests run there as well.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import orthoreg_ext as ox
import orthoreg_ext.functional as F
from orthoreg_ext.precision import PRECISIONS
from tests.conftest import TARGETS, Layers, Target, make_target, relative_error

# relative error, Frobenius norm a tensor, of the Gram side (S) and of the gradient's product
GRAM = {"3xtf32": 1e-5, "float32": 1e-5, "tf32": 1e-3, "bf16": 1e-2}
SHAPES = {  # ragged, sliced (many inner entries), of one tile and of several
    "rows": [(40, 700), (33, 37), (129, 64), (1, 300), (7, 513)],
    "cols": [(700, 40), (37, 33), (64, 129), (300, 1), (513, 7)],
}


@pytest.fixture(params=[name for name in TARGETS if name != "cpu"])
def target(request: pytest.FixtureRequest) -> Iterator[Target]:
    """The CUDA kernels: the CPU knows neither tiles nor products."""
    chosen = make_target(request.param, request)
    with ox.backend(chosen.name):
        yield chosen


def layers_of(
    target: Target, shapes: list[tuple[int, int]], *, biases: bool = False, seed: int = 0
) -> Layers:
    generator = torch.Generator().manual_seed(seed)
    layers = Layers()
    for n, k in shapes:
        weight = torch.randn(n, k, generator=generator) * max(n, k) ** -0.5
        layers.weights.append(weight.to(target.device).requires_grad_())
        bias = torch.randn(n, generator=generator) * 0.1
        layers.biases.append(bias.to(target.device).requires_grad_() if biases else None)
        layers.groups.append(1)
    return layers


def masks_of(layers: Layers) -> list[Tensor]:
    generator = torch.Generator().manual_seed(9)
    return [(torch.rand(len(w), generator=generator) < 0.3).to(w.device) for w in layers.weights]


def results(layers: Layers, penalty: str, side: str, masks: list[Tensor] | None = None):
    """Values and gradients of the route through autograd, and of the one into .grad."""
    for parameter in layers.parameters():
        parameter.grad = None
    arguments = {"penalty": penalty, "side": side, "pruned": masks, **layers.arguments()}
    values = F.gram_penalty(**arguments)
    grads = torch.autograd.grad(values.sum(), layers.parameters())
    added = F.add_gram_penalty_grad_(strength=1.0, **arguments)
    return [values.detach(), *grads, added, *(p.grad for p in layers.parameters())]


def check(
    layers: Layers, penalty: str, side: str, tolerance: float, masks: list[Tensor] | None = None
) -> None:
    got = results(layers, penalty, side, masks)
    on_cpu = None if masks is None else [m.cpu() for m in masks]
    with ox.backend("reference"):
        want = results(layers.double(), penalty, side, on_cpu)
    for a, b in zip(got, want, strict=True):
        assert relative_error(a, b) <= tolerance


@pytest.mark.parametrize("tile", ["", "32", "64", "128"])
@pytest.mark.parametrize("name", PRECISIONS)
@pytest.mark.parametrize("side", ["rows", "cols"])
def test_products_sides_and_tiles(
    target: Target, monkeypatch: pytest.MonkeyPatch, name: str, tile: str, side: str
) -> None:
    if tile:
        monkeypatch.setenv("ORTHOREG_EXT_TILE", tile)
    row = PRECISIONS[name]
    tolerance = max(GRAM[row.gram], GRAM[row.gradient])
    layers = layers_of(target, SHAPES[side], biases=True)
    with ox.precision(name):
        check(layers, "so", side, tolerance, masks_of(layers))
        check(layers, "offdiag", side, tolerance)


def test_lower_products_are_really_taken(target: Target) -> None:
    layers = layers_of(target, [(96, 400)])
    errors = {}
    for name in PRECISIONS:
        with ox.precision(name):
            got = results(layers, "offdiag", "rows")[1]
        with ox.backend("reference"):
            errors[name] = relative_error(got, results(layers.double(), "offdiag", "rows")[1])
    assert errors["3xtf32"] < 3e-6
    assert errors["ieee"] < 3e-6
    assert 3e-5 < errors["mixed"] < 6e-4
    assert 3e-5 < errors["tf32"] < 1e-3
    assert 1e-3 < errors["mixed-bf16"] < 1e-2
    assert 1e-3 < errors["bf16"] < 1e-2


@pytest.mark.parametrize("noise", ["rows", "mixing", "entries", "faint"])
def test_small_residuals_keep_their_digits(target: Target, noise: str) -> None:
    """128 rows of 4608 entries, orthonormal to 1e-3: what is left of G - I is right to 2e-4.

    Where only the directions are off, by 1e-3 of a row's norm, G - I is 1e-5 and no float32 sum has
    more than 3 digits of it ("faint").
    """
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    exact = torch.linalg.qr(normal(4608, 128))[0].T
    if noise == "rows":
        exact = exact * (1 + 1e-3 * normal(128, 1)) + 1e-4 * normal(128, 4608) / 4608**0.5
    elif noise == "mixing":
        exact = exact + 1e-3 * normal(128, 128) @ exact
    elif noise == "faint":
        exact = exact + 1e-3 * normal(128, 4608) / 4608**0.5
    else:
        exact = exact + 1e-3 * normal(128, 4608)
    weight = exact.float().to(target.device).contiguous().requires_grad_()
    layers = Layers([weight], [None], [1])
    limit = 5e-4 if noise == "faint" else 2e-4
    with ox.precision("3xtf32"):
        check(layers, "so", "rows", limit)
        residual = F.gram([weight.detach()])[0].double().cpu() - torch.eye(128)
    double = weight.detach().double().cpu()
    want = double @ double.T - torch.eye(128, dtype=torch.float64)
    assert relative_error(residual, want) <= limit


@pytest.mark.parametrize("penalty", ["orthoreg", "so"])
def test_results_do_not_depend_on_the_number_of_multiprocessors(
    target: Target, monkeypatch: pytest.MonkeyPatch, penalty: str
) -> None:
    if target.name != "emulated":
        pytest.skip("a GPU has as many as it has")
    layers = layers_of(target, [*SHAPES["rows"], (65, 65)], biases=True)
    runs = []
    for sms in ("1", "3", "132"):
        monkeypatch.setenv("CUDA_EMU_SMS", sms)
        runs.append(results(layers, penalty, "rows"))
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


@pytest.mark.parametrize("name", ["3xtf32", "tf32", "ieee"])
def test_gram_matrices_are_symmetric_bit_for_bit(target: Target, name: str) -> None:
    weights = [w.detach() for w in layers_of(target, SHAPES["rows"]).weights]
    with ox.precision(name):
        for gram in F.gram(weights):
            assert torch.equal(gram, gram.mT)


def test_waves_give_the_same_results(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = layers_of(target, [(70, 90), (65, 80), (80, 66), (5, 5)], biases=True)
    whole = results(layers, "orthoreg", "small")
    monkeypatch.setenv("ORTHOREG_EXT_WORKSPACE_MB", "0.02")
    for a, b in zip(whole, results(layers, "orthoreg", "small"), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("variable", "value", "text"),
    [
        ("ORTHOREG_EXT_TILE", "48", "ORTHOREG_EXT_TILE is '48', expected 32, 64 or 128"),
        ("ORTHOREG_EXT_WORKSPACE_MB", "-1", "expected a positive number of megabytes"),
        ("ORTHOREG_EXT_WORKSPACE_MB", "much", "expected a positive number of megabytes"),
    ],
)
def test_settings_that_make_no_sense_are_refused(
    target: Target, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, text: str
) -> None:
    monkeypatch.setenv(variable, value)
    layers = layers_of(target, [(70, 90)])
    with pytest.raises(RuntimeError, match=text):
        F.add_gram_penalty_grad_(strength=1.0, **layers.arguments())
    assert layers.weights[0].grad is None or not layers.weights[0].grad.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("side", ["rows", "cols"])
def test_half_weights_are_read_as_they_are(target: Target, dtype: torch.dtype, side: str) -> None:
    """Half numbers are TF32 numbers: their Gram matrix is as good as that of float32."""
    layers = layers_of(target, [(40, 72), (65, 33), (34, 520)])
    halves = [w.detach().to(dtype) for w in layers.weights]
    for name in ("3xtf32", "tf32"):
        with ox.precision(name):
            grams = F.gram(halves, side)
        for weight, gram in zip(halves, grams, strict=True):
            matrix = weight.double().cpu()
            want = matrix @ matrix.T if side == "rows" else matrix.T @ matrix
            assert relative_error(gram, want) <= 2e-6


def test_views_of_any_offset_and_stride(target: Target) -> None:
    base = torch.randn(90, 203, device=target.device)
    for start, stop, step in itertools.product((0, 1, 2, 4), (100, 101, 104), (1, 2)):
        weight = base[::step, start:stop].detach().requires_grad_()
        check(Layers([weight], [None], [1]), "so", "rows", 1e-5)


def test_misaligned_gradients_are_written_in_place(target: Target) -> None:
    for offset in (0, 1, 2, 3):
        storage = torch.zeros(70 * 44 + offset, device=target.device)
        weight = torch.randn(70, 44, device=target.device, requires_grad=True)
        weight.grad = storage[offset:].view(70, 44)
        F.add_gram_penalty_grad_([weight], "so", strength=1.0)
        (want,) = torch.autograd.grad(F.gram_penalty([weight], "so").sum(), weight)
        torch.testing.assert_close(weight.grad, want, rtol=1e-5, atol=1e-5)
        assert not storage[:offset].any()
