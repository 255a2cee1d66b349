"""Tiny data, a tracking store for each test, and nothing of the user's own within reach."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
ROOT = Path(__file__).parent.parent
REAL_LETTERS = ROOT.parent / "shared" / "data" / "notMNIST_small.tar.gz"


@pytest.fixture(autouse=True)
def own_world(tmp_path, monkeypatch):
    """A working folder, local state and a store of its own; no MLflow or poolnet setting of the user."""
    for name in list(os.environ):
        if name.startswith(("MLFLOW_", "POOLNET_")) and name != "MLFLOW_DISABLE_TELEMETRY":
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("POOLNET_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")


def make_arrays(sizes=(300, 90, 110), seed=0):
    """Six arrays of noisy letters that a linear classifier can learn: a bright bar whose place is the label."""
    rng = np.random.default_rng(seed)
    arrays = {}
    for name, size in zip(("train", "val", "test"), sizes, strict=True):
        y = rng.integers(0, 10, size)
        X = rng.integers(0, 120, (size, 28, 28), dtype=np.uint8)
        for image, label in zip(X, y, strict=True):
            image[2 * label + 2 : 2 * label + 8, 4:24] += 90
        arrays[f"X_{name}"], arrays[f"y_{name}"] = X, y
    return arrays


@pytest.fixture
def arrays():
    return make_arrays()


@pytest.fixture
def letters(tmp_path, arrays):
    """The path of a tiny data set."""
    path = tmp_path / "letters.npz"
    np.savez(path, **arrays)
    return path


@pytest.fixture(scope="session")
def real_letters(tmp_path_factory):
    """The real small notMNIST, prepared as the README says."""
    if not REAL_LETTERS.exists():
        pytest.skip("the real small notMNIST is not beside this checkout")
    out = tmp_path_factory.mktemp("real") / "small.npz"
    finished = poolnet("prepare", "notmnist", "--small", REAL_LETTERS, "--out", out)
    assert finished.returncode == 0, finished.stderr
    return out, finished.stdout


def poolnet(*args, **options):
    """Run the command as a user does, in a process of its own."""
    command = [sys.executable, "-m", "poolnet", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **options)
