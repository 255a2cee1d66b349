import contextlib
import errno
import hashlib
import os
import pickle
import re
import shutil
import socket
import sys
import threading
import tracemalloc
import zipfile
from pathlib import Path

import forked
import numpy as np
import pytest
from conftest import make_arrays, ran
from hypothesis import given, settings
from hypothesis import strategies as st

from poolnet import files
from poolnet.cli import commands
from poolnet.data import dataset, glyphs, npz
from poolnet.data.dataset import SPLITS, locate, open_dataset
from poolnet.errors import InputError, RunError
from poolnet.files import home


def save(path, arrays, writer=np.savez):
    writer(path, **arrays)
    return path


def digest(X, y):
    """As it is recorded of a split: type and size, pixels, labels."""
    pixels = np.ascontiguousarray(X, X.dtype.newbyteorder("<"))
    head = f"{pixels.dtype.str} {len(X)}x28x28\n".encode()
    return hashlib.sha256(head + pixels.tobytes() + np.asarray(y, "<i8").tobytes()).hexdigest()


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
    splits = open_dataset(save(tmp_path / "d.npz", stored, writer))
    for split in splits:
        assert split.dtype == str(stored[f"X_{split.name}"].dtype)
        expected = stored[f"X_{split.name}"].reshape(-1, 1, 28, 28).astype(np.float32)
        if stored[f"X_{split.name}"].dtype == np.uint8:
            expected = expected / np.float32(255)
        images = split.images(slice(None))
        assert images.dtype == np.float32
        np.testing.assert_array_equal(images, expected)
        np.testing.assert_array_equal(split.y, arrays[f"y_{split.name}"])
        assert split.sha256 == digest(np.reshape(stored[f"X_{split.name}"], (-1, 28, 28)), split.y)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int32, np.uint64, ">i8"])
def test_labels_of_any_integer_type(tmp_path, arrays, dtype):
    arrays = {key: value.astype(dtype) if key[0] == "y" else value for key, value in arrays.items()}
    splits = open_dataset(save(tmp_path / "d.npz", arrays))
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
    "labels as a column": (
        change("y_train", lambda y: y[:, None]),
        r"y_train: found shape \(300, 1\), .*; store y\.ravel\(\)$",
    ),
    "one-hot labels": (
        change("y_test", lambda y: np.eye(10)[y]),
        r"y_test: found shape \(110, 10\), expected \(N,\); store y\.argmax\(1\)$",
    ),
    "labels in text": (
        change("y_val", lambda y: np.array(list("ABCDEFGHIJ"))[y]),
        r"y_val: found <U1 labels, .*; store \['ABCDEFGHIJ'\.index\(letter\) for letter in y\]$",
    ),
    "labels in bytes": (
        change("y_val", lambda y: np.array(list("ABCDEFGHIJ")).astype("S")[y]),
        r"y_val: found \|S1 labels, .*; store \['ABCDEFGHIJ'\.index",
    ),
    "labels from 1": (change("y_train", lambda y: y + 1), r"y_train: found labels 1..10, .*; store y - 1$"),
    "labels as codes": (
        change("y_train", lambda y: (y + 65).astype(np.uint8)),
        r"y_train: found labels 65..74, .*; store y - 65$",
    ),
    "object array": (change("X_train", lambda X: np.array([Payload()] * len(X))), "X_train: found an object array"),
    "object labels": (change("y_test", lambda y: np.array([Payload()] * len(y))), "y_test: found an object array"),
    "NaN": (change("X_train", lambda X: put(X, np.nan)), "X_train: found NaN or infinity"),
    "infinity": (change("X_test", lambda X: put(X, np.inf)), "X_test: found NaN or infinity"),
    "float 0..255": (change("X_train", lambda X: X.astype(float)), r"X_train: found float64 pixels from 0 to \d+"),
    "integers as pixels": (change("X_val", lambda X: X.astype(int)), r"X_val: found int64 .*; store X\.astype"),
    "label 10": (change("y_train", lambda y: np.where(y == 9, 10, y)), r"y_train: found labels 0..10, expected 0..9"),
    "label -1": (change("y_val", lambda y: y - 1), r"y_val: found labels -1..8, .*; store y \+ 1$"),
    "float labels": (change("y_test", lambda y: y.astype(float)), r"y_test: found float64 .*; store y\.astype\(int\)$"),
    "other length": (change("y_test", lambda y: y[:-1]), "y_test: found 109 labels, expected 110"),
    "empty split": (lambda a: a | {"X_val": a["X_val"][:0], "y_val": a["y_val"][:0]}, "X_val: found no images"),
}


