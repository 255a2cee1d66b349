"""Groups, their names and classes: optional keys of anybody's file."""

import re

import numpy as np
import pytest

from poolnet.data.dataset import SPLITS, open_dataset
from poolnet.errors import InputError

NAMES = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]


def opened(path, arrays, **extra):
    np.savez(path / "d.npz", **arrays | extra)
    return open_dataset(path / "d.npz", keep=())


def grouped(arrays, first=0):
    """Groups of three letters, which go on from one split to the next."""
    groups = {}
    for name in SPLITS:
        size = len(arrays[f"y_{name}"])
        groups[f"group_{name}"] = first + np.arange(size) // 3
        first += -(-size // 3)
    return groups


def test_a_file_without_them_is_as_it_always_was(tmp_path, arrays):
    data = opened(tmp_path, arrays)
    assert data.sha256 == data.images_sha256
    assert (data.group_names, data.classes, data.crossing) == ((), tuple("ABCDEFGHIJ"), 0)
    assert [split.group for split in data] == [None] * 3
    assert not {"classes", "groups"} & data.summary().keys()


def test_classes_that_are_the_letters_are_no_difference(tmp_path, arrays):
    assert opened(tmp_path, arrays, classes=list("ABCDEFGHIJ")).summary() == opened(tmp_path, arrays).summary()


def test_groups_and_names_are_read_and_digested(tmp_path, arrays):
    plain, groups = opened(tmp_path, arrays), grouped(arrays)
    data = opened(tmp_path, arrays, **groups, group_names=[f"font {k}" for k in range(167)], classes=NAMES)
    for split in data:
        assert split.group.dtype == np.int64
        np.testing.assert_array_equal(split.group, groups[f"group_{split.name}"])
    assert data.classes == tuple(NAMES)
    assert data.group_names[166] == "font 166"
    assert data.summary()["classes"] == NAMES
    assert data.summary()["groups"] == {"train": 100, "val": 30, "test": 37, "all": 167, "crossing": 0}
    assert [split.sha256 for split in data] == [split.sha256 for split in plain]
    assert data.images_sha256 == plain.sha256 != data.sha256
    assert data.is_recorded_as(plain.sha256)
    assert data.is_recorded_as(data.sha256)
    assert not plain.is_recorded_as(data.sha256)
    others = [
        opened(tmp_path, arrays, **groups),
        opened(tmp_path, arrays, classes=NAMES),
        opened(tmp_path, arrays, **groups, classes=NAMES),
        opened(tmp_path, arrays, **grouped(arrays, first=1)),
    ]
    assert len({other.sha256 for other in [plain, data, *others]}) == 6


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, ">i2", np.uint64])
def test_groups_of_any_integer_type_are_the_same(tmp_path, arrays, dtype):
    groups = {key: value % 100 for key, value in grouped(arrays).items()}
    one = opened(tmp_path, arrays, **groups)
    assert opened(tmp_path, arrays, **{key: value.astype(dtype) for key, value in groups.items()}).sha256 == one.sha256


def test_groups_that_cross_splits_are_counted(tmp_path, arrays):
    groups = {"group_train": np.arange(300) % 5, "group_val": np.full(90, 4), "group_test": np.arange(110) + 3}
    assert opened(tmp_path, arrays, **groups).crossing == 2  # 3 and 4
    (warning,) = opened(tmp_path, arrays, **groups).warnings()
    assert warning.endswith(".npz: 2 of 113 groups are in more than one split")
    assert opened(tmp_path, arrays, **groups).summary()["groups"] == {
        "train": 5,
        "val": 1,
        "test": 110,
        "all": 113,
        "crossing": 2,
    }


class Payload:
    """Leaves a file behind when it is unpickled."""

    def __reduce__(self):
        return (open, ("payload-ran", "w"))


def text(n, value="a"):
    return np.array([value] * n)


