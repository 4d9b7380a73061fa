"""What the job measures on a network besides its accuracy."""

from __future__ import annotations

import importlib.metadata
import math
import os
import platform
import statistics
import time
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .. import pruning
from ..build_info import build_info
from ..functional import filter_correlation
from ..layers import filter_layers
from ..machine import processor
from ..pruning import Sensitivity
from ..regularizer import OrthoRegularizer
from .data import Samples
from .train import accuracy

BATCH_SIZES = (1, 64)
REPEATS = 30
RATIOS = (0.25, 0.5, 0.75, 0.9)  # of a group, for the sensitivity
SAMPLES = 512  # images of one measurement at most
FEWEST = 64
SHARE = 0.1
PASSES = 3  # of an image, that a step of training is worth


def correlation_by_layer(model: nn.Module) -> dict[str, float]:
    """Returns the mean |cosine| over the pairs of filters of each layer that gets regularised."""
    rows = OrthoRegularizer(model).report()
    return {row.name: row.correlation for row in rows if math.isfinite(row.correlation)}


def mean_correlation(model: nn.Module) -> float:
    """Returns the mean of :func:`correlation_by_layer` over the layers; 0 without any pair."""
    values = list(correlation_by_layer(model).values())
    return statistics.fmean(values) if values else 0.0


def correlation_matrix(model: nn.Module, name: str = "") -> tuple[str, Tensor]:
    """Returns the name and the |cosines|, [n, n], of a layer; of the regularised one in the middle.

    Args:
        model: the network.
        name: of the layer, to take the same one again.
    """
    if not name:
        names = [row.name for row in OrthoRegularizer(model).report()]
        name = names[len(names) // 2]
    layer = next(layer for layer in filter_layers(model) if layer.name == name)
    return name, filter_correlation([layer.weight.detach()])[0].abs()


def sensitivity(
    model: nn.Module,
    example: Tensor,  # [1, channels, height, width]
    train: Samples,
    test: Samples,
    criterion: str,
    epochs: int,
) -> tuple[Sensitivity | None, str]:
    """Cuts each coupled group alone at ``RATIOS``, and measures the accuracy that is left.

    It takes a pass over at most ``SAMPLES`` training images for the scores, and for every group and
    ratio one over some held-out images; both drawn at random, always the same. All measurements
    together take about ``SHARE`` of the network's training at most, unless each has so few images.

    Args:
        model: the network; left as it is, bit for bit.
        example: an input to trace it with.
        train: images for the gradients.
        test: images for the accuracy.
        criterion: ranks the units of a group.
        epochs: of the network's whole training, to which the number of images is fitted.

    Returns:
        the table and on what it was measured, or None and the reason why there is none.
    """
    passes = PASSES * epochs * len(train) * SHARE / (len(RATIOS) * len(filter_layers(model)))
    some = _drawn(test, min(max(int(passes), FEWEST), SAMPLES))
    batches = [train.batch(part) for part in _drawn(train, SAMPLES).split(256)]
    held_out = Samples(test.images[some], test.labels[some], test.mean, test.std)

    def evaluate(model: nn.Module) -> float:
        return accuracy(model, held_out)

    evaluate.__name__ = "accuracy"
    try:
        table = pruning.sensitivity(
            model,
            example,
            batches,
            evaluate=evaluate,
            ratios=RATIOS,
            criterion=criterion,
            verify=False,  # the cut itself is checked
        )
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError) as error:  # a run does not end for want of a figure
        return None, " ".join(str(error).split())
    return table, f"on {len(some)} of the held-out images"


def _drawn(samples: Samples, most: int) -> Tensor:  # [at most that many] int64
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(0))
    return order[:most].sort().values.to(samples.labels.device)


def versions(device: str, model: str = "") -> dict[str, str]:
    """Returns what the numbers of a run depend on besides its settings and data.

    Args:
        device: where it runs.
        model: its name; a package that it comes from is named, too.
    """
    info = build_info()
    gpu = {"GPU": torch.cuda.get_device_name()} if device == "cuda" else {}
    owner = [model.partition(":")[0].partition(".")[0]] if ":" in model else []
    packages = ("torch-pruning", "numpy", "safetensors", "scikit-learn", "pillow", *owner)
    return {
        "orthoreg_ext": info["version"],
        "torch": info["torch"]["version"],
        **{name: found for name in packages if (found := _installed(name))},
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "processor": f"{processor()}, {os.cpu_count()} cores",
        **gpu,
        "operators": f"CPU {info['cpu']['runs']}, backend {info['backend']}",
    }


def _installed(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except (importlib.metadata.PackageNotFoundError, ValueError):  # no name at all
        return ""


@torch.no_grad()
def latencies(
    models: Mapping[str, nn.Module],
    images: Tensor,  # [1, channels, height, width]
) -> dict[int, dict[str, float]]:
    """Returns the median milliseconds of a forward pass by batch size and model.

    The models take turns, so that whatever else the machine does hits them alike.
    """
    found: dict[int, dict[str, float]] = {}
    for size in BATCH_SIZES:
        batch = images.expand(size, -1, -1, -1).contiguous()
        times: dict[str, list[float]] = {name: [] for name in models}
        for repeat in range(REPEATS + 3):
            for name, model in models.items():
                model.eval()
                start = _now(batch.device)
                model(batch)
                if repeat >= 3:  # the first ones warm up
                    times[name].append(1000 * (_now(batch.device) - start))
        found[size] = {name: statistics.median(values) for name, values in times.items()}
    return found


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
