"""Prepare notMNIST: decode it, clean it, split it.

The source is its tarballs or folders. Repeats and conflicts are removed. A seed determines the splits.

This is the reference experiment's recipe: train and val are the large set without exact repeats, 90/10. Test is the
small set without the images of train and val. If there is only one set, it is split 80/10/10. The result depends only
on the images and the seed, not on the order in which they are found. A tarball gives the same result as the folder that
is unpacked from it, links included.
"""

import concurrent.futures
import contextlib
import gzip
import hashlib
import http.client
import io
import lzma
import posixpath
import struct
import tarfile
import urllib.error
import urllib.request
import zlib
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from poolnet.data.dataset import LETTERS, SIDE, SPLITS
from poolnet.data.pictures import BROKEN, opaque
from poolnet.errors import InputError, RunError
from poolnet.files import expanded, home, regular, replacing, walk
from poolnet.process import cores
from poolnet.text import printable, progress

MIRRORS = ("http://yaroslavvb.com/upload/notMNIST/", "https://commondatastorage.googleapis.com/books1000/")
SIZES = {"notMNIST_large.tar.gz": 247_336_696, "notMNIST_small.tar.gz": 8_458_043}  # bytes
MAX_PNG = 1 << 16  # bytes; 28x28 grey pixels are 784, and the largest file of the originals has 2 kB
CHUNK = 512  # files handed to a worker process at once
PNG_START = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR" + struct.pack(">II", SIDE, SIDE)
FEW = 0.1  # of the median letter's images in a split: a letter of which something is missing
STAGES = ("files", "read", "distinct images")  # counts of what remains; the others are of what is left out
NOWHERE, OTHER = "links that lead nowhere, left out", "other files, left out"
MODES = ("1", "L", "LA", "P", "RGB", "RGBA")  # what becomes 8-bit grey without loss of range


@dataclass(frozen=True)
class Letters:
    """Decoded images with labels, digests and counts."""

    images: np.ndarray  # (N, 28, 28) uint8
    labels: np.ndarray  # (N,)
    keys: np.ndarray  # (N,), digests of the pixels
    counts: dict[str, int]  # what was counted on the way

    def take(self, rows: np.ndarray) -> "Letters":
        return Letters(self.images[rows], self.labels[rows], self.keys[rows], self.counts)


def prepare(large: Path | None, small: Path | None, seed: int) -> tuple[dict[str, np.ndarray], dict[str, dict]]:
    """Build the six arrays of notMNIST; count each source's steps.

    Both sources are downloaded if neither is given.
    """
    if large is None and small is None:
        large, small = (download(name) for name in SIZES)
    sources = {name: clean(read(path)) for name, path in (("large", large), ("small", small)) if path is not None}
    rng = np.random.default_rng(seed)
    if len(sources) == 2:
        train, val = _divide(sources["large"], (0.9,), rng)
        seen = np.isin(sources["small"].keys, sources["large"].keys)
        (test,) = _divide(sources["small"].take(np.flatnonzero(~seen)), (), rng)
        sources["small"].counts["also in train or val, dropped"] = int(seen.sum())
    else:
        ((name, letters),) = sources.items()
        train, val, test = _divide(letters, (0.8, 0.9), rng)
    arrays: dict[str, np.ndarray] = {}
    for name, letters in zip(SPLITS, (train, val, test), strict=True):
        arrays[f"X_{name}"], arrays[f"y_{name}"] = letters.images, letters.labels.astype(np.int64)
    counts = {name: letters.counts for name, letters in sources.items()}
    _refuse_empty(arrays, counts, " and ".join(str(path) for path in (large, small) if path))
    return arrays, counts


def _refuse_empty(arrays: dict[str, np.ndarray], counts: dict[str, dict], sources: str) -> None:
    empty = {name: "".join(LETTERS[n] for n in np.flatnonzero(per_letter(arrays, name) == 0)) for name in SPLITS}
    if any(empty.values()):
        absent = ", ".join(f"no {' '.join(letters)} in {name}" for name, letters in empty.items() if letters)
        lost = [f"{n:,} {step}" for column in counts.values() for step, n in column.items() if n and step not in STAGES]
        raise InputError(
            f"{sources}: found too few distinct letters, {absent}, expected each of A to J in train, val and test"
            + (f" ({'; '.join(lost)})" if lost else "")
        )


def per_letter(arrays: dict[str, np.ndarray], split: str) -> np.ndarray:
    """Count a split's images by letter: (10,)."""
    return np.bincount(arrays[f"y_{split}"], minlength=len(LETTERS))


