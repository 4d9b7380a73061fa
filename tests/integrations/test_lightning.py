"""The Lightning callback in real runs of its Trainer, against plain loops."""

from __future__ import annotations

import copy
import importlib
import pickle
import sys
from itertools import pairwise
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import orthoreg_ext as ox
from orthoreg_ext.integrations.lightning import OrthoRegCallback
from tests.integrations.examples import check_adoption, framework, run_example

STEPS = 4
STRENGTH = 0.3  # not to be overlooked


@pytest.fixture(scope="module")
def pl() -> ModuleType:
    framework("lightning")
    return importlib.import_module("lightning.pytorch")


def make_net(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(2, 6, 3), nn.Tanh(), nn.Conv2d(6, 8, 3, groups=2), nn.Tanh()),
        *(nn.Flatten(), nn.Linear(32, 12), nn.Tanh(), nn.Linear(12, 3)),
    ).to(dtype)


def make_batches(count: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(5, 2, 6, 6, generator=generator, dtype=dtype) for _ in range(count)]


def loss_of(net: nn.Module, batch: Tensor) -> Tensor:
    return net(batch).float().square().sum(1).mean()


def make_optimizer(kind: str, parameters: Any) -> torch.optim.Optimizer:
    if kind == "fused":
        return torch.optim.Adam(parameters, 0.01, fused=True)
    return torch.optim.SGD(parameters, 0.05, momentum=0.9)


def gradients(net: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in net.parameters() if p.grad is not None]


def make_module(
    pl: ModuleType, net: nn.Module, kind: str = "sgd", manual: bool = False, clip: float = 0
) -> Any:
    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = net
            self.automatic_optimization = not manual
            self.seen: list[list[Tensor]] = []

        def training_step(self, batch: Tensor, index: int) -> Tensor | None:
            loss = loss_of(self.net, batch)
            if not manual:
                return loss
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            if clip:
                self.clip_gradients(optimizer, clip, "norm")
            optimizer.step()
            return None

        def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
            self.seen.append(gradients(self.net))

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return make_optimizer(kind, self.net.parameters())

    return Module()


def fit(
    pl: ModuleType,
    module: Any,
    callbacks: Any,
    batches: list[Tensor],
    ckpt: Any = None,
    steps: int = STEPS,
    **settings: Any,
) -> Any:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    trainer = pl.Trainer(
        max_steps=steps,
        accelerator="auto" if "strategy" in settings else "cpu",
        enable_checkpointing=False,
        callbacks=callbacks,
        **quiet,
        **settings,
    )
    loader = torch.utils.data.DataLoader(batches, batch_size=None)
    trainer.fit(module, loader, ckpt_path=ckpt)
    return trainer


def plain_loop(
    net: nn.Module,
    batches: list[Tensor],
    *,
    optimizer: str = "sgd",
    accumulate: int = 1,
    clip: float = 0,
    clip_all: bool = True,
    autocast: torch.dtype | None = None,
    scale: bool = False,
) -> tuple[list[list[Tensor]], list[float]]:
    """What a user would write: the term added to the loss, once a step.

    Gives the gradients and the terms of all steps.
    """
    stepper = make_optimizer(optimizer, net.parameters())
    reg = ox.OrthoRegularizer(net, strength=STRENGTH)
    scaler = torch.amp.GradScaler("cpu", enabled=scale)
    seen, terms = [], []
    for i, batch in enumerate(batches):
        with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
            loss = loss_of(net, batch) / accumulate
        scaler.scale(loss).backward()
        if (i + 1) % accumulate:
            continue
        scaler.unscale_(stepper)
        if clip and not clip_all:
            assert nn.utils.clip_grad_norm_(net.parameters(), clip) > clip
        term = reg()
        terms.append(float(term.detach()))
        term.backward()
        seen.append(gradients(net))
        if clip and clip_all:
            assert nn.utils.clip_grad_norm_(net.parameters(), clip) > clip
        scaler.step(stepper)
        scaler.update()
        stepper.zero_grad()
    return seen, terms


