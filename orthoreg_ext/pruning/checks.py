"""What `prune` accepts; every refusal comes before anything is changed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize
from torch.optim import Optimizer

from ..errors import unknown_name
from .counts import Counts
from .units import Structure


def check_model(model: object, argument: str = "model") -> nn.Module:
    """Refuses wrappers and sharded parameters, whose parameters cannot be replaced.

    Raises:
        ValueError: a parameter of a lazy module that has no shape yet.
        TypeError: no module, a wrapper, or DTensor parameters; says what to pass instead.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{argument} is {type(model).__name__}, expected a torch.nn.Module")
    kind = type(model).__name__
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise TypeError(
            f"{argument} is wrapped in {kind}: pass {argument}.module on every rank, and wrap the "
            "pruned model again"
        )
    if isinstance(getattr(model, "_orig_mod", None), nn.Module):
        raise TypeError(
            f"{argument} is compiled: pass the module you compiled, and compile it again"
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(
            f"{argument} is a TorchScript module: prune the Python module, then script it"
        )
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            raise ValueError(f"{argument}: {name!r} is not initialised; run the model once before")
        if type(parameter.data).__name__ == "DTensor":
            raise TypeError(f"{argument}: {name!r} is sharded (DTensor); prune before sharding")
    return model


def require_values(model: nn.Module) -> None:
    """Refuses a model on the meta device.

    Raises:
        ValueError: a parameter has no values to choose filters by.
    """
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ValueError(
                f"model: {name!r} is on the meta device and has no values to choose filters by: "
                "load the weights first"
            )


def check_callable(argument: str, value: object, signature: str) -> None:
    """Refuses an optional function that cannot be called.

    Raises:
        TypeError: naming the argument and how it would be called.
    """
    if value is not None and not callable(value):
        raise TypeError(f"{argument} is {value!r}, expected a function {signature} or None")


def refuse_inference_mode() -> None:
    """Refuses to work where new parameters could never be trained.

    Raises:
        RuntimeError: inside `torch.inference_mode()`.
    """
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            "prune was called inside torch.inference_mode(), where the smaller parameters would be "
            "inference tensors; leave inference_mode (torch.no_grad() may stay)"
        )


def layer_names(
    model: nn.Module, ignored: Iterable[str | nn.Module], argument: str = "ignored"
) -> set[str]:
    """Resolves ignored layers to names; a container stands for everything inside.

    Raises:
        ValueError: an unknown name (with the nearest valid one) or a module of another model.
        TypeError: neither a name nor a module.
    """
    if isinstance(ignored, (str, nn.Module)) or not isinstance(ignored, Iterable):
        raise TypeError(
            f"{argument} is {type(ignored).__name__}, expected a sequence of names or modules; put "
            "the one in a list"
        )
    modules = dict(model.named_modules())
    names_of = {module: name for name, module in modules.items()}
    found: set[str] = set()
    for entry in ignored:
        if isinstance(entry, nn.Module):
            if entry not in names_of:
                raise ValueError(
                    f"{argument}: {type(entry).__name__} is not a module of this model; pass its "
                    "name or the module itself (not one of a copy)"
                )
            name = names_of[entry]
        elif isinstance(entry, str):
            if entry not in modules or not entry:
                raise unknown_name(f"layer in {argument}", entry, [n for n in modules if n])
            name = entry
        else:
            raise TypeError(f"{argument}: {entry!r} is neither a layer name nor a module")
        inside = f"{name}." if name else ""
        found |= {name} | {other for other in modules if other.startswith(inside)}
    return found


def keep_frozen(model: nn.Module, structure: Structure) -> None:
    """Marks groups of which every filter layer is frozen; they are not pruned."""
    for group in structure.prunable:
        owned = [p for name in group.layers for p in _parameters(model.get_submodule(name))]
        if not any(parameter.requires_grad for parameter in owned):
            group.reason = "every layer is frozen (requires_grad=False)"


def _parameters(layer: nn.Module) -> list[nn.Parameter]:
    """The parameters of a layer itself, with those its parametrizations compute it from."""
    owned = list(layer.parameters(recurse=False))
    if parametrize.is_parametrized(layer):
        owned += layer.get_submodule("parametrizations").parameters()
    return owned


def require_prunable(structure: Structure) -> None:
    """Refuses a model in which nothing can be pruned.

    Raises:
        ValueError: listing every layer with the reason.
    """
    if structure.prunable:
        return
    reasons = [f"{', '.join(group.layers)}: {group.reason}" for group in structure.groups]
    reasons += [f"{name}: {reason}" for name, reason in structure.unreached.items()]
    listing = "; ".join(reasons) or "it has no convolution or linear layer"
    raise ValueError(f"no layer of this model can be pruned. {listing}")


def check_work(before: Counts) -> None:
    """Refuses example inputs on which no cut could be counted or verified.

    Raises:
        ValueError: they hold no sample.
    """
    if not before.macs:
        raise ValueError(
            "example_inputs hold no sample, so that no cut can be verified; pass at least one"
        )


