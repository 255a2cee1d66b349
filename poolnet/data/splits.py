"""Clean labelled pictures, divide them into splits, count them.

The result depends on the pictures, their files' names and the seed, not on the order in which they are found.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np

from poolnet.data.annotations import LETTERS
from poolnet.data.dataset import SPLITS
from poolnet.data.letter_files import Letters
from poolnet.errors import InputError
from poolnet.text import printable

FEW = 0.1  # of the median class's images in a split: a class of which something is missing
# Counts of what remains; the others are of what is left out.
STAGES = ("files", "read", "distinct images", "fonts", "names that do not decode", "families by name", "clones united")
SHOWN = 32  # signs of a class's name in a table


def clean(letters: Letters) -> Letters:
    """Keep each distinct image once and drop conflicts.

    The result is in the order of the digests. Of files that hold the same image, the first by name is kept. Images with
    two labels are dropped completely.
    """
    by_name = np.argsort(letters.files, kind="stable")
    keys, first, same = np.unique(letters.keys[by_name], return_index=True, return_inverse=True)
    low = np.full(len(keys), len(LETTERS))
    high = np.zeros(len(keys), int)
    np.minimum.at(low, same, letters.labels[by_name])
    np.maximum.at(high, same, letters.labels[by_name])
    counts = {
        **letters.counts,
        "exact repeats, dropped": len(letters.labels) - len(keys),
        "distinct images": len(keys),
        "with conflicting labels, dropped": int((low != high).sum()),
    }
    return replace(letters.take(by_name[first[low == high]]), counts=counts)


def divide(letters: Letters, shares: Sequence[float], rng: np.random.Generator) -> list[Letters]:
    """Shuffle the letters, then cut them into parts.

    `shares` are the places of the cuts, as fractions of the whole.
    """
    n = len(letters.labels)
    return [letters.take(rows) for rows in np.split(rng.permutation(n), [round(share * n) for share in shares])]


def divide_groups(
    letters: Letters, group: np.ndarray, shares: Sequence[float], rng: np.random.Generator
) -> list[Letters]:
    """Shuffle the groups, then cut them into parts; shuffle each.

    The cuts are as near to `shares` of the letters as whole groups allow.
    """
    _, number, sizes = np.unique(group, return_inverse=True, return_counts=True)
    order = rng.permutation(len(sizes))
    ends = np.concatenate([[0], np.cumsum(sizes[order])])
    cuts = [int(np.abs(ends - share * len(group)).argmin()) for share in shares]
    part_of = np.empty(len(sizes), int)
    for part, groups in enumerate(np.split(order, cuts)):
        part_of[groups] = part
    parts = [np.flatnonzero(part_of[number] == part) for part in range(len(shares) + 1)]
    return [letters.take(rng.permutation(rows)) for rows in parts]


def arrays(parts: Sequence[Letters]) -> dict[str, np.ndarray]:
    """Return images and labels of train, val and test by key."""
    found: dict[str, np.ndarray] = {}
    for name, letters in zip(SPLITS, parts, strict=True):
        found[f"X_{name}"], found[f"y_{name}"] = letters.images, letters.labels.astype(np.int64)
    return found


def refuse_empty(data: Mapping[str, np.ndarray], counts: Mapping[str, dict], sources: str, cure: str = "") -> None:
    """Raise `InputError` if a split lacks a class."""
    names = classes(data)
    empty = {split: [names[n] for n in np.flatnonzero(per_class(data, split) == 0)] for split in SPLITS}
    if any(empty.values()):
        absent = ", ".join(f"no {' '.join(lacking)} in {split}" for split, lacking in empty.items() if lacking)
        lost = [f"{n:,} {step}" for column in counts.values() for step, n in column.items() if n and step not in STAGES]
        each = "each of A to J" if names == tuple(LETTERS) else "each class"
        what = "letters" if names == tuple(LETTERS) else "images"
        raise InputError(
            f"{sources}: found too few distinct {what}, {absent}, expected {each} in train, val and test"
            + (f" ({'; '.join(lost)})" if lost else "")
            + cure
        )


def classes(data: Mapping[str, np.ndarray]) -> tuple[str, ...]:
    return tuple(map(str, data.get("classes", tuple(LETTERS))))


def per_class(data: Mapping[str, np.ndarray], split: str) -> np.ndarray:
    """Count a split's images by class: (10,)."""
    return np.bincount(data[f"y_{split}"], minlength=len(LETTERS))


def scarce(data: Mapping[str, np.ndarray]) -> Iterator[str]:
    """Yield one line for each class with few images."""
    numbers = {name: per_class(data, name) for name in SPLITS}
    names = classes(data)
    what = "letter" if names == tuple(LETTERS) else "class"
    for n, shown in enumerate(names):
        if few := [name for name in SPLITS if numbers[name][n] < FEW * np.median(numbers[name])]:
            parts = (f"{numbers[name][n]:,} in {name} (median {np.median(numbers[name]):,.0f})" for name in few)
            yield f"{what} {shown}: found {', '.join(parts)}; see whether its folder is complete"


def table(data: Mapping[str, np.ndarray], counts: Mapping[str, dict]) -> str:
    """Return the counts as a table for a terminal.

    Each step has a column for each source. Each class has a column for each split. The last lines have the sizes of the
    splits, in families and in images.
    """
    rows: list[tuple[str, ...]] = [("", *counts)] if counts else []
    for step in dict.fromkeys(step for column in counts.values() for step in column):
        rows.append((step, *(f"{column[step]:,}" if step in column else "" for column in counts.values())))
    rows.append(("", *SPLITS))
    columns = [map(printable, classes(data)), *([f"{n:,}" for n in per_class(data, name)] for name in SPLITS)]
    rows += zip(*columns, strict=True)
    lines = [f"{name[:SHOWN]:33}" + "".join(f"{cell:>9}" for cell in cells) for name, *cells in rows]
    if "group_train" in data:
        lines.append("families: " + ", ".join(f"{name} {len(np.unique(data[f'group_{name}'])):,}" for name in SPLITS))
    sizes = (f"{name} {len(data[f'y_{name}']):,}" for name in SPLITS)
    return "\n".join([*lines, "splits: " + ", ".join(sizes)])
