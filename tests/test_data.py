import json
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from conftest import make_arrays
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from poolnet import npz
from poolnet.config import InputError
from poolnet.data import digest, locate, open_splits, windows


def save(path, arrays, writer=np.savez):
    writer(path, **arrays)
    return path


class Payload:
    """Leaves a file behind when it is unpickled."""

    def __reduce__(self):
        return (open, ("payload-ran", "w"))


FORMS = {
    "as the notebook writes it": lambda X: X[:, None].astype(np.float32) / 255,
    "uint8": lambda X: X,
    "uint8 with a channel": lambda X: X[:, None],
    "float64": lambda X: X / 255,
    "float16": lambda X: (X / 255).astype(np.float16),
    "big-endian": lambda X: (X / 255).astype(">f4"),
    "Fortran order": lambda X: np.asfortranarray(X),
}


@pytest.mark.parametrize("writer", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_the_file_gives_the_same_images(tmp_path, arrays, form, writer):
    stored = {key: FORMS[form](value) if key[0] == "X" else value for key, value in arrays.items()}
    splits = open_splits(save(tmp_path / "d.npz", stored, writer))
    for split in splits:
        assert isinstance(split.X, np.memmap)
        expected = stored[f"X_{split.name}"].reshape(-1, 1, 28, 28).astype(np.float32)
        if stored[f"X_{split.name}"].dtype == np.uint8:
            expected = expected / np.float32(255)
        images = split.images(slice(None))
        assert images.dtype == np.float32
        np.testing.assert_array_equal(images, expected)
        np.testing.assert_array_equal(split.y, arrays[f"y_{split.name}"])
        assert split.sha256 == digest(np.reshape(stored[f"X_{split.name}"], (-1, 28, 28)), split.y)


def test_an_uncompressed_file_is_mapped_where_it_lies(letters):
    splits = open_splits(letters)
    assert {split.X.filename for split in splits} == {letters}


def test_a_compressed_file_is_unpacked_once_and_the_copy_follows_the_file(tmp_path):
    path = save(tmp_path / "d.npz", make_arrays(seed=1), np.savez_compressed)
    first = open_splits(path).train.X.filename
    before = Path(first).stat().st_mtime_ns
    assert open_splits(path).train.X.filename == first
    assert Path(first).stat().st_mtime_ns == before
    save(path, make_arrays(seed=2), np.savez_compressed)
    np.testing.assert_array_equal(open_splits(path).train.X, make_arrays(seed=2)["X_train"])
    assert len(list((tmp_path / "home" / "unpacked").glob("*/*/X_train.raw"))) == 1


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int32, np.uint64, ">i8"])
def test_labels_of_any_integer_type(tmp_path, arrays, dtype):
    arrays = {key: value.astype(dtype) if key[0] == "y" else value for key, value in arrays.items()}
    splits = open_splits(save(tmp_path / "d.npz", arrays))
    assert splits.train.y.dtype == np.int64
    np.testing.assert_array_equal(splits.train.y, arrays["y_train"])


def change(key, value):
    return lambda arrays: arrays | {key: value(arrays[key]) if callable(value) else value}


def put(X, value):
    X = X.astype(np.float32) / 255
    X[-1, -1, -1] = value
    return X


BAD_ARRAYS = {  # what is done to good arrays, and what the one line must name
    "missing key": (lambda a: {k: v for k, v in a.items() if k != "y_val"}, "y_val: missing"),
    "extra dimension": (change("X_val", lambda X: X[:, None, None]), r"X_val: found shape \(90, 1, 1, 28, 28\)"),
    "other side": (change("X_test", np.zeros((110, 32, 32), np.uint8)), r"X_test: found shape \(110, 32, 32\)"),
    "scalar": (change("X_train", np.float32(1)), r"X_train: found shape \(\)"),
    "labels as a column": (change("y_train", lambda y: y[:, None]), r"y_train: found shape \(300, 1\)"),
    "object array": (change("X_train", lambda X: np.array([Payload()] * len(X))), "X_train: found an object array"),
    "object labels": (change("y_test", lambda y: np.array([Payload()] * len(y))), "y_test: found an object array"),
    "NaN": (change("X_train", lambda X: put(X, np.nan)), "X_train: found NaN or infinity"),
    "infinity": (change("X_test", lambda X: put(X, np.inf)), "X_test: found NaN or infinity"),
    "float 0..255": (change("X_train", lambda X: X.astype(float)), r"X_train: found float64 pixels from 0 to \d+"),
    "integers as pixels": (change("X_val", lambda X: X.astype(int)), "X_val: found int64 pixels, expected uint8"),
    "label 10": (change("y_train", lambda y: np.where(y == 9, 10, y)), r"y_train: found labels 0..10, expected 0..9"),
    "label -1": (change("y_val", lambda y: y - 1), r"y_val: found labels -1..8, expected 0..9"),
    "float labels": (change("y_test", lambda y: y.astype(float)), "y_test: found float64 labels, expected integers"),
    "other length": (change("y_test", lambda y: y[:-1]), "y_test: found 109 labels, expected 110"),
    "empty split": (lambda a: a | {"X_val": a["X_val"][:0], "y_val": a["y_val"][:0]}, "X_val: found no images"),
}


