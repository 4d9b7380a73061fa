"""Images for the job: the bundled digits, a folder of classes, or an ``.npz`` file."""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import unknown_name
from .extras import require

if TYPE_CHECKING:
    from collections.abc import Callable

    from PIL.Image import Image

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp")
PARTS = ("train", "test")
HELD_OUT = 1 / 3  # of every class, where the data brings no test images
SPLIT_SEED = 0  # of the split: the same test images whatever seed the networks start from
FOLDER_SIZE = 32  # side to which a folder's images are brought unless --image-size says else
_UNREADABLE = (OSError, ValueError, EOFError, RuntimeError)  # RuntimeError: zip methods, passwords
FORMS = (
    "images (uint8 [N, H, W] or [N, H, W, C]) and labels ([N]), optionally test_images and "
    "test_labels; or train_jpeg (uint8, the files one after another), train_offset ([N + 1]) and "
    "train_label ([N]), optionally test_jpeg, test_offset and test_label"
)


@dataclass(frozen=True)
class Samples:
    """Labelled images and what brings their pixels to network inputs.

    Attributes:
        images: uint8 ``[n, channels, height, width]``.
        labels: int64 ``[n]``.
        mean: ``[channels, 1, 1]``, of the training pixels, in 0..1.
        std: ``[channels, 1, 1]``.
    """

    images: Tensor
    labels: Tensor
    mean: Tensor
    std: Tensor

    def __len__(self) -> int:
        """Number of images."""
        return len(self.labels)

    def batch(self, index: Tensor | slice) -> tuple[Tensor, Tensor]:
        """Returns the inputs ``(pixel / 255 - mean) / std``, ``[b, c, h, w]``, and labels."""
        return (self.images[index].float() / 255 - self.mean) / self.std, self.labels[index]

    def batches(self, size: int = 256) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields all samples in order."""
        for start in range(0, len(self), size):
            yield self.batch(slice(start, start + size))

    def to(self, device: torch.device) -> Samples:
        """Returns the samples on ``device``."""
        return Samples(*(t.to(device) for t in (self.images, self.labels, self.mean, self.std)))


@dataclass(frozen=True)
class Dataset:
    """Training and held-out samples of one source.

    Attributes:
        source: What was loaded, for messages.
        classes: Name of each label.
        checksum: CRC-32 of all pixels and labels: tells whether the data changed.
    """

    source: str
    classes: tuple[str, ...]
    train: Samples
    test: Samples
    checksum: int

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Channels, height, width."""
        return tuple(self.train.images.shape[1:])


@dataclass(frozen=True)
class _Raw:
    """What a loader found: uint8 [n, c, h, w] and int64 [n], the test part where there is one."""

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    test_images: Tensor | None = None
    test_labels: Tensor | None = None


def load_dataset(
    source: str, image_size: int | None = None, channels: int | None = None
) -> Dataset:
    """Loads ``digits``, an image folder or an ``.npz`` file.

    A folder is ``DIR/class/*.png`` (or jpg, ...), or ``DIR/train/class/`` and ``DIR/test/class/``.
    Its images become grey if all of them are, RGB otherwise (alpha is dropped), and squares of
    ``image_size``, by default of 32 pixels unless they share one size up to 64 x 64. An ``.npz``
    holds images and labels, or the images packed as JPEG files; see ``FORMS``. Without a test part
    a third of every class is held out, always the same images.

    Args:
        source: ``"digits"``, a folder or an ``.npz`` file.
        image_size: Side in pixels to which the images are resized.
        channels: 3 repeats grey images, for networks that read colour; 1 makes colour grey.

    Raises:
        ValueError: The source is unknown, empty, unreadable, or has fewer than two classes.
    """
    if image_size is not None and image_size < 1:
        raise ValueError(f"--image-size is {image_size}; expected a number of at least 1")
    if channels not in (None, 1, 3):
        raise ValueError(f"--channels is {channels}; expected 1 (grey) or 3 (colour)")
    path = Path(source)
    if source in LOADERS:
        raw = LOADERS[source]()
    elif path.is_dir():
        raw = _load_folder(path, image_size)
    elif path.is_file() and path.suffix == ".npz":
        raw = _load_npz(path)
    elif path.exists():
        raise ValueError(f"data {source!r} is neither a folder nor an .npz file")
    else:
        error = unknown_name("data", source, [*LOADERS, "DIR", "file.npz"])
        raise ValueError(f"{error} There is no such folder or file either.")
    return _dataset(source, raw, image_size, channels)


