"""Ten folders of pictures, one a class."""

import numpy as np
import pytest
from conftest import run
from PIL import Image

from poolnet.data import picture_folder, splits
from poolnet.data.dataset import open_dataset
from poolnet.errors import InputError

NAMES = ["Ankle boot", "Bag", "Coat", "Dress", "Pullover", "Sandal", "Shirt", "Sneaker", "T-shirt", "über"]


def pictures(folder, n=60, names=NAMES, suffix="png", size=28):
    X = np.random.default_rng(0).integers(0, 256, (len(names), n, size, size), dtype=np.uint8)
    X[:, :, 0, 0] = np.arange(len(names))[:, None]
    for name, images in zip(names, X, strict=True):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i, image in enumerate(images):
            Image.fromarray(image).save(folder / name / f"{i}.{suffix}")
    return folder


@pytest.mark.parametrize("suffix", ["png", "bmp", "tiff", "gif", "PNG"])
def test_folders_become_classes(tmp_path, suffix):
    arrays, counts = picture_folder.prepare(pictures(tmp_path / "f", suffix=suffix), seed=0)
    assert arrays["classes"].tolist() == NAMES
    assert [len(arrays[f"y_{name}"]) for name in ("train", "val", "test")] == [480, 60, 60]
    for name in ("train", "val", "test"):
        np.testing.assert_array_equal(arrays[f"X_{name}"][:, 0, 0], arrays[f"y_{name}"])
    assert counts["folder"]["read"] == 600
    assert "Ankle boot" in splits.table(arrays, counts)


def test_what_cannot_be_used_is_counted(tmp_path):
    folder = pictures(tmp_path / "f")
    Image.new("L", (28, 30)).save(folder / "Bag" / "size.png")
    (folder / "Bag" / "damaged.jpg").write_bytes(b"\xff\xd8 nothing")
    (folder / "Bag" / "notes.txt").write_text("text")
    (folder / "readme.txt").write_text("text")
    (folder / ".hidden").mkdir()
    counts = picture_folder.prepare(folder, seed=0)[1]["folder"]
    assert (counts["files"], counts["read"]) == (602, 600)
    assert counts["unreadable or not 28x28, skipped"] == 2
    assert counts["other files, left out"] == 2


def test_the_command_writes_and_says_what_is_next(tmp_path, capsys):
    code, out, _ = run(capsys, "prepare", "folder", pictures(tmp_path / "f"), "--out", tmp_path / "o.npz")
    assert (code, out.splitlines()[-1]) == (0, f"Next: poolnet train --data {tmp_path / 'o.npz'}")
    assert open_dataset(tmp_path / "o.npz").classes == tuple(NAMES)


def test_bad_folders_are_one_line(tmp_path):
    with pytest.raises(InputError, match=r"nowhere: no such folder, expected ten folders of pictures in it"):
        picture_folder.prepare(tmp_path / "nowhere", seed=0)
    with pytest.raises(InputError, match=r"nine: found 9 folders of pictures \(Ankle boot, .*\), expected ten"):
        picture_folder.prepare(pictures(tmp_path / "nine", 1, NAMES[:9]), seed=0)
    with pytest.raises(InputError, match=r"many: found 13 folders of pictures \(0, .*, \.\.\.\), expected ten"):
        picture_folder.prepare(pictures(tmp_path / "many", 1, [str(n) for n in range(13)]), seed=0)
    with pytest.raises(InputError, match=r"large: found no readable picture, expected 28x28 PNG, JPEG"):
        picture_folder.prepare(pictures(tmp_path / "large", 2, size=32), seed=0)
    with pytest.raises(InputError, match=r"few: found too few distinct images, no .* expected each class in train"):
        picture_folder.prepare(pictures(tmp_path / "few", 1), seed=0)