def scaled(**how):
    """A change of whole splits, each by a function of its pixels from 0 to 1."""

    def changed(arrays):
        spread = {f"X_{name}": arrays[f"X_{name}"] / np.float32(arrays[f"X_{name}"].max()) for name in SPLITS}
        return arrays | {key: how.get(key[2:], how["other"])(X).astype(np.float32) for key, X in spread.items()}

    return changed


UNIT, HALF, BOTH, STANDARD = (lambda X: X, lambda X: X - 0.5, lambda X: 2 * X - 1, lambda X: (X - 0.3) / 0.25)
SCALES = {  # what must be one scale in all three splits, and what the one line must say
    "val from -0.5": (scaled(val=HALF, other=UNIT), r"X_val: .* from -0\.5 to 0\.5, and .* from 0 to 1 in X_train"),
    "train from -0.5": (scaled(train=HALF, other=UNIT), r"X_val: .* from 0 to 1, and .* from -0\.5 to 0\.5 in X_train"),
    "test from -1": (scaled(test=BOTH, other=UNIT), "X_test: .* from -1 to 1, and .* from 0 to 1 in X_train"),
    "train from -1": (scaled(train=BOTH, other=HALF), r"X_val: .* from -0\.5 to 0\.5, and .* from -1 to 1 in X_train"),
    "test standardised": (scaled(test=STANDARD, other=UNIT), r"X_test: .* from -1\.2 to 2\.8, and .* from 0 to 1 in"),
    "train standardised": (scaled(train=STANDARD, other=HALF), "X_val: .* expected one scale in all three; store"),
    "test to 2.55": (scaled(test=lambda X: 2.55 * X, other=UNIT), r"X_test: .* from 0 to 2\.55, and .* from 0 to 1 in"),
    "test divided twice": (
        scaled(test=lambda X: X / 255, other=UNIT),
        r"X_test: .* to 0\.0039.*, and .* from 0 to 1 in",
    ),
    "all divided twice": (scaled(other=lambda X: X / 255), r"X_train: .* such as 0\.\.1; .* divided by 255 twice$"),
    "all divided, around 0": (scaled(other=lambda X: (X - 0.5) / 255), "X_train: .* divided by 255 twice"),
    "uint8 of 0 and 1": (
        lambda a: a | {f"X_{name}": (a[f"X_{name}"] > 99).astype(np.uint8) for name in SPLITS},
        r"X_train: found uint8 pixels from 0 to 1, expected 0\.\.255; multiply them by 255$",
    ),
    "uint8 beside -0.5 to 0.5": (
        lambda a: a | {"X_test": (a["X_test"] / 255 - 0.5).astype(np.float32)},
        r"X_test: found float32 pixels from -0\.5 to .*, and uint8 pixels from 0 to ... in X_train",
    ),
    "uint8 of 0 and 1 in test": (
        lambda a: a | {"X_test": (a["X_test"] > 99).astype(np.uint8)},
        "X_test: found uint8 pixels from 0 to 1, and uint8 pixels from 0 to 20. in X_train",
    ),
    "one image, below 0": (
        lambda a: a | {"X_test": (a["X_test"][:1] / 255 - 0.5).astype(np.float32), "y_test": a["y_test"][:1]},
        "X_test: .* expected one scale",
    ),
}


@pytest.mark.parametrize("case", SCALES)
def test_splits_in_different_scales_are_refused_with_their_ranges(tmp_path, arrays, case):
    spoil, message = SCALES[case]
    with pytest.raises(InputError, match=f"scales.npz: {message}"):
        open_dataset(save(tmp_path / "scales.npz", spoil(arrays)))


def only(n, X):
    """Pictures (n, 28, 28) of one colour."""
    return np.full((n, 28, 28), X, np.float32)


