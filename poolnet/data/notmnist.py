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
from dataclasses import dataclass
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
    """Decoded images with labels, digests and counts.

    `images` is (N, 28, 28) uint8, `labels` is (N,) and `keys` is (N,), the digests of the pixels. `counts` holds what
    was counted on the way.
    """

    images: np.ndarray
    labels: np.ndarray
    keys: np.ndarray
    counts: dict[str, int]

    def take(self, rows: np.ndarray) -> "Letters":
        return Letters(self.images[rows], self.labels[rows], self.keys[rows], self.counts)


def prepare(large: Path | None, small: Path | None, seed: int) -> tuple[dict[str, np.ndarray], dict[str, dict]]:
    """Build the six arrays of notMNIST, with counts.

    The counts are those of each step, for each source. Both sources are downloaded if neither is given.
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
    arrays = {}
    for name, letters in zip(SPLITS, (train, val, test), strict=True):
        arrays[f"X_{name}"], arrays[f"y_{name}"] = letters.images, letters.labels.astype(np.int64)
    counts = {name: letters.counts for name, letters in sources.items()}
    _refuse_empty(arrays, counts, " and ".join(str(path) for path in (large, small) if path))
    return arrays, counts


def _refuse_empty(arrays: dict[str, np.ndarray], counts: dict[str, dict], sources: str) -> None:
    empty = {name: "".join(LETTERS[n] for n in np.flatnonzero(per_letter(arrays, name) == 0)) for name in SPLITS}
    if any(empty.values()):
        found = ", ".join(f"no {' '.join(letters)} in {name}" for name, letters in empty.items() if letters)
        lost = [f"{n:,} {step}" for column in counts.values() for step, n in column.items() if n and step not in STAGES]
        raise InputError(
            f"{sources}: found too few distinct letters, {found}, expected each of A to J in train, val and test"
            + (f" ({'; '.join(lost)})" if lost else "")
        )


def per_letter(arrays: dict[str, np.ndarray], split: str) -> np.ndarray:
    """Count the images of A to J in a split.

    The result is (10,).
    """
    return np.bincount(arrays[f"y_{split}"], minlength=len(LETTERS))


def scarce(arrays: dict[str, np.ndarray]) -> Iterator[str]:
    """Yield a warning for each letter with few images.

    Each warning is one line. It tells the user to check the folder of the letter, which may be incomplete.
    """
    numbers = {name: per_letter(arrays, name) for name in SPLITS}
    for n, letter in enumerate(LETTERS):
        if few := [name for name in SPLITS if numbers[name][n] < FEW * np.median(numbers[name])]:
            found = ", ".join(
                f"{numbers[name][n]:,} in {name} (median {np.median(numbers[name]):,.0f})" for name in few
            )
            yield f"letter {letter}: found {found}; see whether its folder is complete"


def read(path: Path) -> Letters:
    """Decode every `A..J/*.png` of a tarball or a folder.

    All cores are used. Files that cannot be read are skipped and counted.
    """
    path = expanded(path)
    if not path.is_dir():
        regular(path, "a notMNIST tarball, or a folder")
    left: Counter[str] = Counter()
    files = _folder_files(path, left) if path.is_dir() else _tar_files(path, left)
    labels, images, keys, unreadable = [], [], [], 0
    chunks = iter(lambda: tuple(islice(files, CHUNK)), ())
    with progress(_on_all_cores(_decode, chunks), label=f"Decoding {printable(path.name)}") as parts:
        for part in parts:
            labels.append(part[0])
            images.append(part[1])
            keys.append(part[2])
            unreadable += part[3]
    if not any(map(len, labels)):
        found = "".join(f", {n:,} {kind}" for kind, n in (+left).items())
        raise InputError(f"{path}: found no readable letter{found}, expected 28x28 PNG files in folders A to J")
    decoded = np.concatenate(labels)
    counts = {"files": len(decoded) + unreadable, "unreadable or not 28x28, skipped": unreadable, **+left}
    counts["read"] = len(decoded)
    return Letters(np.concatenate(images), decoded, np.concatenate(keys), counts)


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
    kept = letters.take(first[low == high])
    return Letters(kept.images, kept.labels, kept.keys, counts)


def table(arrays: dict[str, np.ndarray], counts: dict[str, dict]) -> str:
    """Return the counts as a table for a terminal.

    Each step has a column for each source. Each letter has a column for each split. The last line has the sizes of the
    splits.
    """
    steps = list(dict.fromkeys(step for column in counts.values() for step in column))
    lines = [f"{'':34}" + "".join(f"{name:>10}" for name in counts)]
    for step in steps:
        cells = (f"{column[step]:,}" if step in column else "" for column in counts.values())
        lines.append(f"{step:34}" + "".join(f"{cell:>10}" for cell in cells))
    lines.append(f"{'':34}" + "".join(f"{name:>10}" for name in SPLITS))
    for letter, numbers in zip(LETTERS, zip(*(per_letter(arrays, name) for name in SPLITS), strict=True), strict=True):
        lines.append(f"{letter:34}" + "".join(f"{n:>10,}" for n in numbers))
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


def _folder_files(path: Path, left: Counter) -> Iterator[File]:
    """Yield each letter below a folder.

    All other files there are counted in `left`.
    """
    for file in walk(path):
        label = _label(PurePosixPath(*file.relative_to(path.parent).parts))
        if file.is_symlink() and not file.exists():
            left[NOWHERE] += 1
        elif label is None:
            left[OTHER] += 1
        else:
            yield label, file.read_bytes() if file.is_file() and file.stat().st_size <= MAX_PNG else b""


def _tar_files(path: Path, left: Counter) -> Iterator[File]:
    """Yield each letter in a tarball, without extracting it.

    The tarball is read as a stream. All other entries are counted in `left`.
    """
    links = defaultdict(list)  # by what they lead to
    try:
        for name, entry, content in _entries(path):
            if entry.issym() or entry.islnk():
                target = name.parent / entry.linkname if entry.issym() else entry.linkname
                links[_normal(target)].append(name)
            elif entry.isfile():
                yield from _letters([name], content, left)
        if links:
            yield from _linked_files(path, links, left)
    except (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        if isinstance(error, OSError) and error.errno:  # not of what is in the file
            raise RunError(f"{path}: cannot be read ({error.strerror})") from None
        raise InputError(f"{path}: not a whole tarball ({error}), expected notMNIST's .tar.gz or a folder") from None


def _linked_files(path: Path, links: dict[PurePosixPath, list[PurePosixPath]], left: Counter) -> Iterator[File]:
    """Yield the files that links of a tarball lead to.

    The tarball is read once more from its beginning.
    """
    used = set()
    for name, entry, content in _entries(path):
        if entry.issym() or entry.islnk():
            continue
        names, here = [name], set()
        for known in names:  # which grows, where links lead to links
            for place in (known, *known.parents):
                for link in links.get(place, ()):
                    if link not in here:  # each once, or one that leads back would have no end
                        here.add(link)
                        names.append(link / known.relative_to(place))
        used |= here
        if here and entry.isfile():
            counted = {(_label(name), name.name)}
            new = {(_label(each), each.name): each for each in names}
            yield from _letters([new[key] for key in new.keys() - counted], content, left)
    left[NOWHERE] += sum(not _is_hidden(link) for group in links.values() for link in group if link not in used)


def _letters(names: list[PurePosixPath], content: Callable[[], bytes], left: Counter) -> Iterator[File]:
    """Yield a tarball's file once for each name.

    Names that are not those of a letter are counted in `left`. Hidden names are left out.
    """
    labels = [_label(name) for name in names if not _is_hidden(name)]
    left[OTHER] += labels.count(None)
    if any(label is not None for label in labels):
        letter = content()
        yield from ((label, letter) for label in labels if label is not None)


def _entries(path: Path) -> Iterator[tuple[PurePosixPath, tarfile.TarInfo, Callable[[], bytes]]]:
    """Yield name, header and content of each tarball member.

    The content is a function that reads it. The tarball is read to its end, where its checksum stands.
    """
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(path.open("rb"))
        is_gzip = file.peek(2)[:2] == b"\x1f\x8b"  # tarfile's own stream would not compare gzip's checksum
        stream = stack.enter_context(gzip.open(file)) if is_gzip else file
        with tarfile.open(fileobj=stream, mode="r|*") as tar:
            for entry in tar:
                yield _normal(entry.name), entry, partial(_content, tar, entry)
        while stream.read(1 << 20):  # the checksum stands at the end
            pass


def _content(tar: tarfile.TarFile, entry: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(entry) if entry.size <= MAX_PNG else None
    return file.read() if file else b""


def _normal(name: str | PurePosixPath) -> PurePosixPath:
    return PurePosixPath(posixpath.normpath(name))


def _is_hidden(path: PurePosixPath) -> bool:
    return any(part.startswith(".") and part != ".." for part in path.parts)


def _label(path: PurePosixPath) -> int | None:
    if path.suffix.lower() != ".png" or path.parent.name not in set(LETTERS):
        return None
    return LETTERS.index(path.parent.name)


def _on_all_cores(work, items: Iterable) -> Iterator:
    """Yield `work(item)` for each item, in order.

    Worker processes do the work. No more items are pending than the workers can take soon.
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


