"""Sweeps as a user types them: what is missing is trained once, whatever happens meanwhile."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import deque

import forked
import mlflow
import numpy as np
import pytest
import torch
from conftest import inside, poolnet, ran
from distributed import LocalCluster
from finished_runs import journaled, publish

from poolnet import files
from poolnet.data.dataset import open_dataset
from poolnet.runs import record_transfer, run_record
from poolnet.runs.run_record import RunRecord
from poolnet.studies import worker
from poolnet.studies.crew import Crew
from poolnet.studies.discovery import take_records
from poolnet.studies.study import read
from poolnet.studies.sweep import open_sweep
from poolnet.studies.worker import Job, Task
from poolnet.text import WIDTH
from poolnet.tracking import addresses, sweep_run
from poolnet.training import optimum
from poolnet.training.config import TrainConfig

pytestmark = pytest.mark.usefixtures("letters")
posix = pytest.mark.skipif(sys.platform == "win32", reason="sends POSIX signals to process groups")
GIVEN_UP = "given up, since 4 workers died that trained it"
DEAD = "http://127.0.0.1:9"  # where nobody listens
SAME = ("train_loss", "train_acc", "val_loss", "val_acc", "test_loss", "test_acc", "best/val_acc", "best/plateau_epoch")
STUDY = """question = "Which pooling loses less?"
data = "letters.npz"
seeds = {seeds}
[grid]
pool = ["max", "avg"]
epochs = {epochs}
lr = {lr}
[arms]
max = {{ pool = "max", lr = 0.001 }}
avg = {{ pool = "avg", lr = 0.001 }}
"""


def test_a_worker_finds_the_optimum_once_for_a_pooling_and_a_fold(letters, monkeypatch):
    """Also if memory is short, so that the data are opened again for each run."""
    monkeypatch.setattr(worker, "MEMORY", 0)
    monkeypatch.setattr(worker, "_opened", opened := {})
    times, find = [], optimum.find_optimum
    monkeypatch.setattr(optimum, "find_optimum", lambda *data: times.append(1) or find(*data))
    job = Job(
        str(letters), letters.stem, open_dataset(letters).sha256, "sweep", figures=False, optimum=True,
        server=addresses.environment(), topic="of a test", own=False,
    )  # fmt: skip
    tasks = deque(
        Task(TrainConfig(data=str(letters), pool=pool, epochs=1, fold=fold, seed=seed), "cpu", f"{pool}-{seed}-{index}")
        for index, (seed, fold, pool) in enumerate(
            [(1, "1/2", "avg"), (2, "1/2", "avg"), (1, "2/2", "avg"), (1, "2/2", "conv")]
        )
    )
    found = {}
    with cluster_in_this_process() as cluster, Crew(job, cluster.scheduler_address, False, print, print) as crew:
        crew.start(1)
        for message in crew.train(tasks):
            if message and message.kind == "ended":
                record_transfer.unpack(run_record.folder() / message.task.run, message.files, {})
                found[message.task.run] = RunRecord(run_record.folder() / message.task.run).by_step()[0]
    assert len(times) == 2
    assert [each.size() > 0 for each in opened.values()] == [False, False, True]
    assert {name: "optimum_test_loss" in scores for name, scores in found.items()} == {
        "avg-1-0": True,
        "avg-2-1": True,
        "avg-1-2": True,
        "conv-1-3": False,
    }


def cluster_in_this_process():
    """A scheduler and a worker of Dask, as threads."""
    return LocalCluster(n_workers=1, threads_per_worker=1, processes=False, dashboard_address="127.0.0.1:0")


@pytest.fixture
def study(tmp_path):
    def write(epochs=3, lr="0.001", seeds=(1, 2)):
        path = tmp_path / "pools.toml"
        path.write_text(STUDY.format(epochs=epochs, lr=lr, seeds=[*seeds]), encoding="utf-8")
        return path

    return write


def swept(path, *options, code=0, **environment):
    finished = poolnet("sweep", path, "--workers", 1, "--json", *options, env=os.environ | environment)
    assert finished.returncode == code, finished.stderr
    return json.loads(finished.stdout), finished.stderr


def runs():
    """Children by pool and seed, none of which may be there twice, and the parents."""
    found = mlflow.MlflowClient().search_runs(["0"])
    children = [run for run in found if "poolnet.run" in run.data.tags]
    by_key = {(run.data.params["pool"], int(run.data.params["seed"])): run for run in children}
    assert len(by_key) == len(children)
    return by_key, [run for run in found if "poolnet.study" in run.data.tags]


def histories(run):
    client = mlflow.MlflowClient()
    return {name: [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, name)] for name in SAME}


def test_a_sweep_trains_what_is_missing_and_each_child_equals_the_run_on_its_own(study, monkeypatch):
    own = publish(journaled(TrainConfig(data="letters.npz", pool="avg", seed=2, epochs=3)))
    result, err = swept(study(), "--workers", 2)
    assert err == ""
    assert [(run["run"] == own.info.run_name, run["trained"]) for run in result["runs"]].count((False, True)) == 3
    children, (parent,) = runs()
    assert set(children) == {(pool, seed) for pool in ("max", "avg") for seed in (1, 2)}
    assert children["avg", 2].info.run_id == own.info.run_id  # the store held it: not trained again
    new = [run for key, run in children.items() if key != ("avg", 2)]
    assert {run.data.tags["mlflow.parentRunId"] for run in new} == {parent.info.run_id}
    assert {run.info.status for run in [*new, parent]} == {"FINISHED"}
    assert parent.data.metrics["sweep/runs_finished"] == 4
    mean = sum(children["max", seed].data.metrics["test_acc"] for seed in (1, 2)) / 2
    assert parent.data.metrics["sweep/a_test_acc_mean"] == pytest.approx(mean, abs=1e-12)
    for run in children.values():
        assert run.info.run_id in parent.data.tags["mlflow.note.content"]
    # only the one that was trained by itself is a version; a study may say otherwise
    assert [v.run_id for v in mlflow.MlflowClient().search_model_versions()] == [own.info.run_id]
    note = parent.data.tags["mlflow.note.content"]
    heading, _, one, other, *_ = note.splitlines()
    assert heading == "| arm | n | val acc | test acc | test loss |"
    assert one.startswith("| a: max | 2 | ")
    assert other.startswith("| b: avg | 2 | ")
    # the figures of one of them, of which a sweep draws none
    client, drawn = mlflow.MlflowClient(), children["max", 1]
    assert not client.list_artifacts(drawn.info.run_id, "figures")
    for did in ("published", "nothing"):
        finished = inside("figures", drawn.data.tags["poolnet.run"], "--json")
        assert finished.returncode == 0, finished.stderr
        assert [row["did"] for row in json.loads(finished.stdout)["runs"]] == [did]
        assert len(client.list_artifacts(drawn.info.run_id, "figures")) == 4
    assert not client.list_artifacts(children["max", 2].info.run_id, "figures")
    # what only the server has is not trained again
    shutil.rmtree(run_record.folder())
    again, err = swept(study())
    assert err == ""
    assert not any(run["trained"] for run in again["runs"])
    assert [run["run_id"] for run in again["runs"]] == [run.info.run_id for run in _in_order(children)]
    assert not run_record.names()
    assert mlflow.get_run(parent.info.run_id).info.status == "FINISHED"
    # one of the children once more, by itself
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "x")
    single = publish(journaled(TrainConfig(data="letters.npz", seed=1, epochs=3, register=False)))
    assert histories(single) == histories(children["max", 1])
    assert single.data.params == children["max", 1].data.params


def test_a_sweep_over_folds_trains_each_fold_of_each_seed_and_compare_tests_each_letter_once(study):
    """The runs that it finds count only if they have what the study asks for: the optimum."""
    path = study(epochs=1)
    path.write_text(path.read_text().replace("[grid]", "folds = 2\noptimum = true\n[grid]"), "utf-8")
    config = TrainConfig(data="letters.npz", pool="avg", seed=2, epochs=1, fold="1/2")
    own, without = publish(journaled(config, optimum=True)), publish(journaled(dataclasses.replace(config, seed=1)))
    result, _ = swept(path)
    assert [(run["config"]["seed"], run["config"]["fold"]) for run in result["runs"][::2]] == [
        (1, "1/2"), (1, "2/2"), (2, "1/2"), (2, "2/2"),
    ]  # fmt: skip
    found = {run["run"]: run["trained"] for run in result["runs"]}
    assert found[own.info.run_name] is False
    assert (sum(found.values()), without.info.run_name in found) == (7, False)
    child = mlflow.get_run(next(run["run_id"] for run in result["runs"] if run["run"] != own.info.run_name))
    assert child.info.run_name.startswith("max-seed1-fold1-")
    assert {"optimum/test_acc", "optimum/test_loss"} <= child.data.metrics.keys()
    compared = json.loads(inside("compare", "--study", path, "--no-publish", "--json").stdout)
    splits = open_dataset("letters.npz")
    assert (compared["n_folds"], compared["n_examples"]) == (2, sum(map(len, splits)))
    assert compared["arms"][1]["at_optimum"]["test_loss"] > 0
    # the optimum is the same for each seed
    losses = [run.data.metrics["optimum/test_loss"] for run in mlflow.MlflowClient().search_runs(
        ["0"], "params.pool = 'avg' AND params.fold = '1/2' AND tags.`poolnet.sweep` != ''")]  # fmt: skip
    assert losses == [own.data.metrics["optimum/test_loss"]]


def test_a_sweep_warns_once_of_groups_in_two_splits_but_not_where_folds_keep_them_together(study):
    whole = dict(np.load("letters.npz"))
    for name in ("train", "val", "test"):
        whole[f"group_{name}"] = np.arange(len(whole[f"y_{name}"])) % 7
    np.savez("letters.npz", **whole)
    warned = []
    open_sweep(read(study()), lambda line: None, warned.append)
    assert [line.rpartition("npz: ")[2] for line in warned] == ["7 of 7 groups are in more than one split"]
    path = study()
    path.write_text(path.read_text().replace("[grid]", "folds = 2\n[grid]"), "utf-8")
    open_sweep(read(path), lambda line: None, warned.append)
    assert len(warned) == 1


WATCHED = """
import sys
from poolnet.cli import main
started = []
sys.addaudithook(lambda event, args: started.append(args[0]) if event == "subprocess.Popen" else None)
try:
    main(sys.argv[1:])
