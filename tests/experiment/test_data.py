from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from orthoreg_ext.experiment.data import load_dataset


def picture(mode: str = "L", size: tuple[int, int] = (8, 8), value: int = 100) -> Image.Image:
    colour = {"L": value, "RGB": (value, 0, 0), "RGBA": (value, 0, 0, 10), "LA": (value, 10)}
    return Image.new(mode, size, colour.get(mode, value))


def folder(root: Path, classes: dict[str, list[Image.Image]]) -> Path:
    for name, pictures in classes.items():
        (root / name).mkdir(parents=True)
        for number, image in enumerate(pictures):
            image.save(root / name / f"{number}.png")
    return root


def jpeg(value: int, size: tuple[int, int] = (8, 8)) -> bytes:
    buffer = io.BytesIO()
    picture("RGB", size, value).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def packed(
    prefix: str, values: list[int], labels: list[int], size: int = 8
) -> dict[str, np.ndarray]:
    files = [jpeg(value, (size, size)) for value in values]
    return {
        f"{prefix}_jpeg": np.frombuffer(b"".join(files), np.uint8),
        f"{prefix}_offset": np.cumsum([0, *map(len, files)]),
        f"{prefix}_label": np.array(labels, np.uint8),
    }


def test_digits_are_split_by_class_and_always_alike() -> None:
    first, second = load_dataset("digits"), load_dataset("digits")
    assert first.image_shape == (1, 8, 8)
    assert len(first.classes) == 10
    assert (len(first.train), len(first.test)) == (1198, 599)
    assert torch.equal(first.test.images, second.test.images)
    assert first.checksum == second.checksum
    shares = first.test.labels.bincount() / first.train.labels.bincount()
    assert shares.sub(0.5).abs().max() < 0.02


def test_inputs_are_normalised_by_the_training_pixels() -> None:
    train = load_dataset("digits").train
    x, y = train.batch(slice(None))
    assert x.dtype == torch.float32
    assert abs(float(x.mean())) < 1e-4
    assert abs(float(x.std()) - 1) < 1e-4
    assert torch.equal(y, train.labels)


def test_image_size_resizes() -> None:
    assert load_dataset("digits", 16).image_shape == (1, 16, 16)


def test_folder_of_grey_images_has_one_channel(tmp_path: Path) -> None:
    root = folder(tmp_path / "d", {"b": [picture("L"), picture("LA")], "a": [picture("1")] * 3})
    data = load_dataset(str(root))
    assert data.classes == ("a", "b")
    assert data.image_shape == (1, 8, 8)
    assert (len(data.train), len(data.test)) == (3, 2)


def test_folder_of_mixed_modes_is_rgb_without_alpha(tmp_path: Path) -> None:
    root = folder(
        tmp_path / "d",
        {"a": [picture("L", value=50), picture("RGB", value=60)], "b": [picture("RGBA")] * 2},
    )
    data = load_dataset(str(root))
    assert data.image_shape == (3, 8, 8)
    images = torch.cat([data.train.images, data.test.images])
    labels = torch.cat([data.train.labels, data.test.labels])
    colours = sorted(images[labels == 0][:, :, 0, 0].tolist())
    assert colours == [[50, 50, 50], [60, 0, 0]]
    assert images[labels == 1][:, :, 3, 3].tolist() == [[100, 0, 0]] * 2


def test_sixteen_bit_images_are_scaled_not_clipped(tmp_path: Path) -> None:
    deep = Image.fromarray(np.full((8, 8), 128 * 257, np.uint16))
    root = folder(tmp_path / "d", {"a": [deep, deep], "b": [picture(), picture()]})
    data = load_dataset(str(root))
    images = torch.cat([data.train.images, data.test.images])
    assert sorted(images[:, 0, 0, 0].tolist()) == [100, 100, 128, 128]


def test_folder_with_train_and_test_keeps_its_split(tmp_path: Path) -> None:
    folder(tmp_path / "d" / "train", {"a": [picture(value=1)] * 3, "b": [picture(value=2)]})
    folder(tmp_path / "d" / "test", {"a": [picture(value=3)], "b": [picture(value=4)]})
    data = load_dataset(str(tmp_path / "d"))
    assert data.train.images[:, 0, 0, 0].tolist() == [1, 1, 1, 2]
    assert data.test.images[:, 0, 0, 0].tolist() == [3, 4]
    assert data.test.labels.tolist() == [0, 1]


def test_images_of_several_sizes_become_squares(tmp_path: Path) -> None:
    root = folder(
        tmp_path / "d", {"a": [picture(size=(9, 5))] * 2, "b": [picture(size=(7, 7))] * 2}
    )
    assert load_dataset(str(root)).image_shape == (1, 32, 32)
    assert load_dataset(str(root), 12).image_shape == (1, 12, 12)


