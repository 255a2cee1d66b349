"""Runs that meet trouble, as processes: killed, interrupted, cut off from their server, out of room."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import forked
import mlflow
import numpy as np
import proxy
import pytest
from conftest import inside, make_arrays, poolnet, ran, wait_for, world
from finished_runs import journaled

from poolnet import files
from poolnet.runs import run_record
from poolnet.tracking import sync
from poolnet.training.config import TrainConfig

DEAD = "http://127.0.0.1:9"  # where nothing listens
AWAY = (  # the warning before a training
    f"poolnet: warning: {DEAD} cannot be reached (Connection refused); runs are saved on this machine; "
    "upload them later with: poolnet sync"
)
posix = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signal, or limit")


def start(*options, **settings):
    command = [*forked.POOLNET, "train", "--data", "letters.npz", *map(str, options)]
    return forked.start(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **settings)


def in_trouble(what, *words, **options):
    return ran(*forked.PYTHON, "trouble", what, *words, **options)


@pytest.fixture
def long_run(letters):
    """A training that goes on until it is stopped, in its fifth epoch or later; and its record."""
    processes = []

    def begin(*options, **settings):
        process = start("--epochs", 1_000_000, *options, **settings)
        processes.append(process)
        assert any(line.startswith("Epoch 05") for line in process.stdout), process.stderr.read()
        return process, run_record.find(run_record.names()[-1])

    yield begin
    for process in processes:
        process.kill()
        process.communicate()


def server_of(run):
    """What the server holds of a run, as its publisher has noted."""
    published = files.read_json(run.folder / "published.json")
    return published.get("servers", {}).get(published.get("home"), {})


def only_run(uri=None):
    (run,) = mlflow.MlflowClient(uri).search_runs(["0"])
    return run


def fingerprint(run):
    """What must not depend on what a run went through."""
    figures = [(r["step"], {k: v for k, v in r["metrics"].items() if "second" not in k}) for r in run.metrics()]
    predictions = [np.load(run.folder / "predictions" / f"{name}.npz")["logits"].tolist() for name in ("val", "test")]
    weights = {name: array.tolist() for name, array in run.load_tensors("model").items()}
    return sorted(figures, key=lambda record: record[0]), predictions, weights


# --- signals ---------------------------------------------------------------------------------------------------------


@posix
@pytest.mark.parametrize(("signum", "code", "uri"), [(signal.SIGINT, 130, None), (signal.SIGTERM, 143, DEAD)])
def test_a_signal_ends_the_run_as_killed_within_seconds_and_says_how_to_go_on(long_run, monkeypatch, signum, code, uri):
    if uri:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    process, run = long_run()
    if not uri:
        wait_for(lambda: server_of(run).get("run_id"))
    process.send_signal(signum)
    begun = time.monotonic()
    _, err = process.communicate(timeout=60)
    assert time.monotonic() - begun < 5
    assert process.returncode == code
    assert err.splitlines()[-1] == f"poolnet: error: stopped; go on with: poolnet train --resume {run.name}"
    assert run.ended()["status"] == "KILLED"
    assert run.metrics()[-1]["step"] - int(run.checkpoints()[0]["epochs"]) in (0, 1)  # perhaps just before it was saved
    if not uri:
        assert only_run().info.status == "KILLED"


IN_A_CALLBACK = """
import signal, time, weakref
from poolnet import process
class Gone: pass
process.install()
gone = Gone()
seen = weakref.ref(gone, lambda _: signal.raise_signal(signal.SIGINT))
try:
    del gone
    time.sleep(20)
except process.Stop as stop:
    print("stopped", stop.code)
