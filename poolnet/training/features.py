"""Pool each image once into features, and cache them.

The poolings have no weights to learn, so 784 pixels become 49 numbers once. A feature array is (N, 50) float32: the 49
features of each image, and the constant 1 that carries the bias. It is computed block by block, in the pass that
digests the images. Its cache file is named after what it is made of: `POOLNET_HOME/features/POOL-DIGEST-CHECKSUM.npy`.
"""

import contextlib
import io
import os
import zlib
from collections.abc import Collection
from pathlib import Path

import numpy as np

from poolnet.data.dataset import SPLITS, Dataset, Split, as_pixels, open_dataset
from poolnet.files import home, replacing
from poolnet.text import Echo
from poolnet.training.poolings import POOLINGS

WIDTH = 50
KEPT = ("test",)  # whose images a figure shows; all else needs the features only
BLOCK = 512  # images pooled together, few enough for the processor's cache
CACHE_LIMIT = 4 << 30  # bytes; the reference experiment takes 95 MB a pooling


def open_pooled(
    path: Path, pool: str, cache: bool = True, echo: Echo = lambda line: None, keep: Collection[str] = KEPT
) -> tuple[Dataset, dict[str, np.ndarray]]:
    """Open a data set, with its features by split name.

    The images of the splits in `keep` are kept too.
    """
    if cache:
        splits = open_dataset(path, keep)
        cached = {split.name: array for split in splits if (array := _load(split, pool)) is not None}
        if len(cached) == len(SPLITS):
            return splits, cached
    arrays: dict[str, np.ndarray] = {}

    def watch(name: str, size: int, start: int, block: np.ndarray) -> None:
        if name not in arrays:
            arrays[name] = np.empty((size, WIDTH), np.float32)
        arrays[name][start : start + len(block)] = pooled(block, pool)

    splits = open_dataset(path, keep, watch)  # in one pass, so that the features are of what has this digest
    if cache:
        _save_all(splits, arrays, pool, echo)
    return splits, arrays


def of_dataset(data: Dataset, pool: str) -> dict[str, np.ndarray]:
    """Compute the features of images in memory, by split name."""
    arrays = {}
    for split in data:
        assert split.X is not None
        arrays[split.name] = pooled(split.X, pool)
    return arrays


def pooled(images: np.ndarray, pool: str) -> np.ndarray:
    """Compute the features (n, 50) of stored images (n, 28, 28).

    They are those of `SimplePoolNet.features`, to the bit. torch takes three to twelve times as long for them.
    """
    pooling = POOLINGS[pool]
    array = np.ones((len(images), WIDTH), np.float32)
    for start in range(0, len(images), BLOCK):
        x = images[start : start + BLOCK]
        if not pooling.picks:
            x = as_pixels(x)
        for _ in range(2):
            x = np.maximum(pooling.of_array(x), 0)
        array[start : start + len(x), :-1] = as_pixels(x).reshape(len(x), -1)
    return array


def _folder() -> Path:
    folder = home() / "features"
    folder.mkdir(exist_ok=True)
    return folder


def _load(split: Split, pool: str) -> np.ndarray | None:
    """Return the cached array of a split; remove damaged ones."""
    header = _header(len(split))
    for path in _folder().glob(f"{pool}-{split.sha256}-*.npy"):
        with contextlib.suppress(OSError):
            content = np.fromfile(path, np.uint8)
            data = content[len(header) :]
            right = content[: len(header)].tobytes() == header and len(data) == len(split) * WIDTH * 4
            if right and path.stem.endswith(f"-{_checksum(data)}"):
                os.utime(path)  # the oldest that goes first is the one not used for longest
                return data.view(np.float32).reshape(-1, WIDTH)
            path.unlink(missing_ok=True)
    return None


def _save_all(splits: Dataset, arrays: dict[str, np.ndarray], pool: str, echo: Echo) -> None:
    try:
        for split in splits:
            array = arrays[split.name]
            target = _folder() / f"{pool}-{split.sha256}-{_checksum(array)}.npy"
            with replacing(target) as part, part.open("wb") as file:
                file.write(_header(len(array)))
                file.write(array.data)
            size = _evict(keep=target)
        echo(f"Features: cached in {_folder()}, {size / 1e6:,.1f} MB of at most {CACHE_LIMIT / 1e6:,.0f} MB")
    except OSError as error:  # they are in memory all the same
        echo(f"Features: not cached, {_folder()} cannot be written ({error})")


def _header(size: int) -> bytes:
    """Return the `.npy` header for an array of `size` images."""
    header = io.BytesIO()
    fields = {"descr": "<f4", "fortran_order": False, "shape": (size, WIDTH)}
    np.lib.format.write_array_header_1_0(header, fields)
    return header.getvalue()


def _checksum(array: np.ndarray) -> str:
    return f"{zlib.crc32(array.data):08x}"


def _evict(keep: Path) -> int:
    """Remove the least recently used arrays; return the rest's bytes."""
    files = {}
    for path in _folder().glob("*.npy"):
        with contextlib.suppress(FileNotFoundError):  # another process may evict
            files[path] = path.stat()
    size = sum(stat.st_size for stat in files.values())
    for path in sorted(files, key=lambda path: files[path].st_mtime):
        if size > CACHE_LIMIT and path != keep:
            with contextlib.suppress(PermissionError):  # Windows keeps what another process has mapped
                path.unlink(missing_ok=True)
                size -= files[path].st_size
    return size
