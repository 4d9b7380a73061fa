"""The mean gradient over calibration data, without touching the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .inputs import call, device_of, tensors_in, to_device, undisturbed

Loss = Callable[[Any, Any], Tensor]


def check_data(data: object, rounds: int) -> None:
    """Refuses data that cannot be iterated as often as it is needed.

    Raises:
        TypeError: it is no iterable.
        ValueError: it can be read once only, but every round reads it, or it has length 0.
    """
    if not isinstance(data, Iterable) or isinstance(data, (Tensor, str)):
        raise TypeError(
            f"data is {type(data).__name__}, expected an iterable of (input, target) batches, "
            "e.g. a DataLoader or [(x, y)]"
        )
    if rounds > 1 and isinstance(data, Iterator):
        raise ValueError(
            f"data is a {type(data).__name__}, which can be read once, but {rounds} rounds score "
            "anew; pass a list of batches or a DataLoader"
        )
    if isinstance(data, Sized) and len(data) == 0:
        raise _no_data()


def mean_gradients(
    model: nn.Module,
    parameters: dict[str, nn.Parameter],
    data: Iterable[Any],
    loss: Loss | None = None,
) -> dict[str, Tensor]:
    """The gradient of the mean loss over all samples, batches weighted by their size.

    As in OrthoReg's released code (imp_estimator.py:51-71) the model is in eval mode: behind a
    BatchNorm in train mode the loss does not depend on a filter's scale, so sum w g is identically
    0. Nothing of the model changes, its gradients included.

    Args:
        model: the model.
        parameters: name -> those to differentiate by; frozen ones are allowed.
        data: (input, target) batches; an input may be a tensor, a tuple of arguments or a dict.
        loss: (output, target) -> scalar mean over the batch; cross entropy by default.

    Returns:
        name -> gradient, shaped as the parameter; float32 for half-precision parameters.

    Raises:
        ValueError: no batch, a batch that is no pair, one class only with the default loss, a loss
            that is no finite scalar, or a parameter that the loss does not depend on.
    """
    device, samples = device_of(model), 0
    sums: dict[str, Tensor] = {}
    classes: set[int] | None = set() if loss is None else None
    with undisturbed(model):
        for i, batch in enumerate(data):
            if not isinstance(batch, (tuple, list)) or len(batch) != 2:
                got = f"{type(batch).__name__}"
                raise ValueError(f"data: batch {i} is a {got}, expected a pair (input, target)")
            inputs, target = to_device(batch[0], device), to_device(batch[1], device)
            size = _batch_size(inputs, target, i)
            classes = _see_classes(classes, target)
            output = call(model, inputs)
            value = (
                functional.cross_entropy(output, target) if loss is None else loss(output, target)
            )
            _check_loss(value, i)
            grads = torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
            _add(sums, parameters, grads, size)
            samples += size
    if samples == 0:
        raise _no_data()
    if classes is not None and len(classes) == 1:
        raise ValueError(
            f"data has one class only (class {min(classes)}, {samples} samples): the gradient of "
            "cross entropy would rank filters by that class alone; pass samples of all classes, or "
            "your own loss"
        )
    for name in parameters:
        if name not in sums:
            raise ValueError(
                f"no gradient reaches {name!r} from the loss on data; check the loss, or list the "
                "layer in ignored"
            )
    return {name: total / samples for name, total in sums.items()}


def _add(
    sums: dict[str, Tensor],
    parameters: dict[str, nn.Parameter],
    grads: Sequence[Tensor | None],
    size: int,
) -> None:
    for (name, parameter), grad in zip(parameters.items(), grads, strict=True):
        if grad is None:
            continue
        wide = torch.promote_types(parameter.dtype, torch.float32)
        total = sums.setdefault(name, torch.zeros_like(parameter, dtype=wide).detach())
        total.add_(grad.detach(), alpha=size)


def _no_data() -> ValueError:
    return ValueError("data is empty: pass at least one (input, target) batch to score by gradient")


def _batch_size(inputs: Any, target: Any, index: int) -> int:
    for tensor in (*tensors_in(target), *tensors_in(inputs)):
        if tensor.dim() > 0:
            if tensor.shape[0] == 0:
                raise ValueError(f"data: batch {index} has no samples")
            return tensor.shape[0]
    raise ValueError(f"data: batch {index} has no tensor with a batch dimension")


def _see_classes(classes: set[int] | None, target: Any) -> set[int] | None:
    if classes is None or not isinstance(target, Tensor) or target.is_floating_point():
        return None
    return classes | set(target.unique().tolist())


def _check_loss(value: object, index: int) -> None:
    if not isinstance(value, Tensor) or value.numel() != 1:
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(
            f"loss returned {got} for batch {index}, expected a scalar tensor (a mean)"
        )
    if not bool(torch.isfinite(value)):
        raise ValueError(
            f"the loss of batch {index} is {float(value.detach())}; filters cannot be ranked by it"
        )
