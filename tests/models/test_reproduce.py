"""A recorded run trained again, by the command, from what the store has of it."""

import copy
import dataclasses
import json
from pathlib import Path

import mlflow
import numpy as np
import pytest
from conftest import assert_refused, enter, inside, make_arrays, make_groups, run
from finished_runs import REGISTERED, journaled, name_metrics_as_before, publish
from threadpoolctl import threadpool_limits

from poolnet.models import reproduce
from poolnet.runs import provenance, run_record, train_run
from poolnet.tracking import addresses, training_runs
from poolnet.training.config import Arithmetic

# of the tiny data set, whose letters can be told apart at no loss
FALLS = "poolnet: warning: the lowest train loss is lower still: it falls for ever as the weights grow\n"


def reproduced(name, *options, code=0):
    finished = inside("reproduce", name, *options, "--json")
    assert finished.returncode == code, finished.stderr
    return json.loads(finished.stdout), finished.stderr


def test_the_same_data_and_code_give_the_same_to_the_bit(trained):
    result, err = reproduced(trained.info.run_id)
    assert (result["verdict"], result["first_difference"], err) == ("bit-identical", None, FALLS)
    assert result["compared"] == {"metrics": 3 * 4 + 11, "logits": (90 + 110) * 10, "weights": 500}
    client = mlflow.MlflowClient()
    again = client.get_run(result["run_id"])
    assert (again.info.status, again.info.run_name) == ("FINISHED", result["run"])
    assert again.data.tags["poolnet.reproduces"] == trained.info.run_id
    assert again.data.tags["poolnet.reproduction"] == "bit-identical"
    assert trained.info.run_id in again.data.tags["mlflow.note.content"]
    assert client.get_run(trained.info.run_id).data.tags["poolnet.reproduced_by"] == result["run_id"]
    for key in ("train_loss", "val_acc"):
        histories = [client.get_metric_history(each, key) for each in (trained.info.run_id, result["run_id"])]
        values = [[(metric.step, metric.value) for metric in history] for history in histories]
        assert values[0] == values[1]
    # it is no further version, and no further run of its seed
    assert len(client.search_model_versions("name = 'poolnet'")) == 1
    assert [each.run_id for each in training_runs.search(client, ["0"])] == [trained.info.run_id]


def test_neither_threads_nor_place_and_groups_of_the_data_change_a_digit(trained, tmp_path):
    np.savez(tmp_path / "moved.npz", **make_arrays(), **make_groups())
    with threadpool_limits(3):
        result, err = reproduced(trained.data.tags["poolnet.run"], "--data", tmp_path / "moved.npz")
    assert (result["verdict"], result["circumstances"], err) == ("bit-identical", [], FALLS)


def test_a_conv_run_is_trained_again_with_its_own_threads_and_layout(tmp_path):
    """Runs of earlier versions took as many threads as there were cores, and another layout: digits depend on both."""
    np.savez("letters.npz", **make_arrays())
    config = dataclasses.replace(REGISTERED, pool="conv", epochs=1)
    splits, pooled = train_run.open_training_data(config, False, print)
    old = train_run.create(config, False, splits, addresses.environment(), conv=Arithmetic(3, "contiguous"))
    with old.training():
        train_run.carry_out(old, splits, pooled, echo=lambda line: None)
    result, _ = reproduced(publish(old).info.run_id)
    assert result["verdict"] == "bit-identical"
    assert result["circumstances"] == ["threads 3 (here 2; trained with 3 all the same)"]


def test_one_byte_of_the_data_is_enough_to_refuse(capsys, trained, tmp_path):
    arrays = make_arrays()
    arrays["X_val"][3, 4, 5] ^= 1
    np.savez(tmp_path / "changed.npz", **arrays)
    before = run_record.names()
    code, _, err = run(capsys, "reproduce", trained.info.run_id, "--data", tmp_path / "changed.npz")
    assert_refused(code, err, "changed.npz: val: found SHA-256", "in the record of avg-seed42-")
    assert run_record.names() == before


def test_a_metric_that_differs_is_found_with_its_step(letters):
    """Somebody has logged another loss over that of an epoch."""
    changed = publish(journaled(REGISTERED))
    client = mlflow.MlflowClient()
    value = client.get_metric_history(changed.info.run_id, "val_loss")[1].value
    client.log_metric(changed.info.run_id, "val_loss", value + 0.5, step=2)
    finished = inside("reproduce", changed.info.run_id)
    assert finished.returncode == 1
    line = next(line for line in finished.stdout.splitlines() if line.startswith("different: "))
    assert f"first difference: epoch 2: val_loss {value!r}, recorded {value + 0.5!r}" in line


