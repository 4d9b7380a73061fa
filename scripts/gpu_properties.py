"""What must hold on a GPU beside right numbers: same bits always, no waiting, CUDA graphs.

    python scripts/gpu_properties.py [--emulated]

- the same call gives the same bits twenty times, between other kernels and on other streams;
- no call waits for the GPU (torch.cuda.set_sync_debug_mode("error")); this mode sees only the
  synchronisations of torch itself: a cudaStreamSynchronize or a cudaMalloc of the kernels' own
  launchers would pass, and is for the capture below to find, which refuses both;
- a captured graph replays to the same bits, also after the weights changed;
- a captured step of an attached regulariser replays to the same bits after steps with another
  factor and after the regulariser is gone.

All but the last are asked of the operators and of the attached route (`reg.attach(optimizer)`),
with a constant factor, with one that changes from step to step, and with a loss scale besides.

--emulated runs the first on the emulator, in several schedules; the others need a GPU.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import orthoreg_ext as ox
import orthoreg_ext.functional as F
from orthoreg_ext.precision import precision

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

SMALL = [(16, 3, 3, 3), (32, 16, 3, 3), (64, 32, 3, 3), (10, 64)]
MIXED = [*SMALL, (70, 1200), (130, 65)]
LARGE = [*MIXED, (2048, 2048), (512, 4608)]
MODES = ("ieee", "3xtf32", "mixed", "mixed-bf16", "tf32", "bf16")
CRITERIA = ("l1", "l2", "taylor", "taylor_sq")
FACTORS = ("a constant factor", "a schedule", "a schedule and a loss scale")
Call = Callable[[], "list[Tensor]"]


def leaves(shapes: list[tuple[int, ...]], device: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    drawn = [torch.randn(shape, generator=generator) for shape in shapes]
    made = [(w * torch.Size(w.shape[1:]).numel() ** -0.5).to(device) for w in drawn]
    return [w.requires_grad_() for w in made]


def calls(weights: list[Tensor]) -> dict[str, Call]:
    """The operators; each call starts from gradients of zero and returns all it computes."""
    flat = [w.detach() for w in weights]
    slopes = [torch.cos(w) for w in flat]
    strength = torch.full((), 0.5, device=flat[0].device)

    def zero() -> None:
        for weight in weights:
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
            else:
                weight.grad.zero_()

    def in_place() -> list[Tensor]:
        zero()
        values = F.add_gram_penalty_grad_(weights, "orthoreg", strength=strength)
        return [values, *(w.grad for w in weights if w.grad is not None)]

    def through_autograd() -> list[Tensor]:
        values = F.gram_penalty(weights, "so")
        return [values.detach(), *torch.autograd.grad(values.sum(), weights)]

    def scores() -> list[Tensor]:
        found = [F.filter_scores(flat, slopes, CRITERIA, dim=dim) for dim in (0, 1)]
        return [row for table in found for rows in table.values() for row in rows]

    return {
        "gram": lambda: F.gram(flat, "small"),
        "gram_penalty": through_autograd,
        "add_gram_penalty_grad_": in_place,
        "filter_scores": scores,
    }


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def copied(tensors: list[Tensor]) -> list[Tensor]:
    return [t.detach().clone() for t in tensors]


def repeats(call: Call, device: str) -> bool:
    """Whether twenty calls agree, whatever runs beside and before them."""
    first = copied(call())
    if device == "cpu":
        agree = True
        for order in ("down", "7", "up"):
            os.environ["CUDA_EMU_ORDER"] = order
            agree = agree and same(first, call())
        del os.environ["CUDA_EMU_ORDER"]
        return agree
    streams = [torch.cuda.current_stream(), torch.cuda.Stream(), torch.cuda.Stream()]
    noise = torch.randn(2048, 2048, device=device)
    torch.cuda.synchronize()
    found = []
    for number in range(20):
        with torch.cuda.stream(streams[number % 3]):
            if number % 2:
                noise @ noise  # occupies multiprocessors, and leaves other bits behind
                torch.full((1 << 22,), float("nan"), device=device)  # freed, then reused
            found.append(copied(call()))
        torch.cuda.synchronize()  # the calls share .grad
    return all(same(first, other) for other in found)


def does_not_wait(call: Call) -> bool:
    call()  # the first one may allocate and load
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError as error:
        print(f"    {error}".splitlines()[0])
        return False
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return True


def replays(call: Call, weights: list[Tensor]) -> bool:
    """Whether a graph of the call gives its bits, also for the weights of a later step."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    agree = True
    for _ in range(3):
        graph.replay()
        replayed = copied(captured)
        agree = agree and same(replayed, call())
        with torch.no_grad():
            for weight in weights:
                weight.mul_(0.9)
    return agree


