"""Sweeps on a cluster: machines of their own, as network namespaces, or threads of this process."""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import forked
import mlflow
import pytest
from conftest import inside
from distributed import LocalCluster

from poolnet import files, fit
from poolnet.data.dataset import open_dataset
from poolnet.runs import provenance, run_record, train_run
from poolnet.runs.run_record import RunRecord
from poolnet.studies import worker
from poolnet.studies.crew import Crew
from poolnet.studies.study import read
from poolnet.studies.sweep import open_sweep
from poolnet.tracking import addresses

pytestmark = pytest.mark.usefixtures("letters")
STUDY = """question = "Which pooling loses less?"
data = "letters.npz"
seeds = {seeds}
[grid]
pool = ["max", "avg"]
epochs = {epochs}
[arms]
max = {{ pool = "max" }}
avg = {{ pool = "avg" }}
"""
SCORES = ("train_loss", "train_acc", "val_loss", "val_acc")


@pytest.fixture
def study(tmp_path):
    def write(seeds=2, epochs=2):
        path = tmp_path / "pools.toml"
        path.write_text(STUDY.format(seeds=list(range(1, seeds + 1)), epochs=epochs), encoding="utf-8")
        return path

    return write


@pytest.fixture
def cluster():
    """A scheduler and a worker of Dask, as threads."""
    with LocalCluster(
        n_workers=1, threads_per_worker=1, processes=False, protocol="tcp", dashboard_address="127.0.0.1:0"
    ) as cluster:
        yield cluster.scheduler_address


def _digits():
    """The losses and accuracies of all published children, by pool and seed."""
    found = {}
    client = mlflow.MlflowClient()
    for run in client.search_runs(["0"], "tags.`poolnet.sweep` LIKE '%'"):
        key = run.data.params["pool"], int(run.data.params["seed"])
        assert key not in found
        found[key] = {name: [m.value for m in client.get_metric_history(run.info.run_id, name)] for name in SCORES}
        found[key]["test_loss"] = run.data.metrics["test_loss"]
        assert run.info.status == "FINISHED"
    return found


def _expected(study):
    """The same of runs on this machine, one by one."""
    splits = open_dataset("letters.npz")
    found = {}
    for config in read(study).configs():
        result = fit(config, splits)
        found[config.pool, config.seed] = {name: [getattr(r, name) for r in result.history] for name in SCORES}
        found[config.pool, config.seed]["test_loss"] = result.test.loss
    return found


def test_a_worker_without_the_data_gets_them_once_and_its_runs_are_those_of_this_machine(
    cluster, study, tmp_path, monkeypatch
):
    path, sent = study(epochs=4), []
    send, open_ = Crew._send_data, worker._open
    monkeypatch.setattr(Crew, "_send_data", lambda self, flight: sent.append(1) or send(self, flight))
    copies = lambda job, config: open_(dataclasses.replace(job, path="/nowhere.npz"), config)  # noqa: E731
    monkeypatch.setattr(worker, "_open", copies)
    monkeypatch.setattr(worker, "_opened", {})
    finished = inside("sweep", path, "--cluster", cluster, "--json")
    assert finished.returncode == 0, finished.stderr
    assert [run["trained"] for run in json.loads(finished.stdout)["runs"]] == [True] * 4
    assert len(sent) == 1
    assert [file.name for file in (files.home() / "data" / "received").rglob("*.npz")] == ["letters.npz"]
    assert _digits() == _expected(path)
    recorded = RunRecord(run_record.folder() / run_record.names()[0]).record
    assert (recorded["data"]["path"], recorded["data"]["name"]) == (str(tmp_path / "letters.npz"), "letters")


def test_a_run_that_was_begun_here_goes_on_there_from_its_checkpoint(cluster, study):
    path = study(seeds=1, epochs=6)
    sweep = open_sweep(read(path), print, print)
    config = read(path).configs()[0]
    splits, pooled = train_run.open_training_data(config, True, print, sweep.path)
    begun = train_run.create(config, False, splits, addresses.environment(), sweep.name)

    def stop(record):
        if getattr(record, "epoch", 0) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), begun.training():
        train_run.carry_out(begun, splits, pooled, echo=stop)
    times = [step["t"] for step in begun.metrics()]
    finished = inside("sweep", path, "--cluster", cluster, "--json")
    assert finished.returncode == 0, finished.stderr
    assert json.loads(finished.stdout)["runs"][0]["run"] == begun.name
    assert len(run_record.names()) == 2
    assert [step["t"] for step in begun.metrics()][:3] == times
    assert _digits() == _expected(path)


