"""The record on disk: whole or absent whatever is cut off, in whatever order the clock runs."""

import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from poolnet import job, journal, linear, signals, train
from poolnet.config import InputError, RunError, TrainConfig
from poolnet.data import open_splits
from poolnet.features import open_pooled
from poolnet.journal import Journal
from poolnet.train import Start


@pytest.fixture
def run():
    return journal.create("max-seed42", {"config": {}})


def state(number):
    return {"W": np.full((5, 2), number, np.float32), "t": np.array(number), "order": np.arange(7, dtype=np.uint8)}


def test_a_new_run_has_a_name_of_its_own_and_a_format(run):
    other = journal.create("max-seed42", {"config": {}})
    assert run.name != other.name
    assert run.name.startswith("max-seed42-")
    assert run.record["format"] == 1
    assert journal.names() == [run.name, other.name]
    assert journal.find(run.name).record == run.record
    assert journal.find("max-seed42") is None
    assert journal.find("../runs/" + run.name) is None


def test_metrics_are_recorded_once_a_step(run):
    with run.training():
        first = run.append(1, {"loss": 0.5})
        assert run.append(1, {"loss": 0.7}) == first
        run.append(2, {"loss": 1 / 3})
    assert [(record["step"], record["metrics"]) for record in run.metrics()] == [
        (1, {"loss": 0.5}),
        (2, {"loss": 1 / 3}),
    ]
    with Journal(run.folder).training():
        assert Journal(run.folder).metrics()[0] == first


@given(cut=st.integers(1, 400), junk=st.binary(max_size=60))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_torn_tail_is_dropped_and_the_file_goes_on(run, cut, junk):
    path = run.folder / "metrics.jsonl"
    path.unlink(missing_ok=True)
    with run.training():
        written = [run.append(step, {"loss": step / 7}) for step in range(1, 6)]
    data = path.read_bytes()
    path.write_bytes(data[: max(0, len(data) - cut)] + junk.replace(b"\n", b""))
    torn = Journal(run.folder)
    left = torn.metrics()
    assert left == written[: len(left)]
    with torn.training():
        again = [torn.append(step, {"loss": step / 7}) for step in range(1, 6)]
    assert Journal(run.folder).metrics() == again
    assert [record["metrics"] for record in again] == [record["metrics"] for record in written]


def test_times_never_fall_when_the_clock_jumps_back(run, monkeypatch):
    clock = iter([10**13, 10**13 - 3_600_000, 5, 10**13 + 7, 6])
    monkeypatch.setattr(journal, "now", lambda: next(clock))
    with run.training():
        times = [run.append(step, {})["t"] for step in range(1, 5)]
        run.end("FINISHED")
    assert times == [10**13, 10**13, 10**13, 10**13 + 7]
    assert run.ended()["t"] == 10**13 + 7


def test_the_newest_checkpoint_counts_and_the_one_before_is_kept(run):
    with run.training():
        for number in (1, 2, 3):
            run.save_checkpoint(state(number))
    assert int(run.checkpoint()["t"]) == 3
    assert run.checkpoint()["t"].shape == ()
    with Journal(run.folder).training() as _:
        pass
    files = sorted(run.folder.glob("checkpoint-*"), key=lambda path: path.stat().st_mtime_ns)
    assert len(files) == 2


