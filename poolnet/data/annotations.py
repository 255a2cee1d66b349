"""Read what a data set may say beside images and labels.

All of it is optional. `group_train group_val group_test` are integers, one for each image: images with the same number
belong together, as the letters of one family of fonts, in whichever split they are. `group_names` holds the name of
group k at index k. `classes` holds the ten names of the labels.
"""

import hashlib
import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from poolnet.data import npz
from poolnet.errors import InputError

LETTERS = "ABCDEFGHIJ"  # the classes, where a file does not name them
LIMIT = 2**63  # group numbers are int64
LONGEST = 40  # signs of a class name, which stands in tables and figures


@dataclass(frozen=True)
class Annotations:
    """The optional keys of one file."""

    groups: dict[str, np.ndarray] = field(default_factory=dict)  # (N,) int64 for each split, or no split at all
    group_names: tuple[str, ...] = ()
    classes: tuple[str, ...] = tuple(LETTERS)

    def digest(self, images_sha256: str) -> str:
        """Return a digest of the images and of these.

        It is that of the images if there is nothing else.
        """
        if not self.groups and self.classes == tuple(LETTERS):
            return images_sha256
        sha = hashlib.sha256(images_sha256.encode())
        for name in sorted(self.groups):
            sha.update(np.ascontiguousarray(self.groups[name], "<i8").data)
        sha.update(json.dumps([self.group_names, self.classes]).encode())
        return sha.hexdigest()


def read(archive: zipfile.ZipFile, path: Path, sizes: Mapping[str, int]) -> Annotations:
    """Read and check the optional keys; raise `InputError`.

    `sizes` has the number of images of each split.
    """
    present = {name.removesuffix(".npy") for name in archive.namelist()}
    keys = {name: f"group_{name}" for name in sizes}
    missing = [key for key in keys.values() if key not in present]
    if missing and len(missing) < len(keys):
        raise InputError(f"{path}: {missing[0]}: missing, expected {' '.join(keys.values())}, or none of them")
    groups = {}
    if not missing:
        groups = {name: _numbers(npz.member(archive, path, key), sizes[name]) for name, key in keys.items()}
    group_names: tuple[str, ...] = ()
    if "group_names" in present:
        if missing:
            raise InputError(
                f"{path}: group_names: found no groups to name, expected {' '.join(keys.values())} as well"
            )
        group_names = _texts(npz.member(archive, path, "group_names"))
        largest = max(int(group.max()) for group in groups.values())
        if largest >= len(group_names):
            raise InputError(
                f"{path}: group_names: found {len(group_names):,} names, but group {largest}; "
                f"expected at least {largest + 1:,}, the name of group k at index k"
            )
    if "classes" not in present:
        return Annotations(groups, group_names)
    classes = class_names(_texts(npz.member(archive, path, "classes")), f"{path}: classes")
    return Annotations(groups, group_names, classes)


def class_names(names: tuple[str, ...], where: str) -> tuple[str, ...]:
    """Check the names of the ten classes; raise `InputError`."""
    if len(names) != len(LETTERS):
        raise InputError(f"{where}: found {len(names)} names, expected {len(LETTERS)}, one for each label")
    for label, name in enumerate(names):
        if not name.strip() or not name.isprintable() or len(name) > LONGEST:
            raise InputError(
                f"{where}: found {name[: LONGEST + 1]!a} for label {label}, expected 1 to {LONGEST} printable signs"
            )
        if name in names[:label]:
            raise InputError(f"{where}: found {name!r} twice, for labels {names.index(name)} and {label}")
    return names


def _numbers(member: npz.Member, size: int) -> np.ndarray:
    """Read the groups of one split: (N,) int64."""
    where = f"{member.path}: {member.key}"
    if member.shape != (size,):
        found = f"{member.shape[0]:,} groups" if len(member.shape) == 1 else f"shape {member.shape}"
        raise InputError(f"{where}: found {found}, expected {size:,}, one for each image")
    if member.dtype.kind not in "iu":
        cure = "; store np.unique(group, return_inverse=True)[1]" if member.dtype.kind in "USf" else ""
        raise InputError(f"{where}: found {member.dtype} groups, expected integers from 0{cure}")
    group = member.read()
    if int(group.min()) < 0 or int(group.max()) >= LIMIT:
        raise InputError(f"{where}: found groups {group.min()}..{group.max()}, expected integers from 0 to 2**63 - 1")
    return group.astype(np.int64)


def _texts(member: npz.Member) -> tuple[str, ...]:
    where = f"{member.path}: {member.key}"
    if member.dtype.kind != "U" or len(member.shape) != 1:
        cure = "; store np.array(names).astype(str)" if member.dtype.kind == "S" else ""
        found = f"{member.dtype} of shape {member.shape}"
        raise InputError(f"{where}: found {found}, expected a list of names as text{cure}")
    return tuple(map(str, member.read()))
