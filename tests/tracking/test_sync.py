"""Catching up with servers, and going on with runs, as a user types it."""

import contextlib
import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import threading
from pathlib import Path

import forked
import mlflow
import numpy as np
import pytest
from conftest import assert_refused, inside, make_arrays, make_groups, mlflow_run, poolnet, run, wait_for
from finished_runs import CONFIG, journaled, name_metrics_as_before, publish

from poolnet import files, process, text
from poolnet.runs import run_record, train_run
from poolnet.tracking import addresses, published, servers, sync
from poolnet.tracking.publication import Publication, is_complete, upload_new
from poolnet.training import fast_step

pytestmark = pytest.mark.usefixtures("letters")


def interrupted(config=CONFIG, after=1):
    """A run of this process that was stopped after an epoch, as a run that was killed leaves it."""
    splits, pooled = train_run.open_training_data(config, cache=False, echo=lambda line: None)
    left = train_run.create(config, False, splits, addresses.environment())

    def stop_after(record):
        if int(str(record).split()[1].rstrip(":")) == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), left.training():
        train_run.carry_out(left, splits, pooled, echo=stop_after)
    (left.folder / "end.json").unlink()
    return left


def synced(*options, code=0):
    finished = inside("sync", "--json", *options)
    assert finished.returncode == code, finished.stderr
    return json.loads(finished.stdout)["runs"]


# --- sync -----------------------------------------------------------------------------------------------------------


def test_a_run_whose_process_died_is_marked_and_published(capsys):
    left = interrupted()
    code, out, _ = run(capsys, "sync", "--dry-run")
    assert code == 0
    heading, *lines = out.splitlines()
    assert heading == f"0 of 1 runs published on {servers.home_of(left)}"
    assert [line.split()[:2] for line in lines] == [["run", "state"], [left.name, "KILLED"]]
    assert left.ended() is None
    assert not (left.folder / "published.json").exists()
    code, out, _ = run(capsys, "sync")
    assert code == 0
    assert f"published; go on with: poolnet train --resume {left.name}" in out
    (found,) = mlflow.MlflowClient().search_runs(["0"])
    assert (found.info.status, found.info.end_time) == ("KILLED", left.ended()["t"])
    assert [row["found"] for row in synced(left.name)] == ["nothing"]


def test_a_store_that_has_everything_is_one_line_and_else_each_run_that_lacks_something(capsys):
    whole = [journaled(), journaled()]
    for each in whole:
        publish(each)
    for option in ("--dry-run", None):
        code, out, _ = run(capsys, "sync", *filter(None, [option]))
        assert (code, out) == (0, f"2 runs, all published on {servers.home_of(whole[0])}\n")
    assert [row["run"] for row in synced("--dry-run")] == sorted(
        (each.name for each in whole), key=run_record.names().index
    )
    left = journaled()
    code, out, _ = run(capsys, "sync", "--dry-run")
    heading, _, line = out.splitlines()
    assert heading == f"2 of 3 runs published on {servers.home_of(left)}"
    assert line == f"{left.name}  FINISHED  everything: would publish it"
    assert len(line) <= text.WIDTH


def test_nothing_to_publish_is_said(capsys):
    code, out, _ = run(capsys, "sync")
    assert code == 0
    assert out.startswith("No runs in ")
    code, _, err = run(capsys, "sync", "max-seed1-00000000")
    assert_refused(code, err, "max-seed1-00000000: no such run in")
    code, _, err = run(capsys, "sync", "--to", "mlflow.example.org")
    assert_refused(code, err, "--to", "mlflow.example.org", "expected an address such as http://host:5000")


def test_a_run_of_a_newer_poolnet_does_not_keep_the_others_from_the_server(capsys):
    old, new = journaled(), journaled()
    record = json.loads((new.folder / "record.json").read_text())
    files.write_json(new.folder / "record.json", {**files.unsealed(record), "format": 9})
    code, out, _ = run(capsys, "sync")
    assert code == 3
    assert "found record format 9, expected at most 1; update poolnet" in out
    assert publish(old).info.status == "FINISHED"
    refused = inside("train", "--resume", new.name)
    assert_refused(refused.returncode, refused.stderr, "found record format 9", "update poolnet")


