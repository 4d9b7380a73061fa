from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as f

from orthoreg_ext.pruning import checkpoint, prune, replay
from orthoreg_ext.pruning.removal import memory_format

from .nets import IMAGE, VGG, ResNet, Tied, batches, randomised


def fresh(net: Any, seed: int = 99) -> nn.Module:
    torch.manual_seed(seed)
    return net()


def trained(model: nn.Module) -> nn.Module:
    """A few steps in train mode, so that statistics and counters are not the initial ones."""
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    model.train()
    for inputs, _ in batches(count=3):
        optimizer.zero_grad()
        model(inputs).pow(2).mean().backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("name", sorted(IMAGE))
def test_a_replayed_model_is_bit_equal(name: str, x: Tensor, tmp_path: Path) -> None:
    model = randomised(IMAGE[name]())
    result = prune(
        model, x, criterion="l1", ratio=0.5, rounds=2, between_rounds=lambda m, _: trained(m)
    )
    trained(model)
    result.save(tmp_path / "out")
    again = replay(fresh(IMAGE[name]), x, tmp_path / "out")
    state = again.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    assert torch.equal(model.eval()(x), again.eval()(x))
    trained(again)


def test_channels_last_comes_back(x: Tensor, tmp_path: Path) -> None:
    model = randomised(ResNet()).to(memory_format=torch.channels_last)
    prune(model, x, criterion="l1", ratio=0.5).save(tmp_path)
    again = replay(fresh(ResNet), x, tmp_path)
    for (name, a), b in zip(model.named_parameters(), again.parameters(), strict=True):
        assert memory_format(a) == memory_format(b), name
    assert torch.equal(model.eval()(x), again.eval()(x))


def test_flags_of_the_fresh_model_stay(x: Tensor, tmp_path: Path) -> None:
    prune(VGG(), x, criterion="l1", ratio=0.5).save(tmp_path)
    model = fresh(VGG).eval()
    model.conv2.requires_grad_(False)
    replay(model, x, tmp_path)
    assert not model.training
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["conv2.weight"]


def test_shared_parameters_are_written_once_and_stay_shared(x: Tensor, tmp_path: Path) -> None:
    model = Tied()
    prune(model, x, criterion="l1", ratio=0.5).save(tmp_path)
    document = json.loads((tmp_path / "history.json").read_text())
    assert document["aliases"] == {"b.weight": "a.weight"}
    again = replay(fresh(Tied), x, tmp_path)
    assert again.a.weight is again.b.weight
    assert torch.equal(model.eval()(x), again.eval()(x))


def test_a_history_alone_removes_the_filters(x: Tensor) -> None:
    model = randomised(ResNet())
    twin = randomised(ResNet())
    twin.load_state_dict(model.state_dict())
    result = prune(model, x, data=batches(), ratio=0.6, rounds=3)
    replay(twin, x, json.loads(json.dumps(result.history)))
    assert torch.equal(model.eval()(x), twin.eval()(x))