def assert_same(ours: list[Tensor], plain: list[Tensor], rtol: float = 1e-6) -> None:
    assert len(ours) == len(plain) > 0
    for a, b in zip(ours, plain, strict=True):
        assert (a - b).abs().max().item() <= rtol * max(b.abs().max().item(), 1.0)


CASES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    # settings of the Trainer, of the module, of the plain loop
    "plain": ({}, {}, {}),
    "accumulated": ({"accumulate_grad_batches": 3}, {}, {"accumulate": 3}),
    "clipped": ({"gradient_clip_val": 0.5}, {}, {"clip": 0.5}),
    "manual": ({}, {"manual": True}, {}),
    "manual, clipped": ({}, {"manual": True, "clip": 0.5}, {"clip": 0.5, "clip_all": False}),
    "bf16-mixed": ({"precision": "bf16-mixed"}, {}, {"autocast": torch.bfloat16}),
    "16-mixed": (
        {"precision": "16-mixed", "gradient_clip_val": 0.5},
        {},
        {"autocast": torch.float16, "scale": True, "clip": 0.5},
    ),
    "16-mixed, manual": (
        {"precision": "16-mixed"},
        {"manual": True},
        {"autocast": torch.float16, "scale": True},
    ),
    "fused": ({}, {"kind": "fused"}, {"optimizer": "fused"}),
    "64-true": ({"precision": "64-true"}, {}, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_run_equals_the_plain_loop(pl: ModuleType, case: str) -> None:
    trainer, module, loop = CASES[case]
    dtype = torch.float64 if case == "64-true" else torch.float32
    batches = make_batches(STEPS * loop.get("accumulate", 1), dtype)
    plain_net = make_net(dtype)
    seen, terms = plain_loop(plain_net, batches, **loop)
    net, callback = make_net(), OrthoRegCallback(strength=STRENGTH)
    lightning_module = make_module(pl, net, **module)
    settings = dict(trainer)
    if settings.get("precision") == "16-mixed":  # on a CPU Lightning would take bfloat16
        plugin = pl.plugins.precision.MixedPrecision
        settings["plugins"] = plugin(settings.pop("precision"), "cpu")
    fit(pl, lightning_module, callback, batches, **settings)
    assert len(seen) == len(lightning_module.seen) == STEPS
    # in half precision a last bit of a weight can become a whole step of the rounding
    later = 1e-3 if "autocast" in loop else 1e-6
    assert_same(lightning_module.seen[0], seen[0])
    for ours, plain in zip(lightning_module.seen, seen, strict=True):
        assert_same(ours, plain, later)
    assert_same(list(net.parameters()), list(plain_net.parameters()), later)
    reg = callback.regularizer
    last = ox.OrthoRegularizer(plain_net, strength=STRENGTH)
    assert reg().item() == pytest.approx(last().item(), rel=later)
    assert reg.state_dict()["attached_steps"] == [STEPS]
    assert all(a > b for a, b in pairwise(terms)), "the term did nothing"


def test_fused_optimizer_that_unscales_by_itself_gets_a_scaled_term(pl: ModuleType) -> None:
    """Lightning's hook sees scaled gradients there, so that the step itself adds the term."""
    batches = make_batches(STEPS)
    found = []
    for scaled in (True, False):
        net, callback = make_net(), OrthoRegCallback(strength=STRENGTH)
        settings: dict[str, Any] = {"precision": "bf16-mixed"}
        if scaled:
            scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
            mixed = pl.plugins.precision.MixedPrecision("16-mixed", "cpu", scaler)
            mixed.autocast_context_manager = lambda: torch.autocast("cpu", torch.bfloat16)
            settings = {"plugins": mixed}
        fit(pl, make_module(pl, net, "fused"), callback, batches, **settings)
        assert callback.regularizer.state_dict()["attached_steps"] == [STEPS]
        found.append(list(net.parameters()))
    assert_same(*found, rtol=2e-5)  # Adam divides by the root of small numbers


def test_optimizer_of_two_runs_gets_the_term_once(pl: ModuleType) -> None:
    module, callback = make_module(pl, make_net(), "fused"), OrthoRegCallback()
    optimizer = make_optimizer("fused", module.parameters())
    module.configure_optimizers = lambda: optimizer
    for _ in range(2):
        mixed = pl.plugins.precision.MixedPrecision("16-mixed", "cpu")
        fit(pl, module, callback, make_batches(1), steps=1, plugins=mixed)
        assert len(optimizer._optimizer_step_pre_hooks) == 1


@pytest.mark.parametrize("package", ["lightning.pytorch", "pytorch_lightning"])
def test_both_packages_take_it(pl: ModuleType, package: str) -> None:
    try:
        module = importlib.import_module(package)
    except ImportError:
        pytest.skip(f"{package} is not installed")
    batches = make_batches(STEPS)
    plain_net, net = make_net(), make_net()
    plain_loop(plain_net, batches)
    callback = OrthoRegCallback(strength=STRENGTH)
    assert isinstance(callback, OrthoRegCallback)
    assert isinstance(callback, module.Callback)
    fit(module, make_module(module, net), callback, batches)
    assert_same(list(net.parameters()), list(plain_net.parameters()))


def test_package_that_is_loaded_is_taken_and_none_is_named(
    pl: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("lightning.pytorch", "pytorch_lightning"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match="pip install lightning"):
        OrthoRegCallback()
    monkeypatch.setitem(sys.modules, "lightning.pytorch", pl)
    assert isinstance(OrthoRegCallback(), pl.Callback)


@pytest.mark.parametrize("penalty", ["orthoreg", "srip"])
def test_resumed_run_goes_on_with_its_steps(pl: ModuleType, tmp_path: Any, penalty: str) -> None:
    """The schedule ends where that of an uninterrupted run does, bit for bit."""

    def callback() -> Any:
        ramp = ox.schedules.Linear(steps=2 * STEPS)
        return OrthoRegCallback(penalty, STRENGTH, schedule=ramp)

    batches = make_batches(STEPS)  # an epoch
    whole = make_net()
    fit(pl, make_module(pl, whole), callback(), batches, steps=-1, max_epochs=2)
    trainer = fit(pl, make_module(pl, make_net()), callback(), batches, steps=-1, max_epochs=1)
    path = tmp_path / "half.ckpt"
    trainer.save_checkpoint(path)
    resumed, second = make_net(), callback()
    fit(pl, make_module(pl, resumed), second, batches, path, steps=-1, max_epochs=2)
    assert second.state_dict()["attached_steps"] == [2 * STEPS]
    for ours, plain in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours, plain)
    other = OrthoRegCallback(penalty, 0.1)
    with pytest.raises(ValueError, match="strength"):
        fit(pl, make_module(pl, make_net()), other, batches, path, steps=-1, max_epochs=2)


def test_fit_that_goes_on_keeps_counting_and_a_new_one_begins_anew(pl: ModuleType) -> None:
    batches = make_batches(STEPS)
    callback, module = OrthoRegCallback(), make_module(pl, make_net())
    trainer = fit(pl, module, callback, batches, steps=-1, max_epochs=1)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, torch.utils.data.DataLoader(batches, batch_size=None))
    assert callback.state_dict()["attached_steps"] == [2 * STEPS]
    fit(pl, module, callback, batches)
    assert callback.state_dict()["attached_steps"] == [STEPS]