def _dataset(source: str, raw: _Raw, image_size: int | None, channels: int | None) -> Dataset:
    """Checks, splits, resizes and describes what a loader found."""
    present = raw.labels.unique()
    if len(present) < 2:
        got = f"one class ({raw.classes[int(present[0])]!r})" if len(present) else "no images"
        raise ValueError(f"data {source!r} has {got}; training needs two classes at least")
    images, labels = raw.images, raw.labels
    test_images, test_labels = raw.test_images, raw.test_labels
    if test_images is None or test_labels is None:
        held_out = _held_out(source, labels, raw.classes)
        test_images, test_labels = images[held_out], labels[held_out]
        images, labels = images[~held_out], labels[~held_out]
    _check_parts(source, images, test_images, image_size)
    if image_size is not None:
        images, test_images = _resized(images, image_size), _resized(test_images, image_size)
    if channels is not None:
        images, test_images = _coloured(images, channels), _coloured(test_images, channels)

    mean, std = _pixel_statistics(images)
    checksum = 0
    for tensor in (images, labels, test_images, test_labels):
        checksum = zlib.crc32(tensor.contiguous().numpy().tobytes(), checksum)
    train = Samples(images, labels, mean, std)
    test = replace(train, images=test_images, labels=test_labels)
    return Dataset(source, raw.classes, train, test, checksum)


def _check_parts(source: str, train: Tensor, test: Tensor, image_size: int | None) -> None:
    """Checks that both parts have images, and of one shape once they are resized."""
    if not len(test):
        raise ValueError(
            f"data {source!r} has no test images in its test part; add some, or leave that part "
            "out: then a third of the training images is held out"
        )
    if not train[0].numel():
        raise ValueError(f"data {source!r} has images of no pixels: {list(train.shape[2:])}")
    same = 1 if image_size is not None else 3  # only the channels, where the sides will be equal
    if train.shape[1 : 1 + same] != test.shape[1 : 1 + same]:
        shapes = [" x ".join(map(str, part.shape[1:])) for part in (test, train)]
        raise ValueError(
            f"data {source!r}: the test images are {shapes[0]} (channels x height x width), the "
            f"training images {shapes[1]}; bring them to one form"
            + ("" if train.shape[1] != test.shape[1] else ", or pass --image-size")
        )


def _pixel_statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of uint8 [n, c, h, w] in 0..1, [c, 1, 1] each, by counting."""
    values = torch.arange(256, dtype=torch.float64) / 255
    shares = torch.stack(
        [channel.flatten().bincount(minlength=256) for channel in images.unbind(1)]
    )
    shares = shares / shares.sum(1, keepdim=True).double()
    mean = shares @ values
    std = (shares @ values.square() - mean.square()).clamp(min=0).sqrt().clamp(min=1e-3)
    return mean.float()[:, None, None], std.float()[:, None, None]


def _held_out(source: str, labels: Tensor, classes: Sequence[str]) -> Tensor:
    """Mask of the test images, bool [n]: the same share of every class."""
    generator = torch.Generator().manual_seed(SPLIT_SEED)
    mask = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique().tolist():
        members = (labels == label).nonzero().flatten()
        if len(members) < 2:
            raise ValueError(
                f"data {source!r} has one image of class {classes[label]!r}; two at least are "
                "needed, one to train on and one to test on"
            )
        count = max(1, round(len(members) * HELD_OUT))
        mask[members[torch.randperm(len(members), generator=generator)[:count]]] = True
    return mask


def _resized(images: Tensor, size: int) -> Tensor:
    """Brings uint8 [n, c, h, w] to [n, c, size, size]."""
    if images.shape[2:] == (size, size):
        return images
    return (
        torch.nn.functional.interpolate(
            images.float(), (size, size), mode="bilinear", antialias=True
        )
        .round()
        .clamp(0, 255)
        .byte()
    )


def _coloured(images: Tensor, channels: int) -> Tensor:
    """Brings uint8 [n, c, h, w] to [n, channels, h, w]; grey is what ITU-R BT.601 says."""
    if images.shape[1] == channels:
        return images
    if channels > 1:
        return images[:, :1].repeat(1, channels, 1, 1)
    shares = torch.tensor([0.299, 0.587, 0.114])[: images.shape[1], None, None]
    return (images[:, :3].float() * shares / shares.sum()).sum(1, keepdim=True).round().byte()


def _load_digits() -> _Raw:
    """scikit-learn's 1797 hand-written digits of 8 x 8 pixels, 10 classes."""
    digits = require("sklearn.datasets").load_digits()
    images = torch.from_numpy(digits.images)  # 0..16
    return _Raw(
        images=(images * (255 / 16)).round().byte()[:, None],
        labels=torch.from_numpy(digits.target).long(),
        classes=tuple(str(name) for name in digits.target_names),
    )


