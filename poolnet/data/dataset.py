"""Open, validate and digest a data set in one pass.

A data set is an `.npz` with six arrays, in the format of the notebook: `X_train y_train X_val y_val X_test y_test`. X
is (N, 1, 28, 28) or (N, 28, 28), uint8 or float. y is (N,), integers 0..9 for A..J. Groups of images and names of
classes are optional (see `annotations`). The digest is computed while the pixels are read, so it belongs to what the
model sees: nothing is read from the file again.
"""

import contextlib
import hashlib
import itertools
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from poolnet.data import annotations, npz
from poolnet.errors import InputError, RunError
from poolnet.files import Locked, expanded, home, locked
from poolnet.text import Echo

LETTERS = annotations.LETTERS
SIDE = 28  # pixels
SPLITS = ("train", "val", "test")
FLOAT_LIMIT = 10.0  # standardised pixels stay well inside; forgotten scaling, 0..255, does not
NARROW = 0.1  # of black to white: pixels that were divided twice, or of which 1 means white in uint8
SAMPLE, ENOUGH = 200, 10  # images of a split by which its scale is judged, and the fewest that tell what is not there
PATIENCE = 600  # seconds for another process that renders the embedded letters, which takes some ten


@dataclass(frozen=True)
class Split:
    """One split: its images, its labels and their digest."""

    name: str
    X: np.ndarray | None  # (N, 28, 28), uint8 or float; None if the images were not kept
    y: np.ndarray  # (N,) int64
    sha256: str  # of all images and labels
    dtype: str = ""  # of the pixels as stored
    group: np.ndarray | None = None  # (N,) int64, what belongs together; None if the file does not say

    def __len__(self) -> int:
        return len(self.y)

    def images(self, rows: slice | np.ndarray) -> np.ndarray:
        """Return images in the form a model takes (see `as_images`)."""
        assert self.X is not None
        return as_images(self.X[rows])


@dataclass(frozen=True)
class Dataset:
    """A data set: its file and its three splits."""

    path: Path
    train: Split
    val: Split
    test: Split
    overlap: int  # test images that occur in train
    sha256: str = ""  # of all that the file holds: images, labels, groups and names
    images_sha256: str = ""  # of images and labels alone, as all files were known before there were groups
    group_names: tuple[str, ...] = ()
    classes: tuple[str, ...] = tuple(LETTERS)

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def thing(self) -> str:
        """What a class is called: a letter, or a class."""
        return "letter" if self.classes == tuple(LETTERS) else "class"

    @property
    def things(self) -> str:
        """What the images are called."""
        return "letters" if self.classes == tuple(LETTERS) else "images"

    @property
    def groups(self) -> int:
        """Count the groups, of which there are none in many files."""
        return len(set().union(*(split.group.tolist() for split in self if split.group is not None)))

    @property
    def crossing(self) -> int:
        """Count the groups that occur in more than one split."""
        places = Counter(number for split in self if split.group is not None for number in set(split.group.tolist()))
        return sum(n > 1 for n in places.values())

    def warnings(self) -> list[str]:
        """Say what makes test letters less new than they seem."""
        found = []
        if self.overlap:
            found.append(f"{self.path}: {self.overlap:,} of {len(self.test):,} test images also occur in train")
        if self.crossing:
            found.append(f"{self.path}: {self.crossing:,} of {self.groups:,} groups are in more than one split")
        return found

    def is_recorded_as(self, sha256: str) -> bool:
        """Whether a recorded digest means these images.

        It may be of a time when the file had no groups and names.
        """
        return sha256 in (self.sha256, self.images_sha256)

    def summary(self) -> dict:
        """Return what a run record stores about the data."""
        extra: dict = {"classes": list(self.classes)} if self.classes != tuple(LETTERS) else {}
        groups = {split.name: len(np.unique(split.group)) for split in self if split.group is not None}
        if groups:
            extra["groups"] = {**groups, "all": self.groups, "crossing": self.crossing}
        return {
            "path": str(self.path),
            "name": self.name,
            "sha256": self.sha256,
            "overlap": self.overlap,
            "splits": [
                {"name": split.name, "sha256": split.sha256, "shape": [len(split), SIDE, SIDE], "dtype": split.dtype}
                for split in self
            ],
            **extra,
        }

    def __iter__(self) -> Iterator[Split]:
        return iter((self.train, self.val, self.test))


