"""filter_scores, accumulate_fisher_ and group_scores for odd layers, gradients and indices."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import orthoreg_ext as ox
import orthoreg_ext.functional as F
from orthoreg_ext import reference

from .odd import FLOATS, Layers, fuzz, is_right, junk, layers, plain, tensors
from .outcome import Refused, assert_near, assert_unchanged, call, snapshot

CRITERIA = tuple(reference.SCORES)
SOME = st.lists(
    st.sampled_from((*CRITERIA, "l1", "l2", "taylor")), min_size=1, max_size=3, unique=True
)
DIMS = st.sampled_from((0, 0, 1, (0, 1)))


def on_cpu(*rows: Any) -> bool:
    return all(
        isinstance(row, list)
        and all(t is None or (isinstance(t, Tensor) and t.device.type == "cpu") for t in row)
        for row in rows
        if row is not None
    )


def assert_scores(
    found: Any, weights: list[Tensor], groups: Any, names: list[str], dim: Any, *rows: Any
) -> None:
    """Each score equals that of the definition in float64; the size is that of |w| and |g|."""
    dicts = list(found) if isinstance(dim, tuple) else [found]
    axes = dim if isinstance(dim, tuple) else (dim,)
    for scores, axis in zip(dicts, axes, strict=True):
        assert list(scores) == names
        for i, weight in enumerate(weights):
            group = 1 if groups is None else groups[i]
            none = plain(weight).new_empty(0)
            bias, grad, bias_grad = (
                plain(r[i]) if r is not None and is_right(r[i]) else none for r in rows
            )
            if axis == 1:
                bias = bias_grad = none
            w = reference.filter_entries(plain(weight), bias, group, axis)
            g = none
            if set(names) - set(reference.WEIGHT_ONLY):
                g = reference.filter_entries(grad, bias_grad if bias.numel() else none, group, axis)
            for name in names:
                if name == reference.FISHER_DIAG:
                    continue
                expected = reference.SCORES[name](w, g)
                size = reference.SCORES[name](w.abs(), g.abs())
                wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
                assert scores[name][i].dtype == wide
                assert_near(scores[name][i], expected, size, f"{name} of layer {i}, dim {axis}")


@st.composite
def scored(draw: st.DrawFn) -> tuple[Layers, dict[str, Any], bool]:
    """Layers, gradients and the rest; whether something may be refused."""
    drawn = draw(layers(least=1))
    found: dict[str, Any] = {"criteria": draw(SOME), "dim": draw(DIMS)}
    weights = drawn.weights if isinstance(drawn.weights, list) else []
    right = [is_right(w) for w in weights]
    spoilt = drawn.spoilt or not all(right)
    if found["dim"] == 1:
        drawn.biases = None
    if draw(st.integers(0, 3)) or any(n not in ("l1", "l2") for n in found["criteria"]):
        found["grads"] = [
            draw(tensors(tuple(w.shape), draw(st.sampled_from((w.dtype, torch.float32)))))
            if ok
            else draw(junk((2, 2)))
            for w, ok in zip(weights, right, strict=True)
        ]
        if isinstance(drawn.biases, list) and len(drawn.biases) == len(weights):
            found["bias_grads"] = [
                None if not is_right(b) else draw(tensors(tuple(b.shape), b.dtype))
                for b in drawn.biases
            ]
    if draw(st.integers(0, 5)) == 0:
        spoilt = True
        key = draw(st.sampled_from(tuple(found)))
        shape = tuple(weights[0].shape) if weights and right[0] else (2, 2)
        if key in ("grads", "bias_grads") and found[key] and draw(st.booleans()):
            found[key][0] = draw(junk(shape if key == "grads" else shape[:1]))
        else:
            found[key] = draw(
                st.one_of(
                    st.sampled_from(("l1", [], ["l3"], 2, -1, (1, 0), None, 0.5)), junk(shape)
                )
            )
    return drawn, found, spoilt


@fuzz(0.12)
@given(scored())
def test_filter_scores(drawn_call: tuple[Layers, dict[str, Any], bool]) -> None:
    drawn, options, spoilt = drawn_call
    extra = [t for key in ("grads", "bias_grads") for t in _tensors(options.get(key))]
    before = snapshot([*drawn.tensors(), *extra])
    found = call(
        F.filter_scores, drawn.weights, biases=drawn.biases, groups=drawn.groups, **options
    )
    assert_unchanged(before)
    if isinstance(found, Refused):
        assert spoilt, f"refused what is right: {found}"
        return
    rows = (drawn.biases, options.get("grads"), options.get("bias_grads"))
    if on_cpu(drawn.weights, *rows):
        names = list(options["criteria"])
        assert_scores(found, drawn.weights, drawn.groups, names, options["dim"], *rows)


def _tensors(row: Any) -> list[Tensor]:
    return [t for t in row if isinstance(t, Tensor)] if isinstance(row, list) else []


@st.composite
def accumulated(draw: st.DrawFn) -> tuple[Layers, dict[str, Any], bool]:
    drawn = draw(layers(least=1, biases=False))
    weights = drawn.weights if isinstance(drawn.weights, list) else []
    right = [is_right(w) for w in weights]
    spoilt = drawn.spoilt or not all(right)
    grads, fisher = [], []
    for w, ok in zip(weights, right, strict=True):
        shape = tuple(w.shape) if ok else (2, 2)
        grads.append(draw(tensors(shape, w.dtype if ok else torch.float32)))
        wide = torch.float64 if ok and w.dtype == torch.float64 else torch.float32
        writable = ("plain", "channels_last", "permuted", "every second", "unaligned", "rows apart")
        fisher.append(draw(tensors(shape, wide, writable, ("one", "zero", "normal"))))
    found: dict[str, Any] = {
        "grads": grads,
        "fisher": fisher,
        "criteria": draw(
            st.lists(st.sampled_from((*CRITERIA, "fisher_diag")), min_size=1, unique=True)
        ),
        "dim": draw(DIMS),
    }
    if weights and draw(st.integers(0, 3)) == 0:
        spoilt = True
        key = draw(st.sampled_from(("grads", "fisher", "fisher", "criteria", "alias")))
        if key == "alias":
            found["fisher"][-1] = draw(st.sampled_from((grads[0], weights[0], fisher[0])))
        elif key != "criteria":
            odd = ("expanded", "overlapping", "zero tensor", "negative")
            shape = tuple(weights[0].shape) if right[0] else (2, 2)
            found[key][0] = draw(st.one_of(junk(shape), tensors(shape, torch.float32, odd)))
        else:
            found[key] = draw(st.sampled_from(("l1", [], ["l3"], None, 3)))
    return drawn, found, spoilt


@fuzz(0.1)
@given(accumulated())
def test_accumulate_fisher(drawn_call: tuple[Layers, dict[str, Any], bool]) -> None:
    drawn, options, spoilt = drawn_call
    fisher = [t for t in options["fisher"] if isinstance(t, Tensor)]
    inputs = [*drawn.tensors(), *_tensors(options["grads"])]
    before, sums = (
        snapshot([*inputs, *fisher]),
        [t.detach().clone() if is_right(t) else t for t in fisher],
    )
    found = call(F.accumulate_fisher_, drawn.weights, groups=drawn.groups, **options)
    if isinstance(found, Refused):
        assert spoilt, f"refused what is right: {found}"
        assert_unchanged(before)
        return
    if not on_cpu(drawn.weights, options["grads"], options["fisher"]) or spoilt:
        return
    for i, (after, start, grad) in enumerate(zip(fisher, sums, options["grads"], strict=True)):
        added = plain(grad).square()
        assert_near(after, plain(start) + added, plain(start).abs() + added, f"fisher[{i}]")
    names = list(options["criteria"])
    rows = (None, options["grads"], None)
    assert_scores(found, drawn.weights, drawn.groups, names, options["dim"], *rows)


@st.composite
def coupled(draw: st.DrawFn) -> tuple[Any, Any, Any, bool]:
    """Scores, members and a reduction; whether something may be refused."""
    count = draw(st.integers(0, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    scores: list[Any] = []
    for _ in range(count):
        shape = (draw(st.sampled_from((0, 1, 3, 8, 17))),)
        scores.append(draw(tensors(shape, draw(st.sampled_from(FLOATS)))))
    spoilt, members = False, []
    for _ in range(draw(st.integers(0, 3)) if count else 0):
        size = draw(st.sampled_from((0, 1, 3, 8)))
        group: list[Any] = []
        for at in draw(st.lists(st.integers(0, count - 1), max_size=3)):
            length = len(scores[at])
            index: Any = torch.randint(0, max(length, 1), (size,), generator=generator)
            if length == 0 and size:
                spoilt = True
            kind = draw(st.sampled_from(("right",) * 8 + ("none", "missing", "far", "odd")))
            if kind == "none":
                index, spoilt = None, True  # of another length than the others
            elif kind == "missing" and size:
                index[0], spoilt = -1, True  # perhaps in every member
            elif kind == "far" and size:
                index[0], spoilt = draw(st.sampled_from((-2, 2**31, 2**62, 17, -(2**40)))), True
            elif kind == "odd":
                index, spoilt = draw(junk((size,))), True
            group.append((at, index))
        spoilt = spoilt or not group
        members.append(group)
    reduction = draw(
        st.sampled_from((*reference.REDUCTIONS, *reference.REDUCTIONS, "median", None))
    )
    if draw(st.integers(0, 5)) == 0:
        spoilt = True
        if scores and draw(st.booleans()):
            scores[0] = draw(junk((3,)))
        elif members and draw(st.booleans()):
            members[0] = draw(
                st.sampled_from(([(9, None)], [(-1, None)], [("0", None)], 3, [()], None))
            )
        else:
            members = draw(junk((3,)))
    return scores, members, reduction, spoilt


@fuzz(0.06)
@given(coupled())
def test_group_scores(drawn: tuple[Any, Any, Any, bool]) -> None:
    scores, members, reduction, spoilt = drawn
    found = call(F.group_scores, scores, members, reduction)
    if isinstance(found, Refused):
        assert spoilt or reduction not in reference.REDUCTIONS, f"refused what is right: {found}"
        return
    if not on_cpu(scores) or not scores:
        return
    wide = [plain(s) for s in scores]
    with ox.backend("reference"):
        expected = F.group_scores(wide, members, reduction)
        sizes = F.group_scores([s.abs() for s in wide], members, "sum")
    for i, (one, other, size) in enumerate(zip(found, expected, sizes, strict=True)):
        assert_near(one, other, size, f"group {i}")
