"""Fixtures for every test: the implementations to run on, and seeded random layers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

import orthoreg_ext as ox
from orthoreg_ext.backend import BACKENDS
from orthoreg_ext.build_info import compiled, reason
from orthoreg_ext.penalties import KERNELS, PENALTIES
from orthoreg_ext.reference import Rows, filter_matrices, slopes

NAMES = sorted(KERNELS)  # those that every implementation has
OTHERS = sorted(PENALTIES.keys() - KERNELS.keys())  # by those of another one, or plain PyTorch
MARKING = [name for name in NAMES if KERNELS[name].counts is not None]
LEAVING_OUT = [name for name in NAMES if name not in MARKING]  # the filters that are pruned


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Small tensors on busy cores wait for threads; tests that need two ask for them."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def emulator() -> str:
    """Builds the CUDA kernels for the CPU and registers them as backend "emulated"."""
    from tests.emu.backend import register_emulated
    from tests.emu.build import NvccMissingError

    try:
        return register_emulated()
    except NvccMissingError as error:
        pytest.skip(str(error))


@dataclass(frozen=True)
class Target:
    """One implementation under test."""

    name: str
    device: torch.device
    tolerance: float  # relative, of float32 against float64

    @property
    def namespace(self) -> object:
        return getattr(torch.ops, BACKENDS[self.name].namespace or "orthoreg")


def make_target(name: str, request: pytest.FixtureRequest) -> Target:
    if name == "emulated":
        return Target(request.getfixturevalue("emulator"), torch.device("cpu"), 1e-5)
    if name == "cuda":
        return Target("cuda", torch.device("cuda"), 1e-5)
    if not compiled:
        pytest.skip(reason)
    return Target("cpu", torch.device("cpu"), 1e-6)


TARGETS = ["cpu", "emulated", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(params=TARGETS)
def target(request: pytest.FixtureRequest) -> Iterator[Target]:
    """Runs the test on the CPU, on the emulated and, with a GPU, on the real CUDA operators."""
    chosen = make_target(request.param, request)
    with ox.backend(chosen.name):
        yield chosen


@dataclass
class Layers:
    """A list of layers as functional arguments."""

    weights: list[Tensor] = field(default_factory=list)
    biases: list[Tensor | None] = field(default_factory=list)
    groups: list[int] = field(default_factory=list)

    def arguments(self) -> dict[str, object]:
        return {"weights": self.weights, "biases": self.biases, "groups": self.groups}

    def parameters(self) -> list[Tensor]:
        return [*self.weights, *(b for b in self.biases if b is not None)]

    def double(self) -> Layers:
        """The same numbers on the CPU in float64, contiguous."""

        def copy(tensor: Tensor | None) -> Tensor | None:
            if tensor is None:
                return None
            made = tensor.detach().cpu().double().contiguous()
            return made.requires_grad_(tensor.requires_grad)

        return Layers([copy(w) for w in self.weights], [copy(b) for b in self.biases], self.groups)


def random_weight(
    n: int, k: int, generator: torch.Generator, device: torch.device, dtype: torch.dtype
) -> Tensor:  # [n, ...] with k entries a filter
    """A weight of n filters of k entries in one of the layouts that models hold."""
    scale = k**-0.5

    def normal(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(device, dtype)

    choice = int(torch.randint(5, (), generator=generator))
    taps = next((t for t in (9, 4, 25, 3) if k % t == 0), 1)
    side = {9: (3, 3), 4: (2, 2), 25: (5, 5), 3: (1, 3), 1: (1, 1)}[taps]
    if choice == 0:
        return normal(n, k // taps, *side)
    if choice == 1:
        return normal(n, k // taps, *side).contiguous(memory_format=torch.channels_last)
    if choice == 2:
        return normal(n, k + 3)[:, 2 : k + 2]  # an offset and a stride between the filters
    if choice == 3:
        return normal(k, n).t()  # filters that are not dense
    return normal(n, k)


def random_layers(
    seed: int,
    device: torch.device,
    dtype: torch.dtype | None = torch.float32,
    *,
    count: int | None = None,
    largest: int = 300,
    budget: int = 300_000,
    requires_grad: bool = True,
) -> Layers:
    """Ragged layers: n and k from 1 to `largest`, groups, biases, layouts; dtype None mixes them.

    The multiply-adds of all layers stay near `budget`, so that many small layers and few large
    ones take about the same time.
    """
    generator = torch.Generator().manual_seed(seed)

    def integer(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    count = integer(1, 60) if count is None and integer(0, 3) == 0 else count or integer(1, 6)
    layers, spent = Layers(), 0
    for index in range(count):
        share = max(1, (budget - spent) // (count - index))
        n = integer(1, largest)
        k = integer(1, max(1, min(largest, 4 * share // (n * n))))
        n = min(n, max(1, int((4 * share / k) ** 0.5)))
        if integer(0, 1):
            n, k = min(k, largest), min(n, largest)
        spent += n * n * k
        groups = integer(2, 3) if integer(0, 5) == 0 else 1
        kind = dtype or [torch.float32, torch.bfloat16, torch.float16, torch.float64][integer(0, 3)]
        weight = random_weight(n * groups, k, generator, device, kind)
        bias = None
        if integer(0, 2) == 0:
            bias = torch.randn(n * groups, generator=generator).to(device, kind)
        if requires_grad:
            weight = weight.detach().requires_grad_()
            bias = bias if bias is None else bias.requires_grad_()
        layers.weights.append(weight)
        layers.biases.append(bias)
        layers.groups.append(groups)
    return layers


def penalty_arguments(
    name: str, side: str, weights: list[Tensor], seed: int = 0
) -> dict[str, object]:
    """The penalty on that side; one that marks filters gets random ones, and the rows."""
    if name in LEAVING_OUT:
        return {"penalty": name, "side": side}
    generator = torch.Generator().manual_seed(seed)
    marks = [torch.rand(len(w), generator=generator).lt(0.4).to(w.device) for w in weights]
    return {"penalty": name, "side": "rows" if side == "cols" else side, "pruned": marks}


def random_targets(weights: list[Tensor], seed: int) -> list[float | Tensor | None]:
    """A number, one for each filter, or none, layer after layer."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (None, 0.5 + i, torch.rand(len(w), generator=generator).to(w.device))[i % 3]
        for i, w in enumerate(weights)
    ]