LOADERS: dict[str, Callable[[], _Raw]] = {"digits": _load_digits}


def _load_folder(folder: Path, image_size: int | None) -> _Raw:
    """Reads DIR/class/* or DIR/train/class/* and DIR/test/class/*."""
    parts = [folder / part for part in PARTS]
    parts = parts if all(part.is_dir() for part in parts) else [folder]
    files = [_files(part) for part in parts]
    classes = tuple(files[0])
    for name in {name for part in files for name in part} - set(classes):
        raise ValueError(f"data {str(folder)!r}: test class {name!r} has no training images")

    opened = [[(_open(f), classes.index(c)) for c in part for f in part[c]] for part in files]
    pictures = [picture for part in opened for picture, _ in part]
    mode = "L" if all(p.mode == "L" for p in pictures) else "RGB"
    sizes = {p.size for p in pictures}
    if image_size is None and (len(sizes) > 1 or max(max(sizes)) > 2 * FOLDER_SIZE):
        image_size = FOLDER_SIZE
    stacked = [torch.stack([_pixels(p, mode, image_size) for p, _ in part]) for part in opened]
    labels = [torch.tensor([label for _, label in part]) for part in opened]
    return _Raw(stacked[0], labels[0], classes, *stacked[1:], *labels[1:])


def _files(folder: Path) -> dict[str, list[Path]]:
    """Image files by class, both in the order of their names."""
    found = {}
    for entry in sorted(folder.iterdir()):
        if entry.is_dir() and not entry.name.startswith("."):
            files = sorted(f for f in entry.iterdir() if f.suffix.lower() in SUFFIXES)
            if files:
                found[entry.name] = files
    if not found:
        raise ValueError(
            f"data {str(folder)!r} has no images; expected a folder for every class with "
            f"{', '.join(SUFFIXES)} files in it"
        )
    return found


def _open(source: Path | io.BytesIO, name: str = "") -> Image:
    """Decodes one image, turned as its EXIF data says, as grey ("L") or colour ("RGB")."""
    pil, ops = require("PIL.Image"), require("PIL.ImageOps")
    name = name or str(source)
    try:
        with pil.open(source) as file:
            image: Image = ops.exif_transpose(file)
            if image.mode.startswith("I"):  # 16 bit: convert() would clip it
                image = image.convert("I").point(lambda value: value * (1 / 257)).convert("L")
            return image.convert("L" if image.mode in ("1", "L", "LA") else "RGB")
    except (OSError, SyntaxError, ValueError, pil.DecompressionBombError) as error:
        raise ValueError(f"cannot read image {name!r} ({error}); mend or remove it") from error


def _pixels(image: Image, mode: str, size: int | None) -> Tensor:
    """uint8 [channels, height, width] of an image, resized to a square if asked."""
    if size is not None and image.size != (size, size):
        image = image.resize((size, size), require("PIL.Image").Resampling.BILINEAR)
    image = image.convert(mode)
    flat = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return flat.view(image.height, image.width, -1).permute(2, 0, 1)


