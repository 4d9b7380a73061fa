"""``orthoreg bench``: what regulariser and scores cost on the layers of one's own model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import functional, reference
from .backend import backend
from .layers import filter_layers
from .machine import describe
from .penalties import Penalty, get_penalty
from .plan import Term
from .regularizer import OrthoRegularizer
from .timing import Timing, measure, watch

CRITERIA = ("l1", "l2", "taylor", "taylor_sq", "taylor_abs")
"""Five statistics, all from one read of weight and gradient."""


class StillOptimizer(torch.optim.Optimizer):
    """An optimizer whose step is what is attached to it, and no more."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        super().__init__(parameters, {})

    def step(self, closure: object = None) -> None:  # type: ignore[override]
        """Moves nothing."""


def formula_scores(
    weights: Sequence[Tensor],  # each [n, ...]
    grads: Sequence[Tensor],  # like weights
    dims: Sequence[int] = (0,),
) -> list[Tensor]:
    """`CRITERIA` as one writes them: by layer, then by dimension, then by criterion."""
    out = []
    for weight, grad in zip(weights, grads, strict=True):
        for dim in dims:
            over = [d for d in range(weight.dim()) if d != dim]
            product = weight * grad
            out += [
                weight.abs().sum(over),
                weight.square().sum(over).sqrt(),
                product.sum(over).abs(),
                product.square().sum(over),
                product.abs().sum(over),
            ]
    return out


def formula_term(terms: Sequence[Term], penalty: str) -> Tensor:
    """The term by its definition, one layer after the other, for autograd."""
    row, parts = get_penalty(penalty), []
    for term in terms:
        given = term.tensors()
        if not isinstance(row, Penalty) or row.kernel:
            with backend("reference"):
                values = functional.gram_penalty(penalty=penalty, side="small", **given)
            parts.append((values * term.coefficients.to(values.dtype)).sum())
            continue
        biases = [torch.empty(0) if bias is None else bias for bias in given["biases"]]
        nothing = [0.0] * len(biases)
        values = reference.gram_penalty(
            given["weights"], biases, [], [], given["groups"], term.columns, nothing, row
        )
        parts.append((values * term.coefficients.to(values.dtype)).sum())
    return torch.stack(parts).sum()


def bench(
    name: str,
    *,
    penalty: str = "orthoreg",
    device: str = "cpu",
    seconds: float = 20.0,
    num_classes: int | None = None,
    input_shape: tuple[int, ...] | None = None,
    image_size: int | None = None,
    channels: int | None = None,
) -> dict[str, Any]:
    """Times the regulariser and five scores on a model's layers, beside plain PyTorch.

    Args:
        name: the model, as for :func:`orthoreg_ext.analyze.analyze`.
        penalty: a name of :data:`orthoreg_ext.penalties.PENALTIES`.
        device: ``"cpu"`` or ``"cuda"``.
        seconds: for all timing.
        num_classes: length of the output; the factory's own by default.
        input_shape: [channels, height, width] of the input; the factory's own by default.
        image_size: the same for a square.
        channels: the same for its channels.

    Raises:
        ValueError: the model cannot be built or has no layer to regularise, or an argument is
            unknown or out of range.
    """
    if get_penalty(penalty).counts is not None:
        raise ValueError(
            f"--penalty {penalty!r} is about filters to prune, of which a model has none; choose "
            "another penalty"
        )
    if not 0 < seconds < float("inf"):
        raise ValueError(f"--seconds is {seconds}; expected a positive number")
    from .experiment.named import Request, load
    from .experiment.settings import why_no_gpu

    if device == "cuda" and (reason := why_no_gpu()):
        raise ValueError(f"--device cuda cannot be used ({reason}); use --device cpu")
    given = (num_classes, input_shape, image_size, channels)
    model = load(Request(name, None, None, *given)).model.to(device)
    try:
        regularizer = OrthoRegularizer(model, penalty)
    except ValueError as error:
        raise ValueError(
            f"model {name!r}: {str(error).partition(';')[0]}; name a MODEL with convolutions or "
            "linear layers that are trained"
        ) from error
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    terms, skipped = regularizer._current().terms, regularizer._current().skipped
    layers = filter_layers(model)
    return {
        "machine": describe(device),
        "model": name,
        "penalty": penalty,
        "regularised": sum(len(term.layers) for term in terms),
        "left_out": {layer.name: layer.reason for layer in skipped},
        "scored": len(layers),
        "cases": [
            _case("penalty and gradient", _term_ways(regularizer, model), device, seconds / 3),
            _case(
                f"{len(CRITERIA)} scores a filter", _score_ways(model, (0,)), device, seconds / 3
            ),
            _case(
                f"{len(CRITERIA)} scores a filter and an input channel",
                _score_ways(model, (0, 1)),
                device,
                seconds / 3,
            ),
        ],
    }


