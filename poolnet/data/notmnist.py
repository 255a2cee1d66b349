"""Prepare notMNIST: decode it, clean it, split it.

The source is its tarballs or folders. Repeats and conflicts are removed. A seed determines the splits.

Families of fonts are kept together (see `families`). A single set is dealt 80/10/10. With the large and the small set,
test is the small one. Train and val are the large one, 90/10, without the families and images of the small one: its
fonts are those that begin with 0 to 9 and A to I, so that the other way round nothing of test would be left.

The reference experiment splits by image (`split="image"`): train and val are the large set without exact repeats,
90/10. Test is the small set without the images of train and val.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from poolnet.data import families, splits
from poolnet.data.annotations import LETTERS
from poolnet.data.dataset import SPLITS
from poolnet.data.downloads import SIZES, download
from poolnet.data.families import Families
from poolnet.data.letter_files import Kind, Letters, read

KIND = Kind(
    classes=tuple(LETTERS),
    suffixes=(".png",),
    formats=("PNG",),
    content="letter",
    sources="a notMNIST tarball, or a folder",
    expected="28x28 PNG files in folders A to J",
)
CURE = "; letters of one family stay together, which --split image does not ask for"


def prepare(
    large: Path | None, small: Path | None, seed: int, split: str = "group"
) -> tuple[dict[str, np.ndarray], dict[str, dict]]:
    """Build the arrays of notMNIST; count each source's steps.

    The arrays are the six of images and labels, the families of the letters and their names. Both sources are
    downloaded if neither is given. `split` is `group` or `image`.
    """
    if large is None and small is None:
        large, small = (download(name) for name in SIZES)
    found = {name: read(path, KIND) for name, path in (("large", large), ("small", small)) if path is not None}
    known = _families(found)
    for letters in found.values():
        letters.counts.update(known.counts(letters.files))
    sources = {name: splits.clean(found.pop(name)) for name in tuple(found)}  # one copy of the images at a time
    rng = np.random.default_rng(seed)
    parts = _by_group(sources, known, rng) if split == "group" else _by_image(sources, rng)
    arrays = splits.arrays(parts)
    arrays |= {f"group_{name}": known.of(part.files) for name, part in zip(SPLITS, parts, strict=True)}
    arrays["group_names"] = np.array(known.names)
    counts = {name: letters.counts for name, letters in sources.items()}
    origin = " and ".join(str(path) for path in (large, small) if path)
    splits.refuse_empty(arrays, counts, origin, CURE if split == "group" else "")
    return arrays, counts


def _families(found: Mapping[str, Letters]) -> Families:
    """Find the families of all sources together."""
    parts = found.values()
    files = np.concatenate([letters.files for letters in parts])
    labels = np.concatenate([letters.labels for letters in parts])
    keys = np.concatenate([letters.keys for letters in parts])
    return families.find(files, labels, [letters.images for letters in parts], keys)


def _by_image(sources: dict[str, Letters], rng: np.random.Generator) -> list[Letters]:
    if len(sources) == 1:
        (letters,) = sources.values()
        return splits.divide(letters, (0.8, 0.9), rng)
    large, small = sources["large"], sources["small"]
    train, val = splits.divide(large, (0.9,), rng)
    seen = np.isin(small.keys, large.keys)
    small.counts["also in train or val, dropped"] = int(seen.sum())
    return [train, val, *splits.divide(small.take(np.flatnonzero(~seen)), (), rng)]


def _by_group(sources: dict[str, Letters], known: Families, rng: np.random.Generator) -> list[Letters]:
    if len(sources) == 1:
        (letters,) = sources.values()
        return splits.divide_groups(letters, known.of(letters.files), (0.8, 0.9), rng)
    large, small = sources["large"], sources["small"]
    related = np.isin(known.of(large.files), known.of(small.files))
    seen = np.isin(large.keys, small.keys) & ~related
    large.counts["of families in small, dropped"] = int(related.sum())
    large.counts["images in small, dropped"] = int(seen.sum())
    rest = large.take(np.flatnonzero(~(related | seen)))
    return [*splits.divide_groups(rest, known.of(rest.files), (0.9,), rng), *splits.divide(small, (), rng)]
