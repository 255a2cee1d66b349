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
from conftest import assert_refused, inside, make_arrays, ran
from finished_runs import REGISTERED, journaled, publish
from mlflow.entities import Dataset, DatasetInput, LoggedModelInput, LoggedModelOutput, Param, ViewType

from poolnet.data.dataset import open_dataset
from poolnet.runs import run_record, train_run
from poolnet.studies.study import read
from poolnet.tracking import addresses, names, result_runs, servers, sweep_run, sync
from poolnet.training.config import TrainConfig
from poolnet.upkeep import clean

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
    first = swept([1])
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
        "superseded": 3,  # the sweep on the earlier data, and its two runs
        "records": 10,  # two sweeps, three versions and the reproduction
        "caches": len([path for path in Path("home").glob("*/*") if path.parent.name in ("features", "exports")]),
    }
    assert listed["going"]["versions"]["names"] == ["3"]
    assert (active(), sizes()) == (everything, before)

    (parent,) = client.search_runs(["0"], f"tags.`poolnet.study` = '{client.get_run(first[0]).data.tags[names.SWEEP]}'")
    # a clean that is killed between a run and its record leaves this
    (output,) = client.get_run(first[0]).outputs.model_outputs
    client.delete_logged_model(output.model_id)
    client.delete_run(first[0])
    cleaned = said("clean", "--yes")["going"]
    assert {*listed["going"]["superseded"]["names"]} > {*cleaned["superseded"]["names"]}
    assert [cleaned[kind] for kind in ("versions", "failed", "records", "caches")] == [
        listed["going"][kind] for kind in ("versions", "failed", "records", "caches")
    ]
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
    assert last[1] == before[1] - sum(listed["going"][kind]["bytes"] for kind in ("failed", "superseded"))
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


# --- which runs are superseded ----------------------------------------------------------------------------------------


OLD, NEW = "a" * 64, "b" * 64  # digests


def logged(status="FINISHED", tags=None, digest=OLD, path="/data/letters.npz", ended=None, **config):
    """A run as poolnet logs one, of which nobody has a record. Returns its id."""
    client = mlflow.MlflowClient()
    own = {names.RUN: "max-seed1-abcd", names.DATA_SHA256: digest} if config else {}
    run_id = client.create_run("0", tags={**own, **(tags or {})}).info.run_id
    if config:
        options = dataclasses.asdict(TrainConfig(data="letters.npz", epochs=1, **config))
        client.log_batch(run_id, params=[Param(key, str(value)) for key, value in options.items() if value != ""])
        source = json.dumps({"uri": path})
        client.log_inputs(run_id, [DatasetInput(Dataset("letters", digest[:32], "local", source), [])])
    if status != "RUNNING":
        client.set_terminated(run_id, status, ended)
    return run_id


def sweep(
    digest, ended, seeds=(1, 2), trained=None, study="pools", path="/data/letters.npz", status="FINISHED", user=""
):
    """A sweep whose study has these seeds; it has trained those of `trained`. Returns it, and its runs by seed."""
    name = f"{study}-{digest[:8]}"
    parent = logged(status, {names.STUDY: name, names.USER: user}, ended=ended)
    mlflow.MlflowClient().log_text(parent, STUDY.format(seeds=list(seeds)), "study.toml")
    tags = {names.SWEEP: name, names.PARENT: parent}
    runs = [logged(tags=tags, digest=digest, path=path, pool="max", seed=seed) for seed in trained or seeds]
    return parent, runs


def gone(*kinds):
    """The ids of the runs that would go."""
    plan = clean.find(
        servers.own_client(), "0", kinds or ("superseded",), -1
    )  # also what ended in this very millisecond
    return {run.info.run_id for run in (*plan.superseded, *plan.failed)}


def compared(*runs, text=None):
    comparison = logged(tags={names.COMPARISON: "better", names.DATA_SHA256: OLD})
    arms = {"arms": [{"name": "max", "runs": runs}]}
    mlflow.MlflowClient().log_text(comparison, text or json.dumps(arms), "comparison.json")


def test_a_sweep_is_superseded_by_a_later_one_of_the_same_study_and_user_on_the_same_changed_file():
    parent, runs = sweep(OLD, 1000)
    assert gone() == set()
    sweep(NEW, 3000, status="FAILED")
    sweep("c" * 64, 2000, study="others")
    sweep("d" * 64, 2000, path="/data/digits.npz")
    sweep("e" * 64, 2000, user="someone else")
    assert gone() == set()
    older, its_runs = sweep("f" * 64, 500)
    assert gone() == {older, *its_runs}
    sweep("0" * 64, 2000)
    assert gone() >= {parent, *runs}


def test_the_earlier_of_two_sweeps_goes_whichever_it_is():
    """Somebody went back to the first data."""
    first, again = sweep(OLD, 3000), sweep(NEW, 2000)
    assert gone() == {again[0], *again[1]}
    assert first[0] not in gone()