def gradient_error(got: Tensor, want: Tensor, floor: float = 0.0) -> float:
    """relative_error; `floor` is the least size of `want` that counts."""
    error = float((got.detach().double().cpu() - want.detach().double().cpu()).norm())
    return error / max(float(want.detach().double().norm()), floor, 1e-30) if error > 0 else 0.0


def gradient_floor(
    name: str,
    side: str,
    layers: Layers,
    targets: list[float | Tensor | None] | None = None,
    *,
    masked: bool = False,
) -> list[float]:
    """For each of layers.parameters(), how large the terms of its gradient are.

    The gradient of cosines is what is left of S W after most of it has cancelled (all of it for
    parallel filters), and so it may be on the larger side: with targets, and of a root with masks.
    So its rounding errors are small beside |S| |W| only; a few of them meet, hence the factor. 0
    for others.
    """
    root = KERNELS[name].root
    if name != "cosine" and targets is None and not (masked and root):
        return [0.0] * len(layers.parameters())
    weights, biases = [], []
    for i, (w, b, groups) in enumerate(
        zip(layers.weights, layers.biases, layers.groups, strict=True)
    ):
        matrices = filter_matrices(w.detach(), w[:0, 0] if b is None else b.detach(), groups)
        target = None if targets is None else targets[i]
        columns = target is None and (
            side == "cols" or (side == "small" and matrices.shape[1] > matrices.shape[2])
        )
        aims = None if target is None else torch.as_tensor(target).cpu().to(w.dtype).expand(len(w))
        slope = slopes(matrices, columns, KERNELS[name], Rows.of(None, aims, groups, columns))
        rows, slope = matrices.abs(), slope.abs()
        if root:
            slope = slope / slope.norm()
        terms = 8 * (rows @ slope if columns else slope @ rows)
        weights.append(float(terms.norm()))
        biases += [] if b is None else [float(terms[..., -1].norm())]
    return [*weights, *biases]


def relative_error(got: Tensor, want: Tensor) -> float:
    """|got - want| over |want| in the Frobenius norm, in float64."""
    want = want.detach().double().cpu()
    difference = (got.detach().double().cpu() - want).norm()
    return float(difference / want.norm().clamp_min(1e-30)) if difference > 0 else 0.0
