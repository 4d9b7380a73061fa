"""OrthoRegularizer: one added term, or one attached hook, for all layers of a model."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from . import functional
from .arguments import is_factor
from .attachment import Attachment, PreparedTerms, check_hooks, parameters_of, refuse_gathered
from .diagnostics import LayerReport, Report, layer_reports
from .distributed import Group, Ranks, check_group, check_sharing, unwrapped
from .errors import choose
from .plan import LayerWeights, ModelState, Plan, Selection, Selector, Term
from .schedules import Stateful
from .settings import check_numbers, check_penalty
from .sharing import Shares, shared_total, weighted_sum
from .sides import SIDES
from .watch import Watch

_CHANGED = "the layers have changed since they were compiled: call the regulariser once outside"


class OrthoRegularizer:
    """Regularises the filters of a model towards orthonormality.

    The term is strength * sum_l weight_l * P_l over the layers l, with P_l from
    :func:`orthoreg_ext.functional.gram_penalty`. Two routes: ``loss = loss + reg()`` or
    ``reg.attach(optimizer)``. The first is inside whatever is done to the loss (gradient
    clipping, loss scaling); the second adds the gradient just before the optimizer step, after any
    clipping, once a step however often gradients were accumulated.

    Defaults follow OrthoReg (Lubana et al., arXiv 2009.05014, released code): the entrywise L1
    penalty, strength 1e-2 (the authors take 1e-3 for MobileNet), weights sqrt(size) normalised to
    sum 1, the bias of a convolution as one more entry of its filter, the classifier left out. The
    released code hard-codes a size and a side for each network; here size is the number of rows of
    the layer's Gram matrices and the side is the smaller one. Its authors train with weight decay 0
    while the term is on.

    Layers are looked up at every call, so parameters that were replaced (pruned) or frozen since
    are seen. Shared parameters count once.

    ``srip`` keeps an eigenvector for each layer: a step is one step of power iteration, and a new
    layer (or one whose Gram matrix has another size, pruned) begins with 100. Its value is at most
    the true one; ``report()`` gives the true one. ``ocnn`` takes strides and dilations from the
    modules and leaves biases out; layers that are no 2-D convolution or linear are skipped.

    Of many processes each computes the whole term, so that DDP's mean of gradients is right. With
    `shard` each computes some layers: ``reg()`` still is the value of the whole term, and the mean
    over the ranks of its gradient the whole gradient; attached optimizers exchange gradients, which
    stay bit-equal. Sharded weights (FSDP2, tensor parallelism) are gathered, by all ranks at once.

    Args:
        model: the module whose layers are regularised; of DistributedDataParallel the one inside.
        penalty: a name of :data:`orthoreg_ext.penalties.PENALTIES`.
        strength: the factor of the whole term.
        side: ``"rows"``, ``"cols"`` or ``"small"``; see :func:`functional.gram_penalty`.
        layer_weights: ``"sqrt"`` (normalised to sum 1), ``"uniform"`` (1 each), ``"mean"`` (one
            over the number of Gram entries) or a dict from layer name to factor, 1 where missing.
        include: names or patterns (``"features.*"``) of the layers to take, or a function of name
            and module. Without it every convolution and linear layer is taken, but for a linear
            classifier (the last layer of several) and layers larger than `max_dim`.
        exclude: names, patterns or a function; layers to leave out.
        bias: whether a bias is one more entry of its filter: True, False or ``"conv"`` (not for
            linear layers).
        every: evaluates the term on every so many-th call or step only, that many times as strong.
        schedule: a function from the step number (0, 1, ...) to a factor of the strength, one of
            :mod:`orthoreg_ext.schedules` for example.
        max_dim: the largest Gram matrix that is taken without `include`.
        num_groups: of ``gor``: see :func:`functional.gram_penalty`.
        shard: deal the layers to the ranks, balanced by cost; see docs/howto/distributed.md.
        process_group: the one that averages the gradients; by default all ranks.

    Raises:
        RuntimeError: with `shard`, there is no process group, or the ranks have other layers.
        TypeError: the model is sharded by FSDP1, or already sharded and `shard` is given.
        ValueError: no layer is left, or an argument is out of range or unknown.
    """

    def __init__(
        self,
        model: nn.Module,
        penalty: str = "orthoreg",
        strength: float = 1e-2,
        *,
        side: str = "small",
        layer_weights: LayerWeights = "sqrt",
        include: Selector | None = None,
        exclude: Selector | None = None,
        bias: bool | str = "conv",
        every: int = 1,
        schedule: Callable[[int], float] | None = None,
        max_dim: int = 2048,
        num_groups: int | None = None,
        shard: bool = False,
        process_group: Group | None = None,
    ) -> None:
        check_numbers(model, strength, every, max_dim, schedule)
        row, num_groups = check_penalty(penalty, side, layer_weights, bias, num_groups)
        check_sharing(shard, process_group)
        self.model = model = unwrapped(model)
        self.penalty = penalty
        self.strength = float(strength)
        self.side = choose("side", side, SIDES)
        self.every = every
        self.schedule = schedule
        self.shard, self._ranks = bool(shard), Ranks(process_group)
        self._shares: Shares | None = None  # of the layers, as they were dealt
        self.step = 0  # calls of this object; attached optimizers count their own steps
        self._called = 0  # the step of the last call
        self._selection = Selection(
            *(self.side, layer_weights, include, exclude, bias, max_dim, row, num_groups)
        )
        self._attached: weakref.WeakKeyDictionary[torch.optim.Optimizer, Attachment] = (
            weakref.WeakKeyDictionary()
        )
        self._prepared: weakref.WeakKeyDictionary[torch.optim.Optimizer, PreparedTerms] = (
            weakref.WeakKeyDictionary()
        )
        self._loaded_steps: list[int] = []
        self._selection.check(model)
        self._plan = plan = self._planned()
        self._state: ModelState | None = ModelState(model)
        self._watch: Watch | None = Watch(model, plan)
        if not plan.terms:
            reasons = "; ".join(f"{s.name!r}: {s.reason}" for s in plan.skipped)
            raise ValueError(
                f"no layer is left to regularise ({reasons or 'the model has no filters'}); "
                "name layers in include= or relax exclude= and max_dim="
            )
        for layer in plan.skipped:
            if layer.reason.startswith("its Gram matrix"):
                warnings.warn(f"layer {layer.name!r} is skipped: {layer.reason}", stacklevel=2)

    def __call__(self) -> Tensor:
        """Returns the term, a differentiable scalar in the weights' computing precision.

        Each call counts a step. Not so under ``no_grad`` or ``inference_mode``, where it is the
        term of the next step, and in a recomputation of torch.utils.checkpoint, where it is that
        of the last call.
        """
        plan = self._current()
        if torch.compiler.is_compiling() and self.every == 1 and self.schedule is None:
            factor = self.strength  # a step number would be a constant of the graph
        else:
            step = self._called if _is_recomputed() else self.step
            factor = self._factor(step)
            self._called = step
            if torch.is_grad_enabled():
                self.step = step + 1
        if factor == 0 or not plan.terms:
            device = plan.terms[0].coefficients.device if plan.terms else None
            return torch.zeros((), device=device)
        if self.shard:
            shared: Tensor = shared_total(partial(self._shared, plan, factor), self._values, factor)
            return shared
        return weighted_sum(plan.terms, [self._values(term) for term in plan.terms], factor)

    def _values(self, term: Term) -> Tensor:  # [L]
        tensors = term.tensors()
        if not torch.is_grad_enabled() and "vectors" in tensors:  # no step: they stay
            tensors["vectors"] = [vector.clone() for vector in tensors["vectors"]]
        return functional.gram_penalty(penalty=self.penalty, side=self.side, **tensors)

    def attach(self, optimizer: torch.optim.Optimizer, *, hook: bool = True) -> Attachment:
        """Adds the term's gradient before each step of the optimizer, after its closure if any.

        Only parameters of the optimizer are touched, so models with several optimizers attach to
        each; `every` and `schedule` count the steps of each by itself. Under a GradScaler whose
        fused optimizer unscales by itself the term is scaled alike.

        A step copies nothing from the host and waits for no GPU, but for the first one after the
        layers have changed. So it can be captured in a CUDA graph, after a step like it. A graph
        repeats what was captured: the factor that `strength`, `schedule` and `every` gave in that
        step (replays count no steps), under a loss scale that is read anew, the layers, and the
        memory of parameters and gradients. Capture again after any of them was replaced or moved,
        and where the factor shall change. Steps outside of the graph, and whatever becomes of this
        object, do not disturb it.

        Without a hook the step stays as it is and the caller says when, by ``add()`` of what is
        returned: between backward (unscaled, under a GradScaler) and the step. So the term can be
        inside gradient clipping, which the hook comes after.

        Args:
            optimizer: the optimizer of some of the layers.
            hook: whether the optimizer's own step adds the term.

        Returns:
            An object whose ``remove()`` detaches.

        Raises:
            ValueError: already attached to this optimizer, it holds none of the layers, its step
                runs no hooks (timm's Lookahead, Accelerate's wrapper: attach to the optimizer
                inside), or it calls its closure several times a step (LBFGS): use ``loss + reg()``
                there.
        """
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(
                f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}"
            )
        if isinstance(optimizer, torch.optim.LBFGS):
            raise ValueError(
                "LBFGS evaluates its closure many times a step: use loss + reg() instead"
            )
        if optimizer in self._attached and self._attached[optimizer].active:
            raise ValueError("this regulariser is attached to this optimizer already")
        if hook:
            check_hooks(optimizer)
        if not self.concerns(optimizer):
            raise ValueError(
                "the optimizer holds none of the regularised layers: pass it model.parameters(), "
                "and attach again after parameters were replaced"
            )
        step = self._loaded_steps.pop(0) if self._loaded_steps else 0
        self._attached[optimizer] = Attachment(optimizer, self._add_gradient, step, hook)
        return self._attached[optimizer]

    def concerns(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether the optimizer holds any parameter of the layers that are regularised now."""
        owned = parameters_of(optimizer)
        return any(term.owned(owned) for term in self._current().terms)

    def _add_gradient(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        factor = self._factor(step)
        if factor == 0:
            return
        plan, settings = self._current(), (self.penalty, self.side)
        shares = self._shared(plan, factor) if self.shard else None
        own = plan if shares is None else shares.own
        prepared = self._prepared.get(optimizer)
        if prepared is None or not prepared.holds(own, optimizer, *settings):
            refuse_gathered(self.model, plan, optimizer)
            prepared = PreparedTerms(own, optimizer, *settings)
            self._prepared[optimizer] = prepared
        add = partial(prepared.add, factor, getattr(optimizer, "grad_scale", None))
        if shares is None:
            add()
        holds = bool(prepared.terms) if shares is None else shares.add(optimizer, add)
        if plan.terms and not holds:
            warnings.warn(
                "the optimizer holds none of the regularised layers any more, so the term is lost: "
                "parameters were replaced (give prune its optimizer=) or frozen since attach()",
                stacklevel=2,
            )

    def _shared(self, plan: Plan, factor: float) -> Shares:
        if self._shares is None or self._shares.plan is not plan:
            settings = [
                f"{self.penalty!r}, side={self.side!r}, every={self.every}",
                f"strength={self.strength}, a factor of {factor} in this step",
            ]
            with torch.inference_mode(False):  # later steps are to differentiate it
                self._shares = Shares(plan, check_group(self._ranks.group), settings)
        return self._shares

    def report(self) -> Report:
        """Measures every layer: its penalty, its factor in the term, its filters' correlation."""
        plan = self._current()
        rows: list[LayerReport] = []
        with torch.no_grad():
            for term in plan.terms:
                tensors = term.tensors()
                tensors.pop("vectors", None)  # without them it is the true value
                values = functional.gram_penalty(penalty=self.penalty, side=self.side, **tensors)
                rows += layer_reports(term, values)
        return Report(rows, plan.skipped)

    def state_dict(self) -> dict[str, Any]:
        """Returns what a resumed run needs: the step numbers and the settings they belong to.

        The steps of attached optimizers are in the order in which they were attached.
        """
        steps = [a.step for a in self._attached.values() if a.active] + self._loaded_steps
        state = {"step": self.step, "attached_steps": steps, **self._settings()}
        if isinstance(self.schedule, Stateful):
            state["schedule"] = dict(self.schedule.state_dict())
        if vectors := self._current().vectors():
            state["vectors"] = {name: vector.clone() for name, vector in vectors.items()}
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from a :meth:`state_dict`; optimizers may be attached before or after.

        Raises:
            ValueError: the state is of a regulariser with other settings, or incomplete; nothing
                has changed then.
        """
        settings, vectors = self._settings(), self._current().vectors()
        schedule = self.schedule if isinstance(self.schedule, Stateful) else None
        expected = {"step", "attached_steps", *settings}
        expected |= {"schedule"} if schedule else set()
        expected |= {"vectors"} if vectors else set()
        if missing := expected - set(state):
            names = ", ".join(sorted(missing))
            raise ValueError(f"state has no {names}: is it the state_dict of an OrthoRegularizer?")
        for key, value in settings.items():
            if state[key] != value:
                raise ValueError(
                    f"state was saved with {key}={state[key]!r}, but this regulariser has {value!r}"
                )
        if "schedule" in state and schedule is None:
            raise ValueError(
                f"state was saved with the schedule {state['schedule']!r}, but that of this "
                f"regulariser is {self.schedule!r}: give it schedule="
            )
        for name, vector in vectors.items():
            saved = state["vectors"].get(name)
            if not isinstance(saved, Tensor) or saved.shape != vector.shape:
                size = tuple(saved.shape) if isinstance(saved, Tensor) else saved
                raise ValueError(
                    f"state has the eigenvectors {size} of layer {name!r}, but this regulariser "
                    f"has {tuple(vector.shape)}: load it before or after the layers are pruned, as "
                    "it was saved"
                )
        step, *loaded = _steps([state["step"], *state["attached_steps"]])
        if schedule is not None:
            schedule.load_state_dict(state["schedule"])
        for name, vector in vectors.items():
            vector.copy_(state["vectors"][name])
        self.step, self._loaded_steps = step, loaded
        for attachment in self._attached.values():
            if self._loaded_steps and attachment.active:
                attachment.step = self._loaded_steps.pop(0)

    def _settings(self) -> dict[str, Any]:
        weights = self._selection.layer_weights
        found = {
            "penalty": self.penalty,
            "strength": self.strength,
            "side": self.side,
            "layer_weights": weights if isinstance(weights, str) else dict(weights),
            "bias": self._selection.bias,
            "every": self.every,
            "layers": [layer.name for term in self._current().terms for layer in term.layers],
        }
        if self._selection.num_groups is not None:
            found["num_groups"] = self._selection.num_groups
        return found

    def _factor(self, step: int) -> float:
        """The factor of the term in a step, 0 where it is left out."""
        if step % self.every:
            return 0.0
        factor = self.schedule(step) if self.schedule else 1.0
        if not is_factor(factor):
            raise ValueError(
                f"schedule({step}) gave {factor!r}, expected a finite number of at least 0"
            )
        return self.strength * self.every * float(factor)

    def __getstate__(self) -> dict[str, Any]:
        """A copy or a pickle is attached to no optimizer; see :meth:`state_dict` for resuming."""
        empty = dict.fromkeys(("_attached", "_prepared", "_state", "_shares", "_watch"))
        return {**self.__dict__, **empty}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restores a copy, attached to nothing."""
        self.__dict__.update(state)
        self._attached = weakref.WeakKeyDictionary()
        self._prepared = weakref.WeakKeyDictionary()

    def _planned(self, vectors: Mapping[str, Tensor] | None = None) -> Plan:
        with torch.inference_mode(False):  # later steps are to differentiate it
            return self._selection.plan(self.model, vectors)

    def _current(self) -> Plan:
        """The plan for the parameters the model has now."""
        if torch.compiler.is_compiling():  # a graph is of fixed layers
            if self._watch is None or not self._watch.holds():
                self._renew()
            return self._plan
        if self._state is None or not self._state.holds():
            self._plan = self._planned(self._plan.vectors())
            self._state, self._watch = ModelState(self.model), Watch(self.model, self._plan)
        return self._plan

    @torch.compiler.disable(reason=_CHANGED)  # type: ignore[untyped-decorator]
    def _renew(self) -> None:
        self._current()


def _is_recomputed() -> bool:
    """Whether a backward pass is running: then a checkpointed function is called once more."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _steps(saved: list[Any]) -> list[int]:
    for step in saved:
        if not isinstance(step, int) or step < 0:
            raise ValueError(f"state has the step number {step!r}, expected an integer from 0 on")
    return saved