def test_runs_that_a_changed_study_asks_for_no_longer_are_superseded():
    parent, (_, second, third) = sweep(OLD, 1000, seeds=[1], trained=[1, 2, 3])
    assert gone() == {second, third}
    sweep(OLD, 900, study="others", seeds=[2], trained=[5])  # which takes that one from the first
    assert second not in gone()
    mlflow.MlflowClient().set_terminated(parent, "FAILED")
    assert third not in gone()


def test_if_a_study_cannot_be_read_no_run_on_its_data_goes():
    sweep(OLD, 1000, seeds=[1], trained=[1, 2])
    parent, _ = sweep(OLD, 900, study="others")
    mlflow.MlflowClient().log_text(parent, "question = ", "study.toml")
    assert gone() == set()


def test_what_a_result_or_a_version_names_stays_and_its_sweep_with_it():
    client = mlflow.MlflowClient()
    parent, (*runs,) = sweep(OLD, 1000, trained=range(1, 7))
    sweep(NEW, 2000)
    assert gone() == {parent, *runs}
    compared(runs[0])
    assert gone() == set(runs[1:])
    logged(tags={names.REPRODUCES: runs[1], names.RUN: "max-seed2-bcde"})
    logged(tags={names.EVALUATION: "agrees"})
    model = client.create_logged_model("0", "max-seed3", runs[2])
    client.log_outputs(runs[2], [LoggedModelOutput(model.model_id, 1)])
    evaluation = logged(tags={names.EVALUATION: "agrees"})
    client.log_inputs(evaluation, models=[LoggedModelInput(model.model_id)])
    client.create_registered_model("letters-in-production")
    client.create_model_version("letters-in-production", f"runs:/{runs[3]}/model", runs[3])
    client.create_run("0", tags={names.PARENT: runs[4]})  # somebody's own, below ours
    assert [run in gone() for run in runs] == [False, False, False, False, False, True]
    compared(text="damaged")
    assert gone() == set()


# --- failed runs, versions --------------------------------------------------------------------------------------------


def test_failed_runs_go_unless_they_can_go_on_or_say_something(letters):
    client = mlflow.MlflowClient()
    going = {logged(status, pool="max", seed=seed) for seed, status in enumerate(("FAILED", "KILLED"))}
    going.add(logged("KILLED", {"mlflow.source.name": "poolnet evaluate"}))
    parent = logged("KILLED", {names.STUDY: "pools-aaaaaaaa"})
    going |= {parent, logged("FAILED", {names.PARENT: parent}, pool="avg", seed=8)}
    logged("RUNNING", pool="max", seed=5)
    trains = logged("RUNNING", pool="max", seed=9)
    client.log_metric(trains, "val_loss", 0.5)
    going.add(logged("KILLED", {names.REPRODUCES: "0" * 32, names.RUN: "max-seed3-cdef"}))
    logged("FAILED", {names.PROMOTION: "refused"})
    logged("FAILED")  # not poolnet's
    unfinished = logged("FAILED", {names.STUDY: "others-aaaaaaaa"})
    logged(tags={names.PARENT: unfinished}, pool="max", seed=6)
    here = journaled(dataclasses.replace(REGISTERED, register=False))
    client.set_terminated(publish(here).info.run_id, "KILLED")
    here.end("KILLED")
    assert gone("failed") == going
    with contextlib.closing(sqlite3.connect("mlflow.db")) as database, database:
        database.execute("UPDATE runs SET start_time = start_time - 8 * 86400000 WHERE status = 'RUNNING'")
    assert len(gone("failed") - going) == 1  # a process that began it a week ago, and has logged nothing, is dead
    assert trains not in gone("failed")
    out = inside("clean", "failed", "--yes").stdout
    assert f"Kept: {here.name} can go on: poolnet train --resume RUN; " in out
    assert "Kept: max-seed1-abcd are RUNNING; " in out
    assert gone("failed") == set()


def versions(client):
    return {int(version.version) for version in client.search_model_versions("name = 'poolnet'")}