def refuse_reparametrized(
    model: nn.Module, structure: Structure, units: torch.Tensor | None = None
) -> None:
    """Refuses to prune layers whose weights are computed from others.

    Args:
        model: the traced model.
        structure: its units.
        units: those that are to go, [r] int64; all that could by default.

    Raises:
        ValueError: naming the layer and the function that makes its weights plain again.
    """
    if units is None:
        units = torch.cat([group.units for group in structure.prunable])
    for slot in structure.slots:
        if not torch.isin(slot.units, units).any():
            continue
        module = model.get_submodule(slot.owner)
        if isinstance(module, parametrize.ParametrizationList):
            owner = slot.owner.rpartition(".parametrizations.")
            raise _reparametrized(owner[0], owner[2])
        for place in slot.layout.places:
            if parametrize.is_parametrized(module, place.tensor):
                raise _reparametrized(slot.layer, place.tensor)
            tensor = getattr(module, place.tensor)
            plain = place.tensor in module._parameters or place.tensor in module._buffers
            if tensor is not None and not plain:
                raise ValueError(
                    f"layer {slot.layer!r}: {place.tensor!r} is computed from other tensors "
                    "(torch.nn.utils.weight_norm, spectral_norm or prune), which cannot follow a "
                    "removal; call remove_weight_norm, remove_spectral_norm or prune.remove on it "
                    "first, or list the layer in ignored"
                )


def _reparametrized(layer: str, tensor: str) -> ValueError:
    return ValueError(
        f"layer {layer!r}: {tensor!r} is parametrized, and a parametrization cannot follow the "
        f"removal of channels; call torch.nn.utils.parametrize.remove_parametrizations(layer, "
        f"{tensor!r}) first and register it again afterwards, or list the layer in ignored"
    )


def optimizer_list(optimizer: Optimizer | Sequence[Optimizer] | None) -> list[Optimizer]:
    """One optimizer, several or none, as a list.

    Raises:
        TypeError: something else.
    """
    if optimizer is None:
        return []
    if not isinstance(optimizer, (Optimizer, Iterable)):
        raise TypeError(
            f"optimizer is {type(optimizer).__name__}, expected a torch.optim.Optimizer or several"
        )
    optimizers = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)
    for entry in optimizers:
        if not isinstance(entry, Optimizer):
            raise TypeError(
                f"optimizer is {type(entry).__name__}, expected a torch.optim.Optimizer"
            )
    return optimizers


def check_copy(model: nn.Module, ema: nn.Module) -> nn.Module:
    """Returns the averaged copy of a model (unwrapping AveragedModel), if it has its structure.

    Raises:
        ValueError: it has other names or shapes.
    """
    copy = check_model(ema, "ema")
    if isinstance(copy, torch.optim.swa_utils.AveragedModel):
        copy = copy.module
    shapes = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    others = {name: tuple(t.shape) for name, t in copy.state_dict().items()}
    if shapes != others:
        name = min(n for n in shapes.keys() | others.keys() if shapes.get(n) != others.get(n))
        raise ValueError(
            f"ema is not a copy of the model: {name!r} is {others.get(name, 'missing')} there and "
            f"{shapes.get(name, 'missing')} here"
        )
    return copy


def check_finite(model: nn.Module, structure: Structure) -> None:
    """Refuses weights that are NaN or infinite where channels may leave.

    A method that chose its filters before, or scores by something else, would not see them.

    Raises:
        ValueError: naming the layer.
    """
    for slot in structure.slots:
        owned = model.get_submodule(slot.owner)._parameters
        for place in slot.layout.places:
            tensor = owned.get(place.tensor)
            if tensor is not None and not bool(torch.isfinite(tensor).all()):
                raise ValueError(
                    f"layer {slot.layer!r}: {place.tensor!r} holds NaN or infinite numbers, so the "
                    "pruned model would compute NaN; load finite weights, and look at the loss and "
                    "the learning rate"
                )


def check_unchanged(model: nn.Module, structure: Structure) -> None:
    """Refuses a model whose layers were replaced or changed shape since they were traced.

    Raises:
        RuntimeError: naming the layer.
    """
    for slot in structure.slots:
        module = model.get_submodule(slot.owner)
        for place in slot.layout.places:
            if not hasattr(module, place.tensor):
                raise RuntimeError(
                    f"layer {slot.layer!r}: it is a {type(module).__name__} without "
                    f"{place.tensor!r}: it was replaced from outside since the model was traced"
                )
            tensor = getattr(module, place.tensor)
            expected = len(slot.units) // place.groups
            if tensor is not None and tensor.shape[place.dim] != expected:
                raise RuntimeError(
                    f"layer {slot.layer!r}: {place.tensor!r} has {tensor.shape[place.dim]} "
                    f"channels, expected {expected}: its shape was changed from outside since the "
                    "model was traced"
                )