def _term_ways(regularizer: OrthoRegularizer, model: nn.Module) -> dict[str, Callable[[], object]]:
    optimizer = StillOptimizer(list(model.parameters()))
    regularizer.attach(optimizer)
    terms, strength = regularizer._current().terms, regularizer.strength
    eager = lambda: (strength * formula_term(terms, regularizer.penalty)).backward()  # noqa: E731
    return {
        "reg.attach(optimizer)": optimizer.step,
        "loss + reg()": lambda: regularizer().backward(),
        "plain PyTorch": eager,
    }


def _score_ways(model: nn.Module, dims: tuple[int, ...]) -> dict[str, Callable[[], object]]:
    layers = filter_layers(model)
    weights = [layer.weight.detach() for layer in layers]
    grads = [torch.randn_like(weight) for weight in weights]
    groups = [layer.groups for layer in layers]
    dim: Any = dims[0] if len(dims) == 1 else dims
    fused = lambda: functional.filter_scores(weights, grads, CRITERIA, dim=dim, groups=groups)  # noqa: E731
    return {
        "filter_scores": fused,
        "plain PyTorch": lambda: formula_scores(weights, grads, dims),
    }


def _case(
    title: str, calls: dict[str, Callable[[], object]], device: str, budget: float
) -> dict[str, Any]:
    timing: Timing = measure(calls, device, budget, load=watch(device))
    first = next(iter(calls))
    rows = {
        name: {
            "ms": timing.spread(name, 1e3).as_dict(),
            "ratio": None if name == first else timing.ratio(name, first).as_dict(),
        }
        for name in calls
    }
    return {"title": title, "base": first, **timing.about(), "rows": rows}


def table(result: dict[str, Any]) -> str:
    """The result of :func:`bench` as text."""
    machine = result["machine"]
    lines = [
        f"{result['model']} on {machine['name']}, {machine['threads']} threads, "
        f"torch {machine['torch']}",
        f"penalty {result['penalty']!r} on {result['regularised']} layers, scores of "
        f"{result['scored']}",
    ]
    for case in result["cases"]:
        note = {
            "contended": "; THE MACHINE WAS BUSY: do not trust these",
            "unwatched": "",
            "quiet": f", {case['rejected']} disturbed ones left out",
        }[case["state"]]
        lines += ["", f"{case['title']}: {case['rounds']} rounds{note}"]
        for name, row in case["rows"].items():
            ms, ratio = row["ms"], row["ratio"]
            line = f"  {name:22} {ms['median']:10.4f} ms  ({ms['low']:.4f} to {ms['high']:.4f})"
            if ratio is not None:
                line += f"  {ratio['median']:7.2f} x  ({ratio['low']:.2f} to {ratio['high']:.2f})"
            lines.append(line)
    if result["left_out"]:
        lines += ["", "not regularised:"]
        lines += [f"  {name or 'the model'}: {why}" for name, why in result["left_out"].items()]
    return "\n".join(lines)
