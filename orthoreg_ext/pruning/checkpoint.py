"""Pruned models on disk: a JSON history and safetensors weights, never a pickle."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import shutil
import tempfile
from collections import OrderedDict
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from .checks import check_model, refuse_reparametrized
from .counts import widths
from .equivalence import outputs_of
from .history import check_history, units_of
from .removal import commit, memory_format, removal_edits, tensor_cuts, undo
from .structure import trace
from .units import Structure

FORMAT = "orthoreg_ext.pruning/1"
HISTORY, WEIGHTS = "history.json", "weights.safetensors"
_TEMPORARY, _OLD = ".orthoreg-", "old-"


def fingerprint(model: nn.Module) -> str:
    """A hash of the names and shapes of a model's state: its architecture, not its weights."""
    shapes = [[name, list(t.shape)] for name, t in model.state_dict().items() if _is_tensor(t)]
    return hashlib.sha256(json.dumps(shapes).encode()).hexdigest()


def save(
    model: nn.Module, document: dict[str, Any], directory: Path, *, overwrite: bool = False
) -> Path:
    """Writes a pruned model; see :meth:`PruneResult.save`."""
    now = widths(model)
    changed = sorted(n for n, width in document["widths"].items() if now.get(n) != width)
    if changed:
        raise ValueError(
            f"the model changed since this result: {changed[0]!r} has {now.get(changed[0])} "
            f"filters, expected {document['widths'][changed[0]]}; save the result of the last prune"
        )
    made = not directory.exists()
    leftovers = _leftovers(directory)
    empty = made or (directory.is_dir() and set(directory.iterdir()) == set(leftovers))
    if not empty and not (overwrite and directory.is_dir()):
        raise FileExistsError(
            f"{directory} exists and is not an empty directory; choose another one, or pass "
            "overwrite=True to replace the checkpoint in it"
        )
    tensors, aliases, formats = _split_state(model)
    weights: bytes = _safetensors().save(tensors)
    document = {
        "format": FORMAT,
        "versions": {n: _version(n) for n in ("orthoreg_ext", "torch", "torch-pruning")},
        **document,
        "aliases": aliases,
        "channels_last": formats,
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
    }
    text = json.dumps(document, indent=1, allow_nan=False).encode()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _replace(directory, {WEIGHTS: weights, HISTORY: text})
    finally:
        if made and directory.exists() and not any(directory.iterdir()):
            directory.rmdir()
    for leftover in leftovers:  # last: till here they may hold the only copy of a file
        shutil.rmtree(leftover, ignore_errors=True)  # the save is done, and they do not count
    return directory


def _leftovers(directory: Path) -> list[Path]:
    """The temporary folders of saves that were killed; nothing else that is named like them."""
    ours = {prefix + name for name in (WEIGHTS, HISTORY) for prefix in ("", _OLD)}
    return [
        path
        for path in (directory.iterdir() if directory.is_dir() else ())
        if path.name.startswith(_TEMPORARY)
        and path.is_dir()
        and not path.is_symlink()
        and {entry.name for entry in path.iterdir()} <= ours
    ]


def _replace(directory: Path, files: dict[str, bytes]) -> None:
    """Writes files so that either all are new or, after an error, all are as before.

    Everything is on the disk before the first name changes; the history, which vouches for the
    weights by their hash, comes last, so that a crash in between cannot go unnoticed.
    """
    temporary = Path(tempfile.mkdtemp(prefix=_TEMPORARY, dir=directory))
    moved: list[str] = []
    try:
        for name, data in files.items():
            with (temporary / name).open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            if (directory / name).exists():
                shutil.copyfile(directory / name, temporary / f"{_OLD}{name}")
        try:
            for name in files:
                os.replace(temporary / name, directory / name)
                moved.append(name)
        except BaseException:
            for name in moved:
                old = temporary / f"{_OLD}{name}"
                if old.exists():
                    os.replace(old, directory / name)
                else:
                    (directory / name).unlink()
            raise
    finally:
        shutil.rmtree(temporary)


def replay(
    model: nn.Module, example_inputs: Any, source: str | Path | Sequence[dict[str, Any]]
) -> nn.Module:
    """Rebuilds a pruned model from an unpruned one.

    The outputs are bit-equal to those of the model that was saved (same machine, same torch).
    `requires_grad`, training flags and the device stay as they are in `model`.

    Args:
        model: a fresh unpruned model of the same architecture; changed in place.
        example_inputs: as for :func:`prune`.
        source: a directory written by :meth:`PruneResult.save` (or the `history.json` in it); or a
            history, which removes the filters and leaves the weights that are there.

    Returns:
        `model`.

    Raises:
        FileNotFoundError: the directory or one of its two files is missing.
        TypeError: `source` is neither a directory nor a history.
        ValueError: another architecture or dtype, a damaged file, an unknown version, a history
            that does not fit, inputs that the model fails on. The model is untouched.
    """
    check_model(model)
    if not isinstance(source, (str, Path)):
        _cut(model, example_inputs, check_history(source), None)
        return model
    directory = Path(source)
    if directory.name == HISTORY and directory.is_file():
        directory = directory.parent
    document = _read_history(directory / HISTORY)
    if document["architecture"] != fingerprint(model):
        raise ValueError(
            f"{directory} is a checkpoint of another architecture than this {type(model).__name__} "
            "(names or shapes of its state differ): pass the model as it was before pruning"
        )
    state = _read_weights(directory / WEIGHTS, document)
    _cut(model, example_inputs, document["history"], state)
    _load(model, state, set(document["channels_last"]))
    return model


