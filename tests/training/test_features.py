import os
import shutil
import subprocess
import sys
import time
import zlib

import numpy as np
import pytest
import torch
from conftest import make_arrays

from poolnet.data import npz
from poolnet.data.dataset import as_images, open_dataset
from poolnet.errors import InputError
from poolnet.files import home
from poolnet.training import features
from poolnet.training.features import open_pooled
from poolnet.training.model import SimplePoolNet
from poolnet.training.poolings import POOLINGS


def expected(path, pool):
    net = SimplePoolNet(pool)
    for split in open_dataset(path):
        with torch.no_grad():
            yield split.name, net.features(torch.from_numpy(split.images(slice(None)))).numpy()


def cached():
    return sorted((home() / "features").glob("*.npy"))


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("pool", POOLINGS)
def test_features_are_those_of_the_network_and_a_one_for_the_bias(letters, pool, cache):
    splits, arrays = open_pooled(letters, pool, cache)
    for name, net_features in expected(letters, pool):
        assert arrays[name].dtype == np.float32
        np.testing.assert_array_equal(arrays[name][:, :49], net_features)
        np.testing.assert_array_equal(arrays[name][:, 49], 1)
    assert {split.name: len(split) for split in splits} == {name: len(array) for name, array in arrays.items()}
    assert len(cached()) == (3 if cache else 0)


@pytest.mark.parametrize("dtype", ["u1", "f2", "<f4", ">f4", "f8"])
@pytest.mark.parametrize("pool", POOLINGS)
def test_features_are_those_of_the_network_to_the_bit(pool, dtype):
    """Of each type of pixel, with negative ones, and of more images than are pooled together."""
    images = np.random.default_rng(0).integers(0, 256, (2 * features.BLOCK + 1, 28, 28)).astype("u1")
    if dtype != "u1":
        images = ((images - 100.0) / 77).astype(dtype)
    with torch.no_grad():
        of_network = SimplePoolNet(pool).features(torch.from_numpy(as_images(images)))
    np.testing.assert_array_equal(features.pooled(images, pool)[:, :-1], of_network.numpy())


@pytest.mark.parametrize("writer", [np.savez, np.savez_compressed])
def test_windows_of_a_large_split_fall_in_their_places(tmp_path, writer):
    writer(tmp_path / "d.npz", **make_arrays((npz.ROWS + 5, 3, 3)))
    _, arrays = open_pooled(tmp_path / "d.npz", "max")
    for name, net_features in expected(tmp_path / "d.npz", "max"):
        np.testing.assert_array_equal(arrays[name][:, :49], net_features)


def test_the_second_time_nothing_is_computed(letters, monkeypatch):
    _, first = open_pooled(letters, "max")
    monkeypatch.setattr(features, "pooled", None)
    lines = []
    _, second = open_pooled(letters, "max", echo=lines.append)
    assert lines == []
    for name in first:
        np.testing.assert_array_equal(first[name], second[name])


def test_they_are_found_by_content_not_by_path(tmp_path, letters):
    open_pooled(letters, "max")
    before = cached()
    letters.rename(tmp_path / "moved.npz")
    open_pooled(tmp_path / "moved.npz", "max")
    assert cached() == before