class _Pair:
    """Two networks with an optimizer each, stepped in turn."""

    @staticmethod
    def make(pl: ModuleType, toggle: bool) -> Any:
        class Pair(pl.LightningModule):
            def __init__(self) -> None:
                super().__init__()
                self.first, self.second, self.head = make_net(), make_net(), nn.Linear(3, 1)
                self.automatic_optimization = False

            def training_step(self, batch: Tensor, index: int) -> None:
                for optimizer, net in zip(
                    self.optimizers(), (self.first, self.second, self.head), strict=True
                ):
                    if toggle:
                        self.toggle_optimizer(optimizer)
                    optimizer.zero_grad()
                    x = torch.ones(2, 3) if net is self.head else batch
                    self.manual_backward(loss_of(net, x))
                    optimizer.step()
                    if toggle:
                        self.untoggle_optimizer(optimizer)

            def configure_optimizers(self) -> list[torch.optim.Optimizer]:
                nets = (self.first, self.second, self.head)
                return [make_optimizer("sgd", net.parameters()) for net in nets]

        return Pair()


@pytest.mark.parametrize("toggle", [False, True])
def test_each_of_several_optimizers_gets_its_part(pl: ModuleType, toggle: bool) -> None:
    batches = make_batches(STEPS)
    names = ("first", "second")
    callbacks = [
        OrthoRegCallback(strength=STRENGTH, name=name, include=f"{name}.*", max_dim=64)
        for name in names
    ]
    module = _Pair.make(pl, toggle)
    fit(pl, module, callbacks, batches, steps=3 * STEPS)
    plain = make_net()
    stepper = make_optimizer("sgd", plain.parameters())
    reg = ox.OrthoRegularizer(plain, strength=STRENGTH, include="*")
    for batch in batches:
        stepper.zero_grad()
        (loss_of(plain, batch) + reg()).backward()
        stepper.step()
    for name in names:
        net = module.get_submodule(name)
        assert_same(list(net.parameters()), list(plain.parameters()))
    assert [c.state_dict()["attached_steps"] for c in callbacks] == [[STEPS]] * 2


