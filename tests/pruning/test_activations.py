"""Group Fisher against its definition: the gradient by one mask on all that reads a unit."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as f

from orthoreg_ext.pruning import CRITERIA, prune
from orthoreg_ext.pruning.activations import Contributions, check_read, group_fisher
from orthoreg_ext.pruning.evidence import Evidence
from orthoreg_ext.pruning.inputs import call
from orthoreg_ext.pruning.structure import trace

from .nets import VGG, Grouped, ResNet, Separable, batches, randomised
from .test_criteria_transcriptions import structure_of

# group: the layers that read it with the unit of each of their channels, numbers written for a
# unit, multiply-accumulates that leave with it, for an image of 8 x 8
RESNET = {
    "stem": (
        {"layer1.conv1": range(8), "layer2.conv1": range(8), "layer2.short.0": range(8)},
        64 + 64,
        64 * 27 + 64 * 90 + 64 * 90 + 16 * 12 * 9 + 16 * 12,
    ),
    "layer2.conv2": (
        {"layer3.conv1": range(12), "fc": range(12)},
        3 * 16,
        16 * 12 * 9 + 16 * 8 + 16 * 8 * 9 + 16 * 8 * 9 + 4,
    ),
    "layer1.conv1": ({"layer1.conv2": range(10)}, 64, 64 * 8 * 9 + 64 * 8 * 9),
}
VGG_FLAT = {
    "conv3": ({"fc1": [i // 4 for i in range(64)]}, 16, 16 * 12 * 9 + 4 * 10),
    "fc1": ({"fc2": range(10)}, 1, 64 + 4),
}
GROUPED = {  # unit i has the channels i, i + 6, ... of the output of conv2
    "conv2": ({"conv3": [i % 6 for i in range(24)]}, 4 * 64, 4 * 64 * 4 * 9 + 4 * 64 * 8),
}
SEPARABLE = {  # the depthwise layer reads and writes
    "stem": (
        {"depth": range(8), "point": range(8)},
        2 * 64,
        64 * 27 + 64 * 9 + 64 * 12,
    ),
}
CASES = [(ResNet, RESNET), (VGG, VGG_FLAT), (Grouped, GROUPED), (Separable, SEPARABLE)]


def definition(model: nn.Module, readers: dict[str, Any], data: list[Any], units: int) -> Tensor:
    """sum_n (d loss_n / d mask)^2, sample by sample."""
    model, total = copy.deepcopy(model).double().eval(), torch.zeros(units, dtype=torch.float64)
    mask = torch.ones(units, dtype=torch.float64, requires_grad=True)

    def masking(where: list[int]) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor]) -> Tensor:
            shape = [1, -1] + [1] * (args[0].dim() - 2)
            return args[0] * mask[where].view(shape)

        return hook

    for name, where in readers.items():
        model.get_submodule(name).register_forward_pre_hook(masking(list(where)))
    for x, y in data:
        for i in range(len(x)):
            loss = f.cross_entropy(model(x[i : i + 1].double()), y[i : i + 1])
            total += torch.autograd.grad(loss, mask)[0].square()
    return total


@pytest.mark.parametrize("freed", ["nothing", "memory", "macs"])
@pytest.mark.parametrize(("net", "table"), CASES, ids=lambda value: getattr(value, "__name__", ""))
def test_the_sum_over_coupled_layers_is_inside_the_square(
    net: Any, table: dict[str, Any], freed: str, x: Tensor
) -> None:
    model, data = randomised(net()).train(), batches()
    structure = trace(model, x)
    name = {"memory": "group_fisher"}.get(freed, f"group_fisher_{freed}")
    scores = CRITERIA[name].score(Evidence(name, model, structure, data))
    by_name = {g.name: s for g, s in zip(structure.prunable, scores, strict=True)}
    for group, (readers, memory, macs) in table.items():
        got = by_name[group]
        want = definition(model, readers, data, len(got))
        want = want / {"nothing": 1, "memory": memory, "macs": macs}[freed]
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5 * float(want.max()), msg=group)


def test_batches_do_not_matter(x: Tensor) -> None:
    model = randomised(VGG()).double()
    images, labels = (torch.cat(t) for t in zip(*batches(), strict=True))
    parts = [(images[a:b].double(), labels[a:b]) for a, b in ((0, 1), (1, 6), (6, 14))]
    structure = trace(model, x.double())
    whole = group_fisher(model, structure, [(images.double(), labels)])
    torch.testing.assert_close(group_fisher(model, structure, parts), whole)


def test_nothing_of_the_model_changes(x: Tensor) -> None:
    model = randomised(ResNet()).train()
    model(x).sum().backward()
    state = copy.deepcopy(model.state_dict())
    grads = {n: (p.grad, p.grad.clone()) for n, p in model.named_parameters()}
    random = torch.get_rng_state()
    for name in ("group_fisher", "grasp", "rdt", "bn_taylor"):
        structure = trace(model, x)
        CRITERIA[name].score(Evidence(name, model, structure, batches()))
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    for name, parameter in model.named_parameters():
        assert parameter.grad is grads[name][0]
        assert torch.equal(parameter.grad, grads[name][1])
    assert torch.equal(torch.get_rng_state(), random)
    assert model.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_the_hooks_serve_a_training_loop(x: Tensor) -> None:
    model = randomised(VGG()).eval()
    structure, data = trace(model, x), batches(count=1)
    want = group_fisher(model, structure, data, freed="nothing")
    with Contributions(model, structure) as collected:
        f.cross_entropy(call(model, data[0][0]), data[0][1]).backward()
        found = collected.take()
        assert found is not None
        assert collected.take() is None
    got = (found * len(found)).double().square().sum(0)
    units = torch.cat([group.units for group in structure.prunable])
    torch.testing.assert_close(got[units], want[units], rtol=1e-5, atol=0)


class Folded(VGG):
    """Puts the pixels into the batch."""

    def forward(self, x: Tensor) -> Tensor:
        x = f.relu(self.conv3(f.relu(self.conv2(f.relu(self.conv1(x))))))
        x = f.max_pool2d(x, 4).movedim(1, -1).flatten(0, 2).repeat(1, 4)
        return self.fc2(f.relu(self.fc1(x))).unflatten(0, (-1, 4)).mean(1)


def test_samples_that_cannot_be_told_apart_are_refused(x: Tensor) -> None:
    model = Folded()
    with pytest.raises(ValueError, match=r"reads \d+ rows where other layers read \d+"):
        prune(model, x, criterion="group_fisher", ratio=0.3, data=batches())


def test_channels_that_no_layer_reads_are_refused() -> None:
    maker, reader = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)), nn.Conv2d(6, 2, 1)
    check_read(structure_of(nn.Sequential(*maker, reader), 6))
    with pytest.raises(ValueError, match="reads all channels of layer '0', so group Fisher"):
        check_read(structure_of(maker, 6))
    evidence = Evidence("group_fisher", maker, structure_of(maker, 6), [])
    with pytest.raises(ValueError, match="reads all channels of layer '0', so group Fisher"):
        CRITERIA["group_fisher"].score(evidence)


def test_a_loss_that_reaches_no_layer_is_refused(x: Tensor) -> None:
    def loss(output: Tensor, target: Tensor) -> Tensor:
        return torch.zeros((), requires_grad=True) * 1

    with pytest.raises(ValueError, match="no gradient of the loss of batch 0 reaches"):
        prune(VGG(), x, criterion="group_fisher", ratio=0.3, data=batches(), loss=loss)


def test_a_sample_without_a_batch_dimension_is_refused() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    structure, data = trace(model, torch.randn(2, 6)), [(torch.randn(6), torch.tensor(1))]
    with pytest.raises(ValueError, match=r"layer '2' reads \(5,\), expected samples first and 5"):
        group_fisher(model, structure, data, loss=lambda out, y: out.square().mean())