def damaged(content):
    """All kinds of damage, the header bit by bit."""
    for at in [*range(128), 128, 131, len(content) // 2, len(content) - 1]:
        for bit in range(8) if at < 128 else (0, 7):
            flipped = bytearray(content)
            flipped[at] ^= 1 << bit
            yield bytes(flipped)
    yield from (content[:-70], content[:100], content[:-1], content + b"\0", b"", b"text")
    yield content.replace(b"<f4", b">f4")
    yield content.replace(b"False", b"True ")
    yield content.replace(b"(110, 50)", b"(50, 110)")


def test_a_damaged_cache_is_never_taken(letters):
    splits, good = open_pooled(letters, "avg")
    (path,) = (home() / "features").glob(f"*{splits.test.sha256}*")
    content = path.read_bytes()
    assert content[128:] == good["test"].tobytes()
    for damage in damaged(content):
        path.write_bytes(damage)
        assert features._load(splits.test, "avg") is None
        assert not path.exists()


@pytest.mark.parametrize("damage", ["cut", "big-endian", "text", "empty folder", "folder"])
def test_a_damaged_cache_is_made_anew(letters, damage):
    _, good = open_pooled(letters, "avg")
    names = cached()
    for path in names:
        content = path.read_bytes()
        path.unlink()
        if damage.endswith("folder"):
            path.mkdir()
            if damage == "folder":  # of somebody's, which stays
                (path / "file").touch()
        else:
            new = {"cut": content[:-70], "big-endian": content.replace(b"<f4", b">f4"), "text": b"hello"}[damage]
            path.write_bytes(new)
    lines = []
    _, rebuilt = open_pooled(letters, "avg", echo=lines.append)
    for name in good:
        np.testing.assert_array_equal(good[name], rebuilt[name])
    assert cached() == names
    assert [line.partition(",")[0].partition(" in ")[0] for line in lines] == [
        "Features: not cached" if damage == "folder" else "Features: cached"
    ]


def test_features_that_an_earlier_version_wrote_are_taken(letters, monkeypatch):
    splits, arrays = open_pooled(letters, "max")
    for path in cached():
        path.unlink()
    for split in splits:
        checksum = zlib.crc32(arrays[split.name])
        np.save(home() / "features" / f"max-{split.sha256}-{checksum:08x}.npy", arrays[split.name])
    monkeypatch.setattr(features, "pooled", None)
    _, taken = open_pooled(letters, "max")
    np.testing.assert_array_equal(taken["train"], arrays["train"])


@pytest.mark.parametrize("order", ["cached first", "changed in between"])
def test_features_are_of_the_data_whose_digest_is_recorded(tmp_path, monkeypatch, order):
    """Also of another file of the same size and time, and of one that is replaced between two looks."""
    path, other = tmp_path / "d.npz", tmp_path / "other.npz"
    np.savez(path, **make_arrays(seed=1))
    np.savez(other, **make_arrays(seed=2))
    for file in (path, other):
        os.utime(file, (315532800, 315532800))
    if order == "cached first":
        open_pooled(path, "max")
        shutil.copy2(other, path)
    else:
        load = features._load

        def replace_then_load(split, pool):
            shutil.copy2(other, path)
            return load(split, pool)

        monkeypatch.setattr(features, "_load", replace_then_load)
    splits, arrays = open_pooled(path, "max")
    assert splits.sha256 == open_dataset(other).sha256
    for name, net_features in expected(other, "max"):
        np.testing.assert_array_equal(arrays[name][:, :49], net_features)
    np.testing.assert_array_equal(splits.train.y, make_arrays(seed=2)["y_train"])


def test_the_cache_is_bounded_and_the_least_used_goes_first(tmp_path, monkeypatch):
    paths = []
    for seed in range(4):
        paths.append(tmp_path / f"{seed}.npz")
        np.savez(paths[-1], **make_arrays(seed=seed))
    lines = []
    open_pooled(paths[0], "max", echo=lines.append)
    one = sum(path.stat().st_size for path in cached())
    assert lines == [f"Features: cached in {home() / 'features'}, {one / 1e6:,.1f} MB of at most 4,295 MB"]
    monkeypatch.setattr(features, "CACHE_LIMIT", int(2.5 * one))
    for path in (paths[1], paths[0], paths[2]):  # the first is used again, so that the second goes
        time.sleep(0.02)
        open_pooled(path, "max")
    digests = {name.split("-")[1] for name in (path.name for path in cached())}
    for path, kept in zip(paths, (True, False, True), strict=False):
        assert (open_dataset(path).train.sha256 in digests) == kept
    assert sum(path.stat().st_size for path in cached()) <= features.CACHE_LIMIT


def test_bad_data_leaves_no_features(tmp_path):
    arrays = make_arrays()
    arrays["X_train"] = arrays["X_train"].astype(np.float32)
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(InputError, match="X_train"):
        open_pooled(tmp_path / "bad.npz", "max")
    assert cached() == []


LIMITED = """
import resource, sys
from pathlib import Path
from poolnet.training.features import open_pooled
resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))
_, arrays = open_pooled(Path(sys.argv[1]), "max", echo=print)
print(arrays["train"].shape)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit on the size of a file")
def test_a_disk_that_takes_no_more_costs_the_cache_only(letters):
    command = [sys.executable, "-c", LIMITED, str(letters)]
    finished = subprocess.run(command, capture_output=True, text=True, check=True)
    line, shape = finished.stdout.splitlines()
    assert line.startswith(f"Features: not cached, {home() / 'features'} cannot be written (")
    assert shape == "(300, 50)"
    assert list((home() / "features").iterdir()) == []