"""


def test_a_signal_in_a_callback_whose_exceptions_python_drops_is_not_lost():
    stopped = subprocess.run([sys.executable, "-c", IN_A_CALLBACK], capture_output=True, text=True, timeout=60)
    assert (stopped.stdout, stopped.stderr) == ("stopped 130\n", "")


@posix
def test_ctrl_c_in_the_middle_of_a_long_epoch_ends_it_at_once_and_the_epoch_is_trained_again(tmp_path):
    np.savez(tmp_path / "letters.npz", **make_arrays((10_000, 50, 50)))
    process = start("--pool", "conv", "--batch-size", 1, "--epochs", 1)  # of several seconds
    wait_for(lambda: run_record.names())
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    begun = time.monotonic()
    out, err = process.communicate(timeout=60)
    assert time.monotonic() - begun < 5
    assert (process.returncode, out) == (130, "")
    run = run_record.find(run_record.names()[0])
    assert err == f"poolnet: error: stopped; go on with: poolnet train --resume {run.name}\n"
    assert (run.ended()["status"], run.metrics(), run.checkpoints()) == ("KILLED", [], [])


@posix
def test_a_second_ctrl_c_and_a_checkpoint_cut_in_half_and_the_run_goes_on_all_the_same(letters):
    process = start("--epochs", 250, "--drain-timeout", 30)
    assert any(line.startswith("Epoch 05") for line in process.stdout)
    process.send_signal(signal.SIGINT)
    time.sleep(0.05)  # in which it tells the publisher to finish, which takes longer
    process.send_signal(signal.SIGINT)
    begun = time.monotonic()
    _, err = process.communicate()
    assert time.monotonic() - begun < 1
    assert process.returncode == 130, err
    (name,) = run_record.names()
    assert f"go on with: poolnet train --resume {name}" in err
    run = run_record.find(name)
    newest = max(run.folder.glob("checkpoint-*"), key=lambda path: path.stat().st_mtime_ns)
    newest.write_bytes(newest.read_bytes()[: newest.stat().st_size // 2])
    resumed = inside("train", "--resume", name)
    assert resumed.returncode == 0, resumed.stderr
    assert f"Resuming {name} after epoch" in resumed.stdout
    calm = journaled(TrainConfig(data="letters.npz", epochs=250))
    assert fingerprint(run_record.find(name)) == fingerprint(calm)


# --- servers that are not there, or in trouble -----------------------------------------------------------------------


def snapshot(uri):
    """Everything on a server, to be compared with itself."""
    client = mlflow.MlflowClient(uri)
    runs = []
    for run in client.search_runs(["0"]):
        metrics = {key: [vars(m) for m in client.get_metric_history(run.info.run_id, key)] for key in run.data.metrics}
        files = [
            (file.path, file.file_size)
            for name in ("", "figures")
            for file in client.list_artifacts(run.info.run_id, name)
        ]
        runs.append((run.to_dictionary(), metrics, files))
    models = [vars(model)["_model_id"] for model in client.search_logged_models(["0"])]
    return runs, models, [(v.version, v.tags, v.source) for v in client.search_model_versions()]


def test_without_a_server_all_is_on_disk_and_sync_creates_the_run_elsewhere(letters, monkeypatch, tmp_path):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", DEAD)
    finished = inside("train", "--data", letters, "--epochs", 3, "--drain-timeout", 3)
    (name,) = run_record.names()
    assert finished.returncode == 3
    assert finished.stdout.splitlines()[-3].startswith("TEST: ")
    assert finished.stdout.splitlines()[-2:] == ["Drawing the figures ...", "Uploading the run ..."]
    folder = run_record.folder() / name
    warning, error = finished.stderr.splitlines()
    assert warning == AWAY  # before the training, and after it where all is
    assert error == (
        f"poolnet: error: {DEAD}: connection refused; poolnet doctor says more; the run is saved in {folder}; "
        f"upload it later with: poolnet sync {name}"
    )
    store = f"sqlite:///{tmp_path / 'mlflow.db'}"
    for expected in ("published", "nothing"):
        synced = inside("sync", "--to", store, "--json")
        assert synced.returncode == 0, synced.stderr
        (row,) = json.loads(synced.stdout)["runs"]
        assert (row["run"], row["state"], row["did"], row["server"]) == (name, "FINISHED", expected, store)
        if expected == "published":
            before = snapshot(store)
    assert snapshot(store) == before
    assert only_run(store).info.status == "FINISHED"
    (entry,) = before[0]
    assert [m["_step"] for m in entry[1]["val_loss"]] == [1, 2, 3]
    assert json.loads(inside("sync", "--json").stdout)["runs"][0]["server"] == store  # its home from now on


@pytest.fixture
def troubled(server, monkeypatch):
    """The address of a real server behind a proxy that makes trouble on demand."""
    with proxy.serving(server) as (uri, handler):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        yield handler


def test_a_server_in_trouble_costs_no_run(letters, troubled, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    troubled.trouble = "hang"
    finished = poolnet("train", "--data", letters, "--epochs", 2, "--drain-timeout", 3)
    assert finished.returncode == 3
    assert troubled.requests > 0
    (name,) = run_record.names()
    assert finished.stderr.count("\n") == 1
    assert f"poolnet sync {name}" in finished.stderr
    for status in (401, 429, 500, "hang"):
        troubled.trouble = status
        row = sync.sync(name)
        assert (row.ok, row.state) == (False, "FINISHED")
        assert ("timed out" if status == "hang" else str(status)) in row.did
    troubled.trouble = None
    synced = inside("sync", name)
    assert synced.returncode == 0, synced.stderr
    assert re.search(rf"^{name} +FINISHED .* published", synced.stdout, re.MULTILINE)
    client = mlflow.MlflowClient()
    (run,) = client.search_runs(["0"], f"tags.`poolnet.run` = '{name}'")
    assert run.info.status == "FINISHED"
    assert len(client.search_model_versions(f"run_id = '{run.info.run_id}'")) == 1


# --- disks -----------------------------------------------------------------------------------------------------------


@posix
@pytest.mark.parametrize(("epochs", "what"), [(200, "metrics"), (2, "figures")])
def test_a_disk_that_fills_up_fails_in_one_line_and_the_run_goes_on_once_there_is_room(tmp_path, letters, epochs, what):
    environment = world(tmp_path, DEAD) | {"GIT_DIR": "none"}  # changes of this checkout may be as large as the room
    options = ("--epochs", epochs, "--no-cache", "--drain-timeout", 1)
    finished = in_trouble("full_disk", "train", "--data", letters, *options, env=environment)
    out, err = finished.stdout, finished.stderr
    (name,) = run_record.names()
    assert finished.returncode == 1
    warning, error = err.splitlines()
    assert warning == AWAY
    assert "the record cannot be written" in error
    assert f"once it can: poolnet train --resume {name}" in error
    recorded = run_record.find(name).metrics()
    if what == "metrics":  # the last line found no room, and is not there in half, nor on the screen
        assert len(recorded) == len(re.findall("^Epoch", out, re.MULTILINE)) < epochs
    else:
        assert [record["step"] for record in recorded] == [*range(1, epochs + 1), 0]
    resumed = inside("train", "--resume", name, "--drain-timeout", 1)
    assert resumed.returncode == 3, resumed.stderr  # the server is still not there
    assert run_record.find(name).finished
    assert [record["step"] for record in run_record.find(name).metrics()] == [*range(1, epochs + 1), 0]


def test_a_clock_that_jumps_back_an_hour_leaves_times_in_order(letters):
    finished = in_trouble("clock_jumps_back", "train", "--data", "letters.npz", "--epochs", "6")
    assert (finished.returncode, finished.stderr) == (0, "")
    (name,) = run_record.names()
    times = [record["t"] for record in run_record.find(name).metrics()]
    assert times == sorted(times)
    run = only_run()
    assert run.info.start_time <= times[0] <= times[-1] <= run.info.end_time
    history = mlflow.MlflowClient().get_metric_history(run.info.run_id, "val_loss")
    assert [(metric.step, metric.timestamp) for metric in history] == [*enumerate(times[:6], 1)]


@posix
@pytest.mark.parametrize("home", ["home", "file/home"])
def test_a_folder_that_cannot_be_written_is_refused_in_one_line(tmp_path_factory, home):
    folder = Path(
        subprocess.run(["mktemp", "-d", "-p", "/tmp"], capture_output=True, text=True, check=True).stdout.strip()
    )
    try:
        np.savez(folder / "letters.npz", **make_arrays())
        (folder / "home").mkdir()
        (folder / "home").chmod(0o555)
        (folder / "file").touch()
        folder.chmod(0o755)
        environment = world(folder) | {"POOLNET_HOME": str(folder / home)}
        finished = in_trouble("nobody", "train", "--data", folder / "letters.npz", cwd=folder, env=environment)
    finally:
        (folder / "home").chmod(0o755)
        shutil.rmtree(folder)
    assert finished.returncode == 2, finished.stderr
    assert finished.stderr.count("\n") == 1
    assert re.search(rf"{home}: cannot be (written|made).*; set POOLNET_HOME elsewhere", finished.stderr)


# --- two at once, and many -------------------------------------------------------------------------------------------


def test_a_run_that_is_being_trained_is_not_resumed(long_run):
    process, run = long_run()
    second = inside("train", "--resume", run.name)
    assert second.returncode == 2
    assert second.stderr.count("\n") == 1
    assert re.search(
        f"error: {run.name}: another process is training it, .*held by process {process.pid} on", second.stderr
    )
