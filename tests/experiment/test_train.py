from __future__ import annotations

import pytest
import torch
from torch import nn

from orthoreg_ext.experiment.data import Samples
from orthoreg_ext.experiment.train import DivergedError, accuracy, cosine, shift, train_epoch


def samples(n: int = 20) -> Samples:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (n, 1, 8, 8), generator=generator, dtype=torch.uint8)
    return Samples(images, torch.arange(n) % 2, torch.full((1, 1, 1), 0.5), torch.ones(1, 1, 1))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Dropout(0.3), nn.Linear(64, 2))


def trained(seed: int, lr: float = 0.1) -> torch.Tensor:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0)
    train_epoch(model, optimizer, samples(), seed=seed, epoch=0, epochs=2, lr=lr, batch_size=8)
    return model[2].weight.detach()


def test_an_epoch_depends_on_its_seed_alone() -> None:
    first = trained(1)
    torch.rand(7)  # whatever happened before
    assert torch.equal(first, trained(1))
    assert not torch.equal(first, trained(2))


def test_a_loss_that_is_not_finite_is_an_error() -> None:
    with pytest.raises(DivergedError, match="loss"):
        trained(0, lr=float("nan"))


def test_cosine_ends_at_zero() -> None:
    assert [cosine(2.0, p) for p in (0, 0.5, 1)] == pytest.approx([2, 1, 0], abs=1e-12)


def test_shift_moves_whole_images_and_repeats_the_border() -> None:
    image = torch.arange(64.0).view(1, 1, 8, 8)
    moved = shift(image.expand(200, -1, -1, -1), torch.Generator().manual_seed(0))
    allowed = []
    for down in (-1, 0, 1):
        for right in (-1, 0, 1):
            rows = (torch.arange(8) + down).clamp(0, 7)
            columns = (torch.arange(8) + right).clamp(0, 7)
            allowed.append(image[0, 0][rows][:, columns])
    seen = {next(i for i, a in enumerate(allowed) if torch.equal(a, m[0])) for m in moved}
    assert seen == set(range(9))


def test_accuracy_is_in_percent() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    with torch.no_grad():
        model[1].weight.zero_()
        model[1].bias.copy_(torch.tensor([1.0, 0.0]))
    assert accuracy(model, samples(20)) == 50.0
