"""The Transformers callback in real runs of its Trainer, against plain loops."""

from __future__ import annotations

import copy
import importlib
import json
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import orthoreg_ext as ox
from tests.integrations.examples import check_adoption, framework, run_example

STEPS = 4
STRENGTH = 1.0  # not to be overlooked
LR = 0.1
RAMP = ox.schedules.Linear(steps=2 * STEPS)


@pytest.fixture(scope="module")
def hf() -> ModuleType:
    framework("transformers", "accelerate")
    return importlib.import_module("transformers")


@pytest.fixture(autouse=True)
def _state_of_its_own(hf: ModuleType) -> Iterator[None]:
    """Accelerate keeps the precision of the last run for the whole process."""
    yield
    importlib.import_module("accelerate.state").AcceleratorState._reset_state(True)


def make_callback(*args: Any, **kwargs: Any) -> Any:
    adapter = importlib.import_module("orthoreg_ext.integrations.transformers")
    return adapter.OrthoRegCallback(*args, **kwargs)


def make_model(hf: ModuleType) -> nn.Module:
    torch.manual_seed(0)
    return hf.BertForSequenceClassification(
        hf.BertConfig(
            vocab_size=32,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=24,
            max_position_embeddings=8,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )


class Stream(torch.utils.data.IterableDataset):
    """Sentences in a fixed order."""

    def __init__(self, count: int) -> None:
        generator = torch.Generator().manual_seed(1)
        self.tokens = torch.randint(0, 32, (count, 6), generator=generator)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for tokens in self.tokens:
            yield {"input_ids": tokens, "labels": (tokens[0] >= 16).long()}

    def batches(self, size: int) -> list[dict[str, Tensor]]:
        labels = (self.tokens[:, 0] >= 16).long()
        return [
            {"input_ids": t, "labels": y}
            for t, y in zip(self.tokens.split(size), labels.split(size), strict=True)
        ]


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in model.parameters()]


def spy(hf: ModuleType, seen: list[list[Tensor]]) -> Any:
    class Spy(hf.TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            seen.append(gradients(model))

    return Spy()


def make_trainer(
    hf: ModuleType,
    model: nn.Module,
    callbacks: list[Any],
    folder: Path,
    *,
    fp16: bool = False,
    fused: bool = False,
    older: bool = False,
    steps: int = STEPS,
    accumulate: int = 1,
    **settings: Any,
) -> Any:
    class ScaledTrainer(hf.Trainer):
        """fp16 with a loss scale, which accelerate refuses to set up without a GPU."""

        def create_accelerator_and_postprocess(self) -> None:
            super().create_accelerator_and_postprocess()
            self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
            self.accelerator.native_amp = True
            self.accelerator.state._mixed_precision = "fp16"

        def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
            # older Trainers measure, and so unscale, only where they clip
            return 0.0 if older else super()._get_grad_norm(model, grad_norm)

    arguments = hf.TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=accumulate,
        learning_rate=LR,
        lr_scheduler_type="constant",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        logging_strategy="no",
        **{"save_strategy": "no", "max_grad_norm": 0.0, **settings},
    )
    trainer = (ScaledTrainer if fp16 else hf.Trainer)(
        model,
        arguments,
        train_dataset=Stream(4 * steps * accumulate),
        callbacks=callbacks,
        optimizers=(torch.optim.SGD(model.parameters(), LR, fused=fused), None),
    )
    trainer.remove_callback(hf.PrinterCallback)
    trainer.model_accepts_loss_kwargs = False  # Bert does, but leaves out the count of the samples
    return trainer


def plain_loop(
    model: nn.Module,
    *,
    steps: int = STEPS,
    accumulate: int = 1,
    clip: float = 0,
    autocast: torch.dtype | None = None,
    scale: bool = False,
    penalty: str = "orthoreg",
    schedule: Any = None,
) -> list[list[Tensor]]:
    """What a user would write; the gradients of all steps."""
    stepper = torch.optim.SGD(model.parameters(), LR)
    reg = ox.OrthoRegularizer(model, penalty, STRENGTH, schedule=schedule)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scale)
    seen = []
    for i, batch in enumerate(Stream(4 * steps * accumulate).batches(4)):
        with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
            loss = model(**batch).loss / accumulate
        scaler.scale(loss).backward()
        if (i + 1) % accumulate:
            continue
        scaler.unscale_(stepper)
        if clip:
            assert nn.utils.clip_grad_norm_(model.parameters(), clip) > clip
        reg().backward()
        seen.append(gradients(model))
        scaler.step(stepper)
        scaler.update()
        stepper.zero_grad()
    return seen