@pytest.mark.parametrize("channels", [None, 1, 3])
def test_npz_of_arrays(tmp_path: Path, channels: int | None) -> None:
    shape = (6, 5, 4) if channels is None else (6, 5, 4, channels)
    images = np.arange(np.prod(shape)).reshape(shape).astype(np.uint8)
    np.savez(tmp_path / "d.npz", images=images, labels=np.array([7, 7, 7, 9, 9, 9]))
    data = load_dataset(str(tmp_path / "d.npz"))
    assert data.classes == ("7", "9")
    assert data.image_shape == (channels or 1, 5, 4)
    assert (len(data.train), len(data.test)) == (4, 2)
    flat = images.reshape(6, 5, 4, -1).transpose(0, 3, 1, 2)
    assert all(any((flat == image.numpy()).all((1, 2, 3))) for image in data.test.images)


def test_npz_with_test_arrays_and_class_names(tmp_path: Path) -> None:
    np.savez(
        tmp_path / "d.npz",
        images=np.zeros((3, 8, 8), np.uint8),
        labels=np.array([0, 1, 1]),
        test_images=np.ones((2, 8, 8), np.uint8),
        test_labels=np.array([1, 0]),
        classes=np.array(["cat", "dog"]),
    )
    data = load_dataset(str(tmp_path / "d.npz"))
    assert data.classes == ("cat", "dog")
    assert data.train.labels.tolist() == [0, 1, 1]
    assert data.test.labels.tolist() == [1, 0]
    assert int(data.test.images.sum()) == 2 * 64


def test_npz_of_jpegs(tmp_path: Path) -> None:
    arrays = packed("train", [10, 20, 30], [0, 1, 1]) | packed("test", [40, 50], [0, 1])
    np.savez(tmp_path / "d.npz", **arrays, classes=np.array(["cat", "dog"]))
    data = load_dataset(str(tmp_path / "d.npz"))
    assert data.image_shape == (3, 8, 8)
    assert data.classes == ("cat", "dog")
    assert (data.train.images[:, 0, 0, 0].int() - torch.tensor([10, 20, 30])).abs().max() <= 3
    assert data.test.labels.tolist() == [0, 1]


def save(path: Path, **arrays: object) -> str:
    np.savez(path, **arrays)  # type: ignore[arg-type]
    return str(path)


