"""Catching up with servers, and going on with runs, as a user types it."""

import json
import signal
import subprocess
import sys
import threading
from pathlib import Path

import mlflow
import numpy as np
import pytest
from conftest import make_arrays, poolnet
from test_cli import assert_refused, run
from test_project import mlflow_run
from test_tracking import CONFIG, journaled, publish

from poolnet import files, job, journal, linear, signals, stores, sync
from poolnet.tracking import Publication

pytestmark = pytest.mark.usefixtures("letters")


def interrupted(config=CONFIG, after=1):
    """A run of this process that was stopped after an epoch, as a run that was killed leaves it."""
    splits, pooled = job.open_data(config, cache=False, say=lambda line: None)
    left = job.create(config, False, splits)

    def stop_after(record):
        if int(str(record).split()[1].rstrip(":")) == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), left.training():
        job.carry_out(left, splits, pooled, say=stop_after)
    (left.folder / "end.json").unlink()
    return left


def synced(*options, code=0):
    finished = poolnet("sync", "--json", *options)
    assert finished.returncode == code, finished.stderr
    return json.loads(finished.stdout)["runs"]


# --- sync -----------------------------------------------------------------------------------------------------------


def test_a_run_whose_process_died_is_marked_and_published(capsys):
    left = interrupted()
    code, out, _ = run(capsys, "sync", "--dry-run")
    assert code == 0
    assert [line.split()[:2] for line in out.splitlines()] == [["run", "state"], [left.name, "KILLED"]]
    assert left.ended() is None
    assert not (left.folder / "published.json").exists()
    code, out, _ = run(capsys, "sync")
    assert code == 0
    assert f"published; go on with: poolnet train --resume {left.name}" in out
    (found,) = mlflow.MlflowClient().search_runs(["0"])
    assert (found.info.status, found.info.end_time) == ("KILLED", left.ended()["t"])
    assert [row["found"] for row in synced(left.name)] == ["nothing"]


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
    files.write_json(new.folder / "record.json", new.record | {"format": 9})
    code, out, _ = run(capsys, "sync")
    assert code == 3
    assert "found journal format 9, expected at most 1; update poolnet" in out
    assert publish(old).info.status == "FINISHED"
    refused = poolnet("train", "--resume", new.name)
    assert_refused(refused.returncode, refused.stderr, "found journal format 9", "update poolnet")


def test_two_at_once_publish_everything_once():
    finished = journaled(CONFIG.__class__(data="letters.npz", epochs=2))
    Publication(finished, stores.home_of(finished)).save()
    rows = []
    two = [threading.Thread(target=lambda: rows.extend(synced())) for _ in range(2)]
    for thread in two:
        thread.start()
    for thread in two:
        thread.join()
    assert sorted(row["did"] for row in rows) == ["nothing", "published"]
    client = mlflow.MlflowClient()
    assert len(client.search_runs(["0"])) == 1
    assert len(client.search_model_versions()) == 1


@pytest.mark.parametrize("lost", ["all", "run_id", "version", "model"])
def test_what_is_not_remembered_is_found_and_not_made_again(lost):
    finished = journaled(CONFIG.__class__(data="letters.npz", epochs=2))
    first = publish(finished)
    path = finished.folder / "published.json"
    published = files.read_json(path)
    (held,) = published["servers"].values()
    if lost == "all":
        published = {}
    elif lost == "run_id":
        held["run_id"] = ""
    else:
        held["done"].remove(lost)
    files.write_json(path, published)
    again = publish(finished)
    assert again.to_dictionary() == first.to_dictionary()
    client = mlflow.MlflowClient()
    assert len(client.search_runs(["0"])) == len(client.search_model_versions()) == 1
    assert len(client.search_logged_models(["0"])) == 1
    assert len(again.outputs.model_outputs) == 1
    assert [metric.step for metric in client.get_metric_history(first.info.run_id, "val_loss")] == [1, 2]


def test_a_run_that_was_deleted_on_the_server_is_not_made_again(capsys):
    finished = journaled()
    mlflow.MlflowClient().delete_run(publish(finished).info.run_id)
    (finished.folder / "published.json").write_text("{}")
    code, out, _ = run(capsys, "sync")
    assert code == 3
    assert "was deleted on" in out


