"""MNIST's file format: read as written, refused in one line where it is not."""

import gzip
import re
import struct

import numpy as np
import pytest
from conftest import assert_refused, run

from poolnet.data import idx
from poolnet.data.dataset import open_dataset, prepared
from poolnet.errors import InputError

NAMES = tuple(f"class {n}" for n in range(10))


def coded(array, magic=None):
    start = bytes((0, 0, 8, array.ndim)) if magic is None else magic
    return start + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def images(n, seed=0, side=28):
    return np.random.default_rng(seed).integers(0, 256, (n, side, side), dtype=np.uint8)


def labels(n):
    return (np.arange(n) * 7 % 10).astype(np.uint8)


def write(folder, packed=False, **changed):
    """Four whole files, but for those whose content is given."""
    contents = {
        "train_images": coded(images(600)),
        "train_labels": coded(labels(600)),
        "test_images": coded(images(50, seed=1)),
        "test_labels": coded(labels(50)),
    } | changed
    folder.mkdir(exist_ok=True)
    for key, content in contents.items():
        path = folder / (idx.FILES[key] + ".gz" * packed)
        path.write_bytes(gzip.compress(content) if packed else content)
    return folder


def prepare(folder, classes=(), seed=0):
    return idx.prepare(idx.locate(folder, {}), classes, seed)


@pytest.mark.parametrize("packed", [False, True])
def test_the_files_become_splits(tmp_path, packed):
    arrays = prepare(write(tmp_path / "f", packed), NAMES)
    np.testing.assert_array_equal(arrays["X_test"], images(50, seed=1))
    np.testing.assert_array_equal(arrays["y_test"], labels(50))
    assert [len(arrays[f"y_{name}"]) for name in ("train", "val", "test")] == [540, 60, 50]
    assert arrays["y_train"].dtype == np.int64
    both = {image.tobytes(): label for image, label in zip(images(600), labels(600), strict=True)}
    found = {
        image.tobytes(): label
        for name in ("train", "val")
        for image, label in zip(arrays[f"X_{name}"], arrays[f"y_{name}"], strict=True)
    }
    assert found == both
    assert tuple(arrays["classes"]) == NAMES
    assert "classes" not in prepare(tmp_path / "f")
    np.testing.assert_array_equal(prepare(tmp_path / "f")["X_val"], arrays["X_val"])
    assert not np.array_equal(prepare(tmp_path / "f", seed=1)["X_val"], arrays["X_val"])


def test_files_by_other_names(tmp_path):
    folder = write(tmp_path / "f")
    (folder / "t10k-images-idx3-ubyte").rename(folder / "t10k-images.idx3-ubyte")
    (folder / "t10k-labels-idx1-ubyte").rename(tmp_path / "answers")
    arrays = idx.prepare(idx.locate(folder, {"test_labels": tmp_path / "answers"}), (), 0)
    assert len(arrays["y_test"]) == 50
    with pytest.raises(InputError, match=r"f: found no t10k-labels-idx1-ubyte or t10k-labels-idx1-ubyte\.gz; name"):
        idx.locate(folder, {})
    with pytest.raises(InputError, match=r"^--train-images: not given, expected the four files, or a folder"):
        idx.locate(None, {"test_labels": tmp_path / "answers"})
    with pytest.raises(InputError, match=r"nowhere: no such folder, expected one with train-images-idx3-ubyte"):
        idx.locate(tmp_path / "nowhere", {})


