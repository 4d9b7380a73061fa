"""The one call that measures all of it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..layers import FilterLayer, SkippedLayer, inspect_layers
from ..plan import Selection, Selector, selects
from ..pruning.calibration import Loss
from ..pruning.inputs import undisturbed
from .additivity import additivity, contributions
from .jacobian import Spectrum, jacobian_spectrum
from .result import Diagnosis, LayerDiagnosis
from .samples import Batch, read
from .weights import measure_weights, silent_channels


def diagnose(
    model: nn.Module,
    data: Iterable[Any] | None = None,
    *,
    loss: Loss | None = None,
    samples: int = 1024,
    jacobian_samples: int = 32,
    include: Selector | None = None,
    exclude: Selector | None = None,
    bias: bool | str = "conv",
    max_dim: int = 2048,
) -> Diagnosis:
    """Measures how orthogonal, redundant and trainable the filters of a model are.

    Of every layer, from its filter matrices W and their Gram matrices G alone, in float64:

    - degree of orthogonality ||diag G||_1 / ||G||_1 of the smaller side (OrthoReg's released code,
      eval.py; it chooses the side so for ResNets and hard-codes it for other networks);
    - mean and largest |cosine| of two filters, condition number of W, dead filters.

    With data, in eval mode: the additivity gap of importances of the filters of each layer (see
    :class:`Additivity`) and the singular values of the model's Jacobian (see :class:`Spectrum`).

    The model is as before afterwards: training flags, `requires_grad`, `.grad`, buffers, hooks and
    the random state. Frozen layers and the classifier are measured like all others.

    Args:
        model: any module; also a single layer.
        data: (input, target) batches; an input is a tensor, a tuple of arguments or a dict, and
            the first dimension of its tensors counts the samples.
        loss: (output, target) -> scalar mean over the batch; cross entropy by default.
        samples: of how many samples, the first ones of `data`, the gaps are. The gap of many
            filters and few samples is mostly noise: compare it with its floor.
        jacobian_samples: of how many the Jacobians are, with a backward pass for each output; 0
            leaves them out. Outputs that are no floating-point [samples, ...], and more than 1024
            of them, are noted instead.
        include: names or patterns of the layers to take, or a function of name and module; all
            layers by default, but for those of more than `max_dim` filters.
        exclude: likewise, layers to leave out.
        bias: whether a bias is one more entry of its filter: True, False or ``"conv"`` (not for
            linear layers), as in :class:`orthoreg_ext.OrthoRegularizer`; in the Gram matrices as
            well as in the contributions. (Its ``report()`` leaves it out of the cosines.)
        max_dim: the largest matrix between the filters of a layer that is formed without `include`.

    Raises:
        TypeError: `model` is no module, or `data` no iterable.
        ValueError: no layer is left, a weight or the loss is not finite, a batch is no pair of
            input and target, or an argument is unknown or out of range.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    for name, value, least in (
        ("samples", samples, 1),
        ("jacobian_samples", jacobian_samples, 0),
        ("max_dim", max_dim, 1),
    ):
        if not isinstance(value, int) or value < least:
            raise ValueError(f"{name} is {value!r}, expected a whole number of at least {least}")
    if not isinstance(bias, (bool, str)) or bias not in (True, False, "conv"):
        raise ValueError(f"bias is {bias!r}, expected True, False or 'conv'")
    selection = Selection("small", "uniform", include, exclude, bias, max_dim)
    selection.check(model)
    layers, skipped = _select(model, selection)
    with_bias = [
        layer.bias is not None and (layer.kind != "linear" if bias == "conv" else bool(bias))
        for layer in layers
    ]
    with undisturbed(model):
        biases = [x.bias if taken else None for x, taken in zip(layers, with_bias, strict=True)]
        with torch.no_grad(), torch.autocast(_device_type(layers), enabled=False):
            numbers = measure_weights(layers, biases)
            silent = silent_channels(model)
        rows = [
            LayerDiagnosis(x.name, x.kind, x.filters, x.groups, x.fan_in + taken, found)
            for x, taken, found in zip(layers, with_bias, numbers, strict=True)
        ]
        if data is None:
            return Diagnosis(tuple(rows), tuple(skipped), silent)
        batches = read(data, max(samples, jacobian_samples))
        used = _first(batches, samples)
        found = contributions(model, layers, with_bias, used, loss)
        spectrum: Spectrum | str | None = None
        if jacobian_samples:
            few = _first(batches, jacobian_samples)
            spectrum = jacobian_spectrum(model, few, apart=found.apart)
    measured = [_with_additivity(row, c) for row, c in zip(rows, found.values, strict=True)]
    notes = [
        f"the loss does not depend on {layer.name!r}: its filters count as idle"
        for layer, reached in zip(layers, found.reached, strict=True)
        if not reached
    ]
    if not found.apart:
        notes.append("the samples of a batch could not be told apart, so each one ran alone")
    if isinstance(spectrum, str):
        notes.append(f"no Jacobian: {spectrum}")
    return Diagnosis(
        rows=tuple(measured),
        skipped=tuple(skipped),
        silent=silent,
        samples=sum(batch.size for batch in used),
        spectrum=spectrum if isinstance(spectrum, Spectrum) else None,
        notes=tuple(notes),
    )


def _select(model: nn.Module, selection: Selection) -> tuple[list[FilterLayer], list[SkippedLayer]]:
    found, skipped = inspect_layers(model)
    taken = []
    for layer in found:
        reason = ""
        if selection.exclude is not None and selects(selection.exclude, layer):
            reason = "excluded by exclude="
        elif selection.include is not None and not selects(selection.include, layer):
            reason = "not selected by include="
        elif layer.filters == 0 or layer.fan_in == 0:
            reason = "it has no filters"
        elif selection.include is None and layer.filters > selection.max_dim:
            reason = (
                f"the matrix between its filters would be {layer.filters} x {layer.filters}, "
                f"larger than max_dim={selection.max_dim}; name it in include= or raise max_dim="
            )
        if reason:
            skipped.append(SkippedLayer(layer.name, layer.kind, reason))
        else:
            taken.append(layer)
    if not taken:
        reasons = "; ".join(f"{s.name!r}: {s.reason}" for s in skipped)
        raise ValueError(
            f"no layer is left to diagnose ({reasons or 'the model has no filters'}); pass a model "
            "with convolutions or linear layers, or relax include=, exclude= and max_dim="
        )
    return taken, skipped


def _first(batches: list[Batch], samples: int) -> list[Batch]:
    """The first so many samples."""
    taken: list[Batch] = []
    for batch in batches:
        if samples <= 0:
            break
        taken.append(batch.part(0, min(samples, batch.size)))
        samples -= batch.size
    return taken


def _with_additivity(row: LayerDiagnosis, values: Tensor) -> LayerDiagnosis:  # [samples, n]
    return LayerDiagnosis(**{**vars(row), "additivity": additivity(values)})


def _device_type(layers: list[FilterLayer]) -> str:
    return layers[0].weight_parameters()[0].device.type