def test_a_run_that_an_earlier_version_published_lacks_nothing():
    publish(journaled())
    name_metrics_as_before()
    assert [(row["found"], row["did"]) for row in synced()] == [("nothing", "nothing")]
    assert [(row["found"], row["did"]) for row in synced("--prune")] == [("nothing", "checked, removed")]


def test_two_at_once_publish_everything_once():
    finished = journaled(CONFIG.__class__(data="letters.npz", epochs=2))
    rows = []
    two = [threading.Thread(target=lambda: rows.append(sync.sync(finished.name))) for _ in range(2)]
    for thread in two:
        thread.start()
    for thread in two:
        thread.join()
    first, second = sorted(rows, key=lambda row: row.did != "published")
    assert (first.state, first.found, first.did, first.ok) == (
        "FINISHED",
        "everything",
        "published",
        True,
    )
    # the second finds everything there, or says who was faster, if that one took long
    assert (second.state, second.found, second.did) == ("FINISHED", "nothing", "nothing") or "held by" in second.did
    client = mlflow.MlflowClient()
    assert len(client.search_runs(["0"])) == 1
    assert len(client.search_model_versions()) == 1


def test_who_holds_a_run_for_long_is_named_and_the_others_are_published(monkeypatch):
    busy, free = journaled(), journaled()
    monkeypatch.setattr(sync, "LOCK_SECONDS", 0.2)
    with files.locked(busy.folder / "publish.lock"):
        rows = [sync.sync(run.name) for run in (busy, free)]
        assert re.search(rf"publish.lock: held by process {os.getpid()} .*; wait for it, or end it", rows[0].did)
    assert [(row.ok, row.state) for row in rows] == [(False, "FINISHED"), (True, "FINISHED")]
    assert rows[1].did == "published"


def test_a_run_beside_a_running_sweep_is_published_without_waiting_for_its_end():
    """The process that publishes a sweep lets go of each run between two looks."""
    finished, left = journaled(), interrupted()
    command = [*forked.POOLNET, "sync", "--follow"]
    with forked.start(command, stdin=subprocess.PIPE, text=True) as follower, left.training():
        for run in (left, finished):
            follower.stdin.write(f"{run.name} \n")
            follower.stdin.flush()
        wait_for(lambda: published.read(finished).servers)
        assert [row["did"] for row in synced(left.name)] == ["nothing"]
        wait_for(lambda: is_complete(Publication(finished, servers.home_of(finished))), 120)
        assert [row["did"] for row in synced(finished.name)] == ["nothing"]
        assert follower.poll() is None
        follower.kill()


def test_what_is_not_remembered_is_found_and_not_made_again():
    finished = journaled(CONFIG.__class__(data="letters.npz", epochs=2))
    first = publish(finished)
    path = finished.folder / "published.json"
    client = mlflow.MlflowClient()
    for lost in ("run_id", "version", "model", "all"):
        memory = files.read_json(path)
        (server_copy,) = memory["servers"].values()
        if lost == "run_id":
            server_copy["run_id"] = ""
        elif lost != "all":
            server_copy["done"].remove(lost)
        path.unlink()
        if lost != "all":
            files.write_json(path, memory)
        again = publish(finished)
        assert again.to_dictionary() == first.to_dictionary(), lost
        assert len(client.search_runs(["0"])) == len(client.search_model_versions()) == 1
        assert len(client.search_logged_models(["0"])) == 1
        assert len(again.outputs.model_outputs) == 1
        assert [metric.step for metric in client.get_metric_history(first.info.run_id, "val_loss")] == [1, 2]


def test_a_run_that_was_deleted_on_the_server_is_not_made_again(capsys):
    finished = journaled()
    mlflow.MlflowClient().delete_run(publish(finished).info.run_id)
    (finished.folder / "published.json").unlink()
    code, out, _ = run(capsys, "sync")
    assert code == 3
    assert "was deleted on" in out


