"""Read labelled pictures from folders and tarballs.

A picture's label is the name of its folder. Links are followed, and a tarball gives the same as the folder that is
unpacked from it. Files that cannot be read are skipped and counted. All cores decode.
"""

import concurrent.futures
import contextlib
import gzip
import hashlib
import io
import lzma
import posixpath
import struct
import tarfile
import zlib
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from poolnet.data.dataset import SIDE
from poolnet.data.pictures import BROKEN, opaque
from poolnet.errors import InputError, RunError
from poolnet.files import expanded, regular, walk
from poolnet.process import cores
from poolnet.text import printable, progress

MAX_FILE = 1 << 16  # bytes; 28x28 grey pixels are 784, and the largest file of the originals has 2 kB
CHUNK = 512  # files handed to a worker process at once
PNG_START = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR"
SIZE = struct.pack(">II", SIDE, SIDE)  # which follows
NOWHERE, OTHER = "links that lead nowhere, left out", "other files, left out"
MODES = ("1", "L", "LA", "P", "RGB", "RGBA")  # what becomes 8-bit grey without loss of range


@dataclass(frozen=True)
class Kind:
    """What is read: folders, suffixes, and words for messages."""

    classes: Sequence[str]  # names of the folders, in the order of the labels
    suffixes: Collection[str]
    formats: tuple[str, ...]  # of Pillow
    content: str
    sources: str
    expected: str

    def label(self, path: PurePosixPath) -> int | None:
        if path.suffix.lower() not in self.suffixes or path.parent.name not in self.classes:
            return None
        return self.classes.index(path.parent.name)


@dataclass(frozen=True)
class Letters:
    """Decoded images with labels, digests and counts."""

    images: np.ndarray  # (N, 28, 28) uint8
    labels: np.ndarray  # (N,)
    keys: np.ndarray  # (N,), digests of the pixels
    files: np.ndarray  # (N,) str, names without suffixes
    counts: dict[str, int]  # what was counted on the way

    def take(self, rows: np.ndarray) -> "Letters":
        return Letters(self.images[rows], self.labels[rows], self.keys[rows], self.files[rows], self.counts)


def read(path: Path, kind: Kind) -> Letters:
    """Decode every picture of a tarball or a folder.

    All cores are used. Files that cannot be read are skipped and counted.
    """
    path = expanded(path)
    if not path.is_dir():
        regular(path, kind.sources)
    skipped: Counter[str] = Counter()
    files = _folder_files(path, kind, skipped) if path.is_dir() else _tar_files(path, kind, skipped)
    chunks = iter(lambda: tuple(islice(files, CHUNK)), ())
    with progress(
        _on_all_cores(partial(_decode, kind.formats), chunks), label=f"Decoding {printable(path.name)}"
    ) as bar:
        parts: list[Letters] = list(bar)
    if not any(len(part.labels) for part in parts):
        others = "".join(f", {n:,} {kind}" for kind, n in (+skipped).items())
        raise InputError(f"{path}: found no readable {kind.content}{others}, expected {kind.expected}")
    columns = zip(*((part.images, part.labels, part.keys, part.files) for part in parts), strict=True)
    images, labels, keys, names = map(np.concatenate, columns)
    total = sum(part.counts["files"] for part in parts)
    counts = {"files": total, "unreadable or not 28x28, skipped": total - len(labels), **+skipped, "read": len(labels)}
    return Letters(images, labels, keys, names, counts)


File = tuple[int, str, bytes]  # label, name and content, which is empty for a file that is too long to be a letter


def _folder_files(path: Path, kind: Kind, skipped: Counter[str]) -> Iterator[File]:
    """Yield each letter below a folder; count what is skipped."""
    for file in walk(path):
        label = kind.label(PurePosixPath(*file.relative_to(path.parent).parts))
        if file.is_symlink() and not file.exists():
            skipped[NOWHERE] += 1
        elif label is None:
            skipped[OTHER] += 1
        else:
            short = file.is_file() and file.stat().st_size <= MAX_FILE
            yield label, file.stem, file.read_bytes() if short else b""