BAD = {  # what is stored, and what the one line says
    "other length": ({"group_val": np.arange(89)}, "group_val: found 89 groups, expected 90, one for each image"),
    "two dimensions": ({"group_val": np.zeros((90, 1), int)}, r"group_val: found shape (90, 1), expected 90"),
    "scalar": ({"group_test": np.int64(3)}, "group_test: found shape (), expected 110"),
    "negative": ({"group_test": np.arange(110) - 1}, "group_test: found groups -1..108, expected integers from 0"),
    "too large": ({"group_test": np.full(110, 2**63, np.uint64)}, "group_test: found groups 9223372036854775808.."),
    "float": (
        {"group_val": np.zeros(90)},
        "group_val: found float64 groups, expected integers from 0; store np.unique",
    ),
    "NaN": ({"group_val": np.full(90, np.nan)}, "group_val: found float64 groups"),
    "bool": ({"group_val": np.zeros(90, bool)}, "group_val: found bool groups, expected integers from 0"),
    "text": ({"group_val": text(90)}, "group_val: found <U1 groups, expected integers from 0; store np.unique"),
    "object": ({"group_val": np.array([Payload()] * 90)}, "group_val: found an object array, which is never unpickled"),
    "one missing": ({"group_test": None}, "group_test: missing, expected group_train group_val group_test, or none"),
    "two missing": ({"group_train": None, "group_test": None}, "group_train: missing, expected group_train group_val"),
    "names of nothing": (
        {"group_train": None, "group_val": None, "group_test": None, "group_names": text(3)},
        "group_names: found no groups to name, expected group_train group_val group_test as well",
    ),
    "names too few": (
        {"group_names": text(166)},
        "group_names: found 166 names, but group 166; expected at least 167, the name of group k at index k",
    ),
    "names no text": ({"group_names": np.arange(167)}, "group_names: found int64 of shape (167,), expected a list of"),
    "object names": ({"group_names": np.array([Payload()] * 167)}, "group_names: found an object array"),
    "nine classes": ({"classes": NAMES[:9]}, "classes: found 9 names, expected 10, one for each label"),
    "no classes": ({"classes": np.array([], "U1")}, "classes: found 0 names, expected 10"),
    "classes as numbers": ({"classes": np.arange(10)}, "classes: found int64 of shape (10,), expected a list of names"),
    "classes as bytes": (
        {"classes": np.array(NAMES).astype("S")},
        "found |S11 of shape (10,), expected a list of names",
    ),
    "one text": ({"classes": np.array("ABCDEFGHIJ")}, "classes: found <U10 of shape (), expected a list of names"),
    "objects": ({"classes": np.array([Payload()] * 10)}, "classes: found an object array"),
    "empty name": ({"classes": ["", *NAMES[1:]]}, "classes: found '' for label 0, expected 1 to 40 printable signs"),
    "blank name": ({"classes": [*NAMES[:9], " "]}, "classes: found ' ' for label 9, expected 1 to 40 printable signs"),
    "line end": ({"classes": ["a\nb", *NAMES[1:]]}, r"classes: found 'a\nb' for label 0, expected"),
    "long": ({"classes": ["x" * 41, *NAMES[1:]]}, "for label 0, expected 1 to 40 printable signs"),
    "twice": ({"classes": [*NAMES[:9], NAMES[1]]}, "classes: found 'Trouser' twice, for labels 1 and 9"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_cannot_be_meant_is_one_line(tmp_path, arrays, kind, monkeypatch):
    monkeypatch.chdir(tmp_path)
    changed, said = BAD[kind]
    stored = {key: value for key, value in (arrays | grouped(arrays) | changed).items() if value is not None}
    np.savez(tmp_path / "d.npz", **stored)
    with pytest.raises(InputError, match=rf"^{re.escape(str(tmp_path / 'd.npz'))}: .*{re.escape(said)}") as error:
        open_dataset(tmp_path / "d.npz")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "payload-ran").exists()
