"""gram, gram_penalty and add_gram_penalty_grad_ for odd layers and options."""

from __future__ import annotations

import math
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import orthoreg_ext as ox
import orthoreg_ext.functional as F
from orthoreg_ext.penalties import PENALTIES

from .odd import Layers, fuzz, is_right, junk, layers, plain
from .outcome import Refused, assert_near, assert_unchanged, call, snapshot

SIDES = ("rows", "cols", "small")
SQUARES = ("so", "offdiag", "tpp", "dso", "gor")


def is_plain(value: Any) -> bool:
    return isinstance(value, Tensor) and value.device.type == "cpu"


def matrices(drawn: Layers, i: int) -> tuple[Tensor, Tensor]:  # [g, n, k], [g, n, k]
    """The filter matrices of a layer and their absolute values, in float64."""
    weight = plain(drawn.weights[i])
    matrix = weight.reshape(weight.shape[0], weight.shape[1:].numel())
    bias = None if drawn.biases is None else drawn.biases[i]
    if bias is not None and bias.numel():  # an empty one is none
        matrix = torch.cat([matrix, plain(bias)[:, None]], 1)
    group = 1 if drawn.groups is None else drawn.groups[i]
    matrix = matrix.reshape(group, weight.shape[0] // group, matrix.shape[1])
    return matrix, matrix.abs()


@fuzz(0.15)
@given(layers(), st.sampled_from((*SIDES, "", None, 0)))
def test_gram(drawn: Layers, side: Any) -> None:
    before = snapshot(drawn.tensors())
    grams = call(F.gram, drawn.weights, side, biases=drawn.biases, groups=drawn.groups)
    assert_unchanged(before)
    if isinstance(grams, Refused):
        assert drawn.spoilt or side not in SIDES, f"refused what is right: {grams}"
        return
    assert side in SIDES
    for i, found in enumerate(grams):
        if not is_plain(found) or not is_plain(drawn.weights[i]):
            continue
        matrix, size = matrices(drawn, i)
        if side == "cols" or (side == "small" and matrix.shape[1] > matrix.shape[2]):
            matrix, size = matrix.mT, size.mT
        expected, sizes = matrix @ matrix.mT, size @ size.mT
        if drawn.groups is None or drawn.groups[i] == 1:
            expected, sizes = expected[0], sizes[0]
        assert_near(found, expected, sizes, f"layer {i}")


@st.composite
def options(draw: st.DrawFn, drawn: Layers) -> dict[str, Any]:
    """What gram_penalty takes beside the layers: for the right layers mostly right."""
    weights = drawn.weights if isinstance(drawn.weights, list) else [None, None]
    count = len(weights)
    shapes = [tuple(w.shape) or (1,) if is_right(w) else (2, 2) for w in weights]
    name = draw(st.sampled_from((*PENALTIES, "orthoreg", "so")))
    found: dict[str, Any] = {"penalty": name, "side": draw(st.sampled_from(SIDES))}
    if draw(st.booleans()):
        found["coefficients"] = [draw(st.sampled_from((1.0, 0, -2.5, 1e30))) for _ in range(count)]
    if name == "tpp" or draw(st.integers(0, 3)) == 0:
        number = draw(st.integers(0, 2**16))
        found["pruned"] = [
            torch.rand(s[0], generator=torch.Generator().manual_seed(number)) < 0.4 for s in shapes
        ]
    if draw(st.integers(0, 5)) == 0:
        found["targets"] = [draw(st.sampled_from((None, 1.0, 0.25, 0))) for _ in range(count)]
    if draw(st.integers(0, 3)) == 0:  # one thing more, or one spoilt
        shape = shapes[0] if shapes else (2,)
        key = draw(st.sampled_from((*found, "targets", "vectors", "strides", "num_groups")))
        found[key] = draw(
            st.one_of(
                junk(tuple(shape)),
                st.lists(junk(tuple(shape[:1])), min_size=count, max_size=count),
                st.sampled_from((-1, 10**12, True, float("inf"), {}, "so", [], (1,), "rows")),
                st.just([torch.tensor([0, 10**6])] * count),
                st.just([(2, 1)] * count),
            )
        )
    return found


def refusable(drawn: Layers, given_options: dict[str, Any]) -> bool:
    """Whether there is a reason to refuse the call."""
    factors = given_options.get("coefficients")
    if factors is not None and not (
        isinstance(factors, list) and all(isinstance(f, (int, float)) for f in factors)
    ):
        return True
    unusual = {"targets", "vectors", "strides", "num_groups", "pruned"} & given_options.keys()
    penalty, side = given_options["penalty"], given_options["side"]
    if not (isinstance(penalty, str) and isinstance(side, str)):
        return True
    known = penalty in ("orthoreg", "so", "frobenius", "offdiag", "cosine", "dso")
    return drawn.spoilt or bool(unusual) or not known or side not in SIDES


def expected_of(drawn: Layers, given_options: dict[str, Any]) -> tuple[Tensor, Tensor, list[Any]]:
    """Values in float64 by the reference, the size of their sums, and the gradients."""
    weights = [plain(w).requires_grad_() for w in drawn.weights]
    biases = None
    if drawn.biases is not None:
        biases = [None if b is None else plain(b).requires_grad_() for b in drawn.biases]
    wide = {
        key: [plain(t) if isinstance(t, Tensor) and t.is_floating_point() else t for t in value]
        if isinstance(value, (list, tuple)) and key != "coefficients"
        else value
        for key, value in given_options.items()
    }
    with ox.backend("reference"):
        values = F.gram_penalty(weights, biases=biases, groups=drawn.groups, **wide)
    leaves = [t for t in (*weights, *(biases or [])) if t is not None]
    grads: list[Any] = [None] * len(leaves)
    if values.requires_grad and bool(values.isfinite().all()):
        grads = list(torch.autograd.grad(values.sum(), leaves, allow_unused=True))
    sizes = []
    factors = given_options.get("coefficients")
    for i in range(len(weights)):
        _, size = matrices(drawn, i)
        left_out = wide.get("pruned") if given_options["penalty"] != "tpp" else None
        if left_out is not None and left_out[i] is not None:
            gone = torch.zeros(size.shape[:2].numel(), dtype=torch.bool)
            gone[
                left_out[i].nonzero()[:, 0] if left_out[i].dtype == torch.bool else left_out[i]
            ] = True
            size = size.masked_fill(gone.view(size.shape[:2]).unsqueeze(-1), 0)
        n, k = size.shape[-2:]
        total = 0.0
        for gram in (size @ size.mT, size.mT @ size):
            entries = gram + 4 * torch.eye(gram.shape[-1], dtype=gram.dtype)
            squared = given_options["penalty"] in (*SQUARES, "srip")
            total += float((entries.square() if squared else entries).sum() + n * k + n + k)
        factor = 1.0 if factors is None else abs(float(factors[i]))
        norms = size.square().sum(-1) if given_options["penalty"] == "cosine" else size.new_ones(1)
        if bool(((norms > 0) & (norms < 1e-35)).any()):
            total = math.inf  # of filters so small, cosines are 0 in all but float64
        if given_options["penalty"] == "frobenius" and total > 1e17:
            total = math.inf  # the squares under the root overflow in float32
        # 0 times what overflows in the layer's precision is NaN
        sizes.append(total * factor if factor or total != total else total)
    return values.detach(), torch.tensor(sizes, dtype=torch.float64), grads


@st.composite
def calls(draw: st.DrawFn) -> tuple[Layers, dict[str, Any]]:
    drawn = draw(layers())
    return drawn, draw(options(drawn))


def judged(drawn: Layers, given_options: dict[str, Any]) -> bool:
    """Whether the definition is computed beside it: all on the CPU, no vectors to be improved."""
    row = [*drawn.weights, *(drawn.biases or [])] if isinstance(drawn.weights, list) else [None]
    return all(t is None or is_plain(t) for t in row) and "vectors" not in given_options


def assert_values(
    drawn: Layers, values: Tensor, expected: Tensor, sizes: Tensor, penalty: str
) -> None:
    for i, weight in enumerate(drawn.weights):
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        one = slice(i, i + 1)
        assert_near(values[one], expected[one], sizes[one], f"{penalty} of layer {i}", dtype)


@fuzz(0.25)
@given(calls())
def test_gram_penalty(drawn_call: tuple[Layers, dict[str, Any]]) -> None:
    drawn, given_options = drawn_call
    before = snapshot(drawn.tensors())
    values = call(
        F.gram_penalty, drawn.weights, biases=drawn.biases, groups=drawn.groups, **given_options
    )
    if "vectors" not in given_options:
        assert_unchanged(before)
    if isinstance(values, Refused):
        assert refusable(drawn, given_options), f"refused what is right: {values}"
        return
    assert values.shape == (len(drawn.weights),)
    if judged(drawn, given_options):
        expected, sizes, _ = expected_of(drawn, given_options)
        assert_values(drawn, values, expected, sizes, given_options["penalty"])


@fuzz(0.25)
@given(calls(), st.booleans(), st.sampled_from((1.0, 0.0, -0.5, True, None, "1", 1j, [1.0], "t")))
def test_add_gram_penalty_grad(
    drawn_call: tuple[Layers, dict[str, Any]], with_grads: bool, strength: Any
) -> None:
    drawn, given_options = drawn_call
    if strength == "t":
        strength = torch.tensor([0.5])
    leaves = []
    for tensor in drawn.tensors():
        if tensor.is_leaf and tensor.is_floating_point() and not tensor.is_nested:
            try:
                tensor.requires_grad_()
            except (RuntimeError, ValueError):
                continue
            if with_grads and is_plain(tensor) and tensor.layout is torch.strided:
                tensor.grad = torch.ones_like(tensor)
            leaves.append(tensor)
    before = snapshot(drawn.tensors())
    with_options = {"biases": drawn.biases, "groups": drawn.groups, **given_options}
    values = call(F.add_gram_penalty_grad_, drawn.weights, strength=strength, **with_options)
    if isinstance(values, Refused):
        assert_unchanged(before)
        odd = not isinstance(strength, (int, float, Tensor))
        assert odd or refusable(drawn, given_options), f"refused what is right: {values}"
        return
    if not judged(drawn, given_options):
        return
    expected, sizes, grads = expected_of(drawn, given_options)
    assert_values(drawn, values, expected, sizes, given_options["penalty"])
    tensors = [t for t in (*drawn.weights, *(drawn.biases or [])) if t is not None]
    written = {id(leaf) for leaf in leaves}
    usual = given_options["penalty"] in SQUARES and bool((sizes < 1e12).all())
    if not usual or len({id(t) for t in tensors}) < len(tensors):
        return
    factor = float(strength)
    for i, (tensor, grad) in enumerate(zip(tensors, grads, strict=True)):
        if id(tensor) not in written or not tensor.numel() or grad is None:
            continue
        size = sizes.abs().max() * (1 + plain(tensor).abs().max()) * abs(factor) + 1
        rounding = torch.finfo(tensor.dtype).eps * (1 + factor * grad.abs())
        target = factor * grad + with_grads
        got = plain(tensor.grad) if tensor.grad is not None else torch.zeros_like(target)
        if tensor.is_neg() or type(tensor) not in (Tensor, torch.nn.Parameter):
            continue
        overflows = target.abs() > torch.finfo(tensor.dtype).max / 4
        near = overflows | ((got - target).abs() <= 1e-4 * size + 4 * rounding.abs())
        assert bool(near.all()), f"gradient of tensor {i}: {got}, expected {target}"