def prepared(name: str) -> Path:
    """Return where `poolnet prepare` writes a data set by default."""
    return home() / "data" / f"{name}.npz"


def locate(data: str, echo: Echo = lambda line: None) -> Path:
    """Return the file that `--data` stands for.

    `data` is `glyphs`, `notmnist` or a path. The glyphs are rendered when they are first asked for.
    """
    if not data.strip():
        raise InputError("--data: found an empty text, expected glyphs, notmnist, or the path of an .npz file")
    if data == "glyphs":
        return _rendered_glyphs(echo)
    if data == "notmnist" and not prepared(data).exists():
        raise InputError(f"{prepared(data)}: not there yet; make it with: poolnet prepare notmnist")
    return prepared(data) if data == "notmnist" else expanded(Path(data))


def check(data: str) -> None:
    """Raise `InputError` if a data set has no file.

    `data` is as for `locate`. The glyphs need no file, since they are rendered.
    """
    if data != "glyphs":
        npz.check(locate(data).absolute())


def open_data(data: str | Path = "glyphs") -> Dataset:
    """Open a data set by its name or path.

    As for `--data`, that is `glyphs`, `notmnist`, or the path of an `.npz`. Raises `InputError`.
    """
    return open_dataset(locate(str(data)))


Watch = Callable[[str, int, int, np.ndarray], None]  # told of each block: split, its size, first row, pixels


def open_dataset(
    path: Path, keep: Collection[str] = SPLITS, watch: Watch = lambda name, size, start, block: None
) -> Dataset:
    """Read, validate and digest a data set file once.

    The images of the splits in `keep` are kept. `watch` sees all pixels during the reading, so what it computes belongs
    to the same bytes as the digest. Raises `InputError` with file, key, what was found and what was expected.
    """
    path = Path(path).absolute()
    if str(path) != str(path).encode(errors="replace").decode():
        raise InputError(f"{path}: found a name that is not UTF-8, which no tracking server stores; rename it")
    with npz.opened(path) as archive:
        members = {name: _image_member(npz.member(archive, path, f"X_{name}")) for name in SPLITS}
        labels = {name: _read_labels(npz.member(archive, path, f"y_{name}")) for name in SPLITS}
        for name in SPLITS:
            if len(labels[name]) != members[name].shape[0]:
                raise InputError(
                    f"{path}: y_{name}: found {len(labels[name]):,} labels, expected {members[name].shape[0]:,}, "
                    f"one for each image of X_{name}"
                )
        extra = annotations.read(archive, path, {name: len(labels[name]) for name in SPLITS})
        overlap = _Overlap(one_type=len({member.dtype for member in members.values()}) == 1)
        scale = _Scale(members)
        splits = {}
        for name in reversed(SPLITS):  # test first: its images are to be known when train passes by
            watchers = [scale.see, watch, overlap.see]
            split = _read_split(name, members[name], labels[name], name in keep, watchers)
            splits[name] = replace(split, group=extra.groups.get(name))
    scale.check()
    images_sha256 = hashlib.sha256("".join(splits[name].sha256 for name in SPLITS).encode()).hexdigest()
    return Dataset(
        path,
        **splits,
        overlap=overlap.count(),
        sha256=extra.digest(images_sha256),
        images_sha256=images_sha256,
        group_names=extra.group_names,
        classes=extra.classes,
    )