PLAUSIBLE = {
    "from -0.5 to 0.5": scaled(other=HALF),
    "from -1 to 1": scaled(other=BOTH),
    "standardised": scaled(other=STANDARD),
    "uint8 beside 0 to 1": lambda a: a | {"X_test": (a["X_test"] / 255).astype(np.float32)},
    "a faint test": scaled(test=lambda X: 0.3 + 0.3 * X, other=UNIT),
    "photographs in test": scaled(test=lambda X: 0.8 * X - 0.4, other=HALF),
    "thin letters in test": scaled(test=lambda X: X * (np.arange(28) == 14), other=UNIT),
    "bright on dark, and dark on bright": scaled(test=lambda X: 1 - X, other=UNIT),
    "overshoot of a resampling": scaled(test=lambda X: 1.1 * X - 0.05, other=UNIT),
    "one white square": lambda a: scaled(other=HALF)(a) | {"X_test": only(1, 0.5), "y_test": a["y_test"][:1]},
    "one black square": lambda a: scaled(other=HALF)(a) | {"X_test": only(1, -0.5), "y_test": a["y_test"][:1]},
    "two black letters": lambda a: a | {"X_val": only(2, 0), "y_val": a["y_val"][:2]},
}


@pytest.mark.parametrize("case", PLAUSIBLE)
def test_what_one_scale_may_hold_is_taken(tmp_path, arrays, case):
    assert len(open_dataset(save(tmp_path / "scales.npz", PLAUSIBLE[case](arrays))).train) == 300


@pytest.mark.parametrize("case", BAD_ARRAYS)
@pytest.mark.parametrize("writer", [np.savez, np.savez_compressed])
def test_bad_arrays_are_refused_by_file_and_key(tmp_path, arrays, case, writer):
    spoil, message = BAD_ARRAYS[case]
    path = save(tmp_path / "bad.npz", spoil(arrays), writer)
    with pytest.raises(InputError, match=f"bad.npz: {message}"):
        open_dataset(path)
    assert not (tmp_path / "payload-ran").exists()


def test_the_payload_of_these_tests_would_run(tmp_path):
    pickle.loads(pickle.dumps(Payload())).close()
    assert (tmp_path / "payload-ran").exists()


def test_files_that_are_no_whole_archive_are_refused(tmp_path, letters):
    with pytest.raises(InputError, match=r"nowhere.npz: no such file, expected an .npz file"):
        open_dataset(tmp_path / "nowhere.npz")
    with pytest.raises(InputError, match=r"found a folder, expected an \.npz file"):
        open_dataset(tmp_path)
    (tmp_path / "text.npz").write_text("not a zip")
    with pytest.raises(InputError, match=r"text.npz: found no zip archive"):
        open_dataset(tmp_path / "text.npz")
    (tmp_path / "half.npz").write_bytes(letters.read_bytes()[: letters.stat().st_size // 2])
    with pytest.raises(InputError, match=r"half.npz: truncated or damaged"):
        open_dataset(tmp_path / "half.npz")
    with zipfile.ZipFile(tmp_path / "other.npz", "w") as archive:
        archive.writestr("X_train.npy", b"no array")
    with pytest.raises(InputError, match=r"other.npz: X_train: found no array"):
        open_dataset(tmp_path / "other.npz")


@settings(max_examples=30)
@given(cut=st.floats(0, 1, exclude_max=True), compressed=st.booleans())
def test_a_file_cut_anywhere_is_refused(tmp_path, cut, compressed):
    path = save(tmp_path / "cut.npz", make_arrays((12, 3, 3)), np.savez_compressed if compressed else np.savez)
    content = path.read_bytes()
    path.write_bytes(content[: int(cut * len(content))])
    with pytest.raises(InputError, match=r"cut.npz"):
        open_dataset(path)


def test_every_flipped_bit_of_a_header_is_refused(tmp_path):
    path = save(tmp_path / "header.npz", make_arrays((12, 3, 3)))
    content = path.read_bytes()
    start = content.index(b"\x93NUMPY")
    for at in range(start, content.index(b"}", start) + 2):  # behind which are spaces
        for bit in range(8):
            flipped = bytearray(content)
            flipped[at] ^= 1 << bit
            path.write_bytes(flipped)
            with pytest.raises(InputError, match=r"header.npz"):
                open_dataset(path)


@pytest.mark.parametrize("writer", [np.savez, np.savez_compressed])
def test_a_flipped_bit_in_the_table_of_contents_is_refused_or_changes_nothing(tmp_path, writer):
    arrays = make_arrays((2, 1, 1))
    path = save(tmp_path / "table.npz", arrays, writer)
    content = path.read_bytes()
    entries = [match.start() for match in re.finditer(b"PK\x01\x02", content)]
    for at in [*range(entries[0], entries[1]), *range(content.index(b"PK\x05\x06"), len(content))]:
        for bit in range(8):
            flipped = bytearray(content)
            flipped[at] ^= 1 << bit
            path.write_bytes(flipped)
            try:
                splits = open_dataset(path)
            except InputError:
                continue
            np.testing.assert_array_equal(splits.train.X, arrays["X_train"])
            np.testing.assert_array_equal(splits.train.y, arrays["y_train"])


@settings(max_examples=100)
@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), compressed=st.booleans())
def test_a_flipped_bit_is_refused_or_changes_nothing(tmp_path, where, bit, compressed):
    arrays = make_arrays((12, 3, 3))
    path = save(tmp_path / "flipped.npz", arrays, np.savez_compressed if compressed else np.savez)
    content = bytearray(path.read_bytes())
    content[int(where * len(content))] ^= 1 << bit
    path.write_bytes(content)
    try:
        splits = open_dataset(path)
    except InputError:
        return
    for split in splits:
        np.testing.assert_array_equal(split.X, arrays[f"X_{split.name}"])
        np.testing.assert_array_equal(split.y, arrays[f"y_{split.name}"])


