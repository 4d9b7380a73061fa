"""The compiled operators themselves, called as no function of the package would call them.

Their arguments follow the schemas and nothing else. What they return is not judged: they must check
all that their memory accesses depend on, and refuse the rest without touching anything.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from orthoreg_ext.build_info import compiled
from orthoreg_ext.penalties import KERNELS
from orthoreg_ext.precision import PRECISIONS
from orthoreg_ext.reference import FISHER_DIAG, REDUCTIONS, SCORES

from .odd import FLOATS, JUNK, fuzz, shapes, tensors

pytestmark = pytest.mark.skipif(not compiled, reason="nothing is compiled here")

OPERATORS = {
    *("gram", "gram_penalty", "gram_penalty_grad", "add_gram_penalty_grad_", "group_scores"),
    *("prepare_gram_penalty", "add_prepared_gram_penalty_grad_", "release_prepared"),
    *("filter_scores", "accumulate_fisher_"),
}
NUMBERS = (0, 1, 1, 1, 2, 3, -1, 2**31, 2**62, -(2**63))
NAMES = (*KERNELS, "nothing")
READ = ("plain", "plain", "channels_last", "unaligned", "rows apart", "subclass")  # as they are
TENSORS = tuple(i for i, make in enumerate(JUNK) if isinstance(make((2, 2)), Tensor))


def tensor_or_odd(draw: st.DrawFn, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    odd = draw(st.integers(0, 31))
    if odd == 0:
        return JUNK[draw(st.sampled_from(TENSORS))](shape)  # type: ignore[no-any-return]
    return draw(tensors(shape, dtype) if odd < 3 else tensors(shape, dtype, READ))


@st.composite
def arguments(draw: st.DrawFn) -> tuple[str, list[Any]]:
    """An operator and arguments that fit each other mostly, but for one that may be anything."""
    count = draw(st.sampled_from((1, 1, 2, 3, 0)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    chosen = [draw(shapes(1)) for _ in range(count)]
    double = draw(st.booleans())
    dtype = torch.float64 if double else draw(st.sampled_from((FLOATS[0], *FLOATS[3:])))
    wide = torch.float64 if double else torch.float32
    weights, grads = ([tensor_or_odd(draw, s, dtype) for s in chosen] for _ in "wg")
    none = torch.empty(0, dtype=dtype)
    with_bias = [draw(st.booleans()) for _ in chosen]
    biases, bias_grads = (
        [
            tensor_or_odd(draw, s[:1], none.dtype) if b else none
            for s, b in zip(chosen, with_bias, strict=True)
        ]
        for _ in "bg"
    )
    masks = [
        torch.rand(s[0], generator=generator) < 0.5 if draw(st.booleans()) else torch.empty(0) > 0
        for s in chosen
    ]
    targets = [draw(tensors(s[:1], wide)) if draw(st.booleans()) else none.to(wide) for s in chosen]
    groups = [draw(st.sampled_from((1, 1, 1, 2, s[0] or 1))) for s in chosen]
    columns = [draw(st.sampled_from((0, 1))) for _ in chosen]
    sizes = [
        g * (m := (s[0] // g if not c else torch.Size(s[1:]).numel() + b)) * m
        for s, g, c, b in zip(chosen, groups, columns, with_bias, strict=True)
    ]
    slopes, factors = torch.ones(max(0, sum(sizes)), dtype=wide), torch.ones(count, dtype=wide)
    offsets, dim = [0.0] * count, draw(st.sampled_from((0, 1, 2)))
    penalty, precision = (
        draw(st.sampled_from(NAMES)),
        draw(st.sampled_from((*PRECISIONS, *PRECISIONS, ""))),
    )
    criteria = draw(st.lists(st.sampled_from(tuple(SCORES)), min_size=1, max_size=3))
    penalised = [weights, biases, masks if draw(st.booleans()) else [], []]
    if draw(st.integers(0, 3)) == 0 or (penalty == "tpp" and draw(st.booleans())):
        penalised[2:], columns = [masks, targets], [0] * count
    starts = torch.tensor([0, draw(st.sampled_from((*(1,) * 20, *NUMBERS))), 2])
    places = (*(0, 1, 2, 1 << 32) * 8, (1 << 32) + 1, *NUMBERS)
    entries = torch.tensor([draw(st.sampled_from(places)) for _ in range(2)])
    fisher = [torch.zeros(s, dtype=wide) for s in chosen]
    flat = [draw(tensors((draw(st.sampled_from((5, 5, 1, 0))),), wide, READ)) for _ in range(2)]
    rows: dict[str, list[Any]] = {
        "gram": [weights, biases, groups, columns, precision],
        "gram_penalty": [*penalised, groups, columns, offsets, penalty, precision],
        "gram_penalty_grad": [*penalised, slopes, factors, groups, columns, penalty, precision],
        "add_gram_penalty_grad_": [
            *(*penalised, grads, bias_grads, factors, groups, columns, offsets, penalty, precision)
        ],
        "prepare_gram_penalty": [*penalised, groups, columns, offsets, penalty, precision],
        "add_prepared_gram_penalty_grad_": [0, grads, factors],
        "filter_scores": [weights, grads, biases, bias_grads, groups, dim, criteria],
        "accumulate_fisher_": [weights, grads, fisher, groups, dim, [FISHER_DIAG, *criteria]],
        "group_scores": [flat, entries, starts, draw(st.sampled_from((*REDUCTIONS, "")))],
        "release_prepared": [draw(st.sampled_from(NUMBERS))],
    }
    assert rows.keys() == OPERATORS
    name = draw(st.sampled_from(tuple(rows)))
    given_arguments = rows[name]
    if draw(st.integers(0, 3)) == 0:
        at = draw(st.integers(0, len(given_arguments) - 1))
        given_arguments[at] = spoil(draw, given_arguments[at])
    return name, given_arguments


def spoil(draw: st.DrawFn, value: Any) -> Any:
    """Something of the same type in the schema."""
    if isinstance(value, str):
        return draw(st.sampled_from(("", "so", "l1", "x" * 1000, "\0")))
    if isinstance(value, Tensor):
        return JUNK[draw(st.sampled_from(TENSORS))]((3,))
    if isinstance(value, int):
        return draw(st.sampled_from(NUMBERS))
    if not value:
        return [torch.ones(2)]
    change = draw(st.sampled_from(("longer", "shorter", "other")))
    if change != "other":
        return [*value, value[0]] if change == "longer" else value[1:]
    return [spoil(draw, value[0]), *value[1:]]


def test_operators_check_what_they_read() -> None:
    accepted: Counter[str] = Counter()

    @fuzz(0.3, least=300)
    @given(arguments())
    def check(drawn: tuple[str, list[Any]]) -> None:
        name, given_arguments = drawn
        try:
            with torch.no_grad():
                found = getattr(torch.ops.orthoreg, name)(*given_arguments)
        except (RuntimeError, NotImplementedError, TypeError, ValueError, IndexError):
            return
        accepted[name] += 1
        if name == "prepare_gram_penalty":
            _add_and_release(found, given_arguments)

    check()
    # Or nothing would be tested. The two left out take what only another operator gives.
    left_out = {"add_prepared_gram_penalty_grad_", "release_prepared"}
    assert accepted.keys() >= OPERATORS - left_out, f"refused whatever was drawn: {accepted}"


def _add_and_release(number: int, given_arguments: list[Any]) -> None:
    weights, biases = given_arguments[0], [b for b in given_arguments[1] if b.numel()]
    grads = [torch.ones_like(t) for t in (*weights, *biases)]
    wide = torch.float64 if weights[0].dtype == torch.float64 else torch.float32
    operators = torch.ops.orthoreg
    try:
        for some in (grads, grads[:-1], [g[:1] for g in grads]):
            operators.add_prepared_gram_penalty_grad_(
                number, some, torch.ones(len(weights), dtype=wide)
            )
    except (RuntimeError, NotImplementedError):
        pass
    finally:
        operators.release_prepared(number)
    with pytest.raises(RuntimeError):
        operators.add_prepared_gram_penalty_grad_(
            number, grads, torch.ones(len(weights), dtype=wide)
        )