def _rendered_glyphs(echo: Echo) -> Path:
    from poolnet.data import glyphs

    path = prepared(f"glyphs-v{glyphs.VERSION}")
    lock = path.with_suffix(".lock")
    with contextlib.ExitStack() as stack:  # two processes at once share one rendering
        try:
            stack.enter_context(locked(lock))
        except Locked as error:
            echo(f"Waiting for the embedded letters: {error}")
            stack.enter_context(locked(lock, PATIENCE))
        try:
            open_dataset(path, keep=())
        except InputError:  # missing or damaged
            echo(f"Rendering the embedded letters into {path} ...")
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
        cure = "; store X.astype(np.uint8)" if dtype.kind in "iu" else ""
        raise InputError(f"{member.path}: {member.key}: found {dtype} pixels, expected uint8 or float32{cure}")
    return member


def _read_labels(member: npz.Member) -> np.ndarray:
    """Read and check the labels: (N,) int64."""
    where, shape, kind = f"{member.path}: {member.key}", member.shape, member.dtype.kind
    if len(shape) != 1:
        cures: dict[tuple[int, ...], str] = {(len(LETTERS),): "; store y.argmax(1)", (1,): "; store y.ravel()"}
        raise InputError(f"{where}: found shape {shape}, expected (N,){cures.get(shape[1:], '')}")
    if kind not in "iu":
        cure = {"f": "; store y.astype(int)", "b": ""}.get(kind, f"; store [{LETTERS!r}.index(letter) for letter in y]")
        raise InputError(f"{where}: found {member.dtype} labels, expected integers 0..9{cure}")
    y = member.read()
    if len(y) and not (y.min() >= 0 and y.max() < len(LETTERS)):
        low, high = int(y.min()), int(y.max())
        cure = f"; store y {'-' if low > 0 else '+'} {abs(low)}" if low and high - low < len(LETTERS) else ""
        raise InputError(f"{where}: found labels {low}..{high}, expected 0..9 for A..J{cure}")
    return y.astype(np.int64)


def _read_split(name: str, member: npz.Member, y: np.ndarray, keep: bool, watchers: list[Watch]) -> Split:
    """Read one split in one pass, that digests it too."""
    size, little = len(y), member.dtype.newbyteorder("<")
    sha = _begin_digest(member.dtype, size)
    try:
        X = np.empty((size, SIDE, SIDE), member.dtype.newbyteorder("=")) if keep else None
    except MemoryError:
        raise RunError(f"{member.path}: {member.key}: {size:,} images do not fit into memory") from None
    start = 0
    for block in member.blocks():
        block = block.reshape(-1, SIDE, SIDE)
        sha.update(np.ascontiguousarray(block, little).data)
        for watch in watchers:
            watch(name, size, start, block)
        if X is not None:
            X[start : start + len(block)] = block
        start += len(block)
    sha.update(np.ascontiguousarray(y, "<i8").data)
    return Split(name, X, y, sha.hexdigest(), str(member.dtype))


def _begin_digest(dtype: np.dtype, size: int) -> "hashlib._Hash":
    return hashlib.sha256(f"{dtype.newbyteorder('<').str} {size}x{SIDE}x{SIDE}\n".encode())


def split_of(name: str, X: np.ndarray, y: np.ndarray, group: np.ndarray | None) -> Split:
    """Make a split of images in memory, digested as those read."""
    sha = _begin_digest(X.dtype, len(y))
    sha.update(np.ascontiguousarray(X, X.dtype.newbyteorder("<")).data)
    sha.update(np.ascontiguousarray(y, "<i8").data)
    return Split(name, X, y, sha.hexdigest(), str(X.dtype), group)


def count_overlap(train: Split, test: Split) -> int:
    """Count the images of test that occur in train."""
    assert train.X is not None
    assert test.X is not None
    overlap = _Overlap(one_type=True)
    overlap.see("test", len(test), 0, test.X)
    overlap.see("train", len(train), 0, train.X)
    return overlap.count()


class _Overlap:
    """A counter of test images that occur in train."""

    def __init__(self, one_type: bool):
        self.one_type = one_type
        self.in_test: Counter[int] = Counter()  # 64-bit hashes: 400,000 x 14,000 have a false match in 3e-10 of cases
        self.shared: set[int] = set()

    def see(self, name: str, size: int, start: int, block: np.ndarray) -> None:
        if name == "val":
            return
        hashes = (hash(image.tobytes()) for image in (block if self.one_type else as_images(block)))
        if name == "test":
            self.in_test.update(hashes)
        else:
            self.shared |= self.in_test.keys() & hashes

    def count(self) -> int:
        return sum(self.in_test[key] for key in self.shared)


