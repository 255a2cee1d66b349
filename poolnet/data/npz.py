"""Read NumPy archives as a stream, without unpickling.

An `.npz` is a zip of `.npy` members. All are read through one open file, each member once. `zipfile` compares its
checksum during the reading. So what was read is what the file held, even if the file changes later.
"""

import contextlib
import errno
import io
import lzma
import math
import struct
import tokenize
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO

import numpy as np

from poolnet.errors import InputError, RunError
from poolnet.files import FULL, regular, replacing

ROWS = 8192  # rows read at a time
HEADER = 10_010  # bytes at most: numpy refuses more than 10,000 signs, but would read them first
GARBLED = (ValueError, KeyError, TypeError, SyntaxError, tokenize.TokenError, RecursionError, MemoryError)  # a header
QUIET = partial(warnings.catch_warnings, action="ignore")  # at Python 2's numbers, and odd signs in a header


@dataclass(frozen=True)
class Member:
    """One array of an archive, as its header describes it."""

    archive: zipfile.ZipFile
    path: Path
    key: str
    shape: tuple[int, ...]
    dtype: np.dtype
    fortran: bool
    start: int  # where its data begin

    def blocks(self) -> Iterator[np.ndarray]:
        """Yield blocks of `ROWS` rows, in C order."""
        if self.fortran:
            whole = self.read()
            for start in range(0, len(whole), ROWS):
                yield np.ascontiguousarray(whole[start : start + ROWS])
            return
        with _named_errors(self.path), self.archive.open(f"{self.key}.npy") as stream:
            stream.read(self.start)
            for start in range(0, self.shape[0], ROWS):
                shape = (min(ROWS, self.shape[0] - start), *self.shape[1:])
                content = stream.read(self.dtype.itemsize * math.prod(shape))
                yield np.frombuffer(content, self.dtype).reshape(shape)

    def read(self) -> np.ndarray:
        """Read the whole array."""
        with _named_errors(self.path), QUIET(), self.archive.open(f"{self.key}.npy") as stream:
            return np.lib.format.read_array(stream, allow_pickle=False)


def check(path: Path) -> None:
    """Raise `InputError` unless there is a regular file."""
    regular(path, "an .npz file, glyphs, or notmnist")


@contextlib.contextmanager
def opened(path: Path) -> Iterator[zipfile.ZipFile]:
    """Open the `.npz` archive at `path`."""
    check(path)
    with contextlib.ExitStack() as stack:
        with _named_errors(path):
            file = stack.enter_context(path.open("rb"))
            if file.read(2) != b"PK":
                raise InputError(f"{path}: found no zip archive, expected an .npz file")
            archive = stack.enter_context(zipfile.ZipFile(file))
        yield archive


def member(archive: zipfile.ZipFile, path: Path, key: str) -> Member:
    """Read the header of the member `key`.

    Object arrays are refused here, before anything could unpickle them. Raises `InputError`.
    """
    names = archive.namelist()
    if f"{key}.npy" not in names:
        others = ", ".join(sorted(name.removesuffix(".npy") for name in names)) or "an empty archive"
        raise InputError(f"{path}: {key}: missing, found {others}; expected arrays as np.savez writes them")
    with _named_errors(path), archive.open(f"{key}.npy") as stream:
        try:
            shape, fortran, dtype, start = _header(stream)
        except GARBLED as error:
            raise InputError(f"{path}: {key}: found no array ({error}), expected numpy's own format") from None
    if not all(type(size) is int and size >= 0 for size in shape):  # numpy takes True for a size
        raise InputError(f"{path}: {key}: found shape {shape}, expected whole numbers")
    if dtype.hasobject:
        raise InputError(f"{path}: {key}: found an object array, which is never unpickled; expected values of one type")
    size, expected = archive.getinfo(f"{key}.npy").file_size, start + dtype.itemsize * math.prod(shape)
    if size != expected:
        raise InputError(f"{path}: {key}: truncated, found {size:,} bytes, expected {expected:,}")
    return Member(archive, path, key, shape, dtype, fortran, start)


def save(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write the arrays uncompressed, all or none; raise `RunError`."""
    try:
        with replacing(path) as part, part.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]  # none of them is named allow_pickle
    except OSError as error:  # numpy's own names no file and has no number
        cure = "; is the disk full?" if error.errno in (None, errno.EFBIG, *FULL) else ""
        raise RunError(f"{path}: cannot be written ({error.strerror or error}){cure}") from error


def _header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype, int]:
    """Read a header: shape, Fortran order, type, data offset."""
    first = io.BytesIO(stream.read(HEADER))
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    with QUIET():
        return *readers[np.lib.format.read_magic(first)](first), first.tell()


@contextlib.contextmanager
def _named_errors(path: Path) -> Iterator[None]:
    """Turn read errors into one line of `InputError` or `RunError`."""
    try:
        yield
    except InputError:
        raise
    except MemoryError:
        raise RunError(f"{path}: there is not enough memory to read it; end other programs") from None
    except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, EOFError, ValueError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):  # of garbled bzip2 and offsets
            kind = InputError if isinstance(error, PermissionError) else RunError
            raise kind(f"{path}: cannot be read ({error.strerror}), expected an .npz file") from None
        raise InputError(f"{path}: truncated or damaged ({error}), expected a whole .npz file") from None
    except (RuntimeError, OverflowError) as error:  # zipfile's, of what is encrypted or packed in ways it does not know
        raise InputError(f"{path}: cannot be unpacked ({error}), expected an .npz file as numpy writes it") from None