@pytest.mark.parametrize("damage", ["half", "empty", "zeros", "one bit", "gone"])
def test_a_damaged_checkpoint_is_not_used(run, damage):
    with run.training():
        run.save_checkpoint(state(1))
        run.save_checkpoint(state(2))
    newest = next(path for path in run.folder.glob("checkpoint-*") if int(run.load_tensors(path.stem)["t"]) == 2)
    data = newest.read_bytes()
    flipped = data[:-40] + bytes([data[-40] ^ 1]) + data[-39:]
    damaged = {"half": data[: len(data) // 2], "empty": b"", "zeros": bytes(len(data)), "one bit": flipped, "gone": b""}
    newest.write_bytes(damaged[damage])
    if damage == "gone":
        newest.unlink()
    assert int(run.checkpoint()["t"]) == 1
    with run.training():
        run.save_checkpoint(state(3))  # in the place of the damaged one
        assert int(run.checkpoint()["t"]) == 3
        run.save_checkpoint(state(4))
    assert int(run.checkpoint()["t"]) == 4


def test_only_one_process_trains_a_run(run):
    script = f"from poolnet import journal\nwith journal.find({run.name!r}).training(): pass"
    with run.training():
        assert run.is_training()
        second = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert f"InputError: {run.name}: another process is training it" in second.stderr.replace("poolnet.config.", "")
    assert not run.is_training()
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0


@pytest.mark.parametrize(
    ("error", "status"), [(RunError("no"), "FAILED"), (KeyboardInterrupt(), "KILLED"), (signals.Stop(2), "KILLED")]
)
def test_what_ends_a_training_early_is_its_end(run, error, status):
    with pytest.raises(type(error)), run.training():
        raise error
    assert run.ended()["status"] == status
    with run.training():
        assert run.ended() is None


def test_a_journal_of_a_newer_poolnet_is_refused(run):
    record = json.loads((run.folder / "record.json").read_text())
    (run.folder / "record.json").write_text(json.dumps(record | {"format": 2}))
    with pytest.raises(InputError, match="found journal format 2, expected at most 1; update poolnet"):
        journal.find(run.name)
    (run.folder / "record.json").write_text("{")
    with pytest.raises(InputError, match=r"found no readable record\.json"):
        journal.find(run.name)


# --- a training that is interrupted anywhere goes on to the same end -------------------------------------------------


def fits(pool, path):
    if pool == "conv":
        splits = open_splits(path)
        return lambda config, **hooks: train.fit(config, splits, **hooks)
    splits, arrays = open_pooled(path, pool)
    return lambda config, **hooks: linear.fit(config, splits, arrays, **hooks)


def assert_identical(result, expected):
    for found, wanted in zip(result.history, expected.history, strict=True):
        assert (found.train_loss, found.train_acc, found.val_loss, found.val_acc) == (
            (wanted.train_loss, wanted.train_acc, wanted.val_loss, wanted.val_acc)
        )
    np.testing.assert_array_equal(result.test.logits, expected.test.logits)
    for name, tensor in expected.model.state_dict().items():
        np.testing.assert_array_equal(result.model.state_dict()[name].numpy(), tensor.numpy())


@pytest.mark.parametrize("pool", ["max", "avg", "conv"])
def test_from_every_epochs_state_the_rest_is_the_same(letters, run, pool):
    fit, config = fits(pool, letters), TrainConfig(pool=pool, epochs=4, batch_size=32, lr=0.01)
    history, states = [], []
    expected = fit(config, on_epoch=history.append, on_state=states.append)
    assert len(states) == 4
    for epochs, kept in enumerate(states, 1):
        with run.training():
            run.save_checkpoint(kept)
        start = Start(tuple(history[:epochs]), run.checkpoint())
        assert_identical(fit(config, start=start), expected)


@pytest.mark.parametrize("pool", ["max", "conv"])
def test_stopped_after_any_batch_the_rest_is_the_same(letters, monkeypatch, pool):
    monkeypatch.setattr(linear, "BLOCK", 32)
    fit, config = fits(pool, letters), TrainConfig(pool=pool, epochs=3, batch_size=32, lr=0.01)
    expected = fit(config)
    batches = 3 * 10
    for stop_after in (1, 9, 10, 11, 17, 25, batches):
        checks = iter(range(1, 10**6))

        def check(stop_after=stop_after, checks=checks):
            if next(checks) == stop_after:
                raise signals.Stop(2)

        monkeypatch.setattr(signals, "check", check)
        history = []
        with pytest.raises(signals.Stop) as stopped:
            fit(config, on_epoch=history.append)
        monkeypatch.setattr(signals, "check", lambda: None)
        kept = stopped.value.state
        assert int(kept["epochs"]) == len(history)
        result = fit(config, start=Start(tuple(history), kept))
        assert_identical(result, expected)


def test_a_run_whose_checkpoints_are_lost_is_trained_again_and_its_record_stays(letters):
    config = TrainConfig(data=str(letters), epochs=3)
    splits, pooled = job.open_data(config, cache=False, say=lambda line: None)
    run = job.create(config, False, splits)
    with run.training():
        job.carry_out(run, splits, pooled, say=lambda line: None)
    before = run.metrics()
    for path in run.folder.glob("checkpoint-*"):
        path.write_bytes(path.read_bytes()[:100])
    with run.training():
        job.carry_out(run, splits, pooled, say=lambda line: None)
    assert run.metrics() == before
    assert run.finished


def test_a_record_that_the_training_does_not_repeat_is_not_built_on(letters):
    config = TrainConfig(data=str(letters), epochs=2)
    splits, pooled = job.open_data(config, cache=False, say=lambda line: None)
    run = job.create(config, False, splits)
    with run.training():
        run.append(1, dict.fromkeys(("train_loss", "train_acc", "val_loss", "val_acc"), 0.5))
        with pytest.raises(RunError, match=r"epoch 1: train_loss: found 2\..*, but 0.5 in the record of"):
            job.carry_out(run, splits, pooled, say=lambda line: None)