def test_the_digest_sees_the_last_pixel_the_labels_and_the_type(tmp_path, arrays):
    X, y = arrays["X_train"], arrays["y_train"]
    pixel, label = X.copy(), y.copy()
    pixel[-1, -1, -1] ^= 1
    label[-1] = (label[-1] + 1) % 10
    variants = [(X, y), (pixel, y), (X, label), (X.astype(np.float32) / 255, y), (X[:-1], y[:-1])]
    digests = [
        open_dataset(save(tmp_path / "d.npz", arrays | {"X_train": X, "y_train": y})).train.sha256 for X, y in variants
    ]
    assert len(set(digests)) == 5
    assert digests == [digest(X, y) for X, y in variants]


def same_size_and_time(path, arrays):
    """Write other data there, as `cp -p`, `rsync -t`, container layers and FAT may leave them."""
    save(path, arrays)
    os.utime(path, (315532800, 315532800))


def test_another_file_of_the_same_size_and_time_is_another_data_set(tmp_path):
    path = tmp_path / "d.npz"
    same_size_and_time(path, make_arrays(seed=1))
    first, size = open_dataset(path), path.stat().st_size
    same_size_and_time(path, make_arrays(seed=2))
    assert path.stat().st_size == size
    second, expected = open_dataset(path), make_arrays(seed=2)
    assert second.sha256 != first.sha256
    for split in second:
        np.testing.assert_array_equal(split.X, expected[f"X_{split.name}"])
        assert split.sha256 == digest(expected[f"X_{split.name}"], expected[f"y_{split.name}"])


