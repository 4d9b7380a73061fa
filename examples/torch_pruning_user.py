"""Torch-Pruning with orthonormal filters: python examples/torch_pruning_user.py

Two lines differ from the plain script: the one marked "added", and the one above "was:". The loop
already calls pruner.regularize(model), as Torch-Pruning's sparse training does; that adds the term.
Needs torch-pruning and, for its digits, scikit-learn (pip install "orthoreg_ext[cli]").
"""

import torch
import torch_pruning as tp
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as f

from orthoreg_ext.integrations.torch_pruning import OrthoRegImportance, with_orthoreg  # added


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x):
        return f.relu(x + self.bn2(self.conv2(f.relu(self.bn1(self.conv1(x))))))


def train(model, pruner, epochs):
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(1297).split(64):
            optimizer.zero_grad()
            f.cross_entropy(model(images[batch]), labels[batch]).backward()
            if pruner is not None:
                pruner.regularize(model)
            optimizer.step()


def report(what):
    model.eval()
    with torch.no_grad():
        right = (model(images[1297:]).argmax(1) == labels[1297:]).float().mean()
    macs, params = tp.utils.count_ops_and_params(model, sample)
    print(f"{what}: {100 * right:.1f} %, {params:.0f} parameters, {macs:.0f} MACs")


torch.manual_seed(0)
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
labels, sample = torch.tensor(digits.target), images[:1]
stem = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
model = nn.Sequential(
    stem, Block(16), nn.MaxPool2d(2), Block(16), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
    nn.Linear(64, 10),
)  # fmt: skip

cut = {"global_pruning": True, "pruning_ratio": 0.5, "ignored_layers": [model[-1]]}
pruner = with_orthoreg(tp.pruner.BNScalePruner)(model, sample, OrthoRegImportance(), **cut)
# was: pruner = tp.pruner.BNScalePruner(model, sample, tp.importance.GroupTaylorImportance(), **cut)

train(model, pruner, epochs=5)
report("trained")

model.eval()  # the scores are of the mean gradient in eval mode
model.zero_grad()
f.cross_entropy(model(images[:1297]), labels[:1297]).backward()
pruner.step()
report("pruned")

train(model, None, epochs=3)
report("fine-tuned")
