"""torch.export: of pruned networks, and of what the package computes."""

from __future__ import annotations

import io

import pytest
import torch
from torch import Tensor, nn

import orthoreg_ext as ox
import orthoreg_ext.functional as F
from tests.machinery import net as model


def test_a_pruned_network_is_exported_saved_and_loaded_with_free_batch_sizes() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1)),
        *(nn.Flatten(), nn.Linear(8, 4)),
    ).eval()
    x = model.batch()
    ox.pruning.prune(net, x, criterion="l1", ratio=0.5)
    assert net[0].out_channels < 8
    program = torch.export.export(net, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for size in (1, 2, 7):
        torch.testing.assert_close(loaded(model.batch(size)), net(model.batch(size)))


@pytest.mark.parametrize("strict", [False, True])
def test_a_loss_with_the_term_is_exported(strict: bool) -> None:
    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = model.make()
            self.reg = ox.OrthoRegularizer(self.net, "so", 1.0)

        def forward(self, x: Tensor) -> Tensor:
            return model.task(self.net, x) + self.reg()

    loss, x = Loss(), model.batch()
    program = torch.export.export(loss, (x,), strict=strict)
    torch.testing.assert_close(program.module()(x), loss(x))


def test_a_penalty_of_any_number_of_filters_is_exported() -> None:
    class Term(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return F.gram_penalty([weight], side="rows")

    shapes = ({0: torch.export.Dim("filters", min=2, max=64)},)
    program = torch.export.export(Term(), (torch.randn(5, 7),), dynamic_shapes=shapes)
    for filters in (2, 9, 64):
        weight = torch.randn(filters, 7)
        torch.testing.assert_close(program.module()(weight), Term()(weight))
