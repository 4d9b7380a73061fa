"""The CPU kernels, at each instruction set: float64, types, layouts, threads, waves."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

import orthoreg_ext as ox
import orthoreg_ext.functional as F
from orthoreg_ext.build_info import compiled, reason
from orthoreg_ext.penalties import KERNELS
from tests.conftest import Layers, relative_error

pytestmark = pytest.mark.skipif(not compiled, reason=reason)

ROOT = Path(__file__).parent.parent
LEVELS = ("avx512", "avx2", "generic")
# filters, entries of a filter, groups: around the lanes of a register, the rows of a block, the
# inner entries that are packed at once, few rows of many, and the edges of a tile and of a unit
SHAPES = [
    *((1, 1, 1), (2, 3, 1), (8, 9, 1), (9, 8, 3), (9, 200, 1), (15, 17, 1), (16, 16, 2)),
    *((17, 31, 1), (33, 47, 5), (48, 49, 1), (64, 289, 1), (100, 64, 1), (129, 577, 1)),
    *((257, 130, 1), (130, 257, 1), (300, 290, 1), (5, 1100, 40), (520, 272, 1)),
    *((12, 1100, 1), (12, 1104, 1), (7, 1104, 1), (1030, 11, 1)),
]
ROUNDING = {torch.float16: 2**-11, torch.bfloat16: 2**-8}  # of a stored gradient


def draw(shapes: list[tuple[int, int, int]], dtype: torch.dtype, seed: int = 0) -> Layers:
    """Weights of these shapes, every second one with a bias."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        drawn = torch.randn(shape, generator=generator) * shape[-1] ** -0.5
        return drawn.to(dtype).requires_grad_()

    layers = Layers(groups=[g for _, _, g in shapes])
    for i, (n, k, groups) in enumerate(shapes):
        layers.weights.append(normal(n * groups, k))
        layers.biases.append(normal(n * groups) if i % 2 else None)
    return layers


def masks(layers: Layers) -> list[Tensor | None]:
    """Every third filter, in two layers of three."""
    return [
        None if i % 3 == 0 else torch.arange(len(w)) % 3 == 1 for i, w in enumerate(layers.weights)
    ]


def run(layers: Layers, name: str, pruned: list[Tensor | None] | None) -> list[Tensor]:
    """Values, gradients by autograd, gradients added to ones, Gram matrices."""
    arguments = {**layers.arguments(), "pruned": pruned}
    values = F.gram_penalty(penalty=name, **arguments)
    grads = torch.autograd.grad(values.sum(), layers.parameters())
    for parameter in layers.parameters():
        parameter.grad = torch.ones_like(parameter)
    added = F.add_gram_penalty_grad_(penalty=name, strength=0.5, **arguments)
    grams = F.gram(**layers.arguments())
    return [values, *grads, added, *(p.grad for p in layers.parameters()), *grams]


def compare_with_float64() -> None:
    """Everything against the reference; one process an instruction set."""
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        for name in sorted(KERNELS):
            layers = draw(SHAPES, dtype)
            rounding = ROUNDING.get(dtype, 0.0)
            tolerance = 1e-13 if dtype == torch.float64 else 1e-6
            if name == "orthoreg" and dtype != torch.float64:
                tolerance = 3e-6  # an entry within rounding of 0 has a sign of its own
            for pruned in (masks(layers),) if KERNELS[name].counts else (None, masks(layers)):
                with ox.backend("cpu"):
                    got = run(layers, name, pruned)
                oracle = layers.double()
                with ox.backend("reference"):
                    want = run(oracle, name, pruned)
                count = len(layers.parameters())
                for i, (a, b) in enumerate(zip(got, want, strict=True)):
                    stored = 0 < i <= count or count + 1 < i <= 2 * count + 1
                    error = relative_error(a, b)
                    bound = tolerance + rounding * stored
                    assert error <= bound, (dtype, name, pruned is not None, i, error)