def test_bad_data_is_named(tmp_path: Path) -> None:
    images, labels = np.zeros((4, 8, 8), np.uint8), np.array([0, 0, 1, 1])
    (tmp_path / "empty").mkdir()
    one = folder(tmp_path / "one", {"cat": [picture()] * 3})
    few = folder(tmp_path / "few", {"cat": [picture()] * 3, "dog": [picture()]})
    torn = folder(tmp_path / "torn", {"cat": [picture()] * 2, "dog": [picture()] * 2})
    whole = (torn / "dog" / "1.png").read_bytes()
    (torn / "dog" / "1.png").write_bytes(whole[: len(whole) // 2])
    folder(tmp_path / "new" / "train", {"a": [picture()], "b": [picture()]})
    folder(tmp_path / "new" / "test", {"a": [picture()], "c": [picture()]})
    (tmp_path / "broken.npz").write_bytes(b"PK no zip")
    (tmp_path / "file.txt").write_text("")
    offset = packed("train", [1, 2], [0, 1]) | {"train_offset": np.array([0, 1])}
    expected = {
        "digit": "unknown data 'digit'; did you mean 'digits'",
        str(tmp_path / "file.txt"): "neither a folder nor an .npz file",
        str(tmp_path / "empty"): "has no images; expected a folder for every class",
        str(one): "has one class ('cat'); training needs two",
        str(few): "one image of class 'dog'",
        str(torn): "cannot read image",
        str(tmp_path / "new"): "test class 'c' has no training images",
        str(tmp_path / "broken.npz"): "cannot read",
        save(tmp_path / "k.npz", images=images): "has no array 'labels' (it has ['images'])",
        save(tmp_path / "f.npz", images=images / 2, labels=labels): "images is float64 [4, 8, 8]",
        save(tmp_path / "l.npz", images=images, labels=labels[:3]): "labels is int64 [3]",
        save(tmp_path / "o.npz", **offset): "train_offset must have one entry more",
        save(tmp_path / "t.npz", images=images, labels=labels, test_images=images[:1],
             test_labels=np.array([5])): "test class '5' has no training images",
        save(tmp_path / "c.npz", images=images, labels=labels * 0): "has one class ('0')",
    }  # fmt: skip
    for source, text in expected.items():
        with pytest.raises(ValueError) as error:  # noqa: PT011 - the text is compared below
            load_dataset(source)
        assert text in str(error.value)
    with pytest.raises(ValueError, match=r"dog/1\.png"):
        load_dataset(str(torn))


def test_parts_of_an_npz_must_fit_together(tmp_path: Path) -> None:
    grey, labels = np.zeros((4, 8, 8), np.uint8), np.array([0, 0, 1, 1])
    colour = np.zeros((2, 8, 8, 3), np.uint8)
    larger = np.zeros((2, 9, 9), np.uint8)
    test = {"images": grey, "labels": labels, "test_labels": labels[1:3]}
    train = packed("train", [1, 2], [0, 1])
    packs = train | packed("test", [3], [0], size=9)
    whole = save(tmp_path / "whole.npz", images=grey, labels=labels)
    torn = tmp_path / "torn.npz"
    torn.write_bytes(Path(whole).read_bytes()[:-40])
    flipped = bytearray(Path(whole).read_bytes())
    flipped[200] ^= 255  # in the pixels: their checksum is wrong
    (tmp_path / "flipped.npz").write_bytes(flipped)
    with (tmp_path / "array.npz").open("wb") as file:
        np.save(file, grey)
    no_test = {"test_images": grey[:0], "test_labels": labels[:0]}
    expected = {
        str(torn): "cannot read",
        str(tmp_path / "flipped.npz"): "cannot read",
        str(tmp_path / "array.npz"): "cannot read",
        save(tmp_path / "rgb.npz", **test, test_images=colour):
            "test images are 3 x 8 x 8 (channels x height x width), the training images 1 x 8 x 8",
        save(tmp_path / "size.npz", **test, test_images=larger): "test images are 1 x 9 x 9",
        save(tmp_path / "jpeg.npz", **packs): "test images are 3 x 9 x 9",
        save(tmp_path / "none.npz", images=grey, labels=labels, **no_test): "no test images",
        save(tmp_path / "some.npz", images=grey, labels=labels, test_images=grey):
            "has 'test_images' but no 'test_labels'",
        save(tmp_path / "more.npz", images=grey[:3], labels=labels): "labels is int64 [4]",
        save(tmp_path / "flat.npz", images=grey[:, :0], labels=labels): "images of no pixels",
        save(tmp_path / "nil.npz", images=grey[:0], labels=labels[:0]): "has no images",
        save(tmp_path / "scalar.npz", **train | {"train_label": np.array(3)}):
            "train_label is int64 []",
        save(tmp_path / "empty.npz", **train | {
            "train_label": labels[:0], "train_offset": np.array([0]),
            "train_jpeg": grey.ravel()[:0]}): "has no images",
        save(tmp_path / "back.npz", **train | {
            "train_offset": train["train_offset"] - [9, 0, 0]}): "train_offset must",
    }  # fmt: skip
    for source, text in expected.items():
        with pytest.raises(ValueError) as error:  # noqa: PT011 - the text is compared below
            load_dataset(source)
        assert text in str(error.value), source


def test_test_images_of_another_size_are_resized_where_a_size_is_given(tmp_path: Path) -> None:
    source = save(
        tmp_path / "size.npz",
        images=np.zeros((4, 8, 8), np.uint8),
        labels=np.array([0, 0, 1, 1]),
        test_images=np.zeros((2, 9, 9), np.uint8),
        test_labels=np.array([0, 1]),
    )
    data = load_dataset(source, 6)
    assert data.test.images.shape == (2, 1, 6, 6)


def test_images_are_brought_to_grey_or_colour(tmp_path: Path) -> None:
    pixels = np.zeros((4, 2, 2, 3), dtype=np.uint8)
    pixels[0] = (100, 200, 50)
    np.savez(tmp_path / "c.npz", images=pixels, labels=np.array([0, 1, 0, 1]))
    grey = load_dataset(str(tmp_path / "c.npz"), None, 1)
    images = torch.cat([grey.train.images, grey.test.images])
    assert sorted(images[:, 0, 0, 0].tolist()) == [0, 0, 0, 153]  # .299 .587 .114
    np.savez(tmp_path / "g.npz", images=pixels[..., 1], labels=np.array([0, 1, 0, 1]))
    colour = load_dataset(str(tmp_path / "g.npz"), 4, 3)
    assert colour.image_shape == (3, 4, 4)
    assert all(torch.equal(part[:, 0], part[:, 2]) for part in (colour.train.images,))
    with pytest.raises(ValueError, match="--channels is 2; expected 1"):
        load_dataset("digits", None, 2)
    with pytest.raises(ValueError, match="--image-size is 0"):
        load_dataset("digits", 0)
