"""Everything that is compared, by name: the package, and what one would write or install instead.

`REGULARISE` computes a penalty and its gradient for all layers, added to each ``.grad`` or
returned; the ways to score filters are in scoring.py. All take leaves of any shapes [n, ...].
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import orthoreg_ext as ox
import orthoreg_ext.functional as F
from orthoreg_ext.bench import StillOptimizer

Call = Callable[[], Any]
Prepare = Callable[[list[Tensor]], Call]
PRUNED = 4  # of the masked ways: every so many-th filter is gone


@dataclass(frozen=True)
class Way:
    """One way to do the work.

    Attributes:
        meaning: what it is, with all that a ratio depends on.
        prepare: weights (or what else a question is about) -> the call that is timed; its
            gradients are returned or in ``.grad``, scores are returned.
        computes: the penalty, or which dimensions are scored.
        why_not: device type -> why it cannot run there; empty where it can.
        tidy: what the call returned -> tensors in the order of the exact ones.
    """

    meaning: str
    prepare: Callable[[Any], Call]
    computes: str = "so"
    why_not: Callable[[str], str] = lambda device: ""
    tidy: Callable[[Any], list[Tensor]] = lambda returned: list(returned or ())


def needs(module: str) -> Callable[[str], str]:
    """Why a way that needs a package cannot run."""
    return lambda _: "" if importlib.util.find_spec(module) else f"{module} is not installed"


def _needs_cuda(device: str) -> str:
    return "" if device == "cuda" else "CUDA graphs need a GPU"


# ---- the package


def masks(weights: Sequence[Tensor]) -> list[Tensor]:  # each bool [n]
    """The filters that are pruned in the masked ways."""
    return [torch.arange(len(w), device=w.device) % PRUNED == PRUNED - 1 for w in weights]


def _in_place(penalty: str, *, masked: bool = False) -> Prepare:
    def prepare(weights: list[Tensor]) -> Call:
        pruned = masks(weights) if masked else None

        def call() -> None:
            F.add_gram_penalty_grad_(weights, penalty, strength=1.0, pruned=pruned)

        return call

    return prepare


def _autograd(weights: list[Tensor]) -> Call:
    return lambda: F.gram_penalty(weights, "so").sum().backward()


def _model(weights: Sequence[Tensor]) -> nn.Module:
    """Convolutions and linear layers with these weights, and their memory and gradients."""
    layers = nn.ModuleList()
    for weight in weights:
        n, k, *window = weight.shape
        layer = nn.Conv2d(k, n, window, bias=False) if window else nn.Linear(k, n, bias=False)
        layer.weight = nn.Parameter(weight.detach())
        layer.weight.grad = weight.grad
        layers.append(layer)
    return layers


def attached(weights: list[Tensor]) -> Call:
    """What reg.attach(optimizer) adds to a step, with all that it looks up there."""
    with torch.device("meta"):  # the layers' own weights are never made
        model = _model(weights)
    regularizer = ox.OrthoRegularizer(model, "so", 1.0, layer_weights="uniform", include="*")
    optimizer = StillOptimizer(list(model.parameters()))
    regularizer.attach(optimizer)

    def call() -> None:
        optimizer.step()

    return call


def _captured(prepare: Prepare) -> Prepare:
    """The call's kernels in a CUDA graph, without any cost of launching them."""

    def captured(weights: list[Tensor]) -> Call:
        call, side, graph = prepare(weights), torch.cuda.Stream(), torch.cuda.CUDAGraph()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(graph):
            call()
        return lambda: graph.replay()

    return captured


# ---- what one would write


def orthoreg_repo(weights: list[Tensor]) -> Call:
    """OrthoReg as released: the identity is filled on the CPU and copied, layer by layer."""

    def call() -> None:
        total = torch.zeros((), device=weights[0].device)
        for weight in weights:
            matrix = weight.flatten(1)
            if matrix.shape[0] > matrix.shape[1]:
                matrix = matrix.t()
            eye = torch.eye(len(matrix)).to(matrix.device)
            total = total + (matrix @ matrix.t() - eye).norm(1)
        total.backward()

    return call


def eager_penalty(weights: Sequence[Tensor]) -> Tensor:
    """`so` as a training script writes it: on the filters' side, a layer after the other."""
    total = torch.zeros((), device=weights[0].device)
    for weight in weights:
        matrix = weight.flatten(1)
        eye = torch.eye(len(matrix), device=matrix.device)
        total = total + (matrix @ matrix.t() - eye).square().sum()
    return total


def eager(weights: list[Tensor]) -> Call:
    """Autograd on the filters' side, as a training script writes it."""
    return lambda: eager_penalty(weights).backward()


def compiled(weights: list[Tensor]) -> Call:
    """torch.compile of `eager`; gradients are returned, so that nothing is added outside."""
    function = torch.compile(eager_penalty, mode="reduce-overhead", dynamic=False)
    return lambda: torch.autograd.grad(function(weights), weights)


def _closed(weights: list[Tensor], *, small: bool) -> Call:
    @torch.no_grad()
    def call() -> None:
        total = torch.zeros((), device=weights[0].device)
        for weight in weights:
            matrix, grad = weight.flatten(1), weight.grad
            assert grad is not None
            rows = not small or matrix.shape[0] <= matrix.shape[1]
            gram = matrix @ matrix.t() if rows else matrix.t() @ matrix
            gram.diagonal().sub_(1)
            total += torch.dot(gram.view(-1), gram.view(-1))
            left, right = (gram, matrix) if rows else (matrix, gram)
            grad.view(matrix.shape).addmm_(left, right, alpha=4)

    return call


