"""Which criterion finds filters that are there twice?

A plain network is trained, then widened: in every layer some filters, drawn at random, get a copy,
with a little noise on its weights, and whoever reads the pair reads each at half its weight. So the
function stays as it was, but for the noise, and as many filters are redundant as were copied. Then
exactly so many are cut from every layer, and the network is fine-tuned.

options.criterion: names; options.share: copies for each filter; options.noise: standard deviation,
relative to that of the layer's weights.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from copy import deepcopy

import torch
from torch import Tensor, nn

from experiments.config import Config, check_options
from experiments.lab import Lab, check_cut
from experiments.runner import Unit, Values

Copies = dict[str, list[int]]  # layer -> the filters that its last ones are copies of


def stages(config: Config) -> Sequence[Sequence[Unit]]:
    """The networks, then the criteria."""
    check_options(config, {"criterion": list, "share": float, "noise": float})
    if (share := config.options["share"]) > 1:
        raise ValueError(f"options.share is {share}, expected a number of at most 1: one copy each")
    for name in config.options["criterion"]:
        check_cut({"criterion": name, "ratio": share / (1 + share)}, "options")
    nets = config.networks
    return nets, [
        {**net, "criterion": name} for net in nets for name in config.options["criterion"]
    ]


def measure(lab: Lab, unit: Unit) -> Values:
    """The accuracy of a network and of the widened one, or what a criterion cuts from that."""
    options, seed = lab.config.options, unit["seed"]
    net = lab.trained(unit["model"], unit["arm"], seed)
    wide, copies = widened(net, options["share"], options["noise"], seed)
    if "criterion" not in unit:
        return {"accuracy": lab.accuracy(net), "wide": lab.accuracy(wide)}
    share = options["share"]
    result = lab.prune(wide, unit["criterion"], share / (1 + share), scope="local")
    gone = {entry["layer"]: set(entry["removed"]) for entry in result.history}
    pairs, whole, lost = counted(copies, gone, {row.name: row.before for row in result.layers})
    cut = lab.accuracy(wide)
    lab.finetuned(wide, unit)
    found = {"found": 1 - whole / pairs, "lost": lost, "cut": cut}
    return {**found, "finetuned": lab.accuracy(wide)}


def counted(
    copies: Copies, gone: dict[str, set[int]], widths: dict[str, int]
) -> tuple[int, int, float]:
    """The pairs, those that are still whole, and the share of what was there once that is lost.

    Args:
        copies: as from :func:`widened`.
        gone: the filters that were removed, by layer.
        widths: of the layers before.
    """
    pairs = whole = kinds = dead = 0
    for layer, originals in copies.items():
        removed, width = gone.get(layer, set()), widths[layer]
        first = width - len(originals)
        twins = {original: first + i for i, original in enumerate(originals)}
        pairs += len(twins)
        whole += sum(a not in removed and b not in removed for a, b in twins.items())
        kinds += first
        dead += sum(i in removed and twins.get(i, i) in removed for i in range(first))
    return pairs, whole, dead / kinds


@torch.no_grad()
def widened(net: nn.Module, share: float, noise: float, seed: int) -> tuple[nn.Sequential, Copies]:
    """A network that computes the same, with copies of some filters of every convolution.

    Args:
        net: convolutions without bias or groups, each with a BatchNorm2d, layers without parameters
            in a row, and one linear layer behind a global mean; it is left alone.
        share: copies for each filter of a layer.
        noise: standard deviation of what is added to a copy, relative to that of the weights.
        seed: of the choice and of the noise.

    Raises:
        ValueError: the network has a layer of another kind.
    """
    for name, module in net.named_children():
        plain = isinstance(module, nn.Conv2d) and module.bias is None and module.groups == 1
        plain = plain or isinstance(module, nn.BatchNorm2d | nn.Linear)
        if not plain and next(module.parameters(), None) is not None:
            raise ValueError(
                f"layer {name!r} is {type(module).__name__}, which is not widened here: expected "
                "a row of convolutions without bias or groups, BatchNorm2d and Linear, such as vgg"
            )
    generator = torch.Generator().manual_seed(seed)
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    copies: Copies = {}
    reads: Tensor | None = None  # the channel of the layer before that each channel here copies
    for name, module in net.named_children():
        if isinstance(module, nn.Conv2d):
            weight = _read(module.weight, reads)
            width = len(weight)
            chosen = torch.randperm(width, generator=generator)[: round(share * width)]
            reads = torch.cat([torch.arange(width), chosen.sort().values])
            wide = weight[reads]
            drawn = torch.randn(wide[width:].shape, generator=generator)
            wide[width:] += noise * weight.std() * drawn
            copies[name] = reads[width:].tolist()
            layers[name] = _with(module, wide)
        elif isinstance(module, nn.BatchNorm2d):
            assert reads is not None
            layers[name] = norm = nn.BatchNorm2d(len(reads), module.eps, module.momentum)
            state = module.state_dict()
            norm.load_state_dict({k: v[reads] if v.dim() else v for k, v in state.items()})
        elif isinstance(module, nn.Linear):
            layers[name] = _with(module, _read(module.weight, reads))
        else:
            layers[name] = module
    return nn.Sequential(layers).to(next(net.parameters()).device), copies


def _with(layer: nn.Conv2d | nn.Linear, weight: Tensor) -> nn.Conv2d | nn.Linear:
    """A copy of a layer with other weights."""
    copy = deepcopy(layer)
    copy.weight = nn.Parameter(weight)
    if isinstance(copy, nn.Conv2d):
        copy.out_channels, copy.in_channels = weight.shape[:2]
    else:
        copy.out_features, copy.in_features = weight.shape
    return copy


def _read(weight: Tensor, reads: Tensor | None) -> Tensor:  # [n, k, ...] -> [n, len(reads), ...]
    """Weights that read the channels of a widened layer: a pair at half the weight each."""
    weight = weight.detach().cpu()  # where what is drawn is
    if reads is None:
        return weight.clone()
    halves = 1.0 / reads.bincount()[reads]
    return weight[:, reads] * halves.view(1, -1, *[1] * (weight.dim() - 2))