def in_process(level: str, code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs code where ORTHOREG_EXT_CPU names an instruction set; skips if it cannot run here."""
    done = subprocess.run(
        [sys.executable, "-c", f"import tests.test_cpu_kernels as t\n{code}"],
        cwd=ROOT,
        env={**os.environ, "ORTHOREG_EXT_CPU": level, **environment},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    if "does not have these instructions" in done.stderr or " is unknown; valid: " in done.stderr:
        pytest.skip(f"{level} does not run here")
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.mark.parametrize("level", LEVELS)
def test_each_instruction_set_agrees_with_float64(level: str) -> None:
    in_process(level, "t.torch.set_num_threads(1)\nt.compare_with_float64()")


def test_instruction_sets_agree(tmp_path: Path) -> None:
    results = {}
    for level in LEVELS:
        path = tmp_path / level
        code = (
            "import torch\ntorch.set_num_threads(1)\n"
            "layers = t.draw(t.SHAPES, torch.float32)\n"
            f"torch.save([r.detach() for r in t.run(layers, 'so', None)], {str(path)!r})"
        )
        try:
            in_process(level, code)
        except pytest.skip.Exception:
            continue
        results[level] = torch.load(path)
    assert "generic" in results
    for other in results.values():
        for a, b in zip(results["generic"], other, strict=True):
            assert relative_error(b, a.double()) <= 1e-6


@pytest.mark.parametrize("name", sorted(KERNELS))
def test_threads_and_other_layers_change_no_bit(name: str) -> None:
    shapes = [*SHAPES, (512, 300, 1), (96, 2000, 1)]
    layers = draw(shapes, torch.float32)
    pruned = masks(layers)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(run(layers, name, pruned))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    together = [p.grad.clone() for p in layers.weights]
    for i in range(len(shapes)):
        weight, bias = layers.weights[i], layers.biases[i]
        weight.grad = torch.ones_like(weight)
        value = F.add_gram_penalty_grad_(
            [weight],
            name,
            strength=0.5,
            biases=[bias],
            groups=[layers.groups[i]],
            pruned=[pruned[i]],
        )
        assert torch.equal(weight.grad, together[i])
        assert value[0] == results[0][1 + len(layers.parameters())][i]


def test_both_routes_give_the_same_numbers() -> None:
    layers = draw([*SHAPES, (512, 300, 1)], torch.float32)
    for name in KERNELS:
        values, *rest = run(layers, name, masks(layers))
        count = len(layers.parameters())
        assert torch.equal(values, rest[count])
        for grad, held in zip(rest[:count], rest[count + 1 :], strict=False):
            torch.testing.assert_close(held, 1 + 0.5 * grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_waves_change_no_bit(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = draw([*SHAPES, (512, 300, 1), (200, 600, 2)], dtype)
    runs = []
    for megabytes in ("256", "0.5", "0.001"):
        monkeypatch.setenv("ORTHOREG_EXT_WORKSPACE_MB", megabytes)
        runs.append(run(layers, "so", masks(layers)))
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


def test_refused_workspace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORTHOREG_EXT_WORKSPACE_MB", "much")
    weight = torch.randn(4, 6, requires_grad=True)
    with pytest.raises(RuntimeError, match="expected a positive number of megabytes"):
        F.add_gram_penalty_grad_([weight], strength=1.0)


@pytest.mark.parametrize("shape", [(40, 18, 3, 3), (300, 7, 5, 5), (20, 3, 3, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_strided_layouts(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Channels last, rows of a wider buffer, and addresses that fit no register."""
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    entries = drawn[0].numel()
    want_weight = drawn.double().requires_grad_()
    with ox.backend("reference"):
        want = F.gram_penalty([want_weight], "so")
    (want_grad,) = torch.autograd.grad(want.sum(), want_weight)
    wide = torch.zeros(shape[0], entries + 5, dtype=dtype)
    shifted = torch.zeros(drawn.numel() + 1, dtype=dtype)[1:].view(shape)
    tolerance = 1e-6 + ROUNDING.get(dtype, 0)
    for weight in (
        drawn.contiguous(memory_format=torch.channels_last),
        wide[:, 3 : 3 + entries].copy_(drawn.flatten(1)),
        shifted.copy_(drawn),
    ):
        leaf = weight.detach().requires_grad_()
        value = F.add_gram_penalty_grad_([leaf], "so", strength=1.0)
        assert relative_error(value, want) <= tolerance
        assert relative_error(leaf.grad.reshape_as(want_grad), want_grad) <= tolerance


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_16_bit_number_is_read_and_written_as_torch_does(dtype: torch.dtype) -> None:
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    numbers = bits.view(dtype)
    # one filter [2]: the Gram matrix of the columns side holds x * 1 = x off the diagonal
    weight = torch.stack([numbers, torch.ones_like(numbers)], 1)
    groups = [len(weight)]
    got = F.gram([weight], groups=groups, side="cols")[0][:, 0, 1]
    want = numbers.float()
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got[~want.isnan()], want[~want.isnan()])
    # offdiag: the gradient of one entry is 4 x y^2, here rounded once from float32
    finite = numbers.float().abs() < 1e37
    leaf = weight[finite].clone().requires_grad_()
    F.add_gram_penalty_grad_([leaf], "offdiag", strength=0.25, groups=[len(leaf)], side="cols")
    x = numbers[finite].float()
    assert torch.equal(leaf.grad[:, 0], x.to(dtype))
    exact = (x.abs() > 1e-18) & (x.abs() < 1e18)  # in float32
    assert torch.equal(leaf.grad[exact, 1], (x * x)[exact].to(dtype))