def closed(weights: list[Tensor]) -> Call:
    """Two matrix products a layer, without autograd."""
    return _closed(weights, small=False)


def closed_small(weights: list[Tensor]) -> Call:
    """The same with the smaller of the two Gram matrices."""
    return _closed(weights, small=True)


def _grouped(multiply: Callable[[list[Tensor], list[Tensor]], Sequence[Tensor]]) -> object:
    """The closed form with one grouped product for all Gram matrices and one for all gradients."""

    def prepare(weights: list[Tensor], dtype: torch.dtype) -> Call:
        @torch.no_grad()
        def call() -> None:
            flat = [w.flatten(1).to(dtype) for w in weights]
            grams = [g.float() for g in multiply(flat, [w.t() for w in flat])]
            for gram in grams:
                gram.diagonal().sub_(1)
            torch.stack(torch._foreach_norm(grams)).square().sum()
            products = multiply([g.to(dtype) for g in grams], flat)
            grads = [w.grad for w in weights]
            torch._foreach_add_(
                grads,
                [p.to(w.dtype).view_as(w) for p, w in zip(products, weights, strict=True)],
                alpha=4,
            )

        return call

    return prepare


def foreach_mm(weights: list[Tensor]) -> Call:
    """torch._foreach_mm in bfloat16, its fast path."""
    return _grouped(torch._foreach_mm)(weights, torch.bfloat16)  # type: ignore[operator]


def pyg_lib(weights: list[Tensor]) -> Call:
    """pyg-lib's grouped_matmul in float32."""
    import pyg_lib as library

    return _grouped(library.ops.grouped_matmul)(weights, torch.float32)  # type: ignore[operator]


def peft(weights: list[Tensor]) -> Call:
    """AdaLoRA's loop as in PEFT: the norm of G - I of each factor, on its short side."""

    def call() -> None:
        total = torch.zeros((), device=weights[0].device)
        for weight in weights:
            matrix = weight.flatten(1)
            gram = (
                matrix @ matrix.t() if matrix.shape[0] <= matrix.shape[1] else matrix.t() @ matrix
            )
            eye = torch.eye(*gram.size(), out=torch.empty_like(gram))
            eye.requires_grad = False
            total = total + torch.norm(gram - eye, p="fro")
        total.backward()

    return call


def _has_foreach_mm(_: str) -> str:
    if hasattr(torch, "_foreach_mm"):
        return ""
    return f"torch {torch.__version__} has no _foreach_mm"


REGULARISE = {
    "orthoreg_ext": Way("add_gram_penalty_grad_", _in_place("so")),
    "orthoreg_ext-attached": Way("a step after reg.attach(optimizer)", attached),
    "orthoreg_ext-autograd": Way("gram_penalty(...).sum().backward()", _autograd),
    "orthoreg_ext-graph": Way(
        "add_gram_penalty_grad_ in a CUDA graph", _captured(_in_place("so")), why_not=_needs_cuda
    ),
    "orthoreg_ext-l1": Way("add_gram_penalty_grad_", _in_place("orthoreg"), "orthoreg"),
    "orthoreg_ext-offdiag": Way("add_gram_penalty_grad_", _in_place("offdiag"), "offdiag"),
    "orthoreg_ext-cosine": Way("add_gram_penalty_grad_", _in_place("cosine"), "cosine"),
    "orthoreg_ext-tpp": Way(
        "add_gram_penalty_grad_, pruned= every 4th",
        _in_place("tpp", masked=True),
        "tpp masked",
    ),
    "orthoreg_ext-masked": Way(
        "add_gram_penalty_grad_, pruned= every 4th", _in_place("so", masked=True), "so masked"
    ),
    "orthoreg_ext-l1-masked": Way(
        "add_gram_penalty_grad_, pruned= every 4th",
        _in_place("orthoreg", masked=True),
        "orthoreg masked",
    ),
    "orthoreg_ext-frobenius": Way("add_gram_penalty_grad_", _in_place("frobenius"), "frobenius"),
    "orthoreg-repo": Way(
        "as released: eye on the CPU, autograd, smaller side", orthoreg_repo, "orthoreg"
    ),
    "eager": Way("eye on the device, autograd, filters' side", eager),
    "closed": Way("two mm a layer, filters' side", closed),
    "closed-small": Way("two mm a layer, smaller side", closed_small),
    "closed-small-graph": Way(
        "closed-small in a CUDA graph", _captured(closed_small), why_not=_needs_cuda
    ),
    "compile": Way("torch.compile(eager, mode='reduce-overhead')", compiled),
    "foreach_mm": Way("torch._foreach_mm, cast to bf16", foreach_mm, why_not=_has_foreach_mm),
    "pyg-lib": Way("pyg_lib.ops.grouped_matmul, fp32", pyg_lib, why_not=needs("pyg_lib")),
    "peft": Way("PEFT's AdaLoRA loop, autograd", peft, "frobenius"),
}

# What every other way of the same work is divided by, where a case names none.
OURS = {
    "so": "orthoreg_ext",
    "orthoreg": "orthoreg_ext-l1",
    "frobenius": "orthoreg_ext-frobenius",
    "dim 0": "orthoreg_ext",
    "both dims": "orthoreg_ext-both",
    "taylor": "orthoreg_ext-taylor",
    "magnitude": "orthoreg_ext-l2",
}
