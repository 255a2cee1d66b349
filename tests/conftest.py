"""Tiny data, a tracking store for each test, and nothing of the user's own within reach."""

import contextlib
import functools
import io
import os
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import forked
import numpy as np
import pytest
from filelock import FileLock
from hypothesis import HealthCheck, settings

from poolnet.cli.commands import SETTINGS, main

# No test fails because the machine is slow. And the fixtures of a test are as good for its second example.
UNTIMED = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
settings.register_profile("untimed", deadline=None, suppress_health_check=UNTIMED)
settings.load_profile("untimed")

os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"  # read when mlflow is imported
ROOT = Path(__file__).parent.parent
LONG = [  # files that take more than seven seconds, the longest first
    "team_server",
    "cluster",
    "sweep",
    "browser",
    "promote",
    "sync",
    "servers",
    "faults",
    "security",
    "compare",
    "clean",
    "models",
    "notmnist",
    "programs",
    "fast_step",
    "publication",
    "two_machines",
    "run_record",
    "data",
    "report",
    "serving",
    "cli",
    "paired",
    "doctor",
    "reproduce",
    "project",
]
STUDY = """question = "Which pooling loses less?"
data = "letters.npz"
seeds = [1, 2, 3]
[grid]
pool = ["max", "avg"]
epochs = 2
[arms]
max = { pool = "max" }
avg = { pool = "avg" }
"""
REAL_LETTERS = ROOT.parent / "shared" / "data" / "notMNIST_small.tar.gz"


def world(folder, uri=None):
    """The environment of a process whose local state and tracking store lie in `folder`; nothing set by the user."""
    ours = {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_TRACKING_URI": uri or f"sqlite:///{folder / 'mlflow.db'}",
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),  # as an activated environment
        "POOLNET_HOME": str(folder / "home"),
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
    }
    theirs = ("MLFLOW_", "POOLNET_", "PYTHONDONTWRITEBYTECODE")  # without the last, no process compiles poolnet anew
    return {name: value for name, value in os.environ.items() if not name.startswith(theirs)} | ours


def pytest_configure(config):
    """Start one forking server for all workers, of which this process is none."""
    if not hasattr(config, "workerinput"):
        stack = contextlib.ExitStack()
        stack.enter_context(forked.serving())
        config.add_cleanup(stack.close)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes(specs):
    """Workers have their imports done too."""
    for spec in specs:
        spec.python = spec.python or forked.python()


def pytest_collection_modifyitems(items):
    """Long files first, so that workers end at the same time."""
    places = {name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path.stem.removeprefix("test_"), len(LONG)))


