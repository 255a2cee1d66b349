"""Prepare a data set from ten folders of pictures, one a class.

The classes are the folders' names in sorted order. Pictures are 28x28 pixels; those of another size are skipped and
counted, since how to fit them is for their owner to decide. Repeats and conflicts are removed as from notMNIST, and the
rest is split 80/10/10 by the seed.
"""

from pathlib import Path

import numpy as np

from poolnet.data import splits
from poolnet.data.annotations import LETTERS, class_names
from poolnet.data.letter_files import Kind, read
from poolnet.data.pictures import FORMATS, SUFFIXES
from poolnet.errors import InputError
from poolnet.files import expanded, walk


def prepare(folder: Path, seed: int) -> tuple[dict[str, np.ndarray], dict[str, dict]]:
    """Build the arrays of the folder's pictures; count the steps."""
    folder = expanded(folder)
    names = classes(folder)
    kind = Kind(names, SUFFIXES, FORMATS, "picture", "ten folders of pictures", f"28x28 {', '.join(FORMATS)} files")
    letters = splits.clean(read(folder, kind))
    arrays = splits.arrays(splits.divide(letters, (0.8, 0.9), np.random.default_rng(seed)))
    arrays["classes"] = np.array(names)
    counts = {"folder": letters.counts}
    splits.refuse_empty(arrays, counts, str(folder))
    return arrays, counts


def classes(folder: Path) -> tuple[str, ...]:
    """Return the names of the ten folders that hold pictures."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder, expected ten folders of pictures in it, one a class")
    below = {file.relative_to(folder).parts for file in walk(folder) if file.suffix.lower() in SUFFIXES}
    names = tuple(sorted({parts[0] for parts in below if len(parts) == 2}))
    if len(names) != len(LETTERS):
        shown = f" ({', '.join(names[:12])}{', ...' if len(names) > 12 else ''})" if names else ""
        raise InputError(f"{folder}: found {len(names)} folders of pictures{shown}, expected ten, one a class")
    return class_names(names, str(folder))
