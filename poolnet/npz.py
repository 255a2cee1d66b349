"""NumPy archives, read member by member without ever holding one in memory.

An `.npz` is a zip of `.npy` members. A member stored uncompressed is mapped where it lies in the archive; a compressed
one is unpacked once, in a stream, into poolnet's local state and mapped there. Nothing is ever unpickled.
"""

import contextlib
import errno
import hashlib
import lzma
import math
import shutil
import tokenize
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from filelock import FileLock

from poolnet.config import InputError, RunError, home
from poolnet.files import replacing

ROWS = 8192  # rows moved at a time


@dataclass(frozen=True)
class Member:
    """One array of an archive, described by its header and not yet read."""

    archive: zipfile.ZipFile
    path: Path
    key: str
    shape: tuple[int, ...]
    dtype: np.dtype
    fortran: bool
    header: bytes  # what stands before the array's data, and counts for the checksum

    @property
    def info(self) -> zipfile.ZipInfo:
        return self.archive.getinfo(f"{self.key}.npy")

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)

    @property
    def in_place(self) -> bool:
        """Whether it can be mapped where it lies; only then is its checksum still to be compared."""
        return self.info.compress_type == zipfile.ZIP_STORED and not self.fortran

    def read(self) -> np.ndarray:
        """The whole array, for members that are small."""
        with self.archive.open(self.info) as stream:
            return np.lib.format.read_array(stream, allow_pickle=False)

    def map(self) -> np.memmap:
        """The array as a read-only map of its file, C order."""
        if self.in_place:
            return np.memmap(self.path, self.dtype, "r", self._offset(), self.shape)
        return np.memmap(_unpacked(self), self.dtype, "r", 0, self.shape)

    def check(self, crc: int) -> None:
        """Compare the checksum of header and data, for a member whose bytes did not pass through zipfile."""
        if crc != self.info.CRC:
            raise InputError(f"{self.path}: {self.key}: damaged, found another checksum than recorded; copy it again")

    def _offset(self) -> int:
        with self.path.open("rb") as file:
            file.seek(self.info.header_offset)
            local = file.read(30)  # name and extra field may be longer or shorter than in the central directory
            name, extra = (int.from_bytes(local[at : at + 2], "little") for at in (26, 28))
            start = self.info.header_offset + 30 + name + extra + len(self.header)
            if start + self.nbytes > file.seek(0, 2):
                raise zipfile.BadZipFile(f"{self.key} ends beyond the file")
        return start


@contextlib.contextmanager
def opened(path: Path) -> Iterator[zipfile.ZipFile]:
    """The archive at `path`, with whatever may be wrong with it said as `InputError`."""
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file, expected an .npz file, glyphs, or notmnist") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}), expected an .npz file") from None
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, RuntimeError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise  # trouble of the disk; the two others are garbled offsets and garbled bzip2
        if magic != b"PK\x03\x04":
            raise InputError(f"{path}: found no zip archive, expected an .npz file") from None
        raise InputError(f"{path}: truncated or damaged ({error}), expected a whole .npz file") from None


def member(archive: zipfile.ZipFile, path: Path, key: str) -> Member:
    """What the header of `key` says. Object arrays are refused here, before anything could unpickle them."""
    names = [name.removesuffix(".npy") for name in archive.namelist()]
    if key not in names:
        raise InputError(f"{path}: {key}: missing, found {', '.join(sorted(names)) or 'an empty archive'}")
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    with archive.open(f"{key}.npy") as stream:
        recorder = _Recorder(stream)
        try:
            shape, fortran, dtype = readers[np.lib.format.read_magic(recorder)](recorder)
        except (ValueError, KeyError, TypeError, SyntaxError, tokenize.TokenError) as error:  # of a garbled header
            raise InputError(f"{path}: {key}: found no array ({error}), expected numpy's own format") from None
    if dtype.hasobject:
        raise InputError(f"{path}: {key}: found an object array, which is never unpickled; expected numbers")
    found = Member(archive, path, key, shape, dtype, fortran, recorder.seen)
    size = len(found.header) + found.nbytes
    if found.info.file_size != size:
        raise InputError(f"{path}: {key}: truncated, found {found.info.file_size:,} bytes, expected {size:,}")
    return found


def save(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write the arrays uncompressed, so that each can be mapped; the file appears whole or not at all."""
    try:
        with replacing(path) as part, part.open("wb") as file:
            np.savez(file, **arrays)
    except OSError as error:  # numpy's own names no file
        raise RunError(f"{path}: cannot be written ({error}); is the disk full?") from error


class _Recorder:
    """A stream that remembers what was read from it."""

    def __init__(self, stream):
        self._stream, self.seen = stream, b""

    def read(self, size: int) -> bytes:
        data = self._stream.read(size)
        self.seen += data
        return data


def _unpacked(source: Member) -> Path:
    """The bare data of a compressed or Fortran-ordered member, in C order; of each archive one version is kept."""
    folder = home() / "unpacked" / hashlib.sha256(str(source.path).encode()).hexdigest()[:16]
    stat = source.path.stat()
    version = folder / f"{stat.st_size}-{stat.st_mtime_ns}"
    target = version / f"{source.key}.raw"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):
        for other in folder.iterdir():
            if other.is_dir() and other != version:
                shutil.rmtree(other, ignore_errors=True)  # Windows keeps what another process has mapped
        if not target.exists():
            with replacing(target) as part:
                _unpack(source, part)
    return target


def _unpack(source: Member, part: Path) -> None:
    with source.archive.open(source.info) as stream, part.open("wb") as file:
        stream.read(len(source.header))
        shutil.copyfileobj(stream, file, 1 << 20)
    if part.stat().st_size != source.nbytes:
        raise zipfile.BadZipFile(f"{source.key} is shorter than its header says")
    if source.fortran:
        with replacing(part) as turned, turned.open("wb") as file:
            columns = np.memmap(part, source.dtype, "r", 0, source.shape, order="F")
            for start in range(0, source.shape[0], ROWS):
                file.write(columns[start : start + ROWS].tobytes())
            del columns  # Windows does not replace a file that is mapped
