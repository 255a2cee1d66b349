"""Prepare a data set in MNIST's file format.

Its four files hold images and labels of train and test, gzipped or not. A file begins with 0, 0, the type of its
numbers (8: bytes), the number of its dimensions, and each size as four bytes, the highest first. Val is a tenth of
train, chosen by the seed. Otherwise images and their order are those of the files.
"""

import gzip
import math
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import IO

import numpy as np

from poolnet.data import splits
from poolnet.data.annotations import LETTERS, class_names
from poolnet.data.dataset import SIDE
from poolnet.errors import InputError, RunError
from poolnet.files import expanded, regular

FILES = {  # the usual names, by option
    "train_images": "train-images-idx3-ubyte",
    "train_labels": "train-labels-idx1-ubyte",
    "test_images": "t10k-images-idx3-ubyte",
    "test_labels": "t10k-labels-idx1-ubyte",
}
VAL = 0.1  # of train
EXPECTED = "a file in MNIST's format"
CHUNK = 1 << 20  # bytes


def locate(folder: Path | None, given: Mapping[str, Path | None]) -> dict[str, Path]:
    """Return the four files: those given, the others from the folder.

    In the folder they have MNIST's names, with or without `.gz`, or with a dot as in `idx3.ubyte`.
    """
    found: dict[str, Path] = {}
    for key, name in FILES.items():
        if path := given.get(key):
            found[key] = expanded(path)
        elif folder is None:
            raise InputError(
                f"--{key.replace('_', '-')}: not given, expected the four files, or a folder that has them"
            )
        else:
            found[key] = _in_folder(expanded(folder), name)
    return found


def _in_folder(folder: Path, name: str) -> Path:
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder, expected one with {name} or {name}.gz")
    stem, _, kind = name.rpartition("-idx")
    for spelling in (name, f"{stem}.idx{kind}"):
        for suffix in ("", ".gz"):
            if (path := folder / f"{spelling}{suffix}").exists():
                return path
    raise InputError(f"{folder}: found no {name} or {name}.gz; name the files with --train-images and so on")


def names(classes: str | None) -> tuple[str, ...]:
    """Return the ten names of `--classes`, or none.

    They are a list with commas, or the lines of a text file.
    """
    if classes is None:
        return ()
    if "," in classes:
        return class_names(tuple(name.strip() for name in classes.split(",")), "--classes")
    path = expanded(Path(classes))
    regular(path, "a text file with ten lines, or ten names with commas between them")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise InputError(f"{path}: found no text in UTF-8, expected ten names of classes, one a line") from None
    return class_names(tuple(line.strip() for line in lines if line.strip()), str(path))


def prepare(files: Mapping[str, Path], classes: tuple[str, ...], seed: int) -> dict[str, np.ndarray]:
    """Build the arrays of the data set; raise `InputError`.

    `classes` are ten, or none for A to J.
    """
    X, y = _images(files["train_images"]), _labels(files["train_labels"])
    X_test, y_test = _images(files["test_images"]), _labels(files["test_labels"])
    for split, images, labels in (("train", X, y), ("test", X_test, y_test)):
        if len(images) != len(labels):
            place = files[f"{split}_labels"]
            raise InputError(f"{place}: found {len(labels):,} labels, expected {len(images):,}, one for each image")
    order = np.random.default_rng(seed).permutation(len(y))
    cut = round(VAL * len(y))
    val, train = np.sort(order[:cut]), np.sort(order[cut:])
    arrays = {"X_train": X[train], "y_train": y[train], "X_val": X[val], "y_val": y[val]}
    arrays |= {"X_test": X_test, "y_test": y_test}
    if classes:
        arrays["classes"] = np.array(classes)
    splits.refuse_empty(arrays, {}, str(files["train_images"].parent))
    return arrays


def _images(path: Path) -> np.ndarray:
    images = read(path, dimensions=3)
    if images.shape[1:] != (SIDE, SIDE):
        height, width = images.shape[1:]
        raise InputError(f"{path}: found images of {height}x{width} pixels, expected {SIDE}x{SIDE}")
    return images


def _labels(path: Path) -> np.ndarray:
    labels = read(path, dimensions=1)
    if len(labels) and labels.max() >= len(LETTERS):
        raise InputError(f"{path}: found labels {labels.min()}..{labels.max()}, expected 0..9 for ten classes")
    return labels.astype(np.int64)


def read(path: Path, dimensions: int) -> np.ndarray:
    """Read one file of bytes, gzipped or not: uint8."""
    regular(path, EXPECTED)
    try:
        with path.open("rb") as file:
            if file.peek(2)[:2] != b"\x1f\x8b":
                return _array(path, file, dimensions)
            with gzip.open(file) as unpacked:
                return _array(path, unpacked, dimensions)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"{path}: damaged or cut off ({error}), expected {EXPECTED}") from None
    except OSError as error:
        raise RunError(f"{path}: cannot be read ({error.strerror})") from None


def _array(path: Path, file: IO[bytes] | gzip.GzipFile, dimensions: int) -> np.ndarray:
    magic = file.read(4)
    if magic != bytes((0, 0, 8, dimensions)):
        what = "images" if dimensions == 3 else "labels"
        other = {b"\0\0\x08\x01": ", which are labels", b"\0\0\x08\x03": ", which are images"}.get(magic, "")
        found = (magic.hex(" ") or "nothing") + other
        raise InputError(f"{path}: begins with {found}, expected 00 00 08 0{dimensions}: {what} of bytes")
    sizes = file.read(4 * dimensions)
    if len(sizes) < 4 * dimensions:
        raise InputError(f"{path}: cut off in its first {4 + 4 * dimensions} bytes, expected {EXPECTED}")
    shape = struct.unpack(f">{dimensions}I", sizes)
    expected = math.prod(shape)
    content = bytearray()
    while len(content) <= expected and (chunk := file.read(min(CHUNK, expected + 1 - len(content)))):
        content += chunk
    if len(content) != expected:
        found = f"{len(content):,} bytes of data" if len(content) < expected else "more data"
        raise InputError(f"{path}: found {found}, expected {expected:,} for {' x '.join(map(str, shape))}")
    return np.frombuffer(bytes(content), np.uint8).reshape(shape)