finally:
    print(sys.executable in started, [name for name in ("torch", "matplotlib") if name in sys.modules], file=sys.stderr)
"""


def test_a_sweep_with_nothing_to_do_starts_no_process_and_imports_nothing_slow(study):
    if torch.version.cuda or torch.version.hip or sys.platform == "darwin":
        pytest.skip("torch is asked for its devices here")
    path = study(epochs=1, seeds=[1])
    for config in read(path).configs():
        publish(journaled(config))
    again = subprocess.run([sys.executable, "-c", WATCHED, "sweep", path], capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert "2 of 2 runs finished, 0 of them now" in again.stdout
    table = [line for line in again.stdout.splitlines() if line.startswith(("arm ", "max ", "avg "))]
    assert len(table) == 3
    assert max(map(len, table)) <= WIDTH
    assert again.stderr == "False []\n"


def _in_order(children):
    return [children[pool, seed] for seed in (1, 2) for pool in ("max", "avg")]


@posix
def test_a_sweep_that_is_killed_goes_on_with_the_same_command(study):
    path = study(epochs=80)
    command = [*forked.POOLNET, "sweep", str(path), "--workers", "2"]
    with forked.start(command, stdout=subprocess.DEVNULL) as process:
        _until(_two_are_trained)
        process.kill()
    begun = set(run_record.names())
    assert {name[: len("max-seed1")] for name in begun} == {"max-seed1", "avg-seed1"}  # a pair
    swept(path)
    assert begun <= set(run_record.names())
    children, (parent,) = runs()
    assert len(children) == len(run_record.names()) == 4
    assert {run.info.status for run in [*children.values(), parent]} == {"FINISHED"}
    for run in children.values():
        assert [step for step, _ in histories(run)["val_loss"]] == list(range(1, 81))


@posix
def test_ctrl_c_ends_a_sweep_and_its_workers_and_says_how_to_go_on(study):
    path = study(epochs=5000)
    command = [*forked.POOLNET, "sweep", str(path), "--workers", "2"]
    process = forked.start(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    _until(_two_are_trained)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does, to everybody
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err == f"poolnet: error: stopped; go on with: poolnet sweep {path}\n"
    ended = [RunRecord(run_record.folder() / name).ended()["status"] for name in run_record.names()]
    assert ended == ["KILLED", "KILLED"]
    _, (parent,) = runs()
    assert parent.info.status == "KILLED"


@posix
def test_runs_begin_seed_by_seed_and_one_whose_worker_dies_is_trained_again(study, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", DEAD)
    options = ("--workers", 1, "--drain-timeout", 0)
    finished = ran(*forked.PYTHON, "trouble", "workers_die", "sweep", study(epochs=100), *options)
    assert finished.returncode == 1, finished.stderr
    lines = finished.stdout.splitlines()
    assert {"Looking for runs that are done ...", "Uploading 4 runs ..."} <= set(lines)
    told = [line for line in lines if line.startswith(("begun", "again", "ended"))]
    first, second = ["begun 0 ", "ended 0 "], ["begun 2 ", "ended 2 "]
    once = ["begun 1 ", "again 1 ", "begun 1 ", "ended 1 "]
    never = 3 * ["begun 3 ", "again 3 "]
    assert told == [*first, *once, *second, *never, "begun 3 ", f"ended 3 {GIVEN_UP}"]
    found = {name[: len("max-seed1")]: run_record.find(name).finished for name in run_record.names()}
    assert found == {"max-seed1": True, "avg-seed1": True, "max-seed2": True, "avg-seed2": False}


def test_what_only_resembles_a_run_of_the_study_is_left_out_and_named(study, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", DEAD)
    its = journaled(TrainConfig(data="letters.npz", seed=1, epochs=3)).folder
    for index, change in enumerate(
        [{"config": {"momentum": 0.9}}, {"config": {"pool": "median"}}, {"reproduces": "0" * 32}, {"data": None}]
    ):
        other = shutil.copytree(its, run_record.folder() / f"max-seed1-0000000{index}")
        record = files.read_json(other / "record.json")
        for key, value in change.items():
            record[key] = {**record[key], **value} if isinstance(value, dict) else value
        files.write_json(other / "record.json", record)
    shutil.rmtree(its)
    sweep, warned = open_sweep(read(study()), print, print), []
    assert take_records(sweep, warned.append) == ([], {})
    assert len(sweep.missing) == 4
    assert len(warned) == 1
    assert re.match(r"left out max-seed1-0000000\d and 2 more, which this version of poolnet does not", warned[0])


def _two_are_trained():
    return len([path for path in run_record.folder().glob("*/metrics.jsonl") if path.stat().st_size]) >= 2


def _until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_child_that_fails_is_reported_and_never_counted(study):
    """Of a worker that was started anew, as a user's, and not forked."""
    path = study(lr="[0.001, 1e300]", epochs=1, seeds=[1])
    finished = inside("sweep", path, "--workers", 1, "--json")
    result, err = json.loads(finished.stdout), finished.stderr
    assert finished.returncode == 1
    failed = [run for run in result["runs"] if run["config"]["lr"] == 1e300]
    assert [run["status"] for run in failed] == ["FAILED"] * 2
    assert all("lr=1e+300 may be too high" in run["error"] for run in failed)
    assert err.count("may be too high") == 2
    assert err.splitlines()[-1] == f"poolnet: error: missing runs: 2, see above; again with: poolnet sweep {path}"
    assert [run["status"] for run in result["runs"] if run not in failed] == ["FINISHED"] * 2
    (parent,) = mlflow.MlflowClient().search_runs(["0"], "tags.`poolnet.study` LIKE '%'")
    assert (parent.info.status, parent.data.metrics["sweep/runs_finished"]) == ("FAILED", 2)