def test_the_files_are_json_and_safetensors(x: Tensor, tmp_path: Path) -> None:
    result = prune(VGG(), x, criterion="l1", ratio=0.5)
    assert result.save(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    assert sorted(os.listdir(tmp_path / "a" / "b")) == ["history.json", "weights.safetensors"]
    document = json.loads((tmp_path / "a" / "b" / "history.json").read_text())
    assert document["format"] == checkpoint.FORMAT
    assert document["history"] == result.history
    assert document["settings"]["criterion"] == "l1"
    assert document["sizes"]["after"]["filters"] == result.after.filters
    assert set(document["versions"]) == {"orthoreg_ext", "torch", "torch-pruning"}


def test_a_directory_with_files_is_refused(x: Tensor, tmp_path: Path) -> None:
    result = prune(VGG(), x, criterion="l1", ratio=0.5)
    (tmp_path / "precious.txt").write_text("keep")
    with pytest.raises(FileExistsError, match="not an empty directory; choose another one"):
        result.save(tmp_path)
    assert os.listdir(tmp_path) == ["precious.txt"]
    result.save(tmp_path, overwrite=True)
    result.save(tmp_path, overwrite=True)
    assert sorted(os.listdir(tmp_path)) == ["history.json", "precious.txt", "weights.safetensors"]
    with pytest.raises(FileExistsError):
        result.save(tmp_path / "precious.txt")


def test_a_result_does_not_save_a_model_that_was_pruned_again(x: Tensor, tmp_path: Path) -> None:
    model = VGG()
    first = prune(model, x, criterion="l1", ratio=0.3)
    prune(model, x, criterion="l1", ratio=0.3)
    with pytest.raises(ValueError, match="the model changed since this result"):
        first.save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("failing", ["write", "fsync", "replace", "second replace"])
@pytest.mark.parametrize("existing", [False, True])
def test_a_full_disk_leaves_the_directory_as_it_was(
    failing: str, existing: bool, x: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "out"
    model = VGG()
    result = prune(model, x, criterion="l1", ratio=0.5)
    before = {}
    if existing:
        result.save(target)
        before = {p.name: p.read_bytes() for p in target.iterdir()}
        model.fc2.weight.data += 1

    owner, name = {"write": (Path, "open")}.get(failing, (os, failing.split()[-1]))
    real, allowed = getattr(owner, name), iter([1, 0, 1] if failing == "second replace" else [])

    def full(*args: Any, **kwargs: Any) -> Any:
        if next(allowed, None):
            return real(*args, **kwargs)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(owner, name, full)
    with pytest.raises(OSError, match="No space left"):
        result.save(target, overwrite=existing)
    monkeypatch.undo()
    assert target.exists() == existing
    assert os.listdir(tmp_path) == (["out"] if existing else [])
    if existing:
        assert {p.name: p.read_bytes() for p in target.iterdir()} == before
        replay(fresh(VGG), x, target)


KILLED = """
import os, signal, sys, torch
from orthoreg_ext.pruning import prune
from tests.pruning.nets import VGG
real, allowed = os.replace, int(sys.argv[2])
def killed(source, target):
    global allowed
    if not allowed:
        os.kill(os.getpid(), signal.SIGKILL)
    allowed -= 1
    real(source, target)
os.replace = killed
torch.manual_seed(0)
result = prune(VGG(), torch.randn(1, 3, 8, 8), criterion="l1", ratio=0.25)
result.save(sys.argv[1], overwrite=True)
"""


def killed_save(directory: Path, after: int) -> Path:
    """A save whose process dies after so many files took their place; what it leaves behind."""
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", KILLED, str(directory), str(after)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    (leftover,) = (path for path in directory.iterdir() if path.name.startswith(".orthoreg-"))
    return leftover


def test_a_killed_save_is_as_not_there_for_the_next(x: Tensor, tmp_path: Path) -> None:
    target = tmp_path / "out"
    leftover = killed_save(target, after=0)
    assert os.listdir(target) == [leftover.name]
    model = VGG()
    prune(model, x, criterion="l1", ratio=0.5).save(target)  # not refused as "not empty"
    assert sorted(os.listdir(target)) == ["history.json", "weights.safetensors"]
    again = replay(fresh(VGG), x, target)
    assert torch.equal(model.eval()(x), again.eval()(x))


def test_a_killed_overwrite_is_found_out_and_keeps_the_old_files_until_the_next_save(
    x: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = prune(VGG(), x, criterion="l1", ratio=0.5)
    result.save(tmp_path)
    weights = (tmp_path / "weights.safetensors").read_bytes()
    leftover = killed_save(tmp_path, after=1)
    with pytest.raises(ValueError, match="belongs to another history"):
        replay(fresh(VGG), x, tmp_path)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        result.save(tmp_path, overwrite=True)
    monkeypatch.undo()
    assert (leftover / "old-weights.safetensors").read_bytes() == weights
    result.save(tmp_path, overwrite=True)
    assert sorted(os.listdir(tmp_path)) == ["history.json", "weights.safetensors"]
    replay(fresh(VGG), x, tmp_path)


def lookalike_folder(path: Path) -> None:
    path.mkdir()
    (path / "notes.txt").write_text("keep")


def lookalike_link(path: Path) -> None:
    (path.parent.parent / "elsewhere").mkdir()
    path.symlink_to(path.parent.parent / "elsewhere", target_is_directory=True)


@pytest.mark.parametrize("make", [lookalike_folder, lookalike_link, Path.touch])
def test_what_is_only_named_like_a_leftover_is_kept(make: Any, x: Tensor, tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    make(target / ".orthoreg-mine")
    result = prune(VGG(), x, criterion="l1", ratio=0.5)
    with pytest.raises(FileExistsError, match="not an empty directory"):
        result.save(target)
    result.save(target, overwrite=True)
    assert len(os.listdir(target)) == 3


def saved(x: Tensor, directory: Path) -> Path:
    prune(VGG(), x, criterion="l1", ratio=0.5).save(directory)
    return directory


def edited(directory: Path, **changes: Any) -> None:
    path = directory / "history.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def damage_truncated_weights(directory: Path) -> None:
    path = directory / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def damage_flipped_byte(directory: Path) -> None:
    path = directory / "weights.safetensors"
    data = bytearray(path.read_bytes())
    data[-7] ^= 1
    path.write_bytes(bytes(data))


def damage_truncated_history(directory: Path) -> None:
    path = directory / "history.json"
    path.write_text(path.read_text()[:200])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_truncated_weights, "weights.safetensors is damaged or belongs to another history"),
        (damage_flipped_byte, "weights.safetensors is damaged or belongs to another history"),
        (damage_truncated_history, "history.json is damaged"),
        (lambda d: (d / "history.json").write_bytes(b"\xff\xfe\x00"), "history.json is damaged"),
        (lambda d: (d / "history.json").write_text("[]"), "history.json has format None"),
        (
            lambda d: edited(d, format="orthoreg_ext.pruning/9"),
            "has format 'orthoreg_ext.pruning/9'",
        ),
        (lambda d: edited(d, history="x"), "'history' is missing or not a list"),
        (lambda d: edited(d, history=[{"layer": "conv1"}]), "has no layer or indices"),
        (
            lambda d: edited(d, architecture="0"),
            "a checkpoint of another architecture than this VGG",
        ),
        (
            lambda d: edited(d, history=[{"layer": "conv9", "removed": [0]}]),
            "names layer 'conv9', which this model does not have",
        ),
        (
            lambda d: edited(d, history=[{"layer": "conv1", "removed": [99]}]),
            "removes filters .99.* of 'conv1', which has 8",
        ),
        (
            lambda d: edited(d, history=[{"layer": "conv1", "removed": [0]}]),
            "has shape .* the files do not belong together",
        ),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_model_untouched(
    damage: Any, message: str, x: Tensor, tmp_path: Path
) -> None:
    damage(saved(x, tmp_path))
    model = fresh(VGG)
    state = {n: (id(t), t.clone()) for n, t in model.named_parameters()}
    with pytest.raises(ValueError, match=message):
        replay(model, x, tmp_path)
    assert all(id(p) == state[n][0] for n, p in model.named_parameters())
    assert all(torch.equal(p, state[n][1]) for n, p in model.named_parameters())


@pytest.mark.parametrize("name", ["history.json", "weights.safetensors"])
def test_a_missing_file_is_named(name: str, x: Tensor, tmp_path: Path) -> None:
    (saved(x, tmp_path) / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"{name} is missing: not a pruning checkpoint"):
        replay(fresh(VGG), x, tmp_path)


def test_another_architecture_or_a_pruned_model_is_refused(x: Tensor, tmp_path: Path) -> None:
    saved(x, tmp_path)
    with pytest.raises(ValueError, match="another architecture than this ResNet"):
        replay(ResNet(), x, tmp_path)
    model = replay(fresh(VGG), x, tmp_path)
    with pytest.raises(ValueError, match="pass the model as it was before pruning"):
        replay(model, x, tmp_path)


def test_another_dtype_is_refused(x: Tensor, tmp_path: Path) -> None:
    saved(x, tmp_path)
    with pytest.raises(ValueError, match=r"is torch.float32, the model's is torch.float64"):
        replay(fresh(VGG).double(), x.double(), tmp_path)


class Versioned(VGG):
    """Refuses a state without the version it was written in, as torchvision's MNASNet."""

    _version = 2

    def _load_from_state_dict(self, state: Any, prefix: str, metadata: Any, *rest: Any) -> None:
        assert metadata.get("version") == 2
        super()._load_from_state_dict(state, prefix, metadata, *rest)


def test_a_module_finds_the_version_of_its_state(x: Tensor, tmp_path: Path) -> None:
    model = Versioned()
    prune(model, x, criterion="l1", ratio=0.5).save(tmp_path / "out")
    again = replay(fresh(Versioned), x, tmp_path / "out")
    assert torch.equal(model.eval()(x), again.eval()(x))


class Extra(VGG):
    def get_extra_state(self) -> dict[str, int]:
        return {"step": 3}

    def set_extra_state(self, state: Any) -> None:
        pass


def test_state_that_needs_a_pickle_is_refused(x: Tensor, tmp_path: Path) -> None:
    result = prune(Extra(), x, criterion="l1", ratio=0.5)
    with pytest.raises(ValueError, match=r"_extra_state.*only tensors can be written"):
        result.save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_history_of_coupled_layers_must_name_them_all(x: Tensor) -> None:
    model = ResNet()
    with pytest.raises(ValueError, match="the layers are coupled differently"):
        replay(model, x, [{"layer": "stem", "removed": [0]}])
    assert f.relu(model.stem(x)).shape[1] == 8


def entry(removed: Any, layer: Any = "conv1", **others: Any) -> dict[str, Any]:
    return {"round": 1, "layer": layer, "removed": removed, **others}


@pytest.mark.parametrize(
    ("history", "message"),
    [
        (
            [entry([0, 1], filters=3)],
            r"entry 0\) removes 2 filters of 'conv1'.* 3 are left.* 6 of 8",
        ),
        ([entry([0, 0])], r"entry 0, layer 'conv1'\): removed is \[0, 0\], expected each .*once"),
        ([entry([0]), entry([1, 0])], r"entry 1\) removes filters \[0\] of 'conv1', which an earl"),
        ([entry([0], filters=7), entry([1], filters=7)], r"entry 1\).*7 are left, expected 6 of 8"),
        ([entry([0], "fc2")], "removes filters of fc2, expected none: an output of the model"),
        ([{"layer": "conv1"}], r"entry 0 of the history \(layer 'conv1'\) has no 'removed'"),
        ([{"removed": [0]}], r"entry 0 of the history \(layer None\) has no 'layer'"),
        ([entry(["0"])], r"entry 0, layer 'conv1'\): removed is \['0'\], expected a list of"),
        ([entry(3)], "removed is 3, expected a list"),
        ([entry("01")], "removed is '01', expected a list"),
        ([entry([])], r"removed is \[\], expected a list of at least one integer"),
        ([entry([True])], r"removed is \[True\], expected a list"),
        ([entry([1.7])], r"removed is \[1.7\], expected a list"),
        ([entry([-1])], r"removes filters \[-1\] of 'conv1', which has 8; expected .* 0 to 7"),
        ([entry(list(range(8)))], "all 8 filters of 'conv1', expected at least one to stay"),
        ([entry([0]), entry(list(range(1, 8)))], r"entry 1\) removes all 8 filters of 'conv1'"),
        ([entry([0], ["conv1"])], r"names layer \['conv1'\], which this model does not have"),
        ([7], "entry 0 of the history is int, expected a dictionary"),
    ],
)
def test_a_history_that_does_not_fit_is_named_and_the_model_untouched(
    history: Any, message: str, x: Tensor
) -> None:
    model = fresh(VGG)
    state = {n: (p, p.clone()) for n, p in model.named_parameters()}
    with pytest.raises(ValueError, match=message):
        replay(model, x, history)
    assert all(
        p is state[n][0] and torch.equal(p, state[n][1]) for n, p in model.named_parameters()
    )


@pytest.mark.parametrize("source", [None, 3, {"history": []}])
def test_what_is_no_history_is_refused(source: Any, x: Tensor) -> None:
    with pytest.raises(TypeError, match=r"source is .*, expected a directory"):
        replay(fresh(VGG), x, source)


def test_the_path_of_the_history_stands_for_its_directory(x: Tensor, tmp_path: Path) -> None:
    saved(x, tmp_path)
    expected = replay(fresh(VGG), x, tmp_path).eval()(x)
    assert torch.equal(replay(fresh(VGG), x, tmp_path / "history.json").eval()(x), expected)
    with pytest.raises(FileNotFoundError, match="not a pruning checkpoint"):
        replay(fresh(VGG), x, tmp_path / "weights.safetensors")
