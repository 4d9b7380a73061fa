"""Scores of a network's pruning groups: Torch-Pruning's Taylor importance beside one fused pass."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import orthoreg_ext.functional as F
from benchmarks.baselines import Call, Way, needs


def network(shapes: list[Tensor]) -> tuple[nn.Module, Tensor]:
    """A ResNet-50 where the weights are one's (else a small ResNet), and an input for it."""
    device = shapes[0].device
    torch.manual_seed(0)
    if len(shapes) == 54:
        from torchvision.models import resnet50

        model, inputs = resnet50(), torch.randn(1, 3, 64, 64)
    else:
        from orthoreg_ext.experiment.models import resnet

        model, inputs = resnet(), torch.randn(1, 1, 8, 8)
    model, inputs = model.to(device), inputs.to(device)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    return model, inputs


def torch_pruning(weights: list[Tensor]) -> Call:
    """GroupTaylorImportance of all groups; the dependency graph is built outside."""
    import torch_pruning as tp

    model, inputs = network(weights)
    graph = tp.DependencyGraph().build_dependency(model, example_inputs=inputs)
    groups = list(graph.get_all_groups(root_module_types=[nn.Conv2d, nn.Linear]))
    importance = tp.importance.GroupTaylorImportance()

    def call() -> None:
        for group in groups:
            importance(group)

    return call


def fused(weights: list[Tensor]) -> Call:
    """Taylor scores of filters and of input channels of all convolutions and linear layers."""
    model, _ = network(weights)
    layers = [m.weight for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    flat, grads = [w.detach() for w in layers], [w.grad for w in layers]

    def call() -> None:
        for dim in (0, 1):
            F.filter_scores(flat, grads, ("taylor",), dim=dim)

    return call


GROUPS = {
    "orthoreg_ext-both": Way("filter_scores, twice", fused, "both dims"),
    "torch-pruning": Way(
        "GroupTaylorImportance of every group", torch_pruning, "both dims", needs("torch_pruning")
    ),
}