def test_prune_removes_only_what_the_server_holds_completely(capsys):
    whole, damaged, killed = journaled(), journaled(), interrupted()
    rows = [sync.sync(name, dry_run=True, prune=True) for name in run_record.names()]
    assert [row.did for row in rows] == ["would publish it"] * 3
    publish(whole)
    run_id = publish(damaged).info.run_id
    artifact = Path(mlflow.get_run(run_id).info.artifact_uri) / "predictions" / "test.npz"
    artifact.write_bytes(artifact.read_bytes()[:-1] + b"!")
    rows = {row["run"]: row for row in synced("--prune", code=3)}
    assert rows[whole.name]["did"] == "checked, removed"
    assert rows[damaged.name]["did"] == f"kept: artifact test.npz; to publish that again: poolnet sync {damaged.name}"
    assert "poolnet train --resume" in rows[killed.name]["did"]
    assert run_record.names() == [damaged.name, killed.name]
    assert [row["did"] for row in synced(damaged.name, "--prune")] == ["published, checked, removed"]
    assert not (run_record.folder() / damaged.name).exists()


# --- resume ---------------------------------------------------------------------------------------------------------


def test_resume_goes_on_in_the_same_run_and_ends_as_if_nothing_had_happened(capsys):
    left, calm = interrupted(), publish(journaled())
    publish_killed = Publication(left, servers.home_of(left))
    left.mark_if_dead()
    upload_new(publish_killed)
    run_id = publish_killed.server_copy.run_id
    code, out, err = run(capsys, "train", "--resume", run_id)  # the id that the UI shows is good as well
    assert (code, err) == (0, "")
    assert re.findall(r"^Epoch (\d\d)", out, re.MULTILINE) == ["01", "02"]  # it was stopped before its checkpoint
    found = mlflow.get_run(run_id)
    assert found.info.status == "FINISHED"
    for name in set(calm.data.metrics) - {"speed/epoch_seconds", "speed/examples_per_second"}:
        assert found.data.metrics[name] == calm.data.metrics[name]
    code, out, _ = run(capsys, "train", "--resume", left.name)
    assert code == 0
    assert f"{left.name} is finished" in out


def test_a_stop_before_the_first_batch_is_recorded(monkeypatch):
    splits, pooled = train_run.open_training_data(CONFIG, cache=False, echo=lambda line: None)
    left = train_run.create(CONFIG, False, splits, addresses.environment())

    def stopped(*args, **hooks):
        raise process.Stop(signal.SIGINT)

    monkeypatch.setattr(fast_step, "fit", stopped)
    with pytest.raises(process.Stop), left.training():
        train_run.carry_out(left, splits, pooled)
    assert left.ended()["status"] == "KILLED"
    assert left.checkpoints() == []


def test_options_that_contradict_the_record_are_refused_naming_both(capsys):
    left = interrupted()
    for option, here, recorded in (
        ("--pool", "avg", "max"),
        ("--epochs", "30", "2"),
        ("--data", "other.npz", "letters.npz"),
    ):
        code, _, err = run(capsys, "train", "--resume", left.name, option, here)
        assert_refused(code, err, option.strip("-"), f"found {here}, but {recorded} in the record of {left.name}")
    code, _, err = run(capsys, "train", "--resume", left.name, "--optimum")
    assert_refused(code, err, "optimum: found True, but False")
    np.savez("letters.npz", **make_arrays(), **make_groups())  # the same images
    assert run(capsys, "train", "--resume", left.name, "--epochs", 2)[0] == 0


def test_other_data_under_the_same_name_are_refused(capsys, tmp_path):
    left = interrupted()
    left.mark_if_dead()
    np.savez(tmp_path / "letters.npz", **make_arrays(seed=5))
    code, _, err = run(capsys, "train", "--resume", left.name)
    assert_refused(code, err, "letters.npz: found SHA-256", "in the record of", "put the data set back")
    assert left.ended()["status"] == "KILLED"  # as it was, not a failure


def test_a_run_that_nobody_knows_is_refused(capsys):
    code, _, err = run(capsys, "train", "--resume", "max-seed42-00000000")
    assert_refused(code, err, "max-seed42-00000000: no such run in", "train it anew with the command")


