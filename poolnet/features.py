"""The pooled features: 784 pixels become 49 numbers once, since the poolings have no weights to learn.

A feature array is (N, 50) float32: the 49 features of each image, and the constant 1 that carries the bias. It is
computed in a stream, in the pass that validates and digests the data where that is still due, and cached by what it is
made of: `POOLNET_HOME/features/POOL-DIGEST-CHECKSUM.npy`.
"""

import contextlib
import hashlib
import os
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock

from poolnet.config import home
from poolnet.data import Split, Splits, as_images, open_splits, windows
from poolnet.files import replacing
from poolnet.model import SimplePoolNet

WIDTH = 50
CACHE_LIMIT = 4 << 30  # bytes; the reference experiment takes 95 MB a pooling


def open_pooled(
    path: Path, pool: str, cache: bool = True, say: Callable[[str], None] = lambda line: None
) -> tuple[Splits, dict[str, np.ndarray]]:
    """The data set, opened as `open_splits` does, and the feature array of each split by its name."""
    path = Path(path).absolute()
    net = SimplePoolNet(pool)
    arrays: dict[str, np.ndarray] = {}

    def watch(name: str, size: int, start: int, window: np.ndarray) -> None:
        if name not in arrays:
            arrays[name] = np.empty((size, WIDTH), np.float32)
        arrays[name][start : start + len(window)] = pooled(net, window)

    with _one_process(path) if cache else contextlib.nullcontext():
        splits = open_splits(path, watch)
        for split in splits:
            if split.name not in arrays:  # the file was known, and not read from end to end
                known = _load(split, pool) if cache else None
                arrays[split.name] = compute(net, split) if known is None else known
        fresh = [split for split in splits if not isinstance(arrays[split.name], np.memmap)]
        if cache and fresh:
            try:
                for split in fresh:
                    _save(arrays[split.name], split, pool)
                say(f"Features: cached in {_folder()}, {_size() / 1e6:,.1f} MB of at most {CACHE_LIMIT / 1e6:,.0f} MB")
            except OSError as error:  # they are in memory all the same
                say(f"Features: not cached, {_folder()} cannot be written ({error}); is the disk full?")
    return splits, arrays


def compute(net: SimplePoolNet, split: Split) -> np.ndarray:
    """The features of a split, (N, 50), window by window."""
    array = np.empty((len(split), WIDTH), np.float32)
    start = 0
    for window in windows(split.X):
        array[start : start + len(window)] = pooled(net, window)
        start += len(window)
    return array


@torch.inference_mode()
def pooled(net: SimplePoolNet, window: np.ndarray) -> np.ndarray:
    """The features of some stored images, (n, 50), by the network's own `features`."""
    array = np.ones((len(window), WIDTH), np.float32)
    array[:, :-1] = net.features(torch.from_numpy(as_images(window))).numpy()
    return array


def _folder() -> Path:
    folder = home() / "features"
    folder.mkdir(exist_ok=True)
    return folder


def _one_process(path: Path) -> FileLock:
    """Held while a data set is opened: of two processes at once, the second finds what the first has computed."""
    return FileLock(_folder() / f"{hashlib.sha256(str(path).encode()).hexdigest()[:16]}.lock")


def _load(split: Split, pool: str) -> np.ndarray | None:
    """The cached array as a map, if it is there and whole. One that is damaged is removed."""
    for path in _folder().glob(f"{pool}-{split.sha256}-*.npy"):
        with contextlib.suppress(ValueError, EOFError, OSError):
            array = np.load(path, mmap_mode="r", allow_pickle=False)
            if array.shape == (len(split), WIDTH) and path.stem.endswith(_checksum(array)):
                os.utime(path)  # the oldest that goes first is the one not used for longest
                return array
            del array
        path.unlink(missing_ok=True)
    return None


def _save(array: np.ndarray, split: Split, pool: str) -> None:
    target = _folder() / f"{pool}-{split.sha256}-{_checksum(array)}.npy"
    with replacing(target) as part, part.open("wb") as file:
        np.save(file, array)
    _evict(keep=target)


def _checksum(array: np.ndarray) -> str:
    return f"{zlib.crc32(np.ascontiguousarray(array)):08x}"


def _evict(keep: Path) -> None:
    """Remove the arrays not used for longest until the rest fits."""
    files = _files()
    for path in sorted(files, key=lambda path: files[path].st_mtime):
        if _size() <= CACHE_LIMIT:
            return
        if path != keep:
            with contextlib.suppress(PermissionError):  # Windows keeps what another process has mapped
                path.unlink(missing_ok=True)


def _size() -> int:
    """The bytes of all cached arrays."""
    return sum(stat.st_size for stat in _files().values())


def _files() -> dict[Path, os.stat_result]:
    files = {}
    for path in _folder().glob("*.npy"):
        with contextlib.suppress(FileNotFoundError):  # another process may evict
            files[path] = path.stat()
    return files