def test_orthonormal_rows_keep_the_residual_accurate() -> None:
    """G - I cancels: its entries are some 1e-4, where float32 sums of G err by 1e-8 to 1e-7."""
    generator = torch.Generator().manual_seed(0)
    for n, k in ((64, 576), (128, 1152), (300, 2304)):
        basis, _ = torch.linalg.qr(torch.randn(k, n, generator=generator, dtype=torch.float64))
        noise = torch.randn(n, k, generator=generator, dtype=torch.float64) * k**-0.5
        weight = (basis.T + 1e-3 * noise).float()
        (gram,) = F.gram([weight])
        want = weight.double() @ weight.double().T - torch.eye(n, dtype=torch.float64)
        residual = gram.double() - torch.eye(n, dtype=torch.float64)
        assert relative_error(residual, want) <= 2e-4
        leaf = weight.clone().requires_grad_()
        F.add_gram_penalty_grad_([leaf], "so", strength=1.0)
        assert relative_error(leaf.grad, 4 * want @ weight.double()) <= 1.5e-4


@pytest.mark.parametrize("side", ["rows", "cols"])
@pytest.mark.parametrize("shape", [(300, 320), (12, 320), (320, 12)])
def test_nan_and_inf_spread_and_pruned_ones_do_not(side: str, shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    mask = torch.zeros(len(weight), dtype=torch.bool)
    mask[[7, -1]] = True
    weight[7], weight[-1, 3] = float("nan"), float("inf")
    leaf = weight.clone().requires_grad_()
    value = F.add_gram_penalty_grad_([leaf], "so", strength=1.0, side=side, pruned=[mask])
    assert value.isfinite().all()
    assert leaf.grad.isfinite().all()
    assert not leaf.grad[mask].any()
    leaf = weight.clone().requires_grad_()
    value = F.add_gram_penalty_grad_([leaf], "so", strength=1.0, side=side)
    assert value.isnan().all()
    assert leaf.grad[7].isnan().all()


@pytest.mark.parametrize("side", ["rows", "cols"])
def test_what_a_matrix_leaves_behind_does_not_reach_the_next(side: str) -> None:
    torch.set_num_threads(1)
    for n in (9, 5, 13, 1, 12):
        of_nan, weight = torch.full((16, 600), float("nan")), torch.randn(n, 600).double()
        if side == "cols":
            of_nan, weight = of_nan.T.contiguous(), weight.T.contiguous()
        assert F.gram([of_nan], side)[0].isnan().all()
        (got,) = F.gram([weight.float()], side)
        want = weight.float().double()
        want = want @ want.T if side == "rows" else want.T @ want
        assert relative_error(got, want) < 1e-6


def test_calls_from_several_python_threads_at_once() -> None:
    torch.set_num_threads(2)
    shapes = [(300, 290, 1), (64, 289, 1), (130, 257, 1)]

    def compute(seed: int) -> list[Tensor]:
        return run(draw(shapes, torch.float32, seed), "frobenius", None)

    want = [compute(seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            for got, expected in zip(pool.map(compute, range(4)), want, strict=True):
                assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