# --- comparing, without another process -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def both(store):
    with pytest.MonkeyPatch.context() as patch:
        enter(store[0], patch)
        return reproduce.find(mlflow.MlflowClient(), store[1].info.run_id), journaled(REGISTERED, optimum=True)


@pytest.fixture
def pair(both):
    """What a store has of a run, free to be changed, and the record of the same run once more."""
    return copy.deepcopy(both[0]), both[1]


def differences(original, again):
    return list(reproduce._differences(original, again))


def test_what_is_compared(pair):
    original, again = pair
    assert differences(original, again) == []
    assert set(original.metrics) == {0, 1, 2, 3}
    del original.metrics[0]["optimum_test_acc"]  # as of an earlier version
    assert differences(original, again) == []
    original.metrics[3]["train_loss"] += 1e-7
    original.metrics[0]["test_acc"] += 0.01
    del original.metrics[1]["val_acc"]
    original.weights["fc.bias"][7] += 1e-5
    original.logits["test"][3, 4] += 1
    result = differences(original, again)
    assert [each.text.split(" 0.")[0].split(" 1.")[0].split(" np")[0].split(" -")[0] for each in result] == [
        "epoch 1: val_acc",
        "epoch 3: train_loss",
        "test_acc",
        "logits of test[3, 4]",
        "fc.bias[7]",
    ]
    assert [each.small for each in result] == [False, True, False, False, True]


def test_a_run_of_an_earlier_version_is_compared_in_all_its_metrics(trained, both):
    name_metrics_as_before()
    original = reproduce.find(mlflow.MlflowClient(), trained.info.run_id)
    assert original.metrics == both[0].metrics
    assert differences(original, both[1]) == []
    assert len(list(reproduce._metrics(original, both[1]))) == 3 * 4 + 11


def test_timings_are_not_compared(pair):
    original, again = pair
    original.metrics[1]["epoch_seconds"] += 1
    assert differences(original, again) == []


def test_other_code_is_named(monkeypatch, pair):
    original, _ = pair
    record = original.record["code"]
    monkeypatch.setattr(provenance, "code_state", lambda: ("f" * 40, "false", b""))
    assert reproduce._code_differences(original) == [f"commit {record['commit']} (here {'f' * 40})"]
    clean = dataclasses.replace(original, record={"code": {"commit": "f" * 40, "dirty": "false"}}, diff=b"")
    assert reproduce._code_differences(clean) == []
    dirty = dataclasses.replace(original, record={"code": {"commit": "f" * 40, "dirty": "true"}}, diff=b"-a\n+b")
    assert reproduce._code_differences(dirty) == ["uncommitted changes (here no uncommitted changes)"]
    monkeypatch.setattr(provenance, "code_state", lambda: ("f" * 40, "true", b"-a\n+c"))
    assert reproduce._code_differences(dirty) == ["uncommitted changes (here other ones)"]
    monkeypatch.setattr(provenance, "code_state", lambda: ("f" * 40, "true", b"-a\n+b"))
    assert reproduce._code_differences(dirty) == []


def test_another_device_and_other_packages_are_named(pair):
    original, _ = pair
    config, circumstances = reproduce._settings({**original.record, "device": "cuda:99"}, "")
    assert circumstances == [f"device cuda:99 (here {config.device})"]
    assert config.register is False
    record = {**original.record, "environment": {**original.record["environment"], "torch": "2.10.0"}}
    assert provenance.differences(record)[0].startswith("torch 2.10.0 (here ")


def test_what_cannot_be_reproduced_is_one_line(capsys, letters):
    code, _, err = run(capsys, "reproduce", "avg-seed42-00000000")
    assert_refused(code, err, "avg-seed42-00000000: no such run")
    client = mlflow.MlflowClient()
    foreign = client.create_run("0").info.run_id
    code, _, err = run(capsys, "reproduce", foreign)
    assert_refused(code, err, foreign, "none of poolnet train")
    finished = publish(journaled(REGISTERED)).info.run_id
    client.set_terminated(finished, "KILLED")
    code, _, err = run(capsys, "reproduce", finished)
    assert_refused(code, err, "found it KILLED", "poolnet train --resume avg-seed42-")
    client.set_terminated(finished, "FINISHED")
    record = Path(client.download_artifacts(finished, "record.json")).read_text(encoding="utf-8")
    damaged = {
        "{}": "damaged",
        record[:700]: "line",
        record.replace('"pool": "avg"', '"pool": "max"'): "damaged",
        "[" * 100_000: "nested too deep",
        '{"format": 1}': "started: missing",
        '{"format": 99}': "update poolnet",
    }
    for content, reason in damaged.items():
        client.log_text(finished, content, "record.json")
        code, _, err = run(capsys, "reproduce", finished)
        assert_refused(code, err, "found no readable record.json", reason)