@pytest.mark.parametrize("writer", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("how", ["replaced", "overwritten", "cut", "gone"])
def test_what_becomes_of_the_file_later_changes_nothing(tmp_path, arrays, writer, how):
    path = save(tmp_path / "d.npz", arrays, writer)
    splits = open_dataset(path)
    if how == "replaced":
        npz.save(path, make_arrays(seed=2))
    elif how == "overwritten":
        path.write_bytes(bytes(path.stat().st_size))
    elif how == "cut":
        os.truncate(path, 10)
    else:
        path.unlink()
    for split in splits:
        np.testing.assert_array_equal(split.X, arrays[f"X_{split.name}"])
        assert digest(split.X, split.y) == split.sha256


@pytest.mark.parametrize("how", ["replaced", "overwritten"])
def test_a_file_that_changes_while_it_is_opened_is_the_old_one_or_refused(tmp_path, arrays, monkeypatch, how):
    monkeypatch.setattr(npz, "ROWS", 50)
    path = save(tmp_path / "d.npz", arrays)
    other = save(tmp_path / "other.npz", make_arrays(seed=2))

    def meddle(name, size, start, block):
        if name == "val" and how == "replaced":
            shutil.copy(other, tmp_path / "copy.npz")
            (tmp_path / "copy.npz").replace(path)
        elif name == "val":
            shutil.copy(other, path)

    if sys.platform == "win32" and how == "replaced":
        pytest.skip("Windows replaces no file that is open")
    if how == "overwritten":
        with pytest.raises(InputError, match=r"d.npz: truncated or damaged"):
            open_dataset(path, watch=meddle)
        return
    for split in open_dataset(path, watch=meddle):
        np.testing.assert_array_equal(split.X, arrays[f"X_{split.name}"])
        assert split.sha256 == digest(split.X, split.y)


def test_images_that_nobody_wants_are_not_kept(letters, arrays):
    splits = open_dataset(letters, keep=("test",))
    assert (splits.train.X, splits.val.X) == (None, None)
    np.testing.assert_array_equal(splits.test.X, arrays["X_test"])
    assert splits.summary() == open_dataset(letters).summary()


def test_test_images_that_train_holds_are_counted(tmp_path):
    arrays = make_arrays((50, 20, 20))
    arrays["X_test"][:3] = arrays["X_train"][[7, 7, 49]]  # one train image twice, another once
    arrays["X_test"][4] = arrays["X_val"][0]  # val does not count
    assert open_dataset(save(tmp_path / "d.npz", arrays)).overlap == 3
    arrays["X_test"] = arrays["X_test"].astype(np.float32) / 255  # nor does the type of the pixels
    assert open_dataset(save(tmp_path / "e.npz", arrays)).overlap == 3
    assert open_dataset(save(tmp_path / "f.npz", make_arrays((50, 20, 20)))).overlap == 0


@pytest.mark.parametrize("rows", [1, 7, 300, 1000])
def test_windows_are_the_rows_in_order(tmp_path, arrays, monkeypatch, rows):
    monkeypatch.setattr(npz, "ROWS", rows)
    seen = {name: [] for name in dataset.SPLITS}
    for writer in (np.savez, np.savez_compressed):
        open_dataset(save(tmp_path / "d.npz", arrays, writer), (), lambda name, *rest: seen[name].append(rest))
        for name, blocks in seen.items():
            starts = [start for _, start, _ in blocks]
            assert starts == list(range(0, len(arrays[f"X_{name}"]), rows))
            np.testing.assert_array_equal(np.concatenate([pixels for *_, pixels in blocks]), arrays[f"X_{name}"])
            blocks.clear()


def header_of(path, key, shape, descr="|u1"):
    """Replace a member by one whose header says this."""
    text = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    text += b" " * (-(len(text) + 11) % 64) + b"\n"
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    members[f"{key}.npy"] = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + b"\0"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)


@pytest.mark.parametrize("key", ["X_train", "y_train", "y_test"])
@pytest.mark.parametrize(
    "shape",
    [
        *("(True,)", "(True, 28, 28)", "(-1,)", "(10**30,)", "(1.0,)", "(None,)", "('1',)", "1", "(1, (2,))"),
        *(f"({10**30},)", f"({10**15}, 28, 28)", f"({10**12},)", "(" * 3000 + ")" * 3000, "[" * 500 + "]" * 500),
    ],
)
def test_a_header_of_any_other_shape_is_refused_in_one_line(letters, key, shape):
    header_of(letters, key, shape)
    with pytest.raises(InputError, match=rf"letters.npz: {key}: "):
        open_dataset(letters)


@pytest.mark.parametrize("key", ["X_train", "y_test"])
def test_a_member_without_the_suffix_of_an_array_is_missing(letters, key):
    rewrite(letters, lambda name, content: (key if name == f"{key}.npy" else name, content))
    with pytest.raises(InputError, match=rf"letters.npz: {key}: missing, found .*; expected arrays as np.savez"):
        open_dataset(letters)


def test_a_header_that_unpacks_to_very_much_is_not_read(letters):
    size = 30_000_000
    with zipfile.ZipFile(letters, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("X_train.npy", b"\x93NUMPY\x02\x00" + size.to_bytes(4, "little") + bytes(size))
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=r"letters.npz: X_train: found no array \(EOF"):
            open_dataset(letters)
        assert tracemalloc.get_traced_memory()[1] < size / 10
    finally:
        tracemalloc.stop()