def test_a_worker_with_other_versions_is_refused_by_name_or_taken_and_recorded(cluster, study, monkeypatch):
    own = provenance.software()
    monkeypatch.setattr(worker.provenance, "other_software", lambda there: f"torch 1.0, expected {own['torch']}")
    refused = inside("sweep", study(), "--cluster", cluster)
    assert refused.returncode == 1
    assert f"takes no runs (torch 1.0, expected {own['torch']})" in refused.stderr
    assert refused.stderr.splitlines()[-1] == f"poolnet: error: {cluster}: no worker takes runs, see above"
    assert not run_record.names()
    taken = inside("sweep", study(), "--cluster", cluster, "--any-version")
    assert taken.returncode == 0, taken.stderr
    tags = [run.data.tags for run in mlflow.MlflowClient().search_runs(["0"], "tags.`poolnet.sweep` LIKE '%'")]
    assert [tag["poolnet.differs"] for tag in tags] == [f"torch 1.0, expected {own['torch']}"] * 4


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (["--cluster", "nonsense://x:1"], 2, "--cluster: found 'nonsense://x:1', expected as tcp://HOST:8786"),
        (["--cluster", "tcp://127.0.0.1:9"], 1, "tcp://127.0.0.1:9: no Dask scheduler answers"),
        (["--cluster", "tls://127.0.0.1:9"], 1, "tls://127.0.0.1:9: no Dask scheduler answers"),
        (["--cluster", "tcp://127.0.0.1:9", "--workers", "2"], 2, "--workers: counts processes of this machine"),
    ],
)
def test_bad_input_is_refused_in_one_line(study, options, code, said, monkeypatch):
    monkeypatch.setattr("poolnet.studies.crew.ANSWER_SECONDS", 1)
    refused = inside("sweep", study(), *options)
    assert refused.returncode == code
    assert refused.stderr.startswith(f"poolnet: error: {said}")
    assert refused.stderr.count("\n") == 1
    assert not run_record.names()
    assert not mlflow.MlflowClient().search_runs(["0"])  # no run of the sweep either


