"""Pool each image once into features, and cache them.

The poolings have no weights to learn, so 784 pixels become 49 numbers once. A feature array is (N, 50) float32: the 49
features of each image, and the constant 1 that carries the bias. It is computed window by window, in the pass that
digests the images. Its cache file is named after what it is made of: `POOLNET_HOME/features/POOL-DIGEST-CHECKSUM.npy`.
"""

import contextlib
import io
import os
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from poolnet.data.dataset import Dataset, Split, as_images, open_splits
from poolnet.files import home, replacing
from poolnet.training.model import SimplePoolNet

WIDTH = 50
KEPT = ("test",)  # whose images a figure shows; all else needs the features only
WINDOW = 4096  # images pooled together; bounds memory
CACHE_LIMIT = 4 << 30  # bytes; the reference experiment takes 95 MB a pooling


def open_pooled(
    path: Path, pool: str, cache: bool = True, echo: Callable[[str], None] = lambda line: None
) -> tuple[Dataset, dict[str, np.ndarray]]:
    """Open a data set and return its pooled features.

    The data set is opened as by `open_splits`. The features are a dictionary from split name to feature array.
    """
    if cache:
        splits = open_splits(path, keep=KEPT)
        known = {split.name: _load(split, pool) for split in splits}
        if all(array is not None for array in known.values()):
            return splits, known
    net, arrays = SimplePoolNet(pool), {}

    def watch(name: str, size: int, start: int, window: np.ndarray) -> None:
        if name not in arrays:
            arrays[name] = np.empty((size, WIDTH), np.float32)
        arrays[name][start : start + len(window)] = pooled(net, window)

    splits = open_splits(path, KEPT, watch)  # in one pass, so that the features are of what has this digest
    if cache:
        _save_all(splits, arrays, pool, echo)
    return splits, arrays


def of_dataset(data: Dataset, pool: str) -> dict[str, np.ndarray]:
    """Compute the features of images in memory.

    The result is a dictionary from split name to feature array.
    """
    net = SimplePoolNet(pool)
    starts = {split.name: range(0, len(split), WINDOW) for split in data}
    return {
        split.name: np.concatenate([pooled(net, split.X[start : start + WINDOW]) for start in starts[split.name]])
        for split in data
    }


@torch.inference_mode()
def pooled(net: SimplePoolNet, window: np.ndarray) -> np.ndarray:
    """Compute the features of some stored images.

    The result is (n, 50). The network's own `features` computes them.
    """
    array = np.ones((len(window), WIDTH), np.float32)
    array[:, :-1] = net.features(torch.from_numpy(as_images(window))).numpy()
    return array


def _folder() -> Path:
    folder = home() / "features"
    folder.mkdir(exist_ok=True)
    return folder


def _load(split: Split, pool: str) -> np.ndarray | None:
    """Return the cached feature array of a split, if valid.

    Every bit must be right. A damaged file is removed.
    """
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


def _save_all(splits: Dataset, arrays: dict[str, np.ndarray], pool: str, echo: Callable[[str], None]) -> None:
    try:
        for split in splits:
            _save(arrays[split.name], split, pool)
        echo(f"Features: cached in {_folder()}, {_size() / 1e6:,.1f} MB of at most {CACHE_LIMIT / 1e6:,.0f} MB")
    except OSError as error:  # they are in memory all the same
        echo(f"Features: not cached, {_folder()} cannot be written ({error})")


def _save(array: np.ndarray, split: Split, pool: str) -> None:
    target = _folder() / f"{pool}-{split.sha256}-{_checksum(array)}.npy"
    with replacing(target) as part, part.open("wb") as file:
        file.write(_header(len(array)))
        file.write(array)
    _evict(keep=target)


def _header(size: int) -> bytes:
    """Return the `.npy` header for an array of `size` images."""
    header = io.BytesIO()
    about = {"descr": "<f4", "fortran_order": False, "shape": (size, WIDTH)}
    np.lib.format.write_array_header_1_0(header, about)
    return header.getvalue()


def _checksum(array: np.ndarray) -> str:
    return f"{zlib.crc32(np.ascontiguousarray(array)):08x}"


def _evict(keep: Path) -> None:
    """Remove the least recently used arrays until the rest fits."""
    files = _files()
    for path in sorted(files, key=lambda path: files[path].st_mtime):
        if _size() <= CACHE_LIMIT:
            return
        if path != keep:
            with contextlib.suppress(PermissionError):  # Windows keeps what another process has mapped
                path.unlink(missing_ok=True)


def _size() -> int:
    """Return the bytes of all cached arrays."""
    return sum(stat.st_size for stat in _files().values())


def _files() -> dict[Path, os.stat_result]:
    files = {}
    for path in _folder().glob("*.npy"):
        with contextlib.suppress(FileNotFoundError):  # another process may evict
            files[path] = path.stat()
    return files