@pytest.mark.parametrize("case", BAD_ARRAYS)
@pytest.mark.parametrize("writer", [np.savez, np.savez_compressed])
def test_bad_arrays_are_refused_by_file_and_key(tmp_path, arrays, case, writer):
    spoil, message = BAD_ARRAYS[case]
    path = save(tmp_path / "bad.npz", spoil(arrays), writer)
    with pytest.raises(InputError, match=f"bad.npz: {message}"):
        open_splits(path)
    assert not (tmp_path / "payload-ran").exists()


def test_the_payload_of_these_tests_would_run(tmp_path):
    pickle.loads(pickle.dumps(Payload())).close()
    assert (tmp_path / "payload-ran").exists()


def test_files_that_are_no_whole_archive_are_refused(tmp_path, letters):
    with pytest.raises(InputError, match=r"nowhere.npz: no such file, expected an .npz file"):
        open_splits(tmp_path / "nowhere.npz")
    with pytest.raises(InputError, match="cannot be read"):
        open_splits(tmp_path)
    (tmp_path / "text.npz").write_text("not a zip")
    with pytest.raises(InputError, match=r"text.npz: found no zip archive"):
        open_splits(tmp_path / "text.npz")
    (tmp_path / "half.npz").write_bytes(letters.read_bytes()[: letters.stat().st_size // 2])
    with pytest.raises(InputError, match=r"half.npz: truncated or damaged"):
        open_splits(tmp_path / "half.npz")
    with zipfile.ZipFile(tmp_path / "other.npz", "w") as archive:
        archive.writestr("X_train.npy", b"no array")
    with pytest.raises(InputError, match=r"other.npz: X_train: found no array"):
        open_splits(tmp_path / "other.npz")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.floats(0, 1, exclude_max=True), compressed=st.booleans())
def test_a_file_cut_anywhere_is_refused(tmp_path, cut, compressed):
    path = save(tmp_path / "cut.npz", make_arrays((12, 3, 3)), np.savez_compressed if compressed else np.savez)
    content = path.read_bytes()
    path.write_bytes(content[: int(cut * len(content))])
    with pytest.raises(InputError, match=r"cut.npz"):
        open_splits(path)


def test_every_flipped_bit_of_a_header_is_refused(tmp_path):
    path = save(tmp_path / "header.npz", make_arrays((12, 3, 3)))
    content = path.read_bytes()
    start = content.index(b"\x93NUMPY")
    for at in range(start, content.index(b"\n", start)):
        for bit in range(8):
            flipped = bytearray(content)
            flipped[at] ^= 1 << bit
            path.write_bytes(flipped)
            with pytest.raises(InputError, match=r"header.npz"):
                open_splits(path)


@pytest.mark.parametrize("writer", [np.savez, np.savez_compressed])
def test_a_flipped_bit_in_the_table_of_contents_is_refused_or_changes_nothing(tmp_path, writer):
    arrays = make_arrays((2, 1, 1))
    path = save(tmp_path / "table.npz", arrays, writer)
    content = path.read_bytes()
    for at in range(content.index(b"PK\x01\x02"), len(content)):
        for bit in range(8):
            flipped = bytearray(content)
            flipped[at] ^= 1 << bit
            path.write_bytes(flipped)
            try:
                splits = open_splits(path)
            except InputError:
                continue
            np.testing.assert_array_equal(splits.train.X, arrays["X_train"])
            np.testing.assert_array_equal(splits.train.y, arrays["y_train"])


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), compressed=st.booleans())
def test_a_flipped_bit_is_refused_or_changes_nothing(tmp_path, where, bit, compressed):
    arrays = make_arrays((12, 3, 3))
    path = save(tmp_path / "flipped.npz", arrays, np.savez_compressed if compressed else np.savez)
    content = bytearray(path.read_bytes())
    content[int(where * len(content))] ^= 1 << bit
    path.write_bytes(content)
    try:
        splits = open_splits(path)
    except InputError:
        return
    for split in splits:
        np.testing.assert_array_equal(split.X, arrays[f"X_{split.name}"])
        np.testing.assert_array_equal(split.y, arrays[f"y_{split.name}"])


