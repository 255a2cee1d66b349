"""Open a data set: six arrays in an `.npz`, validated, digested and memory-mapped.

The format is the notebook's: `X_train y_train X_val y_val X_test y_test`, X (N, 1, 28, 28) or (N, 28, 28), uint8 or
float, y (N,) integers 0..9 for A..J. No image array is ever read whole.
"""

import hashlib
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from filelock import FileLock

from poolnet import npz
from poolnet.config import InputError, home
from poolnet.files import replacing

LETTERS = "ABCDEFGHIJ"
SIDE = 28  # pixels
SPLITS = ("train", "val", "test")
FLOAT_LIMIT = 10.0  # standardised pixels stay well inside; forgotten scaling, 0..255, does not
DIGEST_VERSION = 1  # of what is hashed; raised when that changes, so that nothing stale is remembered


@dataclass(frozen=True)
class Split:
    """`X` (N, 28, 28) uint8 or float, usually a memory map; `y` (N,) int64; `sha256` over the whole of both."""

    name: str
    X: np.ndarray
    y: np.ndarray
    sha256: str

    def __len__(self) -> int:
        return len(self.y)

    def images(self, rows: slice | np.ndarray) -> np.ndarray:
        """Those images as a model takes them, see `as_images`."""
        return as_images(self.X[rows])


@dataclass(frozen=True)
class Splits:
    """A data set: its file, its three splits, and how many test images also occur in train."""

    path: Path
    train: Split
    val: Split
    test: Split
    overlap: int

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def sha256(self) -> str:
        """One digest for the three."""
        return hashlib.sha256("".join(split.sha256 for split in self).encode()).hexdigest()

    def described(self) -> dict:
        """What the record of a run says of the data."""
        return {
            "path": str(self.path),
            "name": self.name,
            "sha256": self.sha256,
            "overlap": self.overlap,
            "splits": [
                {"name": split.name, "sha256": split.sha256, "shape": list(split.X.shape), "dtype": str(split.X.dtype)}
                for split in self
            ],
        }

    def __iter__(self) -> Iterator[Split]:
        return iter((self.train, self.val, self.test))


def prepared(name: str) -> Path:
    """Where the data set NAME is kept unless its maker was told otherwise."""
    return home() / "data" / f"{name}.npz"


def locate(data: str, say: Callable[[str], None] = lambda line: None) -> Path:
    """The file behind `--data`: `glyphs` (rendered when first asked for), `notmnist`, or a path."""
    if data == "glyphs":
        return _rendered_glyphs(say)
    if data == "notmnist" and not prepared(data).exists():
        raise InputError(f"{prepared(data)}: not there yet; make it with: poolnet prepare notmnist")
    return prepared(data) if data == "notmnist" else Path(data)


Watch = Callable[[str, int, int, np.ndarray], None]  # told of each window: split, its size, first row, pixels


def open_splits(path: Path, watch: Watch = lambda name, size, start, window: None) -> Splits:
    """Open, validate and digest. Raises `InputError` with file, key, what was found and what was expected.

    A file that was not seen before is read once from end to end, and `watch` sees its pixels on the way.
    """
    path = Path(path).absolute()
    with npz.opened(path) as archive:
        stamp = {"version": DIGEST_VERSION, "size": path.stat().st_size, "mtime_ns": path.stat().st_mtime_ns}
        members = {name: _image_member(npz.member(archive, path, f"X_{name}")) for name in SPLITS}
        labels = {name: _read_labels(npz.member(archive, path, f"y_{name}")) for name in SPLITS}
        for name in SPLITS:
            if len(labels[name]) != members[name].shape[0]:
                raise InputError(
                    f"{path}: y_{name}: found {len(labels[name]):,} labels, expected {members[name].shape[0]:,}, "
                    f"one for each image of X_{name}"
                )
        images = {name: members[name].map().reshape(-1, SIDE, SIDE) for name in SPLITS}
        record = _remembered(path, stamp)
        if record is None:
            record = {**stamp, **_scan(members, images, labels, watch)}
            _remember(path, record)
    splits = (Split(name, images[name], labels[name], record["sha256"][name]) for name in SPLITS)
    return Splits(path, *splits, overlap=record["overlap"])


def windows(X: np.ndarray, size: int = npz.ROWS) -> Iterator[np.ndarray]:
    """Successive rows of `X`, an array or a whole map, `size` at a time.

    Rows of a map come as small maps that die with their use: read through one long-lived map, pages would stay
    resident until the whole file is.
    """
    root = X
    while isinstance(root.base, np.memmap):
        root = root.base
    assert root.nbytes == X.nbytes or not isinstance(X, np.memmap), "a part of a map keeps the whole map's offset"
    for start in range(0, len(X), size):
        stop = min(start + size, len(X))
        if isinstance(X, np.memmap):
            offset = X.offset + start * X.strides[0]
            yield np.memmap(X.filename, X.dtype, "r", offset, (stop - start, *X.shape[1:]))
        else:
            yield X[start:stop]


def digest(X: np.ndarray, y: np.ndarray) -> str:
    """The SHA-256 of a split: its type and size, its pixels, its labels; the same on every machine."""
    sha = hashlib.sha256()
    for _ in _hashed(X, y, sha):
        pass
    return sha.hexdigest()


