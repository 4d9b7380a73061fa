"""The job from its first step to its last, continued from wherever it was interrupted.

For every seed two networks with the same parameters go the same way on the same batches: one is
trained with the regulariser and cut by ``settings.criterion``, its twin without and by L1. The way
of a network is a list of steps (:func:`plan`): training epochs, then for every round a cut and
epochs of fine-tuning. After each step everything is stored, and every step starts from a seed of
its own, so that a run which was interrupted ends with the same numbers as one that was not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as nnf

from .. import pruning
from ..pruning.selection import RemovesNothingError
from ..regularizer import OrthoRegularizer
from ..report.scores import ScoreRecorder
from . import measure
from .checks import check_backend, check_export, check_packages, refusing
from .data import Dataset, load_dataset
from .files import check_folder, owned
from .models import build_model
from .outputs import OUTPUTS, write_outputs
from .progress import Show, cut_line, epoch_line
from .record import Arm, Cut, Epoch, Run, Size
from .settings import Settings, why_no_gpu
from .state import STATE_NAME, load_state, restore_training, save_state, training_tensors, under
from .steps import Step, extended, no_cut, plan
from .train import DivergedError, accuracy, deterministic, train_epoch
from .weights import load_weights, weights_checksum

CALIBRATION = 10_000  # training images that score the filters, as in OrthoReg's released code
MOMENTUM = 0.9
NOTHING = 1e-6  # a share to remove that is none


class Screen(Protocol):
    """Where a run shows itself; see :func:`progress.showing`."""

    def __call__(self, total: int, done: int) -> AbstractContextManager[Show]:
        """Starts to show ``total`` steps, of which ``done`` were done before."""


@contextmanager
def silent(total: int, done: int) -> Iterator[Show]:
    """Shows nothing."""
    yield lambda line, keep: None


@dataclass
class Training:
    """A network under way."""

    model: nn.Module
    optimizer: torch.optim.Optimizer


class Job:
    """A run with the data and the folder it works on."""

    def __init__(self, run: Run, dataset: Dataset, out: Path, stored: Mapping[str, Tensor]) -> None:
        self.run, self.settings, self.dataset, self.out = run, run.settings, dataset, out
        device = torch.device(self.settings.device)
        self.train, self.test = dataset.train.to(device), dataset.test.to(device)
        self.example = self.train.batch(slice(0, 1))[0]
        self.steps = plan(self.settings)
        self.stored = stored  # what the run continues from
        # what the report and the files need of networks that are finished
        self.kept = {key: t for key, t in stored.items() if key.startswith("kept.")}

    def fresh(self, seed: int) -> nn.Module:
        """Returns the untrained network of a seed."""
        model = build_model(
            self.settings.model,
            num_classes=len(self.dataset.classes),
            image_shape=self.dataset.image_shape,
            seed=seed,
        )
        if self.settings.weights is not None:
            load_weights(model, Path(self.settings.weights))
        return model.to(self.settings.device)

    def pruned(self, arm: Arm) -> nn.Module:
        """Returns the network of an arm after its cuts, with untrained weights."""
        model = self.fresh(arm.seed)
        if arm.checkpoint:
            pruning.replay(model, self.example, arm.checkpoint["history"])
        return model

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """Returns the optimizer of a stage; its learning rate is set at every batch."""
        return torch.optim.SGD(model.parameters(), lr=0, momentum=MOMENTUM, nesterov=True)

    def check_network(self) -> None:
        """Cuts and exports untrained networks: what cannot be cut or exported is refused at once.

        Raises:
            ValueError: The network cannot be cut as asked, or not exported.
        """
        first = self.steps[self.settings.epochs]
        network = self.fresh(self.settings.seed)
        with refusing(f"--model {self.settings.model!r} cannot be pruned"):
            self._cut(network, self.settings.criterion, first.gone, samples=2)
            if self.settings.target != "latency":  # which takes a while to measure
                self._cut(self.fresh(self.settings.seed), "l1", first.gone, samples=2)
        with refusing(f"--model {self.settings.model!r} cannot be exported"):
            check_export(network, self.train.batch(slice(0, 2))[0])

    def _cut(
        self,
        model: nn.Module,
        criterion: str | pruning.Criterion,
        ratio: float,
        samples: int = CALIBRATION,
    ) -> pruning.PruneResult:
        """Cuts the network by a criterion, on samples of the training images, in eval mode."""
        order = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(0))
        chosen = order[:samples].sort().values.to(self.train.labels.device)
        return pruning.prune(
            model.eval(),
            self.example,
            criterion=criterion,
            ratio=ratio,
            data=[self.train.batch(part) for part in chosen.split(256)],
            loss=nnf.cross_entropy,
            scope="global",
            max_layer_ratio=self.settings.max_layer_ratio,
            target=self.settings.target,
            round_to=self.settings.round_to,
        )

    def _share(self, step: Step, cuts: list[Cut]) -> float:
        """What a step's cut removes of what is left, so that in total ``step.gone`` goes.

        What rounding spared before goes now, and what went too early is not asked for again.
        """
        if not cuts:
            return step.gone
        if self.settings.target == "filters":
            left = cuts[-1].prunable[1] / cuts[0].prunable[0]
        else:
            left = math.prod(1 - cut.saved for cut in cuts)
        return 1 - (1 - step.gone) / left

    def execute(self, show: Show) -> None:
        """Does what is left of every arm, storing everything after each step."""
        for arm in self.run.arms:
            if arm.done == len(self.steps):
                continue
            training = self._restored(arm)
            while arm.done < len(self.steps):
                step = self.steps[arm.done]
                line = self._do(step, arm, training)
                arm.done += 1
                if arm.done == len(self.steps):
                    self._keep(arm, training.model, "after")
                self.save(training)
                show(line, step.stage == "cut" or step.epoch + 1 == step.epochs)

    def _restored(self, arm: Arm) -> Training:
        """The network of an arm as its last step left it."""
        model = self.pruned(arm)
        training = Training(model, self.optimizer(model))
        if arm.done:
            restore_training(model, training.optimizer, self.stored)
        return training

    def _do(self, step: Step, arm: Arm, training: Training) -> str:
        """Does one step and returns its line."""
        settings, model = self.settings, training.model
        if step.stage == "cut":
            if step.cut == 0:
                self._keep(arm, model, "before")
            before = accuracy(model, self.test)
            ratio, recorder = self._share(step, arm.cuts), ScoreRecorder(arm.criterion)
            try:
                result = self._cut(model, recorder.criterion, ratio) if ratio > NOTHING else None
            except RemovesNothingError:
                if not arm.cuts:
                    raise
                result = None
            training.optimizer = self.optimizer(model)
            if result is None:  # the cuts before went further than asked, as --round-to has it
                arm.cuts.append(no_cut(arm.cuts[-1], before))
                return cut_line(arm, arm.cuts[-1])
            prunable = [row for row in result.layers if not row.reason]
            arm.checkpoint = extended(arm.checkpoint, result.document(), step.cut + 1)
            arm.cuts.append(
                Cut(
                    ratio=ratio,
                    saved=result.saved[settings.target],
                    accuracy_before=before,
                    accuracy_after=accuracy(model, self.test),
                    before=Size.of(result.before),
                    after=Size.of(result.after),
                    prunable=(sum(r.before for r in prunable), sum(r.after for r in prunable)),
                    layers=[(row.name, row.before, row.after) for row in result.layers],
                    scores=recorder.counts(result)[0] if arm.seed == settings.seed else None,
                )
            )
            return cut_line(arm, arm.cuts[-1])

        regularizer = None
        if step.stage == "train" and arm.regularised:
            assert settings.strength is not None  # resolved
            regularizer = OrthoRegularizer(model, settings.penalty, settings.strength)
        try:
            loss, penalty = train_epoch(
                model,
                training.optimizer,
                self.train,
                regularizer,
                seed=1_000_003 * arm.seed + arm.done,
                epoch=step.epoch,
                epochs=step.epochs,
                lr=settings.lr if step.stage == "train" else settings.finetune_lr,
                batch_size=settings.batch_size,
            )
        except DivergedError as error:
            rate = "--lr" if step.stage == "train" else "--finetune-lr"
            remedy = f"a lower {rate}" + (" or --strength" if regularizer is not None else "")
            raise DivergedError(
                f"seed {arm.seed}, {arm.name}: the training diverged in {step.stage} epoch "
                f"{step.epoch + 1} of {step.epochs} ({error}); start again with {remedy} and "
                "another --out"
            ) from error
        epoch = Epoch(
            stage=step.stage,
            cut=step.cut,
            epoch=step.epoch + 1,
            loss=loss,
            penalty=penalty,
            accuracy=accuracy(model, self.test),
            correlation=measure.mean_correlation(model),
        )
        arm.epochs.append(epoch)
        return epoch_line(arm, epoch, step.epochs)

    def _keep(self, arm: Arm, model: nn.Module, when: str) -> None:
        """Keeps of the first seed's networks what the report draws and the files hold."""
        if when == "before":
            arm.layer_correlations = measure.correlation_by_layer(model)
        else:
            arm.final_correlations = measure.correlation_by_layer(model)
        if arm.seed != self.settings.seed:
            return
        if when == "before":
            epochs = self.settings.epochs + self.settings.finetune_epochs
            arm.sensitivity, arm.sensitivity_note = measure.sensitivity(
                model, self.example, self.train, self.test, arm.criterion, epochs
            )
        name, matrix = measure.correlation_matrix(model, self.run.matrix_layer)
        self.run.matrix_layer = name
        self.kept[f"kept.matrix.{arm.name} {when}"] = matrix.cpu()
        if when == "after" and arm.regularised:
            for key, value in model.state_dict().items():
                self.kept[f"kept.model.{key}"] = value.detach().cpu().clone()

    def save(self, training: Training | None = None) -> None:
        """Stores the run, atomically."""
        tensors = dict(self.kept)
        if training is not None:
            tensors.update(training_tensors(training.model, training.optimizer))
        save_state(self.out / STATE_NAME, self.run.to_json(), tensors)

    def finish(self) -> None:
        """Measures latencies and writes the files of the finished run."""
        arms = {arm.name: arm for arm in self.run.arms if arm.seed == self.settings.seed}
        networks = {name: self.pruned(arm) for name, arm in arms.items()}
        dense = self.fresh(self.settings.seed)
        found = measure.latencies({"dense": dense, **networks}, self.example)
        self.run.latency = {str(size): times for size, times in found.items()}
        network = networks["regularised"]
        network.load_state_dict(under("kept.model.", self.kept))
        matrices = under("kept.matrix.", self.kept)
        finished = replace(self.run, finished=True)
        write_outputs(finished, network, self.train.batch(slice(0, 64))[0], matrices, self.out)
        self.run = finished
        self.save()


