"""Divide a data set into folds, so that each letter is tested once.

Fold k of n tests one part of n, takes a tenth of the rest as val and trains on what is left. Groups stay together, as
the letters of a family of fonts. The division depends on the groups alone, not on a seed or on the machine.
"""

from dataclasses import replace

import numpy as np

from poolnet.data.dataset import SPLITS, Dataset, as_pixels, count_overlap, split_of
from poolnet.data.fold_number import parse
from poolnet.errors import InputError

VAL = 10  # parts of what is not tested, of which one is val; fewer, if there are not so many groups


def rows(group: np.ndarray, fold: str) -> dict[str, np.ndarray]:
    """Return the rows of train, val and test, in ascending order.

    `group` has a number for each letter. Raises `InputError` if there are too few groups for so many folds.
    """
    k, n = parse(fold)
    part = _deal(group, n)
    rest = np.flatnonzero(part != k - 1)
    val = np.zeros(len(group), bool)
    parts = min(VAL, len(np.unique(group[rest])))
    val[rest] = _deal(group[rest], parts) == parts - 1
    found = {"train": (part != k - 1) & ~val, "val": val, "test": part == k - 1}
    if empty := [name for name in SPLITS if not found[name].any()]:
        groups = len(np.unique(group))
        raise InputError(f"fold {fold}: found {groups} groups, too few, so that {empty[0]} would have none of them")
    return {name: np.flatnonzero(found[name]) for name in SPLITS}


def take(data: Dataset, fold: str) -> tuple[Dataset, dict[str, np.ndarray]]:
    """Return one fold of a data set, and its rows.

    The rows are those of train, val and test one after the other. The fold keeps the digest of the whole file, since it
    is a choice among the same letters. Its splits have digests of their own.
    """
    group = all_groups(data)
    chosen = rows(group, fold)
    images = [split.X for split in data if split.X is not None]
    assert len(images) == len(SPLITS)  # all were kept
    if len({X.dtype for X in images}) > 1:  # 255 in one may be 1.0 in another
        images = [as_pixels(X) for X in images]
    X, y = np.concatenate(images), np.concatenate([split.y for split in data])
    known = data.train.group is not None
    splits = {name: split_of(name, X[at], y[at], group[at] if known else None) for name, at in chosen.items()}
    train, val, test = (splits[name] for name in SPLITS)
    return replace(data, train=train, val=val, test=test, overlap=count_overlap(train, test)), chosen


def all_groups(data: Dataset) -> np.ndarray:
    """Return the groups of train, val and test, one after the other.

    Without groups each letter is a group of its own.
    """
    known = [split.group for split in data if split.group is not None]
    return np.concatenate(known) if known else np.arange(sum(map(len, data)))


def _deal(group: np.ndarray, parts: int) -> np.ndarray:
    """Deal groups to parts of nearly equal numbers of letters.

    The largest group goes first, always to the part that has the fewest letters yet. Returns (N,), from 0.
    """
    _, number, sizes = np.unique(group, return_inverse=True, return_counts=True)
    filled = np.zeros(parts, int)
    part_of = np.empty(len(sizes), int)
    for one in np.lexsort((_scattered(len(sizes)), -sizes)):
        part_of[one] = filled.argmin()
        filled[part_of[one]] += sizes[one]
    return part_of[number]


def _scattered(n: int) -> np.ndarray:
    """Return n different numbers without any order, always the same.

    Groups whose numbers are close may be alike, and images of one class may follow each other. This is the finaliser of
    splitmix64 (Steele, Lea & Flood 2014), which no version of numpy changes.
    """
    x = np.arange(1, n + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return x ^ (x >> np.uint64(31))
