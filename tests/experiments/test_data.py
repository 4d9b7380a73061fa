from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from experiments.config import Data
from experiments.data import load
from orthoreg_ext.experiment.data import Samples, load_dataset


def colours(count: int, seed: int) -> Any:  # uint8 [count, 8, 8, 3]
    return np.random.default_rng(seed).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)


def pairs(samples: Samples) -> list[tuple[bytes, int]]:
    labels = samples.labels.tolist()
    return [(i.numpy().tobytes(), y) for i, y in zip(samples.images, labels, strict=True)]


class FakeCIFAR:
    """What torchvision.datasets.CIFAR10 has of what is used."""

    made = 0
    classes = ("cat", "dog")

    def __init__(self, root: str, train: bool) -> None:
        if not (Path(root) / "cifar-10-batches-py" / "data_batch_1").exists():
            raise RuntimeError("Dataset not found or corrupted. You can use download=True")
        type(self).made += 1
        self.data = colours(20 if train else 10, int(train))
        self.targets = [i % 2 for i in range(len(self.data))]


@pytest.fixture
def cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "data" / "cifar-10-batches-py").mkdir(parents=True)
    (tmp_path / "data" / "cifar-10-batches-py" / "data_batch_1").touch()
    monkeypatch.setattr(FakeCIFAR, "made", 0)
    fake = SimpleNamespace(CIFAR10=FakeCIFAR)
    monkeypatch.setitem(sys.modules, "torchvision.datasets", fake)  # type: ignore[arg-type]
    return tmp_path / "data"


def test_a_subset_is_some_of_the_images_always_the_same(tmp_path: Path) -> None:
    torch.manual_seed(1)
    one = load(Data(train=64, test=32), tmp_path, tmp_path)
    torch.manual_seed(2)
    two = load(Data(train=64, test=32), tmp_path, tmp_path)
    whole = load_dataset("digits")
    assert (len(one.train), len(one.test)) == (64, 32)
    for part, again, every in zip(
        (one.train, one.test), (two.train, two.test), (whole.train, whole.test), strict=True
    ):
        assert torch.equal(part.images, again.images)
        assert torch.equal(part.labels, again.labels)
        found = pairs(part)
        assert len(set(found)) == len(found)
        assert set(found) <= set(pairs(every))
        assert torch.equal(part.mean, every.mean)  # the pixels mean the same in every subset
    assert len(one.train.labels.unique()) == 10


def test_without_numbers_it_is_everything(tmp_path: Path) -> None:
    found, whole = load(Data(), tmp_path, tmp_path), load_dataset("digits")
    assert torch.equal(found.train.images, whole.train.images)
    assert torch.equal(found.test.labels, whole.test.labels)
    assert found.checksum == whole.checksum


def test_images_are_resized(tmp_path: Path) -> None:
    found = load(Data(train=8, test=4, image_size=16), tmp_path, tmp_path)
    assert found.image_shape == (1, 16, 16)
    assert tuple(found.test.images.shape) == (4, 1, 16, 16)


@pytest.mark.parametrize(("part", "there"), [("train", 1198), ("test", 599)])
def test_more_than_there_are_is_refused(tmp_path: Path, part: str, there: int) -> None:
    with pytest.raises(ValueError, match=rf"data.{part} is 1200, expected at most the {there}"):
        load(Data(**{part: 1200}), tmp_path, tmp_path)


def test_an_npz_file_is_found_in_the_folder(tmp_path: Path) -> None:
    images, labels = colours(12, 0), np.arange(12) % 3
    np.savez(tmp_path / "x.npz", images=images, labels=labels)
    found = load(Data("x.npz", train=4), tmp_path, tmp_path / "cache")
    assert found.source == "x.npz"
    assert found.image_shape == (3, 8, 8)
    assert (len(found.train), len(found.test)) == (4, 3)
    assert not (tmp_path / "cache").exists()
    with pytest.raises(ValueError, match=r"data 'y.npz' is not in .*--data DIR"):
        load(Data("y.npz"), tmp_path, tmp_path)
    (tmp_path / "z.npz").write_bytes((tmp_path / "x.npz").read_bytes()[:-50])
    with pytest.raises(ValueError, match=r"cannot read '.*z.npz' as an .npz file"):
        load(Data("z.npz"), tmp_path, tmp_path)


def test_torchvisions_folder_is_read_once(cifar: Path, tmp_path: Path) -> None:
    data = Data("cifar-10-batches-py", train=6)
    found = load(data, cifar, tmp_path / "cache")
    assert FakeCIFAR.made == 2
    assert found.classes == ("cat", "dog")
    assert found.image_shape == (3, 8, 8)
    assert (len(found.train), len(found.test)) == (6, 10)
    expected = torch.from_numpy(colours(10, 0)).permute(0, 3, 1, 2)
    assert torch.equal(found.test.images, expected)
    assert found.test.labels.tolist() == [0, 1] * 5
    again = load(data, cifar, tmp_path / "cache")
    assert FakeCIFAR.made == 2
    assert again.checksum == found.checksum
    assert torch.equal(again.train.images, found.train.images)


def test_a_damaged_folder_of_torchvision_is_named(cifar: Path, tmp_path: Path) -> None:
    (cifar / "cifar-10-batches-py" / "data_batch_1").unlink()
    with pytest.raises(
        ValueError, match=r"cifar-10-batches-py' is damaged.*corrupted.*CIFAR10\(.*download=True\)"
    ):
        load(Data("cifar-10-batches-py"), cifar, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("error", [ModuleNotFoundError, RuntimeError])
def test_without_torchvision_its_folder_cannot_be_read(
    cifar: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    def missing(name: str) -> None:
        raise error("operator torchvision::nms does not exist")

    monkeypatch.setattr("experiments.data.require", missing)
    with pytest.raises(ValueError, match=r"'cifar-10-batches-py' is read by torchvision.*pip"):
        load(Data("cifar-10-batches-py"), cifar, tmp_path / "cache")
