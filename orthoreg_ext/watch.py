"""Whether a plan still fits its model, asked inside of a graph of torch.compile."""

from __future__ import annotations

from torch import nn

from .plan import Plan


class Watch:
    """What the layers of a plan look like, in words that torch.compile can trace.

    Tracing :meth:`holds` makes a guard of everything it reads, so a graph that was compiled for
    other layers is not run again.

    Args:
        model: the module that the plan is of.
        plan: the layers, and those that were left out for they were frozen.
    """

    def __init__(self, model: nn.Module, plan: Plan) -> None:
        watched = {id(layer.module) for term in plan.terms for layer in term.layers}
        frozen = {layer.name for layer in plan.skipped if layer.reason.startswith("frozen")}
        self._places: list[tuple[nn.Module, str, nn.Module]] = []
        self._forms: list[tuple[nn.Module, str, bool, tuple[int, ...]]] = []
        for parent in model.modules():
            for name, child in parent._modules.items():
                if child is not None:
                    self._places.append((parent, name, child))
        for name, module in model.named_modules():
            if id(module) not in watched and name not in frozen:
                continue
            for owner in module.modules():
                for key, p in owner._parameters.items():
                    if p is not None:
                        self._forms.append((owner, key, p.requires_grad, tuple(p.shape)))

    def holds(self) -> bool:
        """Whether the layers are the same modules, as trainable and as large as they were."""
        for parent, name, child in self._places:
            if getattr(parent, name, None) is not child:
                return False
        for owner, key, trainable, shape in self._forms:
            p = getattr(owner, key)
            if p.requires_grad != trainable or tuple(p.shape) != shape:
                return False
        return True