def assert_same(ours: list[Tensor], plain: list[Tensor], rtol: float = 1e-6) -> None:
    assert len(ours) == len(plain) > 0
    for a, b in zip(ours, plain, strict=True):
        assert (a - b).abs().max().item() <= rtol * max(b.abs().max().item(), 1.0)


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    # settings of the Trainer, of the plain loop
    "plain": ({}, {}),
    "accumulated": ({"accumulate": 3}, {"accumulate": 3}),
    "clipped": ({"max_grad_norm": 0.05}, {"clip": 0.05}),
    "bf16": ({"bf16": True}, {"autocast": torch.bfloat16}),
    "fp16": ({"fp16": True}, {"autocast": torch.float16, "scale": True}),
    "fp16, fused": ({"fp16": True, "fused": True}, {"autocast": torch.float16, "scale": True}),
    "fp16, older": ({"fp16": True, "older": True}, {"autocast": torch.float16, "scale": True}),
    "fp16, clipped": (
        {"fp16": True, "max_grad_norm": 0.05, "accumulate": 2},
        {"autocast": torch.float16, "scale": True, "clip": 0.05, "accumulate": 2},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_run_equals_the_plain_loop(hf: ModuleType, tmp_path: Path, case: str) -> None:
    settings, loop = CASES[case]
    plain, model = make_model(hf), make_model(hf)
    expected = plain_loop(plain, **loop)
    seen: list[list[Tensor]] = []
    callback = make_callback(strength=STRENGTH)
    trainer = make_trainer(hf, model, [callback, spy(hf, seen)], tmp_path, **settings)
    trainer.train()
    assert type(trainer.optimizer).__name__ == "AcceleratedOptimizer"
    if settings.get("fp16"):
        assert trainer.optimizer.scaler.get_scale() == 1024.0
    assert len(seen) == len(expected) == STEPS
    # in half precision a last bit of a weight can become a whole step of the rounding
    later = 1e-3 if "autocast" in loop else 1e-6
    assert_same(seen[0], expected[0])
    for ours, others in zip(seen, expected, strict=True):
        assert_same(ours, others, later)
    assert_same(list(model.parameters()), list(plain.parameters()), later)
    value = callback.regularizer().item()
    last = ox.OrthoRegularizer(plain, strength=STRENGTH)
    assert value == pytest.approx(last().item(), rel=later)
    first = ox.OrthoRegularizer(make_model(hf), strength=STRENGTH)
    assert value < 0.99 * first().item(), "the term did nothing"


@pytest.mark.parametrize("penalty", ["orthoreg", "srip"])
def test_resumed_run_goes_on_with_its_steps(hf: ModuleType, tmp_path: Path, penalty: str) -> None:
    plain = make_model(hf)
    plain_loop(plain, steps=2 * STEPS, penalty=penalty, schedule=RAMP)
    settings = {"save_strategy": "steps", "save_steps": STEPS, "steps": 2 * STEPS}
    first = make_callback(penalty, STRENGTH, schedule=RAMP)
    make_trainer(hf, make_model(hf), [first], tmp_path, **settings).train()
    checkpoint = tmp_path / f"checkpoint-{STEPS}"
    stored = json.loads((checkpoint / "trainer_state.json").read_text())["stateful_callbacks"]
    assert stored["OrthoRegCallback"]["attributes"]["saved"]["attached_steps"] == [STEPS]

    model, second = make_model(hf), make_callback(penalty, STRENGTH, schedule=RAMP)
    trainer = make_trainer(hf, model, [second], tmp_path, **settings)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert second.regularizer.state_dict()["attached_steps"] == [2 * STEPS]
    assert_same(list(model.parameters()), list(plain.parameters()))

    other = make_callback(penalty, 0.1, schedule=RAMP)
    trainer = make_trainer(hf, make_model(hf), [other], tmp_path, **settings)
    with pytest.raises(ValueError, match=r"strength=1\.0"):
        trainer.train(resume_from_checkpoint=str(checkpoint))


def test_callbacks_that_the_trainer_builds_anew(hf: ModuleType, tmp_path: Path) -> None:
    """restore_callback_states_from_checkpoint: right, or refused where JSON loses something."""
    settings = {"save_strategy": "steps", "save_steps": STEPS, "steps": 2 * STEPS}
    restore = {**settings, "restore_callback_states_from_checkpoint": True}
    for options, works in (({"every": 2}, True), ({"schedule": RAMP}, False)):
        folder = tmp_path / str(works)
        callback = make_callback("so", STRENGTH, **options)
        make_trainer(hf, make_model(hf), [callback], folder, **settings).train()
        callback = make_callback("so", STRENGTH, **options)
        trainer = make_trainer(hf, make_model(hf), [callback], folder, **restore)
        if not works:
            with pytest.raises(ValueError, match="loses schedule"):
                trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{STEPS}"))
            continue
        trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{STEPS}"))
        (built,) = [c for c in trainer.callback_handler.callbacks if type(c) is type(callback)]
        assert built is not callback
        assert built.options == callback.options
        assert built.regularizer.state_dict()["attached_steps"] == [2 * STEPS]


def test_several_callbacks_find_their_own_states(hf: ModuleType, tmp_path: Path) -> None:
    def callbacks() -> list[Any]:
        query = make_callback("so", STRENGTH, name="query", include="*query")
        return [query, make_callback(name="rest", exclude="*query", every=2)]

    settings = {"save_strategy": "steps", "save_steps": STEPS, "steps": 3 * STEPS}
    make_trainer(hf, make_model(hf), callbacks(), tmp_path, **settings).train()
    resumed = callbacks()
    trainer = make_trainer(hf, make_model(hf), resumed, tmp_path, **settings)
    trainer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{2 * STEPS}"))
    for callback in resumed:
        assert callback.regularizer.state_dict()["attached_steps"] == [3 * STEPS]


def test_checkpoint_without_the_callback_and_a_second_run_begin_with_step_0(
    hf: ModuleType, tmp_path: Path
) -> None:
    settings = {"save_strategy": "steps", "save_steps": STEPS, "steps": 2 * STEPS}
    make_trainer(hf, make_model(hf), [], tmp_path, **settings).train()
    callbacks = [make_callback(name="a"), make_callback("so", name="b")]
    trainer = make_trainer(hf, make_model(hf), callbacks, tmp_path, **settings)
    with pytest.warns(UserWarning, match="name='b'.*begin with 0"):
        trainer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{STEPS}"))
    path = tmp_path / f"checkpoint-{2 * STEPS}" / "trainer_state.json"
    stored = json.loads(path.read_text())["stateful_callbacks"]["OrthoRegCallback"]
    steps = [(s["args"]["name"], s["attributes"]["saved"]["attached_steps"]) for s in stored]
    assert steps[-2:] == [("a", [STEPS]), ("b", [STEPS])]
    trainer.train()
    for callback in callbacks:
        assert callback.regularizer.state_dict()["attached_steps"] == [2 * STEPS]
    for copied in (copy.deepcopy(callbacks[0]), pickle.loads(pickle.dumps(callbacks[0]))):
        assert copied.regularizer is None  # no second model
        trainer = make_trainer(hf, make_model(hf), [copied], tmp_path, steps=1)
        trainer.train()
        assert copied.regularizer.state_dict()["attached_steps"] == [1]


def test_prepared_optimizer_of_a_plain_accelerate_loop(hf: ModuleType) -> None:
    """Accelerate's wrapper runs no hooks: the error says so, the one inside does."""
    accelerate = importlib.import_module("accelerate")
    plain, model = make_model(hf), make_model(hf)
    plain_loop(plain, accumulate=2)
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), LR))
    reg = ox.OrthoRegularizer(model, strength=STRENGTH)
    with pytest.raises(ValueError, match=r"attach to the one inside, optimizer\.optimizer"):
        reg.attach(optimizer)
    reg.attach(optimizer.optimizer)
    for batch in Stream(4 * STEPS * 2).batches(4):
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch).loss)
            optimizer.step()
            optimizer.zero_grad()
    assert_same(list(model.parameters()), list(plain.parameters()))


