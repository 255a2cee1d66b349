"""Two machines that sweep the same study against one server: one sweep, and each combination once."""

import dataclasses
import json
import os
import subprocess

import forked
import mlflow
import pytest
from conftest import STUDY, inside
from finished_runs import journaled, publish

from poolnet import files
from poolnet.data.dataset import open_dataset
from poolnet.errors import RunError
from poolnet.runs import run_record
from poolnet.tracking import publication, sweep_run
from poolnet.tracking.publication import Publication
from poolnet.training.config import TrainConfig

pytestmark = pytest.mark.usefixtures("letters")


def test_two_machines_at_once_leave_one_sweep_and_each_combination_once(tmp_path):
    path = tmp_path / "pools.toml"
    path.write_text(STUDY.replace("[1, 2, 3]", "[1, 2]"), encoding="utf-8")
    homes = [{"POOLNET_HOME": str(tmp_path / name)} for name in ("one", "other")]
    command = [*forked.POOLNET, "sweep", str(path), "--workers", "1", "--json"]
    sweeps = [forked.start(command, env=os.environ | home, stdout=subprocess.PIPE, text=True) for home in homes]
    told = [json.loads(sweep.communicate(timeout=120)[0]) for sweep in sweeps]
    assert [sweep.returncode for sweep in sweeps] == [0, 0]
    for home in homes:
        synced = inside("sync", "--json", **home)
        assert synced.returncode == 0, synced.stderr
    found = mlflow.MlflowClient().search_runs(["0"])
    (parent,) = [run for run in found if "poolnet.study" in run.data.tags]
    children = {run.info.run_id: run for run in found if "poolnet.run" in run.data.tags}
    assert len(children) == len({(run.data.params["pool"], run.data.params["seed"]) for run in children.values()}) == 4
    assert {(run.info.status, run.data.tags["mlflow.parentRunId"]) for run in children.values()} == {
        ("FINISHED", parent.info.run_id)
    }
    # whoever ended last saw all of them
    assert {run["run_id"] for run in told[0]["runs"]} == children.keys() or (
        {run["run_id"] for run in told[1]["runs"]} == children.keys()
    )


@pytest.fixture
def child(tmp_path):
    """Makes finished records of the same combination of a sweep, each in a home of its own."""

    def make(home, monkeypatch, **changes):
        monkeypatch.setenv("POOLNET_HOME", str(tmp_path / home))
        config = TrainConfig(data="letters.npz", seed=1, epochs=2, register=False)
        run = journaled(dataclasses.replace(config, **changes))
        record = files.read_json(run.folder / "record.json")
        name = sweep_run.name_of("pools", open_dataset("letters.npz").sha256)
        files.write_json(run.folder / "record.json", {**record, "sweep": name})
        return run_record.RunRecord(run.folder)

    return make


def test_a_record_whose_combination_another_machine_has_finished_counts_as_published(child, monkeypatch):
    publish(child("one", monkeypatch))
    child("other", monkeypatch)
    child("other", monkeypatch, seed=2)
    for expected in (1, 0):
        finished = inside("sync", "--json")
        assert finished.returncode == 0, finished.stderr
        rows = json.loads(finished.stdout)["runs"]
        assert len(rows) == 2
        assert sum(row["did"] == "published" for row in rows) >= expected
    published = mlflow.MlflowClient().search_runs(["0"], "tags.`poolnet.run` LIKE '%'")
    assert sorted(run.data.params["seed"] for run in published) == ["1", "2"]


def test_what_two_machines_created_at_the_same_moment_is_settled_by_whoever_looks_last(child, monkeypatch):
    """Neither saw the other's runs before its own were there."""
    client = mlflow.MlflowClient()
    ours, theirs = child("one", monkeypatch), child("other", monkeypatch)
    with monkeypatch.context() as blind:
        blind.setattr(sweep_run, "_all", lambda *query: [])
        blind.setattr(publication.servers, "once", lambda client, look_up, *args: look_up(client, *args))
        runs = [publish(ours), publish(theirs)]
    assert runs[0].data.tags["mlflow.parentRunId"] != runs[1].data.tags["mlflow.parentRunId"]
    name = ours.record["sweep"]
    for _ in range(2):  # twice is once
        sweep_run.settle(client, "0", name)
        (parent,) = client.search_runs(["0"], f"tags.`poolnet.study` = '{name}'")
        (left,) = client.search_runs(["0"], f"tags.`poolnet.sweep` = '{name}'")
        assert left.info.run_id == runs[0].info.run_id
        assert left.data.tags["mlflow.parentRunId"] == parent.info.run_id
    # the other machine hears of it
    deleted = Publication(theirs, os.environ["MLFLOW_TRACKING_URI"])
    publication.upload_new(deleted)
    assert (deleted.server_copy.stand_in, publication.is_complete(deleted)) == (left.info.run_id, True)
    # if a user removes what stands for it, it is deleted as any other
    client.delete_run(left.info.run_id)
    with pytest.raises(RunError, match="was deleted"):
        publication.upload_new(deleted)


def test_the_run_that_mlflow_run_made_is_not_deleted_but_says_where_the_results_are(child, monkeypatch):
    client = mlflow.MlflowClient()
    first = sweep_run.find_or_create(client, "0", "pools-01234567")
    made = client.create_run("0", tags={"mlflow.project.entryPoint": "sweep", "poolnet.study": "pools-01234567"})
    sweep_run.settle(client, "0", "pools-01234567")
    assert first in client.get_run(made.info.run_id).data.tags["mlflow.note.content"]
    assert [run.info.run_id for run in client.search_runs(["0"], "tags.`poolnet.study` LIKE '%'")] == [first]


def test_a_run_that_a_user_deleted_is_not_published_again(child, monkeypatch):
    run = publish(child("one", monkeypatch))
    mlflow.MlflowClient().delete_run(run.info.run_id)
    finished = inside("sync")
    assert finished.returncode == 3
    assert "was deleted" in finished.stdout + finished.stderr