def _load_npz(path: Path) -> _Raw:
    """Reads an .npz in one of ``FORMS``."""
    numpy = require("numpy")
    try:
        loaded = numpy.load(path, allow_pickle=False)
        if not isinstance(loaded, numpy.lib.npyio.NpzFile):
            raise ValueError("it holds a single array, as an .npy file does")
        with loaded as file:
            arrays = {key: file[key] for key in file.files}
    except (*_UNREADABLE, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"cannot read {str(path)!r} as an .npz file ({error})") from error
    jpeg = "train_jpeg" in arrays
    if jpeg:
        keys = [[f"{part}_{key}" for key in ("jpeg", "offset", "label")] for part in PARTS]
    else:
        keys = [["images", "labels"], ["test_images", "test_labels"]]
    missing = [key for key in keys[0] if key not in arrays]
    if missing:
        raise ValueError(
            f"data {str(path)!r} has no array {missing[0]!r} (it has {sorted(arrays)}); "
            f"expected {FORMS}"
        )
    absent = [key for key in keys[1] if key not in arrays]
    if 0 < len(absent) < len(keys[1]):
        there = next(key for key in keys[1] if key in arrays)
        raise ValueError(f"data {str(path)!r} has {there!r} but no {absent[0]!r}; expected {FORMS}")
    unpack = _unpack_jpegs if jpeg else _unpack_arrays
    parts = [unpack(path, arrays, k) for k in keys if all(key in arrays for key in k)]
    values = sorted({int(value) for _, labels in parts for value in labels})
    names = arrays.get("classes")
    if names is not None and values and values[0] >= 0 and values[-1] < len(names):
        classes = tuple(str(names[value]) for value in values)
    else:
        classes = tuple(str(value) for value in values)
    numbers = {value: number for number, value in enumerate(values)}
    labels = [torch.tensor([numbers[int(value)] for value in part]) for _, part in parts]
    images = [part for part, _ in parts]
    for label in set(labels[-1].tolist()) - set(labels[0].tolist()):
        raise ValueError(
            f"data {str(path)!r}: test class {classes[label]!r} has no training images"
        )
    return _Raw(images[0], labels[0], classes, *images[1:], *labels[1:])


def _unpack_arrays(path: Path, arrays: dict[str, Any], keys: Sequence[str]) -> tuple[Tensor, Any]:
    """Images of the plain form, uint8 [n, c, h, w], and their labels."""
    images, labels = (arrays[key] for key in keys)
    if images.dtype != "uint8" or images.ndim not in (3, 4):
        raise ValueError(
            f"data {str(path)!r}: {keys[0]} is {images.dtype} {list(images.shape)}; "
            "expected uint8 [N, H, W] or [N, H, W, C]"
        )
    if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu":
        raise ValueError(
            f"data {str(path)!r}: {keys[1]} is {labels.dtype} {list(labels.shape)}; "
            f"expected one whole number for each of the {len(images)} images"
        )
    pixels = torch.from_numpy(images if images.ndim == 4 else images[..., None])
    return pixels.permute(0, 3, 1, 2).contiguous(), labels


def _unpack_jpegs(path: Path, arrays: dict[str, Any], keys: Sequence[str]) -> tuple[Tensor, Any]:
    """Images of the packed form, uint8 [n, c, h, w], and their labels."""
    packed, offset, labels = (arrays[key] for key in keys)
    if packed.dtype != "uint8" or packed.ndim != 1:
        raise ValueError(
            f"data {str(path)!r}: {keys[0]} is {packed.dtype} {list(packed.shape)}; expected uint8 "
            "[bytes], the JPEG files one after another"
        )
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise ValueError(
            f"data {str(path)!r}: {keys[2]} is {labels.dtype} {list(labels.shape)}; expected one "
            "whole number for each image, [N]"
        )
    count = len(labels)
    ordered = offset.shape == (count + 1,) and offset.dtype.kind in "iu"
    ends = [int(value) for value in offset] if ordered else []
    if not ends or ends != sorted(ends) or (ends[0], ends[-1]) != (0, len(packed)):
        raise ValueError(
            f"data {str(path)!r}: {keys[1]} must have one entry more than {keys[2]} ({count}), "
            f"begin at 0, never fall and end at the length of {keys[0]} ({len(packed)})"
        )
    if not count:
        return torch.empty(0, 1, 1, 1, dtype=torch.uint8), labels
    pictures = [
        _open(io.BytesIO(packed[start:stop].tobytes()), f"{path}: {keys[0]} {index}")
        for index, (start, stop) in enumerate(pairwise(ends))
    ]
    if len({p.size for p in pictures}) > 1:
        raise ValueError(f"data {str(path)!r}: the images of {keys[0]} differ in size")
    mode = "L" if all(p.mode == "L" for p in pictures) else "RGB"
    return torch.stack([_pixels(p, mode, None) for p in pictures]), labels