def test_missing_package_is_named(hf: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    for package, adapter in (("transformers", "transformers"), ("peft", "peft")):
        monkeypatch.setitem(sys.modules, package, None)
        monkeypatch.delitem(sys.modules, f"orthoreg_ext.integrations.{adapter}", raising=False)
        with pytest.raises(ImportError, match=f"integrations.{adapter} needs {package}.*pip"):
            importlib.import_module(f"orthoreg_ext.integrations.{adapter}")


def test_what_cannot_work_is_refused(hf: ModuleType) -> None:
    with pytest.raises(TypeError, match="strenth"):
        make_callback(strenth=1.0)
    model = make_model(hf)
    optimizer = torch.optim.SGD(model.parameters(), LR)
    state = SimpleNamespace(global_step=0, stateful_callbacks={})

    def begin(model: nn.Module, **args: Any) -> None:
        make_callback().on_train_begin(
            SimpleNamespace(**args), state, None, model=model, optimizer=optimizer
        )

    begin(model)
    with pytest.raises(ValueError, match="DeepSpeed gives a process only a part"):
        begin(model, deepspeed="zero3.json")
    with pytest.raises(ValueError, match="FSDP gives a process only a part"):
        begin(type("FullyShardedDataParallel", (nn.Sequential,), {})(model))


def test_copies_are_attached_to_nothing(hf: ModuleType) -> None:
    model, callback = make_model(hf), make_callback("so", STRENGTH, name="mine", every=2)
    state = SimpleNamespace(global_step=0, stateful_callbacks={})
    optimizer = torch.optim.SGD(model.parameters(), LR)
    callback.on_train_begin(SimpleNamespace(), state, None, model=model, optimizer=optimizer)
    callback.on_pre_optimizer_step(None, state, None, model=model, optimizer=optimizer)
    for twin in (copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))):
        assert (twin.name, twin.options) == (callback.name, callback.options)
        assert twin.regularizer is None
    assert callback.regularizer.state_dict()["attached_steps"] == [1]


def test_example_runs_and_changes_two_lines(
    hf: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    check_adoption("transformers_callback.py")
    assert float(run_example("transformers_callback.py", capsys).split()[-1]) < 0.3