def _rendered_glyphs(say: Callable[[str], None]) -> Path:
    from poolnet import glyphs

    path = prepared(f"glyphs-v{glyphs.VERSION}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):  # two processes at once share one rendering
        if not path.exists():
            say(f"Rendering the embedded letters into {path} (once) ...")
            npz.save(path, glyphs.render())
    return path


# --- validation ----------------------------------------------------------------------------------------------------


def _image_member(member: npz.Member) -> npz.Member:
    shape, dtype = member.shape, member.dtype
    if shape[1:] not in ((SIDE, SIDE), (1, SIDE, SIDE)):
        raise InputError(
            f"{member.path}: {member.key}: found shape {shape}, expected (N, 1, {SIDE}, {SIDE}) or (N, {SIDE}, {SIDE})"
        )
    if shape[0] < 1:
        raise InputError(f"{member.path}: {member.key}: found no images, expected at least one")
    if dtype != np.uint8 and not (dtype.kind == "f" and dtype.itemsize <= 8):
        raise InputError(f"{member.path}: {member.key}: found {dtype} pixels, expected uint8 or float32")
    return member


def _read_labels(member: npz.Member) -> np.ndarray:
    """The labels, (N,) int64."""
    if len(member.shape) != 1:
        raise InputError(f"{member.path}: {member.key}: found shape {member.shape}, expected (N,)")
    if member.dtype.kind not in "iu":
        raise InputError(f"{member.path}: {member.key}: found {member.dtype} labels, expected integers 0..9")
    y = member.read()
    if len(y) and not (y.min() >= 0 and y.max() < len(LETTERS)):
        raise InputError(f"{member.path}: {member.key}: found labels {y.min()}..{y.max()}, expected 0..9 for A..J")
    return y.astype(np.int64)


def _scan(
    members: dict[str, npz.Member], images: dict[str, np.ndarray], labels: dict[str, np.ndarray], watch: Watch
) -> dict:
    """One pass over every pixel: range, checksum, SHA-256, and the test images that train holds too."""
    one_type = len({member.dtype for member in members.values()}) == 1
    in_test: dict[int, int] = {}  # by 64-bit hash: among 400,000 x 14,000 images a false match has a chance of 3e-10
    shared: set[int] = set()
    sha256 = {}
    for name in reversed(SPLITS):  # test first: its images are to be known when train passes by
        sha, crc = hashlib.sha256(), zlib.crc32(members[name].header)
        for index, window in enumerate(_hashed(images[name], labels[name], sha)):
            _check_range(members[name], window)
            crc = zlib.crc32(window, crc)
            watch(name, len(images[name]), index * npz.ROWS, window)
            if name == "val":
                continue
            for image in window if one_type else as_images(window):
                key = hash(image.tobytes())
                if name == "test":
                    in_test[key] = in_test.get(key, 0) + 1
                elif key in in_test:
                    shared.add(key)
        if members[name].in_place:
            members[name].check(crc)
        sha256[name] = sha.hexdigest()
    return {"sha256": sha256, "overlap": sum(in_test[key] for key in shared)}


def _hashed(X: np.ndarray, y: np.ndarray, sha: "hashlib._Hash") -> Iterator[np.ndarray]:
    """The windows of `X`, each added to `sha` as it passes; the labels are added after the last."""
    little = X.dtype.newbyteorder("<")
    sha.update(f"{little.str} {len(X)}x{SIDE}x{SIDE}\n".encode())
    for window in windows(X):
        sha.update(np.ascontiguousarray(window, little))
        yield window
    sha.update(np.ascontiguousarray(y, "<i8"))


def _check_range(member: npz.Member, window: np.ndarray) -> None:
    if window.dtype == np.uint8:
        return
    low, high = window.min(), window.max()  # a NaN anywhere becomes both
    if not (np.isfinite(low) and np.isfinite(high)):
        raise InputError(f"{member.path}: {member.key}: found NaN or infinity, expected finite pixels")
    if max(-low, high) > FLOAT_LIMIT:
        raise InputError(
            f"{member.path}: {member.key}: found {window.dtype} pixels from {low:g} to {high:g}, expected "
            f"{-FLOAT_LIMIT:g}..{FLOAT_LIMIT:g}; divide them by 255 or store them as uint8"
        )


def as_images(x: np.ndarray) -> np.ndarray:
    """Stored pixels as a model takes them: float32 (n, 1, 28, 28), uint8 divided by 255."""
    images = x.reshape(-1, 1, SIDE, SIDE).astype(np.float32)
    if x.dtype == np.uint8:
        images /= 255
    return images


# --- what is remembered of a file, so that it is scanned once ---------------------------------------------------------


def _records() -> dict[str, dict]:
    try:
        return json.loads((home() / "digests.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):  # absent or damaged: what it would say is worked out again
        return {}


def _remembered(path: Path, stamp: dict) -> dict | None:
    record = _records().get(str(path), {})
    return record if stamp.items() <= record.items() else None


def _remember(path: Path, record: dict) -> None:
    records = {known: value for known, value in _records().items() if Path(known).exists()}
    with replacing(home() / "digests.json") as part:
        part.write_text(json.dumps({**records, str(path): record}, indent=1), encoding="utf-8")