def test_the_digest_sees_the_last_pixel_the_labels_and_the_type(arrays):
    X, y = arrays["X_train"], arrays["y_train"]
    pixel, label = X.copy(), y.copy()
    pixel[-1, -1, -1] ^= 1
    label[-1] = (label[-1] + 1) % 10
    digests = {
        digest(X, y),
        digest(pixel, y),
        digest(X, label),
        digest(X.astype(np.float32), y),
        digest(X[:-1], y[:-1]),
    }
    assert len(digests) == 5
    assert digest(X, y) == digest(np.asfortranarray(X), y.astype(np.uint8))


def test_digests_are_remembered_until_the_file_changes(tmp_path, letters):
    expected = open_splits(letters).train.sha256
    memory = tmp_path / "home" / "digests.json"
    records = json.loads(memory.read_text())
    records[str(letters)]["sha256"]["train"] = "what was remembered"
    memory.write_text(json.dumps(records))
    assert open_splits(letters).train.sha256 == "what was remembered"
    os.utime(letters, ns=(1, 1))
    assert open_splits(letters).train.sha256 == expected
    memory.write_text("{ damaged")
    assert open_splits(letters).train.sha256 == expected


def test_test_images_that_train_holds_are_counted(tmp_path):
    arrays = make_arrays((50, 20, 20))
    arrays["X_test"][:3] = arrays["X_train"][[7, 7, 49]]  # one train image twice, another once
    arrays["X_test"][4] = arrays["X_val"][0]  # val does not count
    assert open_splits(save(tmp_path / "d.npz", arrays)).overlap == 3
    arrays["X_test"] = arrays["X_test"].astype(np.float32) / 255  # nor does the type of the pixels
    assert open_splits(save(tmp_path / "e.npz", arrays)).overlap == 3
    assert open_splits(save(tmp_path / "f.npz", make_arrays((50, 20, 20)))).overlap == 0


@pytest.mark.parametrize("size", [1, 7, 300, 1000])
def test_windows_are_the_rows_in_order(letters, arrays, size):
    X = open_splits(letters).train.X
    np.testing.assert_array_equal(np.concatenate(list(windows(X, size))), arrays["X_train"])
    np.testing.assert_array_equal(np.concatenate(list(windows(arrays["X_train"], size))), arrays["X_train"])
    with pytest.raises(AssertionError):
        next(windows(X[5:], size))


def test_locate_says_how_to_make_notmnist(tmp_path):
    with pytest.raises(InputError, match="poolnet prepare notmnist"):
        locate("notmnist")
    made = tmp_path / "home" / "data" / "notmnist.npz"
    made.parent.mkdir(parents=True)
    made.touch()
    assert locate("notmnist") == made
    assert str(locate("some/where.npz")) == str(Path("some", "where.npz"))


def test_save_leaves_the_old_file_when_it_fails(letters, arrays):
    before = letters.read_bytes()
    with pytest.raises((AttributeError, pickle.PicklingError)):  # of the second array, when the first is written
        npz.save(letters, {"X_train": arrays["X_train"], "y_train": np.array([lambda: 0])})
    assert letters.read_bytes() == before
    assert list(letters.parent.glob(".letters*")) == []


def test_what_a_killed_process_left_is_removed_but_not_what_one_at_work_holds(tmp_path, letters, arrays):
    killed, at_work = tmp_path / ".letters.npz.0a0a0a0a.part", tmp_path / ".letters.npz.1b1b1b1b.part"
    for path in (killed, at_work):
        path.touch()
    os.utime(killed, (1, 1))
    npz.save(letters, arrays)
    assert [path.exists() for path in (killed, at_work)] == [False, True]


LIMITED = """
import resource, sys
from poolnet.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))
main(["prepare", "glyphs", "--train", "100", "--val", "10", "--test", "10", "--out", sys.argv[1]])
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit on the size of a file")
def test_a_disk_that_takes_no_more_is_one_line_that_names_the_file(letters):
    before = letters.read_bytes()
    finished = subprocess.run([sys.executable, "-c", LIMITED, str(letters)], capture_output=True, text=True)
    assert finished.returncode == 1
    assert finished.stderr.startswith(f"poolnet: error: {letters}: cannot be written (")
    assert finished.stderr.count("\n") == 1
    assert letters.read_bytes() == before
    assert list(letters.parent.glob(".letters*")) == []