def test_versions_stay_that_a_promotion_knows_or_somebody_uses_and_no_sync_makes_others_again(letters):
    client = mlflow.MlflowClient()
    run = journaled(REGISTERED)
    info = publish(run).info
    (first,) = client.search_model_versions("name = 'poolnet'")
    for _ in range(8):
        client.create_model_version("poolnet", first.source, info.run_id)
    client.set_registered_model_alias("poolnet", "of-a-user", "2")
    client.set_model_version_tag("poolnet", "3", "champion-max.since", "2026-01-01T00:00:00.000+00:00")
    client.set_model_version_tag("poolnet", "3", "champion-max.before", "4 5")
    client.set_model_version_tag("poolnet", "3", "challenger/6", "1 of 10: pool=avg")
    client.set_model_version_tag("poolnet", "7", "champion.decision", "refused")
    client.set_model_version_tag("poolnet", "8", "colour", "blue")
    assert inside("clean", "versions", "--yes").returncode == 0
    assert versions(client) == {2, 3, 4, 5, 6, 7}
    for number in (2, 3, 4, 5, 6, 7):
        client.delete_registered_model_alias("poolnet", "of-a-user")
        for key in client.get_model_version("poolnet", str(number)).tags:
            client.delete_model_version_tag("poolnet", str(number), key)
    assert inside("clean", "versions", "--yes").returncode == 0
    assert versions(client) == set()
    assert sync.sync(run.name, prune=True).did == "checked, removed"
    assert versions(client) == set()
    assert said("promote", info.run_id)["version"] == 10  # of a model that is registered again


# --- whatever happens -------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def refusing(table, when="1"):
    """A store that lets nobody change a table any more, from some moment on."""
    with contextlib.closing(sqlite3.connect("mlflow.db", isolation_level=None)) as database:
        database.execute(
            f"CREATE TRIGGER no BEFORE UPDATE ON {table} WHEN {when} BEGIN SELECT RAISE(ABORT, 'not allowed'); END"
        )
        yield
        database.execute("DROP TRIGGER no")


def test_a_clean_that_is_cut_off_is_finished_by_the_same_command():
    parent, runs = sweep(OLD, 1000, trained=[1, 2, 3])
    sweep(NEW, 2000)
    before = active()
    with refusing("runs", "(SELECT count(*) FROM runs WHERE lifecycle_stage = 'deleted') = 2"):
        finished = inside("clean", "superseded", "--yes")
    assert finished.returncode == 1
    assert finished.stderr.count("\n") == 1
    assert "(2 of 4 deleted, the rest is as it was)" in finished.stderr
    assert len(active() & {*runs}) == 1
    assert parent in active()
    assert inside("clean", "superseded", "--yes").returncode == 0
    assert active() == before - {parent, *runs}
    assert inside("clean", "superseded").stdout == "Found nothing to delete.\n"


def test_a_server_that_refuses_the_first_deletion_has_lost_nothing():
    runs = {logged("FAILED", pool="max", seed=seed) for seed in (1, 2)}
    with refusing("runs"):
        finished = inside("clean", "--yes")
    assert (finished.returncode, finished.stdout) == (1, "")
    assert "(nothing was deleted" in finished.stderr
    assert runs <= active()


def test_all_pages_of_a_large_experiment_are_read():
    run_id = logged("FAILED", {"mlflow.source.name": "poolnet compare"})
    with contextlib.closing(sqlite3.connect("mlflow.db")) as database, database:
        database.create_function("new", 1, lambda number: f"{number:032x}")
        columns = [row[1] for row in database.execute("PRAGMA table_info(runs)") if row[1] != "run_uuid"]
        count = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 2100)"
        of_run = f"FROM n, {{}} WHERE run_uuid = '{run_id}'"
        names_of = ", ".join(columns)
        database.execute(
            f"INSERT INTO runs (run_uuid, {names_of}) {count} SELECT new(i), {names_of} {of_run.format('runs')}"
        )
        database.execute(
            f"INSERT INTO tags (run_uuid, key, value) {count} SELECT new(i), key, value {of_run.format('tags')}"
        )
    assert len(said("clean", "failed")["going"]["failed"]["names"]) == 2101


def test_caches_go_without_a_server_unless_a_run_is_trained(letters, monkeypatch):
    (Path("home") / "data" / "received" / "0123").mkdir(parents=True)
    (Path("home") / "data" / "received" / "0123" / "letters.npz").touch()
    (Path("home") / "data" / "own.npz").touch()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    run = journaled()
    (run.folder / "end.json").unlink()
    with run.training():
        assert f"Kept: {run.name} are being trained" in inside("clean", "caches", "--yes").stdout
    assert said("clean", "caches", "--older-than", "1")["going"]["caches"]["names"] == []
    assert "data/received/0123/letters.npz" in said("clean", "caches", "--yes")["going"]["caches"]["names"]
    assert [path.name for path in Path("home").rglob("*.npz") if path.parent.name == "data"] == ["own.npz"]
    assert said("clean", "caches")["going"]["caches"]["names"] == []
    assert inside("clean").returncode == 1  # of a server that is away


def test_bad_input_is_refused_and_no_experiment_is_made(monkeypatch):
    for arguments in (["runs"], ["--older-than", "-1"], ["--experiment", "nowhere"]):
        finished = inside("clean", *arguments)
        assert_refused(finished.returncode, finished.stderr, arguments[-1])
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "not there yet")
    assert inside("clean").returncode == 2
    assert [each.name for each in mlflow.MlflowClient().search_experiments()] == ["Default"]