HUGE = bytes((0, 0, 8, 3)) + struct.pack(">3I", 2**32 - 1, 28, 28)
BAD = {
    "no bytes": ({"train_images": b""}, "ubyte: begins with nothing, expected 00 00 08 03: images"),
    "text": ({"train_images": b"PK\3\4" * 9}, "begins with 50 4b 03 04, expected 00 00 08 03"),
    "labels for images": ({"train_images": coded(labels(600))}, "begins with 00 00 08 01, which are labels, expected"),
    "images for labels": ({"test_labels": coded(images(50))}, "begins with 00 00 08 03, which are images, expected"),
    "floats": ({"test_images": coded(images(50), b"\0\0\x0d\3")}, "begins with 00 00 0d 03, expected 00 00 08 03"),
    "cut in the header": ({"test_images": coded(images(50))[:9]}, "ubyte: cut off in its first 16 bytes"),
    "cut": ({"test_images": coded(images(50))[:-1]}, "found 39,199 bytes of data, expected 39,200 for 50 x 28 x 28"),
    "more": ({"test_images": coded(images(50)) + b"\0"}, "found more data, expected 39,200 for 50 x 28 x 28"),
    "a huge number": ({"test_images": HUGE + bytes(99)}, "found 99 bytes of data, expected 3,367,254,359,280 for"),
    "other size": ({"train_images": coded(images(9, side=32))}, "found images of 32x32 pixels, expected 28x28"),
    "labels beyond ten": ({"train_labels": coded(labels(600) + 1)}, "found labels 1..10, expected 0..9 for ten"),
    "other number": ({"test_labels": coded(labels(49))}, "ubyte: found 49 labels, expected 50, one for"),
    "a class is missing": ({"test_labels": coded(labels(50) // 2)}, "too few distinct letters, no F G H I J in"),
    "none": ({"test_images": coded(images(0)), "test_labels": coded(labels(0))}, "no A B C D E F G H I J in test"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("packed", [False, True])
def test_what_is_damaged_is_one_line(tmp_path, kind, packed):
    changed, said = BAD[kind]
    with pytest.raises(InputError, match=re.escape(said.replace("ubyte:", f"ubyte{'.gz' * packed}:"))) as error:
        prepare(write(tmp_path / "f", packed, **changed))
    assert str(error.value).startswith(str(tmp_path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("at", [12, 0.5, -6])
def test_a_damaged_gzip_file_is_one_line(tmp_path, at):
    path = write(tmp_path / "f", packed=True) / "train-images-idx3-ubyte.gz"
    content = bytearray(path.read_bytes())
    content[int(at * len(content)) if isinstance(at, float) else at] ^= 0x55
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"train-images-idx3-ubyte\.gz: (damaged or cut off|begins with|found)"):
        prepare(tmp_path / "f")
    path.write_bytes(content[:-3])
    with pytest.raises(InputError, match=r"train-images-idx3-ubyte\.gz: damaged or cut off"):
        prepare(tmp_path / "f")


def test_the_command_names_the_data_set_as_its_folder(tmp_path, capsys):
    folder = write(tmp_path / "some digits", packed=True)
    code, out, _ = run(capsys, "prepare", "idx", folder, "--classes", ",".join("abcdefghij"), "--seed", 0)
    place = prepared("some digits")
    assert code == 0
    assert out.endswith(f'Wrote {place}\nNext: poolnet train --data "{place}"\n')
    assert open_dataset(place).classes == tuple("abcdefghij")
    for name in ("notMNIST_small", "glyphs"):
        code, _, err = run(capsys, "prepare", "idx", write(tmp_path / name))
        assert_refused(code, err, f"--out: not given, and {name} is no name for your own data")


def test_names_of_classes(tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("\ufeff" + "\r\n".join(NAMES) + "\n\n", encoding="utf-8")
    assert idx.names(str(names)) == idx.names(",".join(NAMES)) == idx.names(" , ".join(NAMES)) == NAMES
    assert idx.names(None) == ()
    names.write_bytes(b"\xff\xff")
    for given, said in {
        "a,b": "--classes: found 2 names, expected 10, one for each label",
        ",".join("aabcdefghi"): "--classes: found 'a' twice",
        str(names): "names.txt: found no text in UTF-8",
        str(tmp_path / "none.txt"): r"none.txt: no such file, expected a text file with ten lines",
        "": "expected a text file with ten lines",
    }.items():
        with pytest.raises(InputError, match=said):
            idx.names(given)