def test_a_header_of_python_2_is_read_without_a_word(letters, arrays):
    old, new = b"(110,), }  ", b"(110L,), } "
    rewrite(letters, lambda name, content: (name, content.replace(old, new)))
    assert new in letters.read_bytes()
    np.testing.assert_array_equal(open_dataset(letters).test.y, arrays["y_test"])  # warnings are errors in these tests


def rewrite(path, change):
    """Each member of an archive under the name and with the content that `change` gives it."""
    with zipfile.ZipFile(path) as archive:
        members = [change(name, archive.read(name)) for name in archive.namelist()]
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members:
            archive.writestr(name, content)


def test_what_is_no_regular_file_is_refused_at_once(tmp_path, letters):
    places = {tmp_path: "a folder"}
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.npz")
        places |= {tmp_path / "pipe.npz": "a pipe", Path("/dev/zero"): "a device", Path("/dev/null"): "a device"}
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind("s.npz")
        places |= {tmp_path / "s.npz": "a socket"}
    for place, kind in places.items():
        for refused in (lambda p: open_dataset(p), lambda p: npz.opened(p).__enter__()):
            with pytest.raises(InputError, match=f"{place}: found {kind}, expected an .npz file"):
                refused(place)


def run(*args, capsys):
    """Exit code and what is said on stderr, of the command in this process."""
    capsys.readouterr()
    code = commands._run([str(arg) for arg in args])
    return code, capsys.readouterr().err


def small(out):
    return ["prepare", "glyphs", "--train", 1, "--val", 1, "--test", 1, "--out", out]


def test_out_replaces_regular_files_only(tmp_path, letters, capsys, monkeypatch):
    places = {"": "found an empty text", tmp_path: "found a folder", letters / "x.npz": "cannot be written"}
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        (tmp_path / "link").symlink_to("/dev/full")
        places |= {tmp_path / "pipe": "found a pipe", "/dev/full": "found a device", tmp_path / "link": "a device"}
    monkeypatch.setattr(glyphs, "render", None)  # nothing is rendered before it is known where to
    for place, message in places.items():
        code, error = run(*small(place), capsys=capsys)
        assert (code, message in error, error.count("\n")) == (2, True, 1), error
        code, error = run("prepare", "notmnist", "--small", letters, "--out", place, capsys=capsys)
        assert (code, message in error, error.count("\n")) == (2, True, 1), error


@pytest.mark.skipif(sys.platform == "win32", reason="links need a right there")
def test_out_writes_where_a_link_leads(tmp_path, capsys):
    (tmp_path / "link.npz").symlink_to(tmp_path / "target.npz")
    assert run(*small(tmp_path / "link.npz"), capsys=capsys) == (0, "")
    assert (tmp_path / "link.npz").is_symlink()
    assert len(open_dataset(tmp_path / "target.npz").train) == 1


def test_a_full_disk_is_one_line_where_nothing_can_be_written(tmp_path, monkeypatch, capsys):
    def full(**sizes):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(glyphs, "render", full)
    monkeypatch.setenv("POOLNET_HOME", str(Path("letters.txt", "home")))
    Path("letters.txt").touch()  # where a folder would have to be
    code, error = run(*small(tmp_path / "new.npz"), capsys=capsys)
    assert (code, error.count("\n")) == (1, 1)
    assert "No space left on device; files go to POOLNET_HOME" in error


def test_an_empty_name_of_data_is_refused(capsys):
    for text in ("", "  "):
        with pytest.raises(InputError, match="--data: found an empty text"):
            locate(text)


def test_a_tilde_is_the_users_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "me"))
    (tmp_path / "me").mkdir()
    assert run(*small("~/made.npz"), capsys=capsys) == (0, "")
    assert len(open_dataset(locate("~/made.npz")).train) == 1
    assert locate("~/made.npz") == tmp_path / "me" / "made.npz"
    monkeypatch.setenv("POOLNET_HOME", "~/state")
    assert home() == tmp_path / "me" / "state"


