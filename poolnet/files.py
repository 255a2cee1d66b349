"""Read, write and lock the files of poolnet's local state.

A file is replaced as a whole. JSON is stored with its checksum. A lock says who holds it.
"""

import contextlib
import errno
import glob
import json
import os
import socket
import stat
import sys
import time
import uuid
import zlib
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path

from filelock import FileLock, Timeout

from poolnet.errors import InputError, RunError

FULL = (errno.ENOSPC, errno.EDQUOT)  # a disk, or what a user may have of it
LOCK_SECONDS = 5  # that a command waits for another one, before it says who that is


class Locked(RunError):
    """A lock that another process holds for too long."""


def home_path() -> Path:
    """Return where local state lies, there or not.

    It is `POOLNET_HOME`, or `.poolnet` in the working folder.
    """
    return expanded(Path(os.environ.get("POOLNET_HOME") or ".poolnet")).absolute()


def home() -> Path:
    """Return the folder of local state; create it if missing.

    Raises `InputError` if it is not writable.
    """
    path = home_path()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path}: cannot be made ({error.strerror}); set POOLNET_HOME elsewhere") from None
    if not os.access(path, os.W_OK):
        raise InputError(f"{path}: cannot be written; set POOLNET_HOME elsewhere")
    return path


def expanded(path: Path) -> Path:
    """Expand a leading `~`, unless such a name exists here."""
    try:
        return path if Path(*path.parts[:1]).exists() else path.expanduser()
    except RuntimeError:  # of a user who is not known
        return path


@contextlib.contextmanager
def locked(path: Path, wait: float = LOCK_SECONDS, poll: float = 0.05) -> Iterator[None]:
    """Hold a lock, or raise `Locked` after `wait` seconds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    holder = path.with_name(f"{path.name}.holder")
    try:
        lock = FileLock(path).acquire(timeout=wait, poll_interval=poll)
    except Timeout:
        raise Locked(f"{path}: held by {_read_holder(holder)}; wait for it, or end it, then try again") from None
    with lock:
        with contextlib.suppress(OSError):  # of a full disk: the lock holds without it
            words = takewhile(str.isalpha, sys.argv[1:3])  # the command; what follows may hold a secret
            command = " ".join(["poolnet", *words])
            holder.write_text(f"process {os.getpid()} on {socket.gethostname()} ({command})", encoding="utf-8")
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                holder.unlink(missing_ok=True)


def holder_of(path: Path) -> str:
    """Return who holds a lock now, or an empty text."""
    if not path.exists():
        return ""
    try:
        with FileLock(path, timeout=0):
            return ""
    except Timeout:
        return _read_holder(path.with_name(f"{path.name}.holder"))


def _read_holder(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip() or "another process"
    except OSError:
        return "another process"


def regular(path: Path, wanted: str) -> None:
    """Raise `InputError` unless `path` is a regular file.

    The check comes before the file is opened, since opening a pipe, for example, can hang.
    """
    try:
        kind = _kind(path)
    except FileNotFoundError:
        what = "a link that leads nowhere" if path.is_symlink() else "no such file"
        raise InputError(f"{path}: {what}, expected {wanted}") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({getattr(error, 'strerror', error)}), expected {wanted}") from None
    if kind:
        raise InputError(f"{path}: found {kind}, expected {wanted}")


def walk(folder: Path) -> Iterator[Path]:
    """Yield the files below a folder, sorted by name.

    Hidden names are left out. Links are followed. A folder is visited once under each name, so a link that leads back
    does not make the walk endless. A link that leads nowhere is yielded as it is.
    """
    ahead, seen = [folder], set()
    while ahead:
        path = ahead.pop()
        if not path.is_dir():
            yield path
        elif (place := (path.resolve(), path.name)) not in seen:
            seen.add(place)
            ahead += sorted((below for below in path.iterdir() if not below.name.startswith(".")), reverse=True)


def writable(path: Path) -> Path:
    """Follow links from `path` to a file that can be written.

    Anything but a regular file is refused, since it would be replaced. Raises `InputError`, or `RunError` if the disk
    or the user's quota is full.
    """
    try:
        kind = _kind(path)
    except FileNotFoundError:
        kind = ""
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be written ({getattr(error, 'strerror', error)})") from None
    if kind:
        raise InputError(f"{path}: found {kind}, expected a file, or a name that is free")
    path = path.resolve()
    folder = next(parent for parent in path.parents if parent.exists())
    try:
        part = folder / _part(path).name  # as `replacing` will call it, which has to fit too
        part.touch()
        part.unlink()
        if path.exists() and not os.access(path, os.W_OK):
            raise InputError(f"{path}: found a file that may not be written; remove it, or choose another name")
    except OSError as error:
        raised = RunError if error.errno in FULL else InputError
        raise raised(f"{path}: cannot be written, since {folder} takes no file ({error.strerror})") from None
    return path


def _kind(path: Path) -> str:
    """Name the kind of a file that is not regular."""
    mode = path.stat().st_mode
    if stat.S_ISREG(mode):
        return ""
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
    return kinds.get(stat.S_IFMT(mode), "a device")


def replace(part: Path, path: Path) -> None:
    """Replace `path` by `part`, and retry on Windows.

    Windows refuses `part.replace(path)` while another process reads `path`. An empty folder at `path` is replaced as
    well: container mounts leave empty folders in place of files.
    """
    if path.is_dir() and not path.is_symlink():
        with contextlib.suppress(OSError):  # of one that is not empty
            path.rmdir()
    for attempt in range(50):
        try:
            part.replace(path)
            return
        except PermissionError:
            if sys.platform != "win32" or attempt == 49:
                raise
            time.sleep(0.02)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary name; then that file replaces `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for stale in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
        with contextlib.suppress(FileNotFoundError):  # whose process has just finished
            if time.time() - stale.stat().st_mtime > 3600:  # whose process was killed
                stale.unlink()
    part = _part(path)
    try:
        yield part
        replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _part(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part")


def read_json(path: Path) -> dict:
    """Read a JSON object, empty if missing or damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return unsealed(value) if isinstance(value, dict) else {}


def write_json(path: Path, value: dict) -> None:
    """Write a JSON object and its checksum to the disk."""
    with replacing(path) as part, part.open("w", encoding="utf-8") as file:
        json.dump(sealed(value), file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def sealed(value: dict) -> dict:
    """Return a copy with `crc32`, the checksum of the rest."""
    return {**value, "crc32": _checksum(value)}


def unsealed(value: dict) -> dict:
    """Check and remove the checksum of an object.

    The result is empty if the checksum is wrong. An object without a checksum is accepted: earlier versions wrote none.
    """
    rest = {key: part for key, part in value.items() if key != "crc32"}
    return rest if "crc32" not in value or value["crc32"] == _checksum(rest) else {}


def _checksum(value: dict) -> int:
    return zlib.crc32(json.dumps(value, sort_keys=True).encode())