def scarce(arrays: dict[str, np.ndarray]) -> Iterator[str]:
    """Yield one line for each letter with few images."""
    numbers = {name: per_letter(arrays, name) for name in SPLITS}
    for n, letter in enumerate(LETTERS):
        if few := [name for name in SPLITS if numbers[name][n] < FEW * np.median(numbers[name])]:
            parts = (f"{numbers[name][n]:,} in {name} (median {np.median(numbers[name]):,.0f})" for name in few)
            yield f"letter {letter}: found {', '.join(parts)}; see whether its folder is complete"


def read(path: Path) -> Letters:
    """Decode every `A..J/*.png` of a tarball or a folder.

    All cores are used. Files that cannot be read are skipped and counted.
    """
    path = expanded(path)
    if not path.is_dir():
        regular(path, "a notMNIST tarball, or a folder")
    skipped: Counter[str] = Counter()
    files = _folder_files(path, skipped) if path.is_dir() else _tar_files(path, skipped)
    chunks = iter(lambda: tuple(islice(files, CHUNK)), ())
    with progress(_on_all_cores(_decode, chunks), label=f"Decoding {printable(path.name)}") as bar:
        parts: list[Letters] = list(bar)
    if not any(len(part.labels) for part in parts):
        others = "".join(f", {n:,} {kind}" for kind, n in (+skipped).items())
        raise InputError(f"{path}: found no readable letter{others}, expected 28x28 PNG files in folders A to J")
    columns = zip(*((part.images, part.labels, part.keys) for part in parts), strict=True)
    images, labels, keys = map(np.concatenate, columns)
    total = sum(part.counts["files"] for part in parts)
    counts = {"files": total, "unreadable or not 28x28, skipped": total - len(labels), **+skipped, "read": len(labels)}
    return Letters(images, labels, keys, counts)


def clean(letters: Letters) -> Letters:
    """Keep each distinct image once and drop conflicts.

    The result is in the order of the digests. Images with two labels are dropped completely.
    """
    keys, first, group = np.unique(letters.keys, return_index=True, return_inverse=True)
    low = np.full(len(keys), len(LETTERS))
    high = np.zeros(len(keys), int)
    np.minimum.at(low, group, letters.labels)
    np.maximum.at(high, group, letters.labels)
    counts = {
        **letters.counts,
        "exact repeats, dropped": len(letters.labels) - len(keys),
        "distinct images": len(keys),
        "with conflicting labels, dropped": int((low != high).sum()),
    }
    return replace(letters.take(first[low == high]), counts=counts)


def table(arrays: dict[str, np.ndarray], counts: dict[str, dict]) -> str:
    """Return the counts as a table for a terminal.

    Each step has a column for each source. Each letter has a column for each split. The last line has the sizes of the
    splits.
    """
    rows: list[tuple[str, ...]] = [("", *counts)]
    for step in dict.fromkeys(step for column in counts.values() for step in column):
        rows.append((step, *(f"{column[step]:,}" if step in column else "" for column in counts.values())))
    rows.append(("", *SPLITS))
    columns = [LETTERS, *([f"{n:,}" for n in per_letter(arrays, name)] for name in SPLITS)]
    rows += zip(*columns, strict=True)
    lines = [f"{name:33}" + "".join(f"{cell:>9}" for cell in cells) for name, *cells in rows]
    sizes = (f"{name} {len(arrays[f'y_{name}']):,}" for name in SPLITS)
    return "\n".join([*lines, "splits: " + ", ".join(sizes)])


def _divide(letters: Letters, shares: tuple[float, ...], rng: np.random.Generator) -> list[Letters]:
    """Shuffle the letters, then cut them into parts.

    `shares` are the places of the cuts, as fractions of the whole.
    """
    n = len(letters.labels)
    return [letters.take(rows) for rows in np.split(rng.permutation(n), [round(share * n) for share in shares])]


# --- reading and decoding --------------------------------------------------------------------------------------------


File = tuple[int, bytes]  # label and content, which is empty for a file that is too long to be a letter


def _folder_files(path: Path, skipped: Counter[str]) -> Iterator[File]:
    """Yield each letter below a folder; count what is skipped."""
    for file in walk(path):
        label = _label(PurePosixPath(*file.relative_to(path.parent).parts))
        if file.is_symlink() and not file.exists():
            skipped[NOWHERE] += 1
        elif label is None:
            skipped[OTHER] += 1
        else:
            yield label, file.read_bytes() if file.is_file() and file.stat().st_size <= MAX_PNG else b""