ODD_NAMES = ["a b", "a#b?c=d%20", "it's", 'a"b', "Büro", "文字", "$HOME", "a;b&c"]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such names")
@pytest.mark.parametrize("name", [*ODD_NAMES, r"a$\frac$b", "\x1b[31mred\x1b[0m", "\u202ereversed"])
def test_any_name_works_and_none_reaches_the_terminal_raw(tmp_path, capsys, name):
    path = tmp_path / f"{name}.npz"
    assert commands._run([str(arg) for arg in small(path)]) == 0
    printed = capsys.readouterr()
    assert open_dataset(path).name == name
    path.write_bytes(b"damaged")
    code, error = run("prepare", "notmnist", "--small", path, capsys=capsys)
    assert code == 2
    for text in (printed.out, error):
        assert text.count("\n") == 1
        assert text.rstrip("\n").isprintable()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such names")
def test_a_name_that_no_server_stores_is_refused_before_training(letters, capsys):
    named = letters.rename(os.fsdecode(b"not-utf8-\xff.npz"))
    code, error = run("train", "--data", named, capsys=capsys)
    assert (code, error.count("\n")) == (2, 1)
    assert "not-utf8-\\udcff.npz: found a name that is not UTF-8" in error


def test_rendered_letters_that_are_damaged_are_rendered_again(monkeypatch):
    rendered = glyphs.render(20, 10, 10)
    monkeypatch.setattr(glyphs, "render", lambda: rendered)
    lines = []
    path = locate("glyphs", lines.append)
    assert (len(lines), locate("glyphs", lines.append), len(lines)) == (1, path, 1)
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    for damage in (bytes(flipped), whole[:-1], whole[:1000], b"", b"text"):
        path.write_bytes(damage)
        assert locate("glyphs", lines.append) == path
        assert open_dataset(path).sha256 == open_dataset(save(path, rendered)).sha256
    assert len(lines) == 6


def test_who_renders_is_named_while_another_waits(monkeypatch):
    rendered = glyphs.render(20, 10, 10)
    monkeypatch.setattr(glyphs, "render", lambda: rendered)
    monkeypatch.setattr(dataset, "locked", lambda path, wait=0.1: files.locked(path, wait))
    lock, lines = home() / "data" / f"glyphs-v{glyphs.VERSION}.lock", []
    with contextlib.ExitStack() as stack:
        stack.enter_context(files.locked(lock))
        thread = threading.Thread(target=locate, args=("glyphs", lines.append))
        thread.start()
        while not lines:
            assert thread.is_alive()
    thread.join(30)
    assert lines[0].startswith("Waiting for the embedded letters: ")
    assert f"process {os.getpid()}" in lines[0]
    assert lines[1].startswith("Rendering")


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (MemoryError(), RunError, "not enough memory"),
        (OSError(5, "Input/output error"), RunError, r"cannot be read \(Input/output error\)"),
        (PermissionError(13, "Permission denied"), InputError, r"cannot be read \(Permission denied\)"),
        (OSError(22, "Invalid argument"), InputError, "truncated or damaged"),
    ],
)
def test_trouble_while_data_are_read_is_called_what_it_is(letters, monkeypatch, error, kind, message):
    def fail(*args):
        raise error

    with npz.opened(letters) as archive:
        member = npz.member(archive, letters, "X_train")
        monkeypatch.setattr(zipfile.ZipExtFile, "read", fail)
        with pytest.raises(kind, match=f"letters.npz: .*{message}"):
            next(member.blocks())


def test_an_error_of_the_one_who_watches_is_not_the_files(letters):
    def watch(*args):
        raise RuntimeError("can't allocate memory")

    with pytest.raises(RuntimeError, match=r"^can't allocate memory$"):
        open_dataset(letters, watch=watch)


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


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit on the size of a file")
def test_a_disk_that_takes_no_more_is_one_line_that_names_the_file(letters):
    before = letters.read_bytes()
    sizes = ("--train", "100", "--val", "10", "--test", "10")
    finished = ran(*forked.PYTHON, "trouble", "full_disk", "prepare", "glyphs", *sizes, "--out", letters)
    assert finished.returncode == 1
    assert finished.stderr.startswith(f"poolnet: error: {letters}: cannot be written (")
    assert finished.stderr.count("\n") == 1
    assert letters.read_bytes() == before
    assert list(letters.parent.glob(".letters*")) == []