def regularizer(device: str) -> Call:
    """`reg()` of a small network, as a training step calls it."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, bias=False), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.Linear(32, 10)
    ).to(device)
    reg = ox.OrthoRegularizer(model, strength=1e-2)
    return lambda: list(torch.autograd.grad(reg(), model[0].weight))


def network(device: str) -> nn.Sequential:
    """Layers that are written in place, in both precisions, and some that are not.

    The transposed convolution goes through autograd, and so does the layer with a frozen bias.
    """
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3),
        nn.ConvTranspose2d(16, 8, 2),
        nn.Conv2d(16, 32, 3, groups=2),
        nn.Conv2d(8, 24, 3),
        nn.Linear(64, 32).double(),
        nn.Linear(300, 130),
        nn.Linear(130, 10),
    ).to(device)
    model[3].bias.requires_grad_(False)
    return model


def attach(
    model: nn.Sequential, factor: str = FACTORS[0]
) -> tuple[ox.OrthoRegularizer, torch.optim.Optimizer, Call]:
    """A regulariser on an optimizer, and two of its steps, which leave the weights as they are.

    The factor is 1 in both, or with a schedule 1 in the first and 2 in the second.
    """
    schedule = None if factor == FACTORS[0] else lambda step: 1.0 + step % 2
    reg = ox.OrthoRegularizer(model, strength=1.0, schedule=schedule)
    stepped = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(stepped, lr=0.0, fused=True)
    if factor == FACTORS[2]:  # as a GradScaler leaves it for a fused optimizer
        optimizer.grad_scale = torch.full((), 4.0, device=stepped[0].device)
    reg.attach(optimizer)
    for parameter in stepped:
        parameter.grad = torch.zeros_like(parameter)

    def steps() -> list[Tensor]:
        grads = [p.grad for p in stepped if p.grad is not None]
        for grad in grads:
            grad.zero_()
        optimizer.step()
        optimizer.step()
        return grads

    return reg, optimizer, steps


def outlives_what_made_it(device: str) -> bool:
    """Whether a captured step replays to the same bits after other steps, and with no regulariser.

    Nothing of what the replay reads may be memory that those have freed or written.
    """
    model = network(device)
    reg, optimizer, steps = attach(model)
    first = copied(steps())
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        steps()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = steps()

    def agrees() -> bool:
        torch.cuda.synchronize()
        noise = [torch.full((n,), float("nan"), device=device) for n in [*range(1, 64)] * 8]
        del noise  # whatever was freed reads as NaN now
        graph.replay()
        return same(copied(captured), first)

    agree = agrees()
    reg.strength = 3.0
    steps()  # another factor
    agree = agree and agrees()
    with precision("ieee"):
        steps()  # prepared anew
    agree = agree and agrees()
    for attachment in list(reg._attached.values()):
        attachment.remove()
    del reg, optimizer, steps, attachment
    gc.collect()
    return agree and agrees()


def captured_first(device: str) -> bool:
    """Whether eager steps are right when the first one with their factor was inside a capture."""
    reg, _, steps = attach(network(device))
    want = copied(steps())
    reg.strength = 2.0
    steps()
    torch.cuda.synchronize()
    reg.strength = 1.0
    with torch.cuda.graph(torch.cuda.CUDAGraph()):  # never replayed
        steps()
    return same(copied(steps()), want)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--emulated", action="store_true", help="without a GPU, on the emulator")
    backend = device = "cuda"
    emulated = parser.parse_args().emulated
    if emulated:
        from tests.emu.backend import register_emulated

        backend, device = register_emulated(), "cpu"
    failed = []

    def check(holds: bool, what: str) -> None:
        print(f"  {'ok' if holds else 'FAILED'}: {what}", flush=True)
        failed.extend([] if holds else [what])

    with ox.backend(backend):
        for mode in MODES:
            lists = {"small": SMALL, "mixed": MIXED} | ({} if emulated else {"large": LARGE})
            for size, shapes in lists.items():
                weights = leaves(shapes, device)
                for name, call in calls(weights).items():
                    with precision(mode):
                        what = f"{name}, {mode}, {size} layers"
                        check(repeats(call, device), f"the same bits: {what}")
                        if not emulated:
                            check(does_not_wait(call), f"does not wait: {what}")
                            check(replays(call, weights), f"CUDA graph: {what}")
            for factor in FACTORS:
                model = network(device)
                _, _, steps = attach(model, factor)
                with precision(mode):
                    what = f"attached with {factor}, {mode}"
                    check(repeats(steps, device), f"the same bits: {what}")
                    if not emulated:
                        check(does_not_wait(steps), f"does not wait: {what}")
                        check(replays(steps, list(model.parameters())), f"CUDA graph: {what}")
        if not emulated:
            check(does_not_wait(regularizer(device)), "does not wait: OrthoRegularizer()")
            check(outlives_what_made_it(device), "CUDA graph: outlives other steps and its maker")
            check(captured_first(device), "CUDA graph: does not disturb later steps")
    print(f"{len(failed)} failed" + "; streams and graphs need a GPU" * emulated)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