def test_mlflow_run_resumes_in_the_run_that_was_begun():
    left = interrupted(CONFIG.__class__(data="letters.npz", epochs=2, pool="avg", register=False))
    synced()
    (before,) = mlflow.MlflowClient().search_runs(["0"])
    made = mlflow.MlflowClient().create_run("0").info.run_id  # as `mlflow run` does, which passes its defaults on
    refused = inside("train", "--resume", left.name, "--data", "glyphs", "--pool", "conv", MLFLOW_RUN_ID=made)
    assert_refused(refused.returncode, refused.stderr, f"pool: found conv, but avg in the record of {left.name}")
    finished = mlflow_run("-P", f"resume={left.name}")
    assert finished.returncode == 0, finished.stderr
    after = mlflow.get_run(before.info.run_id)
    assert after.info.status == "FINISHED"
    others = [other for other in mlflow.MlflowClient().search_runs(["0"]) if other.info.run_id != after.info.run_id]
    assert [len(other.data.metrics) for other in others] == [0, 0]
    assert others[0].info.run_name == f"resumes {left.name}"
    assert after.info.run_id in others[0].data.tags["mlflow.note.content"]


def test_a_finished_run_with_damaged_results_is_made_whole_by_resuming_it(capsys):
    finished = journaled()
    damaged = {"model.safetensors": (["--dry-run"], [], ["--prune"]), "predictions/val.npz": (["--prune"],)}
    for name, tried in damaged.items():
        path = finished.folder / name
        whole = path.read_bytes()
        middle = len(whole) // 2
        path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
        for options in tried:
            (row,) = synced(*options, code=3)
            assert row["did"] == f"{path}: damaged; made again by: poolnet train --resume {finished.name}"
        code, out, err = run(capsys, "train", "--resume", finished.name)
        assert (code, err) == (0, "")
        assert finished.has_results()
        assert lacks_nothing(finished)
        assert "Model: models:/m-" in out


@pytest.mark.parametrize("moment", ["run", "metrics", "model"])
def test_a_publisher_that_is_killed_is_made_up_for(moment):
    command = [*forked.POOLNET, "sync", "--follow"]
    finished = journaled()
    begun = {
        "run": lambda server_copy: server_copy.run_id,
        "metrics": lambda server_copy: server_copy.metrics,
        "model": lambda server_copy: "model" in server_copy.done,
    }
    with forked.start(command, stdin=subprocess.PIPE, text=True) as first:
        first.stdin.write(f"{finished.name} \n")
        first.stdin.flush()
        wait_for(lambda: begun[moment](next(iter(published.read(finished).servers.values()))), 120)
        first.kill()
    (row,) = synced()
    assert row["did"] in ("published", "nothing")  # by the one or by the other
    assert lacks_nothing(finished)
    assert len(mlflow.MlflowClient().search_runs(["0"])) == 1


def lacks_nothing(run):
    publication = Publication(run, servers.home_of(run))
    return not sync.lacking(publication, every_byte=True)


# --- each run by itself ----------------------------------------------------------------------------------------------

BAD = {  # a file of a run, and what it holds all of a sudden
    "format in quotes": ("record.json", {"format": "1"}),
    "record of nothing": ("record.json", {"format": 1}),
    "record of another form": ("record.json", {"format": 1, "config": [], "data": 3, "tracking": None}),
    "end without status": ("end.json", {"t": 1}),
    "servers in a list": ("published.json", {"servers": []}),
    "server of a number": ("published.json", {"servers": {"x": 1}}),
    "home of a number": ("published.json", {"home": 5, "servers": {}}),
}


def test_damaged_runs_among_good_ones_are_named_and_the_others_are_published(capsys):
    good, bad = journaled(), {}
    for index, (name, content) in enumerate(BAD.values()):
        folder = shutil.copytree(good.folder, run_record.folder() / f"max-seed1-0000000{index}")
        (folder / name).write_text(json.dumps(content))
        bad[folder] = name
    for options in (["--dry-run"], [], ["--prune"]):
        code, out, err = run(capsys, "sync", *options)
        assert (code, err) == (3, "")
        for folder, name in bad.items():
            line = next(line for line in out.splitlines() if line.startswith(folder.name))
            if name == "end.json":  # as if its process had died
                assert re.search(r" KILLED .*(go on with|needs it|would publish)", line)
            else:
                assert line.split()[1] == "unreadable"
                assert str(folder) in line
    assert set(run_record.names()) == {folder.name for folder in bad}
    (found,) = mlflow.MlflowClient().search_runs(["0"], f"tags.`poolnet.run` = '{good.name}'")
    assert found.info.status == "FINISHED"