@contextlib.contextmanager
def made_once(tmp_path_factory, name):
    """A folder that all workers share, and whether it is still to be filled; the others wait meanwhile."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    with FileLock(folder.with_suffix(".lock")):
        full = folder.with_suffix(".full")
        folder.mkdir(exist_ok=True)
        yield folder, not full.exists()
        full.touch()


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory):
    """The tables of a store that nothing has used yet, which take MLflow a second to make."""
    with made_once(tmp_path_factory, "empty") as (folder, new):
        path = folder / "mlflow.db"
        if new:
            import mlflow.db

            mlflow.db.commands.main(["upgrade", f"sqlite:///{path}"], standalone_mode=False)
    return path


@pytest.fixture(autouse=True, scope="session")
def newest_schema():
    """MLflow reads all its migrations for each store that it opens; here once a worker."""
    from mlflow.store.db import utils

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utils, "_get_latest_schema_revision", functools.cache(utils._get_latest_schema_revision))
        yield


@pytest.fixture(autouse=True, scope="session")
def scratch(tmp_path_factory):
    """What MLflow downloads for a test stays among pytest's folders."""
    folder = str(tmp_path_factory.mktemp("scratch"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", folder)
        for name in ("TMPDIR", "TEMP", "TMP"):
            patch.setenv(name, folder)
        yield


@pytest.fixture(autouse=True, scope="session")
def forking():
    """Publishers have their imports done, as most commands."""
    if forked.SERVER in os.environ:
        forked.use()


@pytest.fixture(autouse=True, scope="session")
def kept(tmp_path_factory):
    """The exports that the second run of a home needs no torch for: seconds of work, of which workers share two."""
    global KEPT
    pools = ("max", "avg") if os.environ.get("PYTEST_XDIST_WORKER") == "gw0" else ("avg", "max")
    for pool in pools:
        with made_once(tmp_path_factory, f"kept-{pool}") as (folder, new), pytest.MonkeyPatch.context() as patch:
            if new:
                patch.setenv("POOLNET_HOME", str(folder))
                make_export(folder, pool)
    KEPT = [folder.parent / f"kept-{pool}" / "exports" for pool in pools]


@pytest.fixture(autouse=True, scope="session")
def drawn_once(tmp_path_factory):
    """Without a forking server, draw the figures once a worker."""
    forked.draw_once(Path(os.environ.get(forked.SERVER, tmp_path_factory.mktemp("drawn") / "socket")).parent)


def make_export(folder, pool):
    from poolnet.tracking import programs
    from poolnet.training.model import build_model

    model = SimpleNamespace(artifact_location=str(folder), model_id="m-0")
    arrays = {name: tensor.numpy() for name, tensor in build_model(pool, seed=0).state_dict().items()}
    arrays["example"] = np.zeros((2, 1, 28, 28), np.float32)
    programs.export(arrays, pool, "0" * 32, model, folder / pool)


def keep_exports(home):
    """Give local state in this folder what a first publication would make."""
    for exports in KEPT:
        shutil.copytree(exports, home / "exports", dirs_exist_ok=True)


@pytest.fixture(autouse=True)
def own_world(tmp_path, monkeypatch, empty_store):
    """Each test works in a folder, local state and store of its own."""
    enter(tmp_path, monkeypatch)
    shutil.copy(empty_store, tmp_path)


@pytest.fixture
def nothing_kept(own_world, tmp_path):
    """A test's folder as a newcomer has it, without local state."""
    shutil.rmtree(tmp_path / "home")


def enter(folder, patch):
    """Work in this folder from now on, as a process in its `world` would."""
    keep_exports(folder / "home")
    environment = world(folder)
    for name in list(os.environ):
        if name not in environment:
            patch.delenv(name)
    for name, value in environment.items():
        patch.setenv(name, value)
    for name, value in SETTINGS.items():  # as a command does
        patch.setenv(name, value)
    for name in ("MLFLOW_HTTP_REQUEST_TIMEOUT", "PGCONNECT_TIMEOUT"):  # that a command sets, in this process too
        patch.setenv(name, "20")
    patch.chdir(folder)


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


def make_groups(sizes=(300, 90, 110)):
    """Groups of three letters for `make_arrays`, none of which is in two splits."""
    starts = np.cumsum((0, *sizes))
    splits = zip(("train", "val", "test"), sizes, starts, strict=False)
    return {f"group_{name}": start + np.arange(size) // 3 for name, size, start in splits}


@pytest.fixture
def arrays():
    return make_arrays()


@pytest.fixture
def letters(tmp_path, arrays):
    """The path of a tiny data set."""
    path = tmp_path / "letters.npz"
    np.savez(path, **arrays)
    return path


@pytest.fixture(scope="module")
def store(request, tmp_path_factory, empty_store):
    """A folder with data and a store, which the tests of a file share, and the run that version 1 is from.

    Version 1 is champion. A file that needs other versions names their settings in `VERSIONS`.
    """
    import mlflow
    from finished_runs import REGISTERED, journaled, publish

    from poolnet.runs import run_record

    folder = tmp_path_factory.mktemp("store")
    with pytest.MonkeyPatch.context() as patch:
        enter(folder, patch)
        shutil.copy(empty_store, folder)
        np.savez("letters.npz", **make_arrays())
        configs = getattr(request.module, "VERSIONS", [REGISTERED])
        run, *_ = [publish(journaled(config, optimum=True)) for config in configs]
        mlflow.MlflowClient().set_registered_model_alias("poolnet", "champion", "1")
        shutil.rmtree(run_record.folder())
    return folder, run


@pytest.fixture
def trained(store, monkeypatch):
    """The run of version 1; the test works in its folder and on its store."""
    enter(store[0], monkeypatch)
    return store[1]


@pytest.fixture(scope="session")
def real_letters(tmp_path_factory):
    """The real small notMNIST, prepared as the README says."""
    if not REAL_LETTERS.exists():
        pytest.skip("the real small notMNIST is not beside this checkout")
    with made_once(tmp_path_factory, "real") as (folder, new):
        out, printed = folder / "small.npz", folder / "printed"
        if new:
            finished = poolnet("prepare", "notmnist", "--small", REAL_LETTERS, "--out", out, env=world(folder))
            assert finished.returncode == 0, finished.stderr
            printed.write_text(finished.stdout, encoding="utf-8")
        return out, printed.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def own_files(tmp_path_factory):
    """The first readable 300 of notMNIST's own PNG files."""
    if not REAL_LETTERS.exists():
        pytest.skip("the real small notMNIST is not beside this checkout")
    folder = tmp_path_factory.mktemp("own")
    files = []
    with tarfile.open(REAL_LETTERS, "r|*") as tar:
        for entry in tar:
            if entry.isfile() and entry.name.endswith(".png") and entry.size:
                files.append(folder / f"{len(files)}.png")
                files[-1].write_bytes(tar.extractfile(entry).read())
            if len(files) == 300:
                return files


@pytest.fixture(scope="session")
def glyphs_npz(tmp_path_factory):
    """Embedded letters, fewer than the default."""
    from poolnet.data import glyphs, npz

    path = tmp_path_factory.mktemp("glyphs") / "glyphs.npz"
    npz.save(path, glyphs.render(train=2_000, val=500, test=500))
    return path


@pytest.fixture(scope="session")
def sklearn():
    """Takes a second to import, for which the other workers need not wait."""
    import sklearn.calibration
    import sklearn.linear_model
    import sklearn.metrics

    return sklearn


@pytest.fixture(scope="session")
def server_folder(tmp_path_factory):
    """Where `server` keeps all that it has."""
    return tmp_path_factory.mktemp("server")


@pytest.fixture(scope="session")
def server(server_folder, empty_store):
    """The address of a real tracking server on loopback."""
    folder = server_folder
    shutil.copy(empty_store, folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [*forked.PYTHON, "mlflow", "server", "--workers", "1", "--port", str(port)]
    command += ["--artifacts-destination", str(folder / "artifacts")]
    quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_BACKEND_STORE_URI": f"sqlite:///{folder}/mlflow.db"}
    with (folder / "log").open("w") as log:
        process = forked.start(command, cwd=folder, env=world(folder) | quiet, stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{address}/health", timeout=5):
                break
            assert process.poll() is None, (folder / "log").read_text()
            time.sleep(0.1)
        yield address
    finally:
        process.terminate()
        process.wait()


def inside(*args, **environment):
    """The command in this process, which has its imports done."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as end:
            main([*map(str, args)])
    return subprocess.CompletedProcess(args, end.value.code or 0, out.getvalue(), err.getvalue())


def ran(*command, begin=forked.start, said=None, **options):
    """A command that has ended; with `begin=subprocess.Popen` in a process from its very start, as a user has it."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with begin([*map(str, command)], **pipes, **options) as running:
        out, err = running.communicate(said, timeout=300)
    return subprocess.CompletedProcess(command, running.returncode, out, err)


def poolnet(*args, **options):
    return ran(*forked.POOLNET, *args, **options)


def mlflow_run(*args, project=ROOT, begin=forked.start):
    path = os.environ["PATH"] if begin is subprocess.Popen else forked.path()
    command = [*forked.PYTHON, "mlflow", "run", project, "--env-manager", "local", *args]
    return ran(*command, begin=begin, env=os.environ | {"PATH": path})


def run(capsys, *args):
    """The command in this process: exit code, stdout, stderr."""
    with pytest.raises(SystemExit) as exit_:
        main([*map(str, args)])
    printed = capsys.readouterr()
    return exit_.value.code or 0, printed.out, printed.err


class Terminal(io.StringIO):
    """What a person sees, with `contextlib.redirect_stderr`."""

    def isatty(self):
        return True


def assert_refused(code, stderr, *words):
    assert code == 2
    assert stderr.count("\n") == 1
    assert stderr.startswith("poolnet: error: ")
    for word in words:
        assert word in stderr


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with contextlib.suppress(Exception):  # of a store that is not there yet
            if condition():
                return
        time.sleep(0.05)
    raise AssertionError("it did not happen")


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return exec, (f"open({str(self.path)!r}, 'w').close()",)