def _tar_files(path: Path, skipped: Counter[str]) -> Iterator[File]:
    """Yield each letter of a tarball; count what is skipped."""
    links = defaultdict(list)  # by what they lead to
    try:
        for name, entry, content in _entries(path):
            if entry.issym() or entry.islnk():
                target = name.parent / entry.linkname if entry.issym() else entry.linkname
                links[_normal(target)].append(name)
            elif entry.isfile():
                yield from _letters([name], content, skipped)
        if links:
            yield from _linked_files(path, links, skipped)
    except (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        if isinstance(error, OSError) and error.errno:  # not of what is in the file
            raise RunError(f"{path}: cannot be read ({error.strerror})") from None
        raise InputError(f"{path}: not a whole tarball ({error}), expected notMNIST's .tar.gz or a folder") from None


def _linked_files(path: Path, links: dict[PurePosixPath, list[PurePosixPath]], skipped: Counter[str]) -> Iterator[File]:
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
            new = {(_label(each), each.name): each for each in names}
            yield from _letters([new[key] for key in new.keys() - {(_label(name), name.name)}], content, skipped)
    skipped[NOWHERE] += sum(not _is_hidden(link) for group in links.values() for link in group if link not in used)


def _letters(names: list[PurePosixPath], content: Callable[[], bytes], skipped: Counter[str]) -> Iterator[File]:
    """Yield a tarball's file once for each name.

    Names that are not those of a letter are counted in `skipped`. Hidden names are left out.
    """
    labels = [_label(name) for name in names if not _is_hidden(name)]
    skipped[OTHER] += labels.count(None)
    if any(label is not None for label in labels):
        letter = content()
        yield from ((label, letter) for label in labels if label is not None)


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
    return file.read() if entry.size <= MAX_PNG else b""


def _normal(name: str | PurePosixPath) -> PurePosixPath:
    return PurePosixPath(posixpath.normpath(name))


def _is_hidden(path: PurePosixPath) -> bool:
    return any(part.startswith(".") and part != ".." for part in path.parts)


def _label(path: PurePosixPath) -> int | None:
    if path.suffix.lower() != ".png" or path.parent.name not in set(LETTERS):
        return None
    return LETTERS.index(path.parent.name)


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


def _decode(files: tuple[File, ...]) -> Letters:
    """Decode the readable letters among some files."""
    decoded = [(label, image) for label, content in files if (image := _pixels(content)) is not None]
    labels = np.array([label for label, _ in decoded], np.int64)
    images = np.frombuffer(b"".join(image for _, image in decoded), np.uint8).reshape(-1, SIDE, SIDE)
    keys = b"".join(hashlib.blake2b(image, digest_size=16).digest() for _, image in decoded)
    return Letters(images, labels, np.frombuffer(keys, "V16"), {"files": len(files)})


def _pixels(content: bytes) -> bytes | None:
    """Decode a PNG to 784 grey bytes, or None."""
    if len(content) > MAX_PNG or not content.startswith(PNG_START):
        return None
    try:
        with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
            if image.mode not in MODES:
                return None
            if image.has_transparency_data:
                return Image.fromarray(opaque(np.asarray(image.convert("RGBA"), np.float32))).convert("L").tobytes()
            return image.convert("L").tobytes()
    except BROKEN:
        return None


# --- downloading -----------------------------------------------------------------------------------------------------


def download(name: str, mirrors: tuple[str, ...] = MIRRORS, sizes: dict[str, int] = SIZES) -> Path:
    """Return the tarball `name`, downloaded if it is missing.

    It is kept in the local state. If the first mirror fails, the next one is used. Raises `InputError` if all fail.
    """
    target = home() / "downloads" / name
    if target.exists() and target.stat().st_size == sizes[name]:
        return target
    failures = []
    for mirror in mirrors:
        try:
            _fetch(mirror + name, target, sizes[name])
            return target
        except (urllib.error.URLError, ConnectionError, TimeoutError, http.client.HTTPException, ValueError) as error:
            failures.append(f"{mirror} ({getattr(error, 'reason', error)})")
    option = "large" if "large" in name else "small"
    raise InputError(
        f"{name}: could not be downloaded from {' or '.join(failures)}; get it on a machine with a network and "
        f"pass it with --{option}"
    )


def _fetch(url: str, target: Path, size: int) -> None:
    """Download `url` to `target`; raise `ValueError` for a wrong size."""
    with urllib.request.urlopen(url, timeout=30) as response, replacing(target) as part:
        with part.open("wb") as file, progress(length=size, label=f"Downloading {target.name}") as bar:
            while file.tell() <= size and (data := response.read(1 << 16)):
                file.write(data)
                bar.update(len(data))
        if part.stat().st_size != size:
            raise ValueError(f"found {part.stat().st_size:,} bytes, expected {size:,}")
