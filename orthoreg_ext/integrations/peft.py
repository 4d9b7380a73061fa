"""AdaLoRA's orthogonality term in one call instead of a loop over its matrices."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..functional import gram_penalty
from . import missing

try:
    from peft import AdaLoraModel, PeftModel
except ModuleNotFoundError as error:
    raise missing(__name__, error) from None


class FusedAdaLora:
    """What :func:`fuse_adalora` changed; ``remove()`` undoes it."""

    def __init__(self, model: AdaLoraModel) -> None:
        self.model = model

    def remove(self) -> None:
        """Gives the model PEFT's own forward back; a second call does nothing."""
        self.model.__class__ = AdaLoraModel


class _FusedAdaLoraModel(AdaLoraModel):
    """An AdaLoraModel whose forward computes the term with all matrices at once."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        outputs = self.model.forward(*args, **kwargs)
        if isinstance(getattr(outputs, "loss", None), Tensor):
            config: Any = self.peft_config[self.trainable_adapter_name]
            weight = config.orth_reg_weight
            if weight < 0:
                raise ValueError(f"orth_reg_weight is {weight}, expected a number of at least 0")
            outputs.loss += weight * self._orthogonality().to(outputs.loss.device)
        return outputs

    def _orthogonality(self) -> Tensor:
        """The mean of ||A A^T - I|| over all lora_A and ||B^T B - I|| over all lora_B."""
        parts: dict[tuple[torch.device, str], list[Tensor]] = {}
        for name, p in self.model.named_parameters():
            a = "lora_A" in name
            if (a or "lora_B" in name) and self.trainable_adapter_name in name:
                if p.dim() != 2:
                    raise ValueError(
                        f"{name!r} has the shape {tuple(p.shape)}, expected a matrix: its parts "
                        "are on several processes, where fuse_adalora cannot be used"
                    )
                # the Gram matrix of size r; "small", which one call shares, but for ranks above
                # the size of the layer
                r, other = p.shape if a else p.shape[::-1]
                side = "small" if r <= other else "rows" if a else "cols"
                parts.setdefault((p.device, side), []).append(p)
        if not parts:
            return torch.zeros(())
        sums = [
            gram_penalty(matrices, "frobenius", side=side).sum()
            for (_, side), matrices in parts.items()
        ]
        total = sum((value.to(sums[0].device) for value in sums[1:]), sums[0])
        return total / sum(map(len, parts.values()))


def fuse_adalora(model: nn.Module) -> FusedAdaLora:
    """Replaces AdaLoRA's loop for its orthogonality term by one call of equal value and gradient.

    PEFT's ``AdaLoraModel.forward`` adds orth_reg_weight * mean_P ||P P^T - I||_F to the loss, P
    over every lora_A and every lora_B^T of the trainable adapter: un-squared norms, five small
    operations and their backward for each of hundreds of matrices in every step. (The paper, Zhang
    et al., arXiv 2303.10512, eq. 4, has squared norms and no mean.) Here all matrices go through
    :func:`functional.gram_penalty` at once. Everything else of the forward stays: which adapter
    and which names are taken, the mean over them, no term without a loss. Under autocast, and of
    half-precision adapters, PEFT's products are rounded to half precision; these are float32.

    Args:
        model: what ``get_peft_model`` returned, or its ``base_model``.

    Returns:
        An object whose ``remove()`` gives PEFT's forward back.

    Raises:
        TypeError: the model has no AdaLoRA adapter.
        ValueError: it is fused already, its forward is not PEFT's own, or it is never called: that
            of a PeftModel without ``task_type`` goes past it, so PEFT adds no term either.
    """
    adalora = model if isinstance(model, AdaLoraModel) else getattr(model, "base_model", None)
    if not isinstance(adalora, AdaLoraModel):
        kind = type(adalora if isinstance(adalora, nn.Module) else model).__name__
        raise TypeError(
            f"model is a {kind}, expected one with AdaLoRA adapters: "
            "get_peft_model(model, AdaLoraConfig(...))"
        )
    if isinstance(adalora, _FusedAdaLoraModel):
        raise ValueError("the model is fused already: call remove() of what the first call gave")
    if type(adalora) is not AdaLoraModel or "forward" in vars(adalora):
        raise ValueError(
            f"the forward of this {type(adalora).__name__} is not PEFT's own, but overridden in a "
            "subclass or wrapped by a hook (device_map): fuse_adalora would lose that"
        )
    if type(model).forward is PeftModel.forward:
        raise ValueError(
            "this PeftModel calls the model inside and never AdaLoRA's forward, so that it has no "
            "orthogonality term at all: set task_type= in AdaLoraConfig (or pass model.base_model, "
            "if you call that)"
        )
    adalora.__class__ = _FusedAdaLoraModel
    return FusedAdaLora(adalora)
