"""What is measured on calibration data, without touching the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..distributed import current, sum_over_ranks, together
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
    if current() is None and _is_empty(data):
        raise _no_data()


@dataclass(frozen=True)
class Batch:
    """One batch on the model's device."""

    index: int
    inputs: Any
    target: Any
    size: int  # samples

    def loss(self, output: Any, loss: Loss | None, temperature: float = 1.0) -> Tensor:  # []
        """The mean loss, by default cross entropy, which is of logits over the temperature.

        Raises:
            ValueError: it is no finite scalar.
        """
        if loss is None or loss is functional.cross_entropy:
            scaled = output if temperature == 1 else output / temperature
            value: Tensor = functional.cross_entropy(scaled, self.target)
        else:
            value = loss(output, self.target)
        _check_loss(value, self.index)
        return value


@dataclass
class Seen:
    """What a pass over the data has seen.

    Attributes:
        samples: how many.
        classes: which; None where targets are no classes.
    """

    samples: int = 0
    classes: set[int] | None = field(default_factory=set)


@contextmanager
def one_pass(doing: str, *, need_classes: bool = False) -> Iterator[Seen]:
    """A pass over the data, of every rank over its own; an error of one is an error of all.

    Args:
        doing: what for, for the message on other ranks.
        need_classes: refuse data of one class only, if the targets are classes.

    Raises:
        ValueError: no rank has a batch, or all batches are of one class.
    """
    own = Seen()
    with together(doing) as everyone:
        yield own
        everyone.append(own)
    samples = sum(seen.samples for seen in everyone)
    if samples == 0:
        raise _no_data()
    if not need_classes or any(seen.classes is None for seen in everyone):
        return
    classes: set[int] = set().union(*(seen.classes or () for seen in everyone))
    if len(classes) == 1:
        raise ValueError(
            f"data has one class only (class {min(classes)}, {samples} samples): the gradient of "
            "cross entropy would rank filters by that class alone; pass samples of all classes, or "
            "your own loss"
        )


def batches(model: nn.Module, data: Iterable[Any], seen: Seen) -> Iterator[Batch]:
    """Reads the data batch by batch.

    Args:
        model: says the device.
        data: (input, target) batches; an input may be a tensor, a tuple of arguments or a dict.
        seen: takes note.

    Raises:
        ValueError: a batch that is no pair or has no samples.
    """
    device = device_of(model)
    for i, batch in enumerate(data):
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            got = f"{type(batch).__name__}"
            raise ValueError(f"data: batch {i} is a {got}, expected a pair (input, target)")
        inputs, target = to_device(batch[0], device), to_device(batch[1], device)
        size = _batch_size(inputs, target, i)
        seen.classes = _see_classes(seen.classes, target)
        yield Batch(i, inputs, target, size)
        seen.samples += size