def test_a_run_that_cannot_be_published_does_not_keep_the_follower_from_those_behind_it():
    deleted, damaged, good = journaled(), journaled(), journaled()
    mlflow.MlflowClient().delete_run(publish(deleted).info.run_id)
    deleted.end("FINISHED")
    (damaged.folder / "published.json").write_text('{"servers": []}')
    names = "".join(f"{run.name} \n" for run in (deleted, damaged, good))
    finished = poolnet("sync", "--follow", "--drain-timeout", 10, stdin=subprocess.PIPE, said=names)
    assert finished.returncode == 3, finished.stderr
    assert "was deleted on" in finished.stderr
    assert f"published.json: damaged; remove it, then: poolnet sync {damaged.name}" in finished.stderr
    assert is_complete(Publication(good, servers.home_of(good)))


# --- what a server has lost ------------------------------------------------------------------------------------------


def lose(what, client, run):
    """What an older backup, or a folder that somebody removed, leaves a server without."""
    artifacts, run_id = Path(run.info.artifact_uri), run.info.run_id
    (version,) = client.search_model_versions()
    match what:
        case "artifact worst_mistakes.png":
            (artifacts / "figures" / "worst_mistakes.png").unlink()
        case "artifact test.npz":
            path = artifacts / "predictions" / "test.npz"
            path.write_bytes(path.read_bytes()[:100])
        case "model":  # of which only the files are gone
            shutil.rmtree(Path(client.get_logged_model(version.source.removeprefix("models:/")).artifact_location))
        case "version of the model":
            client.delete_model_version("poolnet", version.version)
        case "status":
            client.update_run(run_id, status="RUNNING")
        case "description":
            client.set_tag(run_id, "mlflow.note.content", "")
        case "metric val_loss":
            with contextlib.closing(sqlite3.connect("mlflow.db")) as database, database:
                for table in ("metrics", "latest_metrics"):
                    database.execute(f"DELETE FROM {table} WHERE key = 'val_loss'")


def test_what_a_server_has_lost_is_published_again():
    finished = journaled(CONFIG.__class__(data="letters.npz", epochs=2))
    first = publish(finished)
    lost = ["artifact worst_mistakes.png", "artifact test.npz", "status", "description", "metric val_loss"]
    lost += ["version of the model", "model"]
    for what in lost:
        lose(what, mlflow.MlflowClient(), first)
        assert sync.sync(finished.name, dry_run=True).found == what
        row = sync.sync(finished.name)
        assert (row.found, row.did, row.ok) == (what, "published", True)
        row = sync.sync(finished.name)
        assert (row.found, row.did) == ("nothing", "nothing")
        assert lacks_nothing(finished), what
        assert len(mlflow.MlflowClient().search_runs(["0"])) == len(mlflow.MlflowClient().search_model_versions()) == 1


def test_a_store_that_is_lost_or_restored_from_an_older_backup_gets_its_runs_again(tmp_path):
    store, backup = tmp_path / "mlflow.db", tmp_path / "backup.db"

    def synced():  # by a process that has not opened the other file
        finished = poolnet("sync", "--json")
        assert finished.returncode == 0, finished.stderr
        return [(row["found"], row["did"]) for row in json.loads(finished.stdout)["runs"]]

    publish(journaled())
    shutil.copy(store, backup)
    publish(journaled())
    shutil.copy(backup, store)
    assert synced() == [("nothing", "nothing"), ("everything", "published")]
    store.unlink()
    assert synced() == [("everything", "published")] * 2
    assert synced() == [("nothing", "nothing")] * 2
    with contextlib.closing(sqlite3.connect(store)) as database:
        assert database.execute("SELECT COUNT(*) FROM runs WHERE status = 'FINISHED'").fetchone() == (2,)


def test_prune_keeps_a_run_whose_model_cannot_be_loaded_or_has_other_weights():
    finished = journaled()
    run_id = publish(finished).info.run_id
    (model,) = mlflow.MlflowClient().search_logged_models(["0"], f"source_run_id = '{run_id}'")
    weights = [path for path in Path(model.artifact_location).rglob("*") if path.suffix in (".pt2", ".safetensors")]
    for path in weights:
        path.write_bytes(path.read_bytes()[:-100])
    row = sync.sync(finished.name, prune=True)
    assert (row.did.partition(";")[0], row.ok) == ("kept: model", False)
    assert finished.load_tensors("model")
    assert sync.sync(finished.name, prune=True).did == "published, checked, removed"  # it is there again