def _tar_files(path: Path, kind: Kind, skipped: Counter[str]) -> Iterator[File]:
    """Yield each letter of a tarball; count what is skipped."""
    links = defaultdict(list)  # by what they lead to
    try:
        for name, entry, content in _entries(path):
            if entry.issym() or entry.islnk():
                target = name.parent / entry.linkname if entry.issym() else entry.linkname
                links[_normal(target)].append(name)
            elif entry.isfile():
                yield from _letters([name], content, kind, skipped)
        if links:
            yield from _linked_files(path, links, kind, skipped)
    except (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        if isinstance(error, OSError) and error.errno:  # not of what is in the file
            raise RunError(f"{path}: cannot be read ({error.strerror})") from None
        raise InputError(f"{path}: not a whole tarball ({error}), expected {kind.sources}") from None


def _linked_files(
    path: Path, links: dict[PurePosixPath, list[PurePosixPath]], kind: Kind, skipped: Counter[str]
) -> Iterator[File]:
    """Yield the files that links of a tarball lead to.

    The tarball is read once more from its beginning.
    """
    used: set[PurePosixPath] = set()
    for name, entry, content in _entries(path):
        if entry.issym() or entry.islnk():
            continue
        names, passed = [name], set[PurePosixPath]()
        for known in names:  # which grows, where links lead to links
            for place in (known, *known.parents):
                for link in links.get(place, ()):
                    if link not in passed:  # each once, or one that leads back would have no end
                        passed.add(link)
                        names.append(link / known.relative_to(place))
        used |= passed
        if passed and entry.isfile():
            new = {(kind.label(each), each.name): each for each in names}
            new.pop((kind.label(name), name.name))
            yield from _letters(list(new.values()), content, kind, skipped)
    skipped[NOWHERE] += sum(not _is_hidden(link) for group in links.values() for link in group if link not in used)


def _letters(
    names: list[PurePosixPath], content: Callable[[], bytes], kind: Kind, skipped: Counter[str]
) -> Iterator[File]:
    """Yield a tarball's file once for each name.

    Names that are not those of a letter are counted in `skipped`. Hidden names are left out.
    """
    labels = [(kind.label(name), name.stem) for name in names if not _is_hidden(name)]
    skipped[OTHER] += sum(label is None for label, _ in labels)
    if any(label is not None for label, _ in labels):
        letter = content()
        yield from ((label, stem, letter) for label, stem in labels if label is not None)


def _entries(path: Path) -> Iterator[tuple[PurePosixPath, tarfile.TarInfo, Callable[[], bytes]]]:
    """Yield name, header and content of each tarball member.

    The content is a function that reads it. The tarball is read to its end, where its checksum stands.
    """
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(path.open("rb"))
        stream: io.BufferedReader | gzip.GzipFile = file
        if file.peek(2)[:2] == b"\x1f\x8b":  # tarfile's own stream would not compare gzip's checksum
            stream = stack.enter_context(gzip.open(file))
        with tarfile.open(fileobj=stream, mode="r|*") as tar:
            for entry in tar:
                yield _normal(entry.name), entry, partial(_content, tar, entry)
        while stream.read(1 << 20):  # the checksum stands at the end
            pass


def _content(tar: tarfile.TarFile, entry: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(entry)
    assert file  # of a regular file
    return file.read() if entry.size <= MAX_FILE else b""


def _normal(name: str | PurePosixPath) -> PurePosixPath:
    return PurePosixPath(posixpath.normpath(name))


def _is_hidden(path: PurePosixPath) -> bool:
    return any(part.startswith(".") and part != ".." for part in path.parts)


def _on_all_cores(work: Callable, items: Iterable) -> Iterator:
    """Yield `work(item)` for each item, in order, from worker processes.

    No more items are pending than the workers can take soon.
    """
    workers = min(cores(), 61)  # more than that Windows does not wait for
    with concurrent.futures.ProcessPoolExecutor(workers) as pool:
        pending: deque[concurrent.futures.Future] = deque()
        for item in items:
            pending.append(pool.submit(work, item))
            if len(pending) > 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def _decode(formats: tuple[str, ...], files: tuple[File, ...]) -> Letters:
    """Decode the readable letters among some files."""
    pictures = ((label, file, _pixels(content, formats)) for label, file, content in files)
    decoded = [(label, file, image) for label, file, image in pictures if image is not None]
    labels = np.array([label for label, _, _ in decoded], np.int64)
    images = np.frombuffer(b"".join(image for _, _, image in decoded), np.uint8).reshape(-1, SIDE, SIDE)
    keys = b"".join(hashlib.blake2b(image, digest_size=16).digest() for _, _, image in decoded)
    names = np.array([file for _, file, _ in decoded], object)
    return Letters(images, labels, np.frombuffer(keys, "V16"), names, {"files": len(files)})


def _pixels(content: bytes, formats: tuple[str, ...]) -> bytes | None:
    """Decode a picture to 784 grey bytes, or None."""
    if len(content) > MAX_FILE or (content.startswith(PNG_START) and not content.startswith(PNG_START + SIZE)):
        return None
    try:
        with Image.open(io.BytesIO(content), formats=formats) as image:
            if image.mode not in MODES or image.size != (SIDE, SIDE):
                return None
            if image.has_transparency_data:
                return Image.fromarray(opaque(np.asarray(image.convert("RGBA"), np.float32))).convert("L").tobytes()
            return image.convert("L").tobytes()
    except BROKEN:
        return None