def mean_gradients(
    model: nn.Module,
    parameters: dict[str, nn.Parameter],
    data: Iterable[Any],
    loss: Loss | None = None,
    *,
    temperature: float = 1.0,
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
        temperature: divides the logits of cross entropy.

    Returns:
        name -> gradient, shaped as the parameter; float32 for half-precision parameters.

    Raises:
        ValueError: no batch, a batch that is no pair, one class only with the default loss, a loss
            that is no finite scalar, or a parameter that the loss does not depend on.
    """
    mean = _Mean(parameters)
    with undisturbed(model), one_pass("scoring", need_classes=loss is None) as seen:
        for batch in batches(model, data, seen):
            value = batch.loss(call(model, batch.inputs), loss, temperature)
            mean.add(_gradients(value, list(parameters.values())), batch.size)
    return mean.result()


def hessian_gradients(
    model: nn.Module,
    parameters: dict[str, nn.Parameter],
    data: Iterable[Any],
    loss: Loss | None = None,
    *,
    temperature: float = 200.0,
) -> dict[str, Tensor]:
    """The product H g of Hessian and gradient of the mean loss over all samples, in eval mode.

    g is the gradient by every parameter that is trained, and by the given ones; H g comes from
    double backward, batch by batch: the gradient of <g, gradient of the batch>. Nothing of the
    model changes. Attention runs in its plain form, the only one that can be differentiated twice.

    Args:
        model: the model.
        parameters: name -> those whose entries of H g are wanted.
        data: as for :func:`mean_gradients`; read twice.
        loss: as for :func:`mean_gradients`.
        temperature: divides the logits of cross entropy, 200 in OrthoReg's released code
            (imp_estimator.py:74-109); a loss of one's own is taken as it is.

    Returns:
        name -> entries of H g, shaped as the parameter; float32 for half-precision parameters.

    Raises:
        ValueError: as :func:`mean_gradients`, or data that can be read once only.
    """
    if isinstance(data, Iterator):
        raise ValueError(
            f"data is a {type(data).__name__}, which can be read once, but the product of Hessian "
            "and gradient reads it twice; pass a list of batches or a DataLoader"
        )
    given = {id(p) for p in parameters.values()}
    others = {n: p for n, p in model.named_parameters() if p.requires_grad and id(p) not in given}
    trained = {**parameters, **others}
    names, leaves = list(trained), list(trained.values())
    mean, product = _Mean(trained), _Mean(parameters)
    plain = sdpa_kernel([SDPBackend.MATH])
    with undisturbed(model), plain, one_pass("scoring", need_classes=loss is None) as seen:
        for batch in batches(model, data, seen):
            value = batch.loss(call(model, batch.inputs), loss, temperature)
            mean.add(_gradients(value, leaves), batch.size)
    gradients = mean.result(parameters)
    plain = sdpa_kernel([SDPBackend.MATH])
    with undisturbed(model), plain, one_pass("scoring") as seen:
        for batch in batches(model, data, seen):
            value = batch.loss(call(model, batch.inputs), loss, temperature)
            grads = torch.autograd.grad(value, leaves, create_graph=True, allow_unused=True)
            inner = torch.zeros((), device=value.device, dtype=torch.float64)
            for name, grad in zip(names, grads, strict=True):
                if grad is not None and name in gradients:
                    inner = inner + (grad * gradients[name].to(grad.dtype)).sum().double()
            wanted = list(parameters.values())
            bends: Sequence[Tensor | None] = [None] * len(wanted)  # of a loss without curvature
            if inner.requires_grad:
                bends = torch.autograd.grad(inner, wanted, allow_unused=True)
            filled = [
                torch.zeros_like(p) if bend is None else bend
                for p, bend in zip(wanted, bends, strict=True)
            ]
            product.add(filled, batch.size)
    return product.result()


def divergences(
    model: nn.Module, parameters: dict[str, nn.Parameter], data: Iterable[Any]
) -> dict[str, Tensor]:
    """How strongly every entry of a parameter moves the predicted distribution, in eval mode.

    With p and q the softmax and the log-softmax of a batch, both averaged over its samples, the
    entry t has sum_c p_c (d q_c / d t)^2, averaged over the batches with their sizes as weights and
    divided by the mean over the parameter, as OrthoReg's released code has it for rate-distortion
    theory (``rdt``, imp_estimator.py:177-201). One backward pass for each class and batch; targets
    are not read.

    Args:
        model: one whose output is logits, [samples, classes].
        parameters: name -> those whose entries are wanted.
        data: as for :func:`mean_gradients`.

    Returns:
        name -> numbers with mean 1 (0 everywhere if nothing moves), shaped as the parameter.

    Raises:
        ValueError: no batch, a batch that is no pair, an output that is no finite [samples,
            classes], or a parameter that it does not depend on.
    """
    mean, leaves = _Mean(parameters), list(parameters.values())
    with undisturbed(model), one_pass("scoring") as seen:
        for batch in batches(model, data, seen):
            logits = call(model, batch.inputs)
            if not isinstance(logits, Tensor) or logits.dim() != 2:
                got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
                raise ValueError(
                    f"the model's output is {got}, but 'rdt' needs logits [samples, classes]; use "
                    "another criterion"
                )
            if not bool(torch.isfinite(logits).all()):
                raise ValueError(
                    f"the output of batch {batch.index} is not finite; filters cannot be ranked by "
                    "it"
                )
            wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
            chances = wide.softmax(1).mean(0).tolist()
            logs = wide.log_softmax(1).mean(0)
            for i, chance in enumerate(chances):
                last = i + 1 == len(chances)
                grads = torch.autograd.grad(
                    logs[i], leaves, retain_graph=not last, allow_unused=True
                )
                squares = [None if g is None else mean.widened(g).square() * chance for g in grads]
                mean.add(squares, batch.size, samples=batch.size if last else 0)
    found = mean.result()
    return {name: t / t.mean() if bool(t.any()) else t for name, t in found.items()}


class _Mean:
    """The mean of one tensor a parameter over the samples of all ranks, in float32 or wider."""

    def __init__(self, parameters: dict[str, nn.Parameter]) -> None:
        self.parameters, self.samples = parameters, 0
        self.sums: dict[str, Tensor] = {}

    @staticmethod
    def widened(tensor: Tensor) -> Tensor:
        return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))

    def add(self, values: Sequence[Tensor | None], size: int, samples: int | None = None) -> None:
        """Adds `size` times the values, and counts that many samples, or `samples`."""
        self.samples += size if samples is None else samples
        for (name, parameter), value in zip(self.parameters.items(), values, strict=True):
            if value is None:
                continue
            wide = torch.promote_types(parameter.dtype, torch.float32)
            if name not in self.sums:
                self.sums[name] = torch.zeros_like(parameter, dtype=wide).detach()
            self.sums[name].add_(value.detach(), alpha=size)

    def require(self, names: Iterable[str]) -> None:
        for name in names:
            if name not in self.sums:
                raise ValueError(
                    f"no gradient reaches {name!r} from the loss on data; check the loss, or list "
                    "the layer in ignored"
                )

    def result(self, required: Iterable[str] | None = None) -> dict[str, Tensor]:
        """The means of all parameters that have any; by default each has to."""
        self._sum_over_ranks()
        self.require(self.parameters if required is None else required)
        return {name: total / self.samples for name, total in self.sums.items()}

    def _sum_over_ranks(self) -> None:
        if current() is None:
            return
        first = next(iter(self.parameters.values()))
        held = [self.samples, *(name in self.sums for name in self.parameters)]
        counts = torch.tensor(held, dtype=torch.float64).to(first.device)
        totals = []
        for name, parameter in self.parameters.items():
            wide = torch.promote_types(parameter.dtype, torch.float32)
            none = torch.zeros_like(parameter, dtype=wide).detach()
            totals.append(self.sums.get(name, none))
        sum_over_ranks([counts, *totals])
        self.samples, *found = (int(count) for count in counts.tolist())
        named = zip(self.parameters, totals, found, strict=True)
        self.sums = {name: total for name, total, ranks in named if ranks}


def _gradients(value: Tensor, leaves: Sequence[Tensor]) -> Sequence[Tensor | None]:
    """The gradient by each leaf, None where there is none: of a constant everywhere."""
    if not value.requires_grad:
        return [None] * len(leaves)
    return torch.autograd.grad(value, leaves, allow_unused=True)


def _is_empty(data: Iterable[Any]) -> bool:
    """Whether it says so; a DataLoader of an IterableDataset has a length that it cannot give."""
    try:
        return isinstance(data, Sized) and len(data) == 0
    except (TypeError, NotImplementedError):
        return False


def _no_data() -> ValueError:
    return ValueError("data is empty: pass at least one (input, target) batch")


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
