"""Training steps of real networks on random images, with and without a regulariser."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import orthoreg_ext as ox
from benchmarks.baselines import Call, Way, eager_penalty
from benchmarks.nets import NETS
from orthoreg_ext.bench import StillOptimizer

STRENGTH, RATE = 1e-4, 1e-4  # the loss must stay finite for as long as it is timed


@dataclass(frozen=True)
class Training:
    """A network, a batch for it, and the layers that are regularised."""

    model: nn.Module
    images: Tensor  # [batch, 3, side, side]
    labels: Tensor  # [batch]

    def optimizer(self) -> torch.optim.Optimizer:
        """SGD with momentum, of its own for each way."""
        return torch.optim.SGD(self.model.parameters(), lr=RATE, momentum=0.9)

    def regularizer(self, penalty: str = "so") -> ox.OrthoRegularizer:
        """Of all layers but the classifier, as it is by default."""
        return ox.OrthoRegularizer(self.model, penalty, STRENGTH, layer_weights="uniform")

    def weights(self) -> list[Tensor]:
        """Of those layers."""
        rows = self.regularizer().report()
        return [self.model.get_submodule(row.name).weight for row in rows]  # type: ignore[misc]


def training(model: str, device: str, batch: int = 128, side: int = 32) -> Training:
    """One of NETS on 32 x 32 images; a small ResNet and batch for the name ``"tiny"``."""
    torch.manual_seed(0)
    if model == "tiny":
        from orthoreg_ext.experiment.models import resnet

        net, batch, side = resnet(in_channels=3), 2, 8
    else:
        net = NETS[model]()
    images = torch.randn(batch, 3, side, side, device=device)
    return Training(net.to(device), images, torch.randint(10, (batch,), device=device))


def step(
    subject: Training, optimizer: torch.optim.Optimizer, term: Callable[[], Tensor] | None = None
) -> Call:
    """One step of the training, perhaps with a term in its loss."""

    def call() -> None:
        loss = nn.functional.cross_entropy(subject.model(subject.images), subject.labels)
        if term is not None:
            loss = loss + term()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return call


def _plain(subject: Training) -> Call:
    return step(subject, subject.optimizer())


def _attached(penalty: str) -> Callable[[Training], Call]:
    def prepare(subject: Training) -> Call:
        optimizer = subject.optimizer()
        regularizer = subject.regularizer(penalty)
        regularizer.attach(optimizer)
        return step(subject, optimizer)

    return prepare


def _in_the_loss(subject: Training) -> Call:
    return step(subject, subject.optimizer(), subject.regularizer())


def _with_eager(subject: Training) -> Call:
    weights = subject.weights()
    return step(subject, subject.optimizer(), lambda: STRENGTH * eager_penalty(weights))


def _alone(subject: Training) -> Call:
    optimizer = StillOptimizer(list(subject.model.parameters()))
    for parameter in subject.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    subject.regularizer().attach(optimizer)
    return lambda: optimizer.step()  # every other way leaves gradients, to which it adds


def _eager_alone(subject: Training) -> Call:
    weights = subject.weights()
    return lambda: (STRENGTH * eager_penalty(weights)).backward()


STEP = {
    "plain": Way("forward, backward, SGD with momentum", _plain, "step"),
    "orthoreg_ext-attached": Way("the same after reg.attach(optimizer)", _attached("so"), "step"),
    "orthoreg_ext-attached-l1": Way("the same, OrthoReg's L1", _attached("orthoreg"), "step"),
    "orthoreg_ext-loss": Way("loss + reg()", _in_the_loss, "step"),
    "eager": Way("loss + penalty by autograd, filters' side", _with_eager, "step"),
    "orthoreg_ext-alone": Way("only what reg.attach adds", _alone, "term"),
    "eager-alone": Way("only penalty and its gradient", _eager_alone, "term"),
}
