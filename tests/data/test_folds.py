"""Folds: each letter tested once, groups together, the same on every machine."""

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from poolnet.data import folds
from poolnet.data.dataset import SPLITS, open_dataset
from poolnet.errors import InputError


def test_by_hand_the_largest_family_goes_to_the_emptiest_part():
    group = np.array([7] * 4 + [3] * 3 + [5] * 2 + [1] * 2 + [9])  # 12 letters in 3 parts: 4, 3 + 1, 2 + 2
    tested = {frozenset(group[folds.rows(group, f"{k}/3")["test"]]) for k in (1, 2, 3)}
    assert tested == {frozenset({7}), frozenset({3, 9}), frozenset({5, 1})}


@settings(max_examples=40)
@given(st.lists(st.integers(1, 30), min_size=25, max_size=60), st.integers(3, 5), st.randoms())
def test_each_letter_is_tested_once_and_no_group_is_in_two_splits(sizes, n, random):
    group = np.repeat([1000 - 3 * i for i in range(len(sizes))], sizes)
    random.shuffle(group)
    tests = []
    for k in range(1, n + 1):
        found = folds.rows(group, f"{k}/{n}")
        assert sorted(np.concatenate(list(found.values()))) == list(range(len(group)))
        apart = [set(group[found[name]]) for name in SPLITS]
        assert sum(map(len, apart)) == len(set(group))
        tests.append(found["test"])
    assert sorted(np.concatenate(tests)) == list(range(len(group)))
    assert max(map(len, tests)) - min(map(len, tests)) <= max(sizes)


def test_without_groups_parts_are_equal_and_never_change():
    found = folds.rows(np.arange(1000), "2/5")
    assert {name: len(at) for name, at in found.items()} == {"train": 720, "val": 80, "test": 200}
    assert hashlib.sha256(found["test"].astype("<i8").tobytes()).hexdigest()[:12] == "a6526ce1511c"
    assert np.ptp(np.bincount(found["test"] % 10)) < 25  # no pattern: 20 expected of each


@pytest.mark.parametrize("fold", ["", "0/5", "6/5", "1/1", "1/101", "2", "2/", "a/b", "2/5/5", "-1/5", "２/5", "1/5 "])
def test_what_is_no_fold_is_one_line(fold):
    with pytest.raises(InputError, match=r"^fold: found '.*', expected such as 2/5"):
        folds.parse(fold)


def test_too_few_groups_for_the_folds_are_refused():
    with pytest.raises(InputError, match=r"^fold 1/3: found 2 groups, too few, so that (train|val|test) would"):
        folds.rows(np.array([0, 0, 1, 1]), "1/3")


@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("mixed", [True, False])
def test_a_fold_is_a_data_set_of_the_same_images(tmp_path, arrays, grouped, mixed):
    if grouped:
        arrays = arrays | {f"group_{name}": np.arange(len(arrays[f"y_{name}"])) // 4 for name in SPLITS}
    if mixed:
        arrays = arrays | {"X_val": arrays["X_val"].astype(np.float32) / 255}
    np.savez(tmp_path / "d.npz", **arrays)
    data = open_dataset(tmp_path / "d.npz")
    fold, rows = folds.take(data, "2/5")
    assert (fold.path, fold.sha256, fold.images_sha256) == (data.path, data.sha256, data.images_sha256)
    every = np.concatenate([split.images(slice(None)) for split in data])
    y = np.concatenate([split.y for split in data])
    for split in fold:
        np.testing.assert_array_equal(split.images(slice(None)), every[rows[split.name]])
        np.testing.assert_array_equal(split.y, y[rows[split.name]])
        assert split.sha256 not in {other.sha256 for other in data}
        assert (split.group is not None) == grouped
    assert fold.crossing == 0
    if not mixed:
        np.savez(tmp_path / "e.npz", **{f"X_{s.name}": s.X for s in fold}, **{f"y_{s.name}": s.y for s in fold})
        again = open_dataset(tmp_path / "e.npz")
        assert [s.sha256 for s in again] == [s.sha256 for s in fold]
        assert again.overlap == fold.overlap
