import multiprocessing
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_arrays

from poolnet import features
from poolnet.config import InputError, home
from poolnet.data import open_splits
from poolnet.features import open_pooled
from poolnet.model import SimplePoolNet


def expected(path, pool):
    net = SimplePoolNet(pool)
    for split in open_splits(path):
        with torch.no_grad():
            yield split.name, net.features(torch.from_numpy(split.images(slice(None)))).numpy()


def cached():
    return sorted((home() / "features").glob("*.npy"))


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("pool", ["max", "avg"])
def test_features_are_those_of_the_network_and_a_one_for_the_bias(letters, pool, known, cache):
    if known:
        open_splits(letters)  # validated and digested before: the features take a pass of their own
    splits, arrays = open_pooled(letters, pool, cache)
    for name, net_features in expected(letters, pool):
        assert arrays[name].dtype == np.float32
        np.testing.assert_array_equal(arrays[name][:, :49], net_features)
        np.testing.assert_array_equal(arrays[name][:, 49], 1)
    assert {split.name: len(split) for split in splits} == {name: len(array) for name, array in arrays.items()}
    assert len(cached()) == (3 if cache else 0)


@pytest.mark.parametrize("writer", [np.savez, np.savez_compressed])
def test_windows_of_a_large_split_fall_in_their_places(tmp_path, writer):
    writer(tmp_path / "d.npz", **make_arrays((features.npz.ROWS + 5, 3, 3)))
    _, arrays = open_pooled(tmp_path / "d.npz", "max")
    for name, net_features in expected(tmp_path / "d.npz", "max"):
        np.testing.assert_array_equal(arrays[name][:, :49], net_features)


def test_the_second_time_they_are_mapped_and_nothing_is_computed(letters, monkeypatch):
    _, first = open_pooled(letters, "max")
    monkeypatch.setattr(features, "pooled", None)
    said = []
    _, second = open_pooled(letters, "max", say=said.append)
    assert said == []
    for name in first:
        assert isinstance(second[name], np.memmap)
        np.testing.assert_array_equal(first[name], second[name])


def test_they_are_found_by_content_not_by_path(tmp_path, letters):
    open_pooled(letters, "max")
    before = cached()
    letters.rename(tmp_path / "moved.npz")
    open_pooled(tmp_path / "moved.npz", "max")
    assert cached() == before


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "text"])
def test_a_damaged_cache_is_rebuilt(letters, damage):
    _, good = open_pooled(letters, "avg")
    good = {name: array.copy() for name, array in good.items()}
    names = cached()
    for path in names:
        content = bytearray(path.read_bytes())
        content[-3] ^= 1
        path.write_bytes({"cut": content[:-70], "flip": content, "empty": b"", "text": b"hello"}[damage])
    _, rebuilt = open_pooled(letters, "avg")
    for name in good:
        np.testing.assert_array_equal(good[name], rebuilt[name])
    assert cached() == names
    _, mapped = open_pooled(letters, "avg")
    assert all(isinstance(array, np.memmap) for array in mapped.values())


def test_the_cache_is_bounded_and_the_least_used_goes_first(tmp_path, monkeypatch):
    paths = []
    for seed in range(4):
        paths.append(tmp_path / f"{seed}.npz")
        np.savez(paths[-1], **make_arrays(seed=seed))
    said = []
    open_pooled(paths[0], "max", say=said.append)
    one = sum(path.stat().st_size for path in cached())
    assert said == [f"Features: cached in {home() / 'features'}, {one / 1e6:,.1f} MB of at most 4,295 MB"]
    monkeypatch.setattr(features, "CACHE_LIMIT", int(2.5 * one))
    for path in (paths[1], paths[0], paths[2]):  # the first is used again, so that the second goes
        time.sleep(0.02)
        open_pooled(path, "max")
    digests = {name.split("-")[1] for name in (path.name for path in cached())}
    for path, kept in zip(paths, (True, False, True), strict=False):
        assert (open_splits(path).train.sha256 in digests) == kept
    assert sum(path.stat().st_size for path in cached()) <= features.CACHE_LIMIT


def _open_in_a_process(path, start, results):
    calls = []
    original = features.pooled
    features.pooled = lambda *args: calls.append(1) or original(*args)
    start.wait()
    _, arrays = open_pooled(Path(path), "max")
    results.put((len(calls), float(arrays["train"].sum())))


def test_two_processes_at_once_share_one_computation(letters):
    context = multiprocessing.get_context("spawn")
    start, results = context.Event(), context.Queue()
    processes = [context.Process(target=_open_in_a_process, args=(letters, start, results)) for _ in range(2)]
    for process in processes:
        process.start()
    start.set()
    found = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert sorted(calls for calls, _ in found) == [0, 3]  # a window for each split, once
    assert found[0][1] == found[1][1]


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
from poolnet.features import open_pooled
resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))
_, arrays = open_pooled(Path(sys.argv[1]), "max", say=print)
print(arrays["train"].shape)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit on the size of a file")
def test_a_disk_that_takes_no_more_costs_the_cache_only(letters):
    command = [sys.executable, "-c", LIMITED, str(letters)]
    finished = subprocess.run(command, capture_output=True, text=True, check=True)
    said, shape = finished.stdout.splitlines()
    assert said.startswith(f"Features: not cached, {home() / 'features'} cannot be written (")
    assert shape == "(300, 50)"
    assert [path.name for path in (home() / "features").iterdir() if path.suffix != ".lock"] == []