class _Scale:
    """A check of the pixel scale over all splits.

    These scales from black to white are usual: 0..1 (uint8 is divided by 255), -0.5..0.5, -1..1, or a mean of 0 and a
    deviation of 1. Letters may be thin or faint in one split, so a range inside of 0..1 may be narrow.
    """

    def __init__(self, members: dict[str, npz.Member]):
        self.members = members
        self.ends: dict[str, list] = {name: [] for name in members}  # darkest and brightest of each block, as stored
        self.samples: dict[str, list[np.ndarray]] = {name: [] for name in members}  # as a model takes them

    def see(self, name: str, size: int, start: int, block: np.ndarray) -> None:
        low, high = block.min(), block.max()  # a NaN anywhere becomes both
        if not (np.isfinite(low) and np.isfinite(high)):
            raise self._refused(name, "NaN or infinity, expected finite pixels")
        if block.dtype != np.uint8 and max(-low, high) > FLOAT_LIMIT:
            expected = f"{-FLOAT_LIMIT:g}..{FLOAT_LIMIT:g}; divide them by 255 or store them as uint8"
            raise self._refused(name, f"{block.dtype} pixels from {low:g} to {high:g}, expected {expected}")
        self.ends[name] += [low, high]
        step = -(-size // SAMPLE)
        self.samples[name].append(as_images(block[-start % step :: step]))

    def check(self) -> None:
        """After all blocks, refuse a wrong scale, or different ones."""
        white = {name: 255 if member.dtype == np.uint8 else 1 for name, member in self.members.items()}
        if all(max(self.ends[name]) - min(self.ends[name]) < NARROW * white[name] for name in self.members):
            cure = "multiply them by 255" if white["train"] > 1 else "they may have been divided by 255 twice"
            expected = "0..255" if white["train"] > 1 else "such as 0..1"
            raise self._refused("train", f"{self._range('train')}, expected {expected}; {cure}")
        samples = {name: np.concatenate(parts) for name, parts in self.samples.items()}
        for one, other in itertools.combinations(samples, 2):
            if _differ(samples[one], samples[other]):
                both = f"{self._range(other)}, and {self._range(one)} in X_{one}"
                raise self._refused(other, f"{both}, expected one scale in all three; store them all as uint8")

    def _range(self, name: str) -> str:
        return f"{self.members[name].dtype} pixels from {min(self.ends[name]):g} to {max(self.ends[name]):g}"

    def _refused(self, name: str, pixels: str) -> InputError:
        return InputError(f"{self.members[name].path}: X_{name}: found {pixels}")


def _differ(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two samples of images have different scales."""
    (low, high), (other_low, other_high) = [np.quantile(images, [0.01, 0.99]) for images in (one, other)]
    signed = [low < -0.2, other_low < -0.2]
    if signed[0] != signed[1] and len((one, other)[signed.index(False)]) >= ENOUGH:
        return True
    if min(len(one), len(other)) < ENOUGH:
        return False
    if all(signed):
        apart = max(abs(low - other_low), abs(high - other_high))
        return bool(apart > 0.24 * max(high - low, other_high - other_low))
    return bool(max(high, other_high) > 1.5 * max(1, min(high, other_high)) or min(high, other_high) < 0.02)


def as_images(x: np.ndarray) -> np.ndarray:
    """Convert images for a model: float32 (n, 1, 28, 28)."""
    return as_pixels(x.reshape(-1, 1, SIDE, SIDE))


def as_pixels(x: np.ndarray) -> np.ndarray:
    """Convert pixels for a model: float32, of the same shape.

    uint8 pixels are divided by 255. Others stay as they are.
    """
    pixels = x.astype(np.float32)
    if x.dtype == np.uint8:
        pixels /= 255
    return pixels