def test_without_a_server_the_children_are_on_disk_with_figures_if_told_and_published_later(study, monkeypatch):
    path, uri = study(), os.environ["MLFLOW_TRACKING_URI"]
    result, err = swept(path, "--figures", "--drain-timeout", 0, code=3, MLFLOW_TRACKING_URI=DEAD)
    assert [run["status"] for run in result["runs"]] == ["FINISHED"] * 4
    assert "upload them later with: poolnet sync" in err.splitlines()[-1]
    damaged = run_record.find(run_record.names()[1]).folder / "metrics.jsonl"
    damaged.write_bytes(damaged.read_bytes().replace(b"0.", b"1.", 1))
    again, _ = swept(path, "--figures", "--drain-timeout", 0, code=3, MLFLOW_TRACKING_URI=DEAD)
    assert [run["run"] for run in again["runs"] if run["trained"]] == [damaged.parent.name]
    assert [run["scores"] for run in again["runs"]] == [run["scores"] for run in result["runs"]]
    assert inside("sync", "--to", uri).returncode == 0
    children, (parent,) = runs()
    assert {run.data.tags["mlflow.parentRunId"] for run in children.values()} == {parent.info.run_id}
    for run in children.values():
        assert len(mlflow.MlflowClient().list_artifacts(run.info.run_id, "figures")) == 4
    finished = inside("sweep", path, "--json")
    assert finished.returncode == 0, finished.stderr
    found = json.loads(finished.stdout)
    assert not any(run["trained"] for run in found["runs"])
    assert {run["run_id"] for run in found["runs"]} == {run.info.run_id for run in children.values()}
    assert mlflow.get_run(parent.info.run_id).info.status == "FINISHED"


def test_a_second_sweep_of_the_same_study_is_refused_and_told_who_is_at_it(study):
    path = study()
    name = sweep_run.name_of(path.stem, open_dataset("letters.npz").sha256)
    with files.locked(sweep_run.folder() / f"{name}.lock"):
        finished = inside("sweep", path)
    assert (finished.returncode, finished.stdout) == (2, "")
    assert finished.stderr.startswith(f"poolnet: error: {path}: another process is sweeping it, ")
    assert f"held by process {os.getpid()} on " in finished.stderr
    assert finished.stderr.count("\n") == 1
    assert run_record.names() == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["no.toml"], ["no.toml: cannot be read"]),
        (["pools.toml", "--data", "no.npz"], ["no.npz"]),
        (["pools.toml", "--workers", "0"], ["--workers: found '0', expected a whole number from 1"]),
        (["pools.toml", "--workers", "9" * 5000], ["expected a whole number from 1 to 999"]),
    ],
)
def test_bad_input_is_refused_in_one_line(study, arguments, said):
    study()
    refused = inside("sweep", *arguments)
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1
    for part in said:
        assert part in refused.stderr
    assert not run_record.names()