def run(
    given: Mapping[str, Any], out: Path, *, resume: bool = False, screen: Screen = silent
) -> Run:
    """Does the whole job, or what is left of it.

    Args:
        given: The settings (:class:`Settings`) that differ from the defaults; to continue a run,
            none or the same as then.
        out: The folder for the results and the state.
        resume: Continue the run stored in ``out``; begin if nothing is stored there and settings
            are given.
        screen: Shows the progress.

    Returns:
        The finished run, as ``history.json`` holds it.

    Raises:
        ValueError: A setting, the data, the network, the folder or the stored state does not do.
        ImportError: A package is missing that the run needs, also only for its last file.
        DivergedError: The training diverged; the stored state is the one of the epoch before.
        OSError: Something could not be written; the stored state is intact.
    """
    state = out / STATE_NAME
    tensors: dict[str, Tensor] = {}
    check_folder(out, resume=resume, state_name=STATE_NAME)
    record: Run | None = None
    if resume and not given and not state.exists():
        raise ValueError(
            f"--out {str(out)!r} holds no run to continue; check its name, or give the settings of "
            "the run, too: it was stopped before it began"
        )
    if resume and state.exists():
        stored, tensors = load_state(state)
        record = Run.from_json(stored)
        record.settings.check_same(given)
        if record.finished and all((out / name).exists() for name in OUTPUTS):
            return record
        if record.settings.device == "cuda" and (reason := why_no_gpu()):
            raise ValueError(
                f"the run in --out {str(out)!r} has --device cuda, which cannot be used here "
                f"({reason}); continue it where a GPU is, or start again with another --out"
            )
    settings = record.settings if record else Settings(**given).resolved()
    check_packages()
    check_backend(settings.device)
    threads = torch.get_num_threads()
    torch.set_num_threads(settings.threads)
    try:
        dataset = load_dataset(settings.data, settings.image_size, settings.channels)
        job = Job(record or new_run(settings, dataset), dataset, out, tensors)
        if record is None:
            job.check_network()
        elif record.data != described(dataset, settings.weights):
            what = f"--data {settings.data!r}"
            what += f" or --weights {settings.weights!r}" if settings.weights else ""
            raise ValueError(
                f"{what} changed since the run began: it cannot be continued; "
                "start again with another --out"
            )
        with owned(out):
            if record is None:
                check_folder(out, resume=False, state_name=STATE_NAME)  # nobody else began one
                job.save()
            arms = job.run.arms
            with deterministic(settings.device):
                with screen(len(arms) * len(job.steps), sum(arm.done for arm in arms)) as show:
                    job.execute(show)
                job.finish()
            return job.run
    finally:
        torch.set_num_threads(threads)


def new_run(settings: Settings, dataset: Dataset) -> Run:
    """Returns the record of a run that is about to begin."""
    arms = [
        Arm(seed, regularised, settings.criterion if regularised else "l1")
        for seed in settings.seeds_used()
        for regularised in (True, False)
    ]
    versions = measure.versions(settings.device, settings.model)
    return Run(settings, versions, described(dataset, settings.weights), arms)


def described(dataset: Dataset, weights: str | None = None) -> dict[str, Any]:
    """Returns what the record says about the data, and the file that the networks start from."""
    return {
        "source": dataset.source,
        "classes": list(dataset.classes),
        "image_shape": list(dataset.image_shape),
        "train": len(dataset.train),
        "test": len(dataset.test),
        "mean": dataset.train.mean.flatten().tolist(),
        "std": dataset.train.std.flatten().tolist(),
        "checksum": dataset.checksum,
        **({"weights_checksum": weights_checksum(Path(weights))} if weights else {}),
    }