@pytest.mark.skipif(sys.platform == "win32", reason="sends POSIX signals")
def test_ctrl_c_leaves_workers_of_others_alone_and_a_scheduler_that_is_gone_is_said(study, tmp_path):
    path, scratch = study(epochs=100_000), tmp_path / "scratch"
    with contextlib.ExitStack() as stack:

        def start(role, *words):
            command = [sys.executable, "-m", f"distributed.cli.dask_{role}", *words]
            quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
            process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": forked.ROOT}, **quiet)
            stack.callback(process.wait)
            stack.callback(process.kill)
            return process

        with socket.create_server(("127.0.0.1", 0)) as free:
            address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
        scheduler = start("scheduler", "--host", address, "--dashboard-address", "127.0.0.1:0")
        words = ["--nthreads", "1", "--no-nanny", "--local-directory", scratch, "--host", "127.0.0.1"]
        worker = start("worker", address, *map(str, words))
        for end, code, said in [
            (
                lambda sweep: sweep.send_signal(signal.SIGINT),
                130,
                f"stopped; go on with: poolnet sweep {path} --cluster",
            ),
            (
                lambda sweep: scheduler.kill(),
                1,
                f"{address}: the scheduler is gone; the runs that have come back are s",
            ),
        ]:
            command = [*forked.POOLNET, "sweep", str(path), "--cluster", address]
            sweep = forked.start(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
            _until(lambda: list(scratch.rglob("metrics.jsonl")))
            end(sweep)
            _, err = sweep.communicate(timeout=60)
            assert (sweep.returncode, err.count("\n")) == (code, 1), err
            assert err.startswith(f"poolnet: error: {said}")
            _until(lambda: not list(scratch.rglob("metrics.jsonl")))  # it was dropped after the epoch
            assert worker.poll() is None or code == 1


# --- machines of their own -------------------------------------------------------------------------------------------

HUB = "10.77.0.1"


def _ip(*words):
    subprocess.run(["ip", *words], check=True, capture_output=True)


@contextlib.contextmanager
def machines(count):
    """Network namespaces: `hub`, and so many others that reach it only."""
    if not all(map(shutil.which, ("ip", "unshare", "mount"))):
        pytest.skip("needs ip, unshare and mount, of Linux")
    hub, *others = (f"poolnet-{os.getpid()}-{name}" for name in range(count + 1))
    made = []
    try:
        try:
            for name in (hub, *others):
                _ip("netns", "add", name)
                made.append(name)
                _ip("-n", name, "link", "set", "lo", "up")
            _ip("-n", hub, "link", "add", "bridge", "type", "bridge")
            _ip("-n", hub, "address", "add", f"{HUB}/24", "dev", "bridge")
            _ip("-n", hub, "link", "set", "bridge", "up")
            for index, name in enumerate(others):
                _ip("-n", hub, "link", "add", f"to{index}", "type", "veth", "peer", "name", "eth0", "netns", name)
                _ip("-n", hub, "link", "set", f"to{index}", "master", "bridge", "up")
                _ip("-n", name, "address", "add", f"10.77.0.{index + 2}/24", "dev", "eth0")
                _ip("-n", name, "link", "set", "eth0", "up")
            subprocess.run(["unshare", "--mount", "true"], check=True, capture_output=True)
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces cannot be made here: {error.stderr.decode().strip()}")
        yield hub, others
    finally:
        for name in made:
            _ip("netns", "delete", name)


def _until(condition, seconds=90):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.skipif(sys.platform != "linux", reason="network namespaces are Linux's")
def test_three_machines_one_killed_one_stopped_and_the_server_restarted_train_each_run_once(study, tmp_path):
    path = study(seeds=8, epochs=150)
    here = Path.cwd()
    with machines(3) as (hub, others), contextlib.ExitStack() as stack:

        def start(machine, command, folder=here, hide=(), **environment):
            folder.mkdir(exist_ok=True)
            script = " && ".join([f"mount -t tmpfs none '{hide}'"] * bool(hide) + ['exec "$@"'])
            words = ["ip", "netns", "exec", machine, "unshare", "--mount", "sh", "-c", script, "sh", *command]
            plain = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW_", "POOLNET_"))}
            log = stack.enter_context((tmp_path / f"{machine}.log").open("ab"))
            process = subprocess.Popen(
                words, cwd=folder, env={**plain, "PYTHONPATH": forked.ROOT, **environment}, stdout=log, stderr=log
            )
            stack.callback(process.wait)
            stack.callback(process.kill)
            return process

        server = [sys.executable, "-m", "mlflow", "server", "--workers", "1", "--port", "5000", "--host", "127.0.0.1",
                  "--backend-store-uri", os.environ["MLFLOW_TRACKING_URI"]]  # fmt: skip
        serving = start(hub, server, MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false")
        start(hub, [sys.executable, "-m", "distributed.cli.dask_scheduler", "--host", HUB, "--port", "8786"])
        elsewhere = tmp_path.parent / f"{tmp_path.name}-elsewhere"
        elsewhere.mkdir()
        stack.callback(shutil.rmtree, elsewhere)
        crew = [
            start(
                machine,
                [sys.executable, "-m", "distributed.cli.dask_worker", f"tcp://{HUB}:8786", "--nthreads", "1",
                 "--no-nanny", "--name", f"machine {index}", "--local-directory", "scratch"],
                elsewhere / str(index),
                hide=str(here),  # data set, records and store of the machine that sweeps
                POOLNET_HOME=str(elsewhere / str(index) / "home"),
            )
            for index, machine in enumerate(others)
        ]  # fmt: skip
        sweep = start(
            hub,
            [sys.executable, "-m", "poolnet", "sweep", str(path), "--cluster", f"tcp://{HUB}:8786"],
            MLFLOW_TRACKING_URI="http://127.0.0.1:5000",
            POOLNET_HOME=os.environ.get("POOLNET_HOME", str(here / ".poolnet")),
        )
        _until(lambda: len(run_record.names()) >= 3 or sweep.poll() is not None)
        crew[0].send_signal(signal.SIGKILL)
        crew[1].send_signal(signal.SIGSTOP)
        stopped = time.monotonic()
        _until(lambda: len(run_record.names()) >= 6 or sweep.poll() is not None)
        serving.terminate()
        serving.wait()
        serving = start(hub, server, MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false")
        stack.callback(serving.wait)
        stack.callback(serving.terminate)  # killed, it would leave its worker behind
        time.sleep(max(0, stopped + 20 - time.monotonic()))
        crew[1].send_signal(signal.SIGCONT)
        log = tmp_path / f"{hub}.log"
        assert sweep.wait(180) == 0, log.read_text()
        assert "its worker died; another one trains it" in log.read_text()
        for index in (1, 2):
            assert [file.name for file in (elsewhere / str(index) / "home" / "data").rglob("*.npz")] == ["letters.npz"]
    found = mlflow.MlflowClient().search_runs(["0"])
    assert len([run for run in found if "poolnet.study" in run.data.tags]) == 1
    assert _digits() == _expected(path)  # of 16 runs