def _decode(files: tuple[tuple[int, bytes], ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Decode the letters of some files.

    Returns labels, images and digests of the readable files, and the number of the others.
    """
    labels, images = [], []
    for label, content in files:
        image = _pixels(content)
        if image is not None:
            labels.append(label)
            images.append(image)
    keys = [hashlib.blake2b(image, digest_size=16).digest() for image in images]
    stack = np.frombuffer(b"".join(images), np.uint8).reshape(-1, SIDE, SIDE)
    return np.array(labels, np.int64), stack, np.frombuffer(b"".join(keys), "V16"), len(files) - len(images)


def _pixels(content: bytes) -> bytes | None:
    """Decode a PNG to 784 grey bytes, or None.

    Size and dimensions are checked before anything is decoded.
    """
    if len(content) > MAX_PNG or not content.startswith(PNG_START):
        return None
    try:
        with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
            if image.mode not in MODES:
                return None
            if not image.has_transparency_data:
                return image.convert("L").tobytes()
            on_ground = opaque(np.asarray(image.convert("RGBA"), np.float32))
            return Image.fromarray(on_ground).convert("L").tobytes()
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
    """Download `url` to `target` and check its size.

    The file is complete or is not created. Raises `ValueError` if the size is wrong.
    """
    with urllib.request.urlopen(url, timeout=30) as response, replacing(target) as part:
        with part.open("wb") as file, progress(length=size, label=f"Downloading {target.name}") as bar:
            while file.tell() <= size and (data := response.read(1 << 16)):
                file.write(data)
                bar.update(len(data))
        if part.stat().st_size != size:
            raise ValueError(f"found {part.stat().st_size:,} bytes, expected {size:,}")
