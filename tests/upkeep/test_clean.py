"""What `poolnet clean` deletes, and what still works afterwards, on real stores."""

import contextlib
import dataclasses
import json
import sqlite3
from pathlib import Path

import forked
import mlflow
import numpy as np
import pytest
from conftest import inside, make_arrays, ran
from finished_runs import REGISTERED, journaled, publish
from mlflow.entities import ViewType

from poolnet.data.dataset import open_dataset
from poolnet.runs import run_record, train_run
from poolnet.studies.study import read
from poolnet.tracking import addresses, names, result_runs, sweep_run, sync

pytestmark = pytest.mark.usefixtures("letters")
WEAK, STRONG = {"epochs": 1, "lr": 1e-5}, {"epochs": 6, "lr": 0.05}
STUDY = """question = "Which pooling is better?"
data = "letters.npz"
seeds = {seeds}
[grid]
pool = ["max", "avg"]
epochs = 1
[arms]
max = {{ pool = "max" }}
avg = {{ pool = "avg" }}
"""


def swept(seeds=(1, 2)):
    """Sweep the study, without processes that train. Returns the ids of the sweep's runs."""
    path = Path("pools.toml")
    path.write_text(STUDY.format(seeds=list(seeds)), encoding="utf-8")
    splits = open_dataset(Path("letters.npz"))
    name = sweep_run.name_of("pools", splits.sha256)
    known = {(run.data.params["pool"], run.data.params["seed"]) for run in children(name)}
    for config in read(path).configs():
        if (config.pool, str(config.seed)) not in known:
            config = dataclasses.replace(config, register=False)
            splits, pooled = train_run.open_training_data(config, cache=True, echo=lambda line: None)
            run = train_run.create(config, False, splits, addresses.environment(), name)
            with run.training():
                train_run.carry_out(run, splits, pooled, echo=lambda line: None, figures=False)
            publish(run)
    said("sweep", path)
    return [run.info.run_id for run in children(name)]


def children(sweep):
    return mlflow.MlflowClient().search_runs(["0"], f"tags.`poolnet.sweep` = '{sweep}'")


def said(*args, code=0):
    finished = inside(*args, "--json")
    assert finished.returncode == code, finished.stderr
    return json.loads(finished.stdout)


def killed_elsewhere():
    """A training that was killed, on a machine whose folder is gone."""
    run = journaled(dataclasses.replace(REGISTERED, seed=7, register=False))
    info = publish(run).info
    mlflow.MlflowClient().set_terminated(info.run_id, "KILLED")
    sync.remove(run)
    return info.run_id


def failed_comparison():
    client = mlflow.MlflowClient()
    with pytest.raises(ZeroDivisionError), result_runs.run(client, "0", "compare", "failed") as run_id:
        _ = 1 / 0
    return run_id


def active():
    return {run.info.run_id for run in mlflow.MlflowClient().search_runs(["0"], max_results=50_000)}


def sizes():
    """Bytes of the database, of artifacts and of local state."""
    with contextlib.closing(sqlite3.connect("mlflow.db")) as database:
        database.execute("VACUUM")
    folders = (Path("mlruns"), Path("home"))
    files = [sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) for folder in folders]
    return [Path("mlflow.db").stat().st_size, *files]


def test_clean_and_gc_free_space_and_what_was_kept_still_works(letters):
    client = mlflow.MlflowClient()
    first = swept()
    np.savez(letters, **make_arrays(seed=1))
    kept = swept()
    compared = said("compare", "--study", "pools.toml")
    runs = [publish(journaled(dataclasses.replace(REGISTERED, **options))) for options in (WEAK, STRONG, {})]
    said("promote", "models:/poolnet/1")
    assert said("promote", "models:/poolnet/2")["kind"] == "better"
    again = said("reproduce", runs[2].data.tags["poolnet.run"])
    failed = {killed_elsewhere(), failed_comparison()}
    theirs = client.create_run("0", tags={"mlflow.source.name": "train.py"}).info.run_id
    client.set_terminated(theirs, "FAILED")
    everything, before = active(), sizes()

    listed = said("clean")
    assert {kind: len(each["names"]) for kind, each in listed["going"].items()} == {
        "versions": 1,  # that never was champion
        "failed": 2,
        "superseded": 5,  # the sweep on the earlier data, and its four runs
        "records": 12,  # two sweeps, three versions and the reproduction
        "caches": len([path for path in Path("home").glob("*/*") if path.parent.name in ("features", "exports")]),
    }
    assert listed["going"]["versions"]["names"] == ["3"]
    assert (active(), sizes()) == (everything, before)

    (parent,) = client.search_runs(["0"], f"tags.`poolnet.study` = '{client.get_run(first[0]).data.tags[names.SWEEP]}'")
    assert said("clean", "--yes")["going"] == listed["going"]
    gone = {*first, parent.info.run_id, *failed}
    assert active() == everything - gone
    assert theirs in active()
    after = sizes()
    assert said("clean")["going"] == {kind: {"names": [], "bytes": 0} for kind in listed["going"]} | {
        "versions": {"names": [], "bytes": None}
    }
    assert not run_record.names()

    gc = ran(*forked.PYTHON, "mlflow", "gc", "--backend-store-uri", addresses.own())
    assert gc.returncode == 0, gc.stderr
    assert not client.search_runs(["0"], run_view_type=ViewType.DELETED_ONLY)
    last = sizes()
    print("database, artifacts, local state:", before, after, last)
    assert last[0] < before[0]
    assert after[1] == before[1]
    assert last[1] < 0.8 * before[1]
    assert after[2] < 0.1 * before[2]
    left = {path.parts[2] for path in Path("mlruns/0").rglob("*") if path.is_file()}  # gc leaves empty folders
    assert left == {*active()} - {theirs} | {"models"}

    assert said("compare", "--study", "pools.toml")["sentence"] == compared["sentence"]
    assert {*kept} <= active()
    assert said("promote", "--rollback")["version"] == 1
    assert said("evaluate", "models:/poolnet@champion")["agrees"]
    assert said("promote", "models:/poolnet/2")["kind"] == "better"
    assert said("evaluate", "models:/poolnet@champion")["agrees"]
    assert said("reproduce", runs[2].info.run_id)["verdict"] == "bit-identical"
    assert client.get_run(again["run_id"]).data.tags[names.REPRODUCTION] == "bit-identical"
    assert inside("sync").returncode == 0