def _cut(
    model: nn.Module,
    example_inputs: Any,
    history: Sequence[dict[str, Any]],
    state: dict[str, Tensor] | None,
) -> None:
    structure = trace(model, example_inputs)
    removed = units_of(structure, history)
    if state is not None:
        _check_state(model, structure, removed, state)
    if not len(removed):
        return
    refuse_reparametrized(model, structure, removed)
    done = commit(removal_edits(model, structure, removed))
    try:
        outputs_of(model, example_inputs)
    except BaseException:
        undo(done)
        raise


def _check_state(
    model: nn.Module, structure: Structure, removed: Tensor, state: dict[str, Tensor]
) -> None:
    """Compares a saved state with what the model will be after the cut."""
    own = {name: (list(t.shape), t.dtype) for name, t in model.state_dict().items()}
    for cut in tensor_cuts(model, structure, removed):
        for owner, attribute in cut.holders:
            name = f"{owner}.{attribute}" if owner else attribute
            for dim, positions in cut.keep.items():
                if name in own:
                    own[name][0][dim] = len(positions)
    if own.keys() != state.keys():
        name = min(own.keys() ^ state.keys())
        raise ValueError(f"{WEIGHTS} and the model do not hold the same tensors: {name!r} differs")
    for name, (shape, dtype) in own.items():
        if list(state[name].shape) != shape:
            raise ValueError(
                f"{WEIGHTS}: {name!r} has shape {list(state[name].shape)}, expected {shape} after "
                "the recorded cut; the files do not belong together"
            )
        if state[name].dtype != dtype:
            raise ValueError(
                f"{WEIGHTS}: {name!r} is {state[name].dtype}, the model's is {dtype}; convert the "
                "model first, e.g. model.to(dtype)"
            )


def _load(model: nn.Module, state: dict[str, Tensor], channels_last: set[str]) -> None:
    named: dict[str, Tensor] = dict(model.named_buffers(remove_duplicate=False))
    named.update(model.named_parameters(remove_duplicate=False))
    for name, tensor in state.items():
        if name in named:  # with the memory format it was saved in: bit-equal results need it
            wanted = _last(tensor.dim()) if name in channels_last else torch.contiguous_format
            data = torch.empty_like(tensor, device=named[name].device, memory_format=wanted)
            named[name].data = data.copy_(tensor)
    loaded = OrderedDict(state)
    # the versions of the modules' formats: MNASNet refuses a state without its own
    loaded._metadata = model.state_dict()._metadata  # type: ignore[attr-defined]
    model.load_state_dict(loaded)


def _last(dims: int) -> torch.memory_format:
    return torch.channels_last if dims == 4 else torch.channels_last_3d


def _split_state(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str], list[str]]:
    """The tensors to write, names that share one, and those in channels_last."""
    first: dict[tuple[Any, ...], str] = {}
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    formats: list[str] = []
    for name, tensor in model.state_dict().items():
        if not _is_tensor(tensor):
            raise ValueError(
                f"{name!r} of the model's state is a {type(tensor).__name__}, and only tensors can "
                "be written without a pickle; move it out of get_extra_state"
            )
        if memory_format(tensor) != torch.contiguous_format:
            formats.append(name)
        key = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and key in first:
            aliases[name] = first[key]
            continue
        first[key] = name
        tensors[name] = tensor.detach().cpu().contiguous().clone()
    return tensors, aliases, formats


def _read_history(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(f"{path} is missing: not a pruning checkpoint") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    version = document.get("format") if isinstance(document, dict) else None
    if version != FORMAT:
        raise ValueError(
            f"{path} has format {version!r}, this version reads {FORMAT!r}; use the version of "
            "orthoreg_ext that wrote it"
        )
    wanted = {"architecture": str, "history": list, "aliases": dict, "channels_last": list}
    for key, kind in {**wanted, "weights_sha256": str}.items():
        if not isinstance(document.get(key), kind):
            raise ValueError(f"{path} is damaged: {key!r} is missing or not a {kind.__name__}")
    for entry in document["history"]:
        if not isinstance(entry, dict) or not {"layer", "removed"} <= entry.keys():
            raise ValueError(f"{path} is damaged: an entry of its history has no layer or indices")
    return dict(document)


def _read_weights(path: Path, document: dict[str, Any]) -> dict[str, Tensor]:
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} is missing: not a pruning checkpoint") from error
    if hashlib.sha256(data).hexdigest() != document["weights_sha256"]:
        raise ValueError(
            f"{path} is damaged or belongs to another history (its hash differs from the one in "
            f"{HISTORY}): copy both files again"
        )
    state: dict[str, Tensor] = _safetensors().load(data)
    for name, source in document["aliases"].items():
        state[name] = state[source]
    return state


def _is_tensor(value: object) -> bool:
    return isinstance(value, Tensor)


def _safetensors() -> ModuleType:
    try:
        return importlib.import_module("safetensors.torch")
    except ImportError as error:
        raise ImportError(
            "checkpoints need safetensors: pip install orthoreg_ext[pruning]"
        ) from error


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "unknown"
