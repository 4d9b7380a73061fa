"""torch.library.opcheck of every operator: schemas, fake kernels, autograd, dynamic shapes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from orthoreg_ext.build_info import compiled
from orthoreg_ext.penalties import KERNELS

pytestmark = pytest.mark.skipif(not compiled, reason="needs the compiled modules")

NO_TENSORS = {"_cpu_level", "_torch_has_cuda", "release_prepared", "prepare_gram_penalty"}
"""They plan, release and ask: there is no fake kernel or gradient to check."""


def tensors(*, requires_grad: bool = False) -> tuple[list[Tensor], list[Tensor], list[int]]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 4), (4, 2, 3, 1), (6, 2)]
    weights = [torch.randn(s, generator=generator) for s in shapes]
    biases = [torch.randn(3, generator=generator), torch.empty(0), torch.randn(6)]
    for tensor in (*weights, biases[0], biases[2]):
        tensor.requires_grad_(requires_grad)
    return weights, biases, [1, 1, 3]


def zeros(like: list[Tensor]) -> list[Tensor]:
    return [torch.zeros_like(t) for t in like]


def arguments() -> dict[str, list[tuple[object, ...]]]:
    """What each operator is checked with."""
    ops = torch.ops.orthoreg
    weights, biases, groups = tensors()
    columns, offsets = [False, True, False], [0.0, 1.0, 2.0]
    moving, moving_biases, _ = tensors(requires_grad=True)
    sides = (groups, columns, offsets)
    slopes = ops.gram_penalty(weights, biases, [], [], *sides, "so", "ieee")[1]
    factors, bound = torch.ones(3), torch.ones(3, requires_grad=True)
    rows = [False] * 3
    mask = [
        torch.tensor([False, True, False]),
        torch.empty(0, dtype=torch.bool),
        weights[2][:, 0] > 0,
    ]
    prepared = ops.prepare_gram_penalty(weights, biases, [], [], *sides, "so", "ieee")
    grads = [*zeros(weights), *zeros([biases[0], biases[2]])]
    entries, starts = torch.tensor([0, 1, 1 << 32, (1 << 32) + 1]), torch.tensor([0, 2, 4])
    return {
        "gram": [(moving, moving_biases, groups, columns, "ieee")],
        "gram_penalty": [
            (moving, moving_biases, mask, [], groups, rows, offsets, name, "3xtf32")
            for name in KERNELS
        ],
        "gram_penalty_grad": [
            (moving, moving_biases, [], [], slopes, bound, groups, columns, "so", "mixed")
        ],
        "add_gram_penalty_grad_": [
            (weights, biases, [], [], zeros(weights), zeros(biases), factors, *sides, "so", "ieee")
        ],
        "add_prepared_gram_penalty_grad_": [(prepared, grads, factors)],
        "filter_scores": [
            (weights, zeros(weights), biases, zeros(biases), groups, 0, ["l1", "fisher"]),
            (weights, [], [], [], groups, 2, ["l2"]),
        ],
        "accumulate_fisher_": [
            (weights, weights, zeros(weights), groups, 0, ["fisher_diag", "taylor"])
        ],
        "group_scores": [([torch.ones(3), torch.ones(2)], entries, starts, "mean")],
    }


def test_opcheck_knows_every_operator() -> None:
    names = torch._C._dispatch_get_all_op_names()
    ours = {name.removeprefix("orthoreg::") for name in names if name.startswith("orthoreg::")}
    assert ours | {"_torch_has_cuda"} == arguments().keys() | NO_TENSORS  # that of CUDA builds only


@pytest.mark.parametrize(
    "name",
    [
        *("gram", "gram_penalty", "gram_penalty_grad", "add_gram_penalty_grad_"),
        *("add_prepared_gram_penalty_grad_", "filter_scores", "accumulate_fisher_", "group_scores"),
    ],
)
def test_opcheck(name: str) -> None:
    for given in arguments()[name]:
        torch.library.opcheck(getattr(torch.ops.orthoreg, name).default, given)