def test_prune_removes_only_what_the_server_holds_completely(capsys):
    whole, damaged, killed = journaled(), journaled(), interrupted()
    rows = list(sync.sync([], to=None, dry_run=True, prune=True))
    assert [row.did for row in rows] == ["would publish it"] * 3
    publish(whole)
    run_id = publish(damaged).info.run_id
    artifact = Path(mlflow.get_run(run_id).info.artifact_uri) / "predictions" / "test.npz"
    artifact.write_bytes(artifact.read_bytes()[:-1] + b"!")
    rows = {row["run"]: row for row in synced("--prune", code=3)}
    assert rows[whole.name]["did"] == "checked, removed"
    assert rows[damaged.name]["did"] == "kept: artifact test.npz"
    assert "poolnet train --resume" in rows[killed.name]["did"]
    assert journal.names() == [damaged.name, killed.name]


# --- resume ---------------------------------------------------------------------------------------------------------


def test_resume_goes_on_in_the_same_run_and_ends_as_if_nothing_had_happened(capsys):
    left, calm = interrupted(), publish(journaled())
    publish_killed = Publication(left, stores.home_of(left))
    sync.mark_if_dead(left)
    publish_killed.advance()
    run_id = publish_killed.held["run_id"]
    code, out, err = run(capsys, "train", "--resume", run_id)  # the id that the UI shows is good as well
    assert (code, err) == (0, "")
    assert "Epoch 01" in out
    found = mlflow.get_run(run_id)
    assert found.info.status == "FINISHED"
    for name in set(calm.data.metrics) - {"epoch_seconds", "examples_per_second"}:
        assert found.data.metrics[name] == calm.data.metrics[name]
    code, out, _ = run(capsys, "train", "--resume", left.name)
    assert code == 0
    assert f"{left.name} is finished" in out


def test_a_stop_before_the_first_batch_is_recorded(monkeypatch):
    splits, pooled = job.open_data(CONFIG, cache=False, say=lambda line: None)
    left = job.create(CONFIG, False, splits)

    def stopped(*args, **hooks):
        raise signals.Stop(signal.SIGINT)

    monkeypatch.setattr(linear, "fit", stopped)
    with pytest.raises(signals.Stop), left.training():
        job.carry_out(left, splits, pooled)
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
    assert run(capsys, "train", "--resume", left.name, "--epochs", 2)[0] == 0


def test_other_data_under_the_same_name_are_refused(capsys, tmp_path):
    left = interrupted()
    sync.mark_if_dead(left)
    np.savez(tmp_path / "letters.npz", **make_arrays(seed=5))
    code, _, err = run(capsys, "train", "--resume", left.name)
    assert_refused(code, err, "letters.npz: found SHA-256", "in the record of", "put the data set back")
    assert left.ended()["status"] == "KILLED"  # as it was, not a failure


def test_a_run_that_nobody_knows_is_refused(capsys):
    code, _, err = run(capsys, "train", "--resume", "max-seed42-00000000")
    assert_refused(code, err, "max-seed42-00000000: no such run in", "if its folder is gone, train it anew")


def test_mlflow_run_resumes_in_the_run_that_was_begun():
    left = interrupted(CONFIG.__class__(data="letters.npz", epochs=2, pool="avg", register=False))
    synced()
    (before,) = mlflow.MlflowClient().search_runs(["0"])
    refused = mlflow_run("-P", f"resume={left.name}", "-P", "pool=conv")
    assert refused.returncode != 0
    assert f"pool: found conv, but avg in the record of {left.name}" in refused.stderr
    finished = mlflow_run("-P", f"resume={left.name}")
    assert finished.returncode == 0, finished.stderr
    after = mlflow.get_run(before.info.run_id)
    assert after.info.status == "FINISHED"
    others = [other for other in mlflow.MlflowClient().search_runs(["0"]) if other.info.run_id != after.info.run_id]
    assert [len(other.data.metrics) for other in others] == [0, 0]
    assert others[0].info.run_name == f"resumes {left.name}"
    assert after.info.run_id in others[0].data.tags["mlflow.note.content"]


def test_a_finished_run_with_a_damaged_model_is_made_whole_by_resuming_it(capsys):
    finished = journaled()
    path = finished.folder / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    (row,) = synced(code=3)
    assert row["did"] == f"{path}: damaged; made again by: poolnet train --resume {finished.name}"
    code, out, err = run(capsys, "train", "--resume", finished.name)
    assert (code, err) == (0, "")
    assert path.read_bytes() == whole
    assert "Model: models:/m-" in out


def test_a_publisher_that_is_killed_is_made_up_for(letters):
    command = [sys.executable, "-m", "poolnet", "sync", "--follow"]
    finished = journaled()
    with subprocess.Popen(command, stdin=subprocess.PIPE, text=True) as first:
        first.stdin.write(f"{finished.name} \n")
        first.stdin.flush()
        first.kill()
    assert [row["did"] for row in synced()] == ["published"]