def test_one_callback_counts_the_steps_of_each_optimizer(pl: ModuleType) -> None:
    """The head has no layer that is regularised, so that its optimizer is left alone."""
    callback = OrthoRegCallback(strength=STRENGTH, exclude="head")
    fit(pl, _Pair.make(pl, False), callback, make_batches(2), steps=6)
    assert callback.state_dict()["attached_steps"] == [2, 2]


def test_step_without_gradients_gets_no_term(pl: ModuleType) -> None:
    """training_step gave None: Lightning steps, but nothing may move."""
    net = make_net()
    module = make_module(pl, net)
    module.training_step = lambda batch, batch_idx: None
    before = copy.deepcopy(net.state_dict())
    callback = OrthoRegCallback(strength=STRENGTH)
    fit(pl, module, callback, make_batches(2), steps=2)
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert callback.state_dict()["attached_steps"] == [0]


def test_copies_go_on_with_the_steps(pl: ModuleType) -> None:
    callback = OrthoRegCallback("so", STRENGTH, name="mine", every=2)
    fit(pl, make_module(pl, make_net()), callback, make_batches(STEPS))
    for twin in (copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))):
        assert type(twin) is type(callback)
        assert twin.options == callback.options
        assert twin.state_key == callback.state_key == "OrthoRegCallback{'name': 'mine'}"
        assert twin.state_dict() == callback.state_dict()
        assert twin.regularizer is None


def test_what_cannot_work_is_refused(pl: ModuleType) -> None:
    batches = make_batches(1)
    with pytest.raises(TypeError, match="strenth"):
        OrthoRegCallback(strenth=1.0)
    module = make_module(pl, make_net())
    module.other = nn.Conv2d(2, 2, 1)
    with pytest.raises(ValueError, match="no optimizer of configure_optimizers holds"):
        fit(pl, module, OrthoRegCallback(include="other"), batches)
    module = make_module(pl, make_net())
    module.configure_optimizers = lambda: torch.optim.LBFGS(module.parameters())
    with pytest.raises(ValueError, match="LBFGS"):
        fit(pl, module, OrthoRegCallback(), batches)
    base = pl.strategies.SingleDeviceStrategy
    strategy = type("FSDPStrategy", (base,), {})("cpu", pl.accelerators.CPUAccelerator())
    with pytest.raises(ValueError, match="FSDPStrategy gives a process only a part"):
        fit(pl, make_module(pl, make_net()), OrthoRegCallback(), batches, strategy=strategy)


def test_example_runs_and_changes_two_lines(
    pl: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    check_adoption("lightning_callback.py")
    assert float(run_example("lightning_callback.py", capsys).split()[-1]) > 0.8
