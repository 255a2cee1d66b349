"""The record on disk: whole or absent whatever is cut off, named where damaged, in whatever order the clock runs."""

import copy
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys

import forked
import numpy as np
import pytest
from conftest import make_arrays, ran
from hypothesis import given, settings
from hypothesis import strategies as st

from poolnet import files, process
from poolnet.data import folds
from poolnet.data.dataset import open_dataset
from poolnet.errors import InputError, RunError
from poolnet.runs import figures, provenance, run_record, train_run
from poolnet.runs.run_record import RunRecord
from poolnet.tracking import addresses
from poolnet.training import fast_step, train_loop
from poolnet.training.config import TrainConfig
from poolnet.training.features import open_pooled
from poolnet.training.train_loop import Start

RECORD = {
    "config": dataclasses.asdict(TrainConfig()),
    "device": "cpu",
    "data": {
        "path": "/letters.npz",
        "name": "letters",
        "sha256": "0" * 64,
        "overlap": 0,
        "splits": [
            {"name": name, "sha256": "0" * 64, "shape": [9, 28, 28], "dtype": "uint8"}
            for name in ("train", "val", "test")
        ],
    },
    "code": {"commit": None, "dirty": "unknown"},
    "environment": {**provenance.environment(), "threads": 1, "layout": "contiguous"},
    "tracking": dict.fromkeys(("uri", "folder", "experiment_id", "experiment_name", "run_id"), ""),
}


@pytest.fixture
def arrays():
    """Few, because a convolution trains on them again and again."""
    return make_arrays((100, 30, 40))


@pytest.fixture
def run():
    return run_record.create("max-seed42", RECORD)


def state(number):
    return {"W": np.full((5, 2), number, np.float32), "t": np.array(number), "order": np.arange(7, dtype=np.uint8)}


def test_a_new_run_has_a_name_of_its_own_and_a_format(run):
    other = run_record.create("max-seed42", RECORD)
    assert run.name != other.name
    assert re.fullmatch("max-seed42-[0-9a-f]{4}", run.name)
    assert run.record["format"] == 1
    assert run_record.names() == [run.name, other.name]
    assert run_record.find(run.name).record == run.record
    with pytest.raises(InputError, match="max-seed42: found 2 runs"):
        run_record.find("max-seed42")
    assert run_record.find("../runs/" + run.name) is None


def test_metrics_are_recorded_once_a_step(run):
    with run.training():
        first = run.append(1, {"loss": 0.5})
        assert run.append(1, {"loss": 0.7}) == first
        run.append(2, {"loss": 1 / 3})
    assert [(record["step"], record["metrics"]) for record in run.metrics()] == [
        (1, {"loss": 0.5}),
        (2, {"loss": 1 / 3}),
    ]
    with RunRecord(run.folder).training():
        assert RunRecord(run.folder).metrics()[0] == first


@given(cut=st.integers(1, 400), junk=st.binary(max_size=60))
@settings(max_examples=60)
def test_a_torn_tail_is_dropped_and_the_file_goes_on(run, cut, junk):
    path = run.folder / "metrics.jsonl"
    path.unlink(missing_ok=True)
    with run.training():
        written = [run.append(step, {"loss": step / 7}) for step in range(1, 6)]
    data = path.read_bytes()
    path.write_bytes(data[: max(0, len(data) - cut)] + junk.replace(b"\n", b""))
    torn = RunRecord(run.folder)
    whole = torn.metrics()
    assert whole == written[: len(whole)]
    with torn.training():
        again = [torn.append(step, {"loss": step / 7}) for step in range(1, 6)]
    assert RunRecord(run.folder).metrics() == again
    assert [record["metrics"] for record in again] == [record["metrics"] for record in written]


def test_times_never_fall_when_the_clock_jumps_back(run, monkeypatch):
    clock = iter([10**13, 10**13 - 3_600_000, 5, 10**13 + 7, 6])
    monkeypatch.setattr(run_record, "now", lambda: next(clock))
    with run.training():
        times = [run.append(step, {})["t"] for step in range(1, 5)]
        run.end("FINISHED")
    assert times == [10**13, 10**13, 10**13, 10**13 + 7]
    assert run.ended()["t"] == 10**13 + 7


def test_the_newest_checkpoint_counts_and_the_one_before_is_kept(run):
    with run.training():
        for number in (1, 2, 3):
            run.save_checkpoint(state(number))
    assert [int(kept["t"]) for kept in run.checkpoints()] == [3, 2]
    assert run.checkpoints()[0]["t"].shape == ()
    again = RunRecord(run.folder)
    with again.training():
        again.save_checkpoint(state(4))
    assert [int(kept["t"]) for kept in run.checkpoints()] == [4, 3]


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
    assert [int(kept["t"]) for kept in run.checkpoints()] == [1]
    with run.training():
        run.save_checkpoint(state(3))  # in the place of the damaged one
        assert int(run.checkpoints()[0]["t"]) == 3
        run.save_checkpoint(state(4))
    assert int(run.checkpoints()[0]["t"]) == 4


def test_only_one_process_trains_a_run(run):
    script = f"from poolnet.runs import run_record\nwith run_record.find({run.name!r}).training(): pass"
    with run.training():
        assert run.is_training()
        second = ran(sys.executable, "-c", script)
    holder = f"held by process {os.getpid()} on "
    assert re.search(f"InputError: {run.name}: another process is training it, .*lock: {holder}", second.stderr)
    assert not run.is_training()
    assert ran(sys.executable, "-c", script).returncode == 0


@pytest.mark.parametrize(
    ("error", "status"), [(RunError("no"), "FAILED"), (KeyboardInterrupt(), "KILLED"), (process.Stop(2), "KILLED")]
)
def test_what_ends_a_training_early_is_its_end(run, error, status):
    with pytest.raises(type(error)), run.training():
        raise error
    assert run.ended()["status"] == status
    with run.training():
        assert run.ended() is None


def test_a_record_of_a_newer_poolnet_is_refused(run):
    files.write_json(run.folder / "record.json", {"format": 2, "all": "else is new"})
    with pytest.raises(InputError, match="found record format 2, expected at most 1; update poolnet"):
        run_record.find(run.name)


def without(record, *keys):
    """A copy of a record without what stands there."""
    changed = copy.deepcopy(record)
    part = changed
    for key in keys[:-1]:
        part = part[key]
    del part[keys[-1]]
    return changed


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "",
        "[]",
        "[" * 100_000,
        '{"format": "1"}',
        '{"format": 1}',
        json.dumps(RECORD | {"format": True, "started": 1}),
        json.dumps(RECORD | {"format": 1, "started": "now"}),
        json.dumps(RECORD | {"format": 1, "started": 1, "config": {"epochs": "3"}}),
        json.dumps(RECORD | {"format": 1, "started": 1, "code": []}),
        json.dumps(RECORD | {"format": 1, "started": 1, "data": RECORD["data"] | {"splits": []}}),
        json.dumps(RECORD | {"format": 1, "started": 1, "data": RECORD["data"] | {"overlap": None}}),
        json.dumps(without(RECORD, "environment", "user") | {"format": 1, "started": 1}),
        json.dumps(files.sealed(RECORD | {"format": 1, "started": 1})).replace('"epochs": 30', '"epochs": 31'),
    ],
)
def test_a_damaged_record_is_refused_in_one_line_and_the_others_are_found(run, content):
    other = run_record.create("max-seed42", RECORD)
    files.write_json(other.folder / "published.json", {"home": "u", "servers": {"u": server_entry("0" * 32)}})
    (run.folder / "record.json").write_text(content)
    (run.folder / "published.json").write_text('{"servers": []}')
    with pytest.raises(
        InputError, match=rf"{run.name}: found no readable record\.json \(.*\); .* have a copy"
    ) as refused:
        run_record.find(run.name)
    assert "\n" not in str(refused.value)
    assert sorted(run_record.names()) == sorted([run.name, other.name])
    assert run_record.find("0" * 32).name == other.name


def server_entry(run_id):
    return {"run_id": run_id, "experiment_id": "0", "done": [], "metrics": 0}


@pytest.mark.parametrize(
    "content",
    [
        '{"servers": []}',
        '{"servers": {"u": []}}',
        '{"servers": {"u": {"run_id": 5}}}',
        '{"home": []}',
        "[]",
        "null",
        "{",
    ],
)
def test_a_run_is_looked_for_beside_one_whose_memory_of_servers_is_damaged(run, content):
    (run.folder / "published.json").write_text(content)
    assert run_record.find("5") is None
    assert run_record.find(run.name).name == run.name


@pytest.mark.parametrize(
    "content", ['{"t": 1}', '{"t": "1", "status": "FINISHED"}', '{"t": 1, "status": "DONE"}', "[]"]
)
def test_an_end_that_is_damaged_is_none(run, content):
    (run.folder / "end.json").write_text(content)
    assert run.ended() is None
    assert not run.finished
    run.mark_if_dead()
    assert run.ended()["status"] == "KILLED"


def test_settings_of_another_version_stop_nothing_but_training(run):
    """A later one has `dropout`, an earlier one had no `register`."""
    config = without(RECORD, "config", "register")["config"] | {"dropout": 0.5}
    files.write_json(run.folder / "record.json", run.record | {"config": config})
    other = run_record.find(run.name)
    assert other.record["config"] == RECORD["config"] | {"dropout": 0.5}
    with pytest.raises(InputError, match=f"{run.name}: dropout: no setting of this version; update poolnet"):
        train_run.settings(other)


# --- damaged metrics -------------------------------------------------------------------------------------------------


VALUES = {"train_loss": 0.5, "train_acc": 0.9, "val_loss": 0.25, "val_acc": 0.8, "examples_per_second": 7.0}


def damaged_line(run):
    with pytest.raises(RunError, match=f"made again by: poolnet train --resume {run.name}") as raised:
        run.metrics()
    return int(re.search(r"metrics\.jsonl: line (\d+) is damaged", str(raised.value))[1])


@given(at=st.integers(0), byte=st.integers(0, 255))
@settings(max_examples=100)
def test_any_changed_byte_is_found_and_the_lines_behind_it_are_kept(run, at, byte):
    path = run.folder / "metrics.jsonl"
    path.unlink(missing_ok=True)
    with run.training():
        written = [run.append(step, VALUES) for step in range(1, 5)]
    data = path.read_bytes()
    at %= len(data) - len(data.splitlines(keepends=True)[-1])  # the last line may be taken for one that is torn
    changed = data[:at] + bytes([byte]) + data[at + 1 :]
    path.write_bytes(changed)
    if changed == data or (data[at] == ord(" ") and chr(byte) in "\r\t"):  # the same to JSON
        return
    line = data[:at].count(b"\n") + 1
    again = RunRecord(run.folder)
    assert damaged_line(again) == line
    lost = {line, line + 1} if data[at] == ord("\n") else {line}
    good = [record for record in written if record["step"] not in lost]
    with again.training():
        assert again.metrics() == good
        for step in range(1, 5):
            again.append(step, VALUES)
    assert again.by_step() == dict.fromkeys(range(1, 5), VALUES)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"val_acc": 0.8', '"val_acc": 8.8'),
        ('"val_acc": 0.8', '"val_acc": "0.8"'),
        ('"val_loss": 0.25', '"val_loss": NaN'),
        ('"train_loss": 0.5', '"train_loss": -0.5'),
        ('"step": 2', '"step": 3'),
        ('"step": 2', '"step": -2'),
        ('"step": 2', '"step": 2.0'),
        ('"t": 2', '"t": "2"'),
        ('"metrics"', '"netrics"'),
    ],
)
def test_lines_of_earlier_versions_have_no_checksum_and_must_be_what_they_can_be(run, old, new):
    lines = [json.dumps({"t": step or 4, "step": step, "metrics": VALUES}) for step in (1, 2, 3, 0)]
    path = run.folder / "metrics.jsonl"
    path.write_text("\n".join([*lines, ""]))
    assert [record["step"] for record in run.metrics()] == [1, 2, 3, 0]
    path.write_text("\n".join([lines[0], lines[1].replace(old, new), *lines[2:], ""]))
    assert damaged_line(run) == 2
    with run.training():
        assert [record["step"] for record in run.metrics()] == [1, 3, 0]
    assert [record["step"] for record in RunRecord(run.folder).metrics()] == [1, 3, 0]


# --- who trains a run ------------------------------------------------------------------------------------------------


def checkers(number, run, times):
    """Processes that look so many times, once they have said that they begin."""
    script = f"""
from poolnet.runs import run_record
run = run_record.find({run.name!r})
print("begins", flush=True)
print(sum(run.is_training() for _ in range({times})))
"""
    pipe = {"stdout": subprocess.PIPE, "text": True}
    started = [forked.start([sys.executable, "-c", script], **pipe) for _ in range(number)]
    for checker in started:
        assert checker.stdout.readline() == "begins\n"
    return started


def test_who_only_looks_is_never_taken_for_the_trainer_and_never_in_its_way(run):
    assert [checker.communicate()[0] for checker in checkers(3, run, 200)] == ["0\n"] * 3
    with run.training():
        assert [checker.communicate()[0] for checker in checkers(2, run, 200)] == ["200\n"] * 2
    looking = checkers(2, run, 10**9)
    try:
        for _ in range(10):
            with RunRecord(run.folder).training():
                pass
    finally:
        for checker in looking:
            checker.kill()
            checker.communicate()


# --- a training that is interrupted anywhere goes on to the same end -------------------------------------------------


def fits(pool, path):
    if pool == "conv":
        splits = open_dataset(path)
        return lambda config, **hooks: train_loop.fit(config, splits, **hooks)
    splits, arrays = open_pooled(path, pool)
    return lambda config, **hooks: fast_step.fit(config, splits, arrays, **hooks)


def assert_identical(result, expected):
    for epoch, wanted in zip(result.history, expected.history, strict=True):
        assert (epoch.train_loss, epoch.train_acc, epoch.val_loss, epoch.val_acc) == (
            (wanted.train_loss, wanted.train_acc, wanted.val_loss, wanted.val_acc)
        )
    np.testing.assert_array_equal(result.test.logits, expected.test.logits)
    for name, tensor in expected.model.state_dict().items():
        np.testing.assert_array_equal(result.model.state_dict()[name].numpy(), tensor.numpy())


@pytest.mark.parametrize("pool", ["max", "avg", "conv"])
def test_from_every_epochs_state_the_rest_is_the_same(letters, run, pool):
    fit, config = fits(pool, letters), TrainConfig(pool=pool, epochs=3, batch_size=32, lr=0.01)
    history, states = [], []
    expected = fit(config, on_epoch=history.append, on_state=states.append)
    assert len(states) == 3
    for epochs, kept in enumerate(states, 1):
        with run.training():
            run.save_checkpoint(kept)
        start = Start(tuple(history[:epochs]), run.checkpoints()[0])
        assert_identical(fit(config, resume_from=lambda new, start=start: start), expected)


def journaled(path, pool="max"):
    """A new run, its data, and the features of them."""
    config = TrainConfig(data=str(path), pool=pool, epochs=3, batch_size=64)
    splits, pooled = train_run.open_training_data(config, cache=False, echo=lambda line: None)
    return train_run.create(config, False, splits, addresses.environment()), splits, pooled


def without_times(run):
    return {step: {k: v for k, v in values.items() if "second" not in k} for step, values in run.by_step().items()}


def changed(state, name):
    """States that are no state of this training, though whole."""
    old = {"parts": np.ones((2, 3)), "spent": np.array(0.5)}
    return {
        "dtype": {**state, name: state[name].astype(np.float64)},
        "shape": {**state, name: state[name][:1]},
        "missing": {key: array for key, array in state.items() if key != name},
        "no epochs": {key: array for key, array in state.items() if key != "epochs"},
        "too many epochs": {**state, "epochs": state["epochs"] + 1},
        "in the middle of an epoch": {**state, **old},
    }


@pytest.mark.parametrize(("pool", "name"), [("max", "M"), ("conv", "adam.0.exp_avg")])
def test_a_checkpoint_that_is_none_of_this_training_is_passed_over(letters, pool, name):
    run, splits, pooled = journaled(letters, pool)

    def trained():
        lines = []
        with run.training():
            result = train_run._train(run, splits, pooled, lambda: None, lines.append, pytest.fail)
        return result, str(lines[0])

    expected, _ = trained()
    newest, before = run.checkpoints()
    assert [int(state["epochs"]) for state in (newest, before)] == [3, 2]
    for kind, state in changed(newest, name).items():
        for slots, says in (((before, state), "after epoch 2 of 3"), ((state, state), "Epoch 01")):
            for slot in slots:
                run.save_checkpoint(slot)
            result, line = trained()
            assert says in line, kind
            assert_identical(result, expected)
    # as earlier versions wrote it at the end of an epoch
    run.save_checkpoint({**newest, "parts": np.empty((0, 3)), "spent": np.array(0.0)})
    assert "after epoch 3 of 3" in trained()[1]


def flipped(data):
    return data[:60] + bytes([data[60] ^ 1]) + data[61:]


@pytest.mark.parametrize("pool", ["avg", "conv"])
def test_a_fold_is_trained_as_a_file_that_holds_just_its_splits(letters, tmp_path, pool):
    config = TrainConfig(data=str(letters), pool=pool, epochs=2, fold="2/3")
    quiet = lambda line: None  # noqa: E731
    train_run.open_training_data(config, cache=True, echo=quiet)  # so that the features come from the cache
    fold, _ = folds.take(open_dataset(letters), config.fold)
    arrays = {f"{kind}_{split.name}": getattr(split, kind) for split in fold for kind in "Xy"}
    np.savez(tmp_path / "fold.npz", **arrays)
    finished = []
    for each in (config, dataclasses.replace(config, fold="", data=str(tmp_path / "fold.npz"))):
        splits, pooled = train_run.open_training_data(each, cache=True, echo=quiet)
        run = train_run.create(each, pool == "avg", splits, addresses.environment())
        with run.training():
            train_run.carry_out(run, splits, pooled, echo=quiet, echo_warning=quiet, figures=False)
        finished.append(run)
    one, other = finished
    assert without_times(one) == without_times(other)
    assert one.record["data"]["splits"] == other.record["data"]["splits"]
    for name in ("val", "test"):
        for mine, theirs in zip(one.load_predictions(name), other.load_predictions(name), strict=True):
            np.testing.assert_array_equal(mine, theirs)
    resumed = train_run.resume(one, {}, False, echo=quiet)
    assert resumed.finished


def test_what_is_damaged_of_a_finished_run_is_named_and_made_again_by_resuming_it(letters):
    run, splits, pooled = journaled(letters)
    with run.training():
        train_run.carry_out(run, splits, pooled, echo=lambda line: None)
    expected, weights = without_times(run), run.load_tensors("model")
    for name, damaged in (
        ("metrics.jsonl", flipped),
        ("metrics.jsonl", lambda data: data[:-1]),  # which alone would be torn: but what is finished has all
        ("model.safetensors", flipped),
        ("predictions/val.npz", flipped),
        ("predictions/test.npz", lambda data: b""),
        ("model.safetensors", None),
        ("predictions/val.npz", None),
    ):
        path = run.folder / name
        if damaged:
            path.write_bytes(damaged(path.read_bytes()))
        else:  # a folder in its place, as container mounts leave them
            path.unlink()
            path.mkdir()
        named = f"{path.name}: .*damaged; made again by: poolnet train --resume {run.name}"
        with pytest.raises(RunError, match=named):
            run.check_results()
        train_run.resume(run, {}, False, echo=lambda line: None)
        run.check_results()
        assert run.finished
        assert without_times(run) == expected
        assert {key: array.tolist() for key, array in run.load_tensors("model").items()} == {
            key: array.tolist() for key, array in weights.items()
        }


@pytest.mark.parametrize(("pool", "optimum"), [("avg", True), ("conv", False)])
def test_figures_drawn_later_are_of_what_was_trained(letters, monkeypatch, pool, optimum):
    config, drawn = TrainConfig(data=str(letters), pool=pool, epochs=2), []
    splits, pooled = train_run.open_training_data(config, cache=False, echo=lambda line: None)
    run = train_run.create(config, optimum, splits, addresses.environment())
    monkeypatch.setattr(figures, "of_run", lambda *result: drawn.append(result))
    monkeypatch.setattr(figures, "save_all", lambda folder, result: None)
    with pytest.raises(InputError, match=f"not finished yet; finish it with: poolnet train --resume {run.name}"):
        train_run.draw(run)
    with run.training():
        train_run.carry_out(run, splits, pooled, echo=lambda line: None)
    train_run.draw(run)
    (_, data, trained, best), (settings, again, recorded, lowest) = drawn
    assert (settings, again.sha256) == (config, data.sha256)
    assert recorded.history == trained.history
    assert_identical(recorded, trained)
    for one, other in ((recorded.val, trained.val), (recorded.test, trained.test)):
        assert (one.loss, one.acc) == (other.loss, other.acc)
        np.testing.assert_array_equal(one.y, other.y)
    assert lowest == best
    assert (best is not None) == optimum
    records = run.by_step()
    del records[2]["epoch_seconds"]
    with monkeypatch.context() as patch:
        patch.setattr(RunRecord, "by_step", lambda self: {step: dict(values) for step, values in records.items()})
        with pytest.raises(RunError, match="lacks some of what figures show"):
            train_run.draw(run)
    (run.folder / "model.safetensors").unlink()
    with pytest.raises(RunError, match="damaged; made again by"):
        train_run.draw(run)


def test_figures_are_whole_or_not_there_and_a_run_that_is_pruned_meanwhile_stays_away(letters, monkeypatch):
    run, splits, pooled = journaled(letters)
    with run.training():
        train_run.carry_out(run, splits, pooled, echo=lambda line: None, figures=False)
    monkeypatch.setattr(figures, "save_all", figures.save_all.__wrapped__)  # the one that draws
    monkeypatch.setattr(figures, "png", lambda figure: figure)
    drawn = {"first": b"whole", "second": b"whole too"}
    monkeypatch.setattr(figures, "of_run", lambda *result: drawn)
    train_run.draw(run)
    assert {path.name: path.read_bytes() for path in (run.folder / "figures").iterdir()} == {
        "first.png": b"whole",
        "second.png": b"whole too",
    }
    drawn["second"] = None  # fails while it is written
    with pytest.raises(TypeError):
        train_run.draw(run)
    assert sorted(path.name for path in (run.folder / "figures").iterdir()) == ["first.png", "second.png"]
    assert (run.folder / "figures" / "second.png").read_bytes() == b"whole too"
    monkeypatch.setattr(figures, "of_run", lambda *result: shutil.rmtree(run.folder) or drawn)
    with pytest.raises(RunError, match=f"cannot be written .*; once it can: poolnet figures {run.name}$"):
        train_run.draw(run)
    assert not run.folder.exists()


def test_a_run_whose_checkpoints_are_lost_is_trained_again_and_its_record_stays(letters):
    config = TrainConfig(data=str(letters), epochs=3)
    splits, pooled = train_run.open_training_data(config, cache=False, echo=lambda line: None)
    run = train_run.create(config, False, splits, addresses.environment())
    with run.training():
        train_run.carry_out(run, splits, pooled, echo=lambda line: None)
    before = run.metrics()
    for path in run.folder.glob("checkpoint-*"):
        path.write_bytes(path.read_bytes()[:100])
    assert run.checkpoints() == []
    with run.training():
        train_run.carry_out(run, splits, pooled, echo=lambda line: None)
    assert run.metrics() == before
    assert run.finished


def test_a_record_that_the_training_does_not_repeat_is_not_built_on(letters):
    config = TrainConfig(data=str(letters), epochs=2)
    splits, pooled = train_run.open_training_data(config, cache=False, echo=lambda line: None)
    run = train_run.create(config, False, splits, addresses.environment())
    with run.training():
        run.append(1, dict.fromkeys(("train_loss", "train_acc", "val_loss", "val_acc"), 0.5))
        with pytest.raises(RunError, match=r"epoch 1: train_loss: found 2\..*, but 0.5 in the record of"):
            train_run.carry_out(run, splits, pooled, echo=lambda line: None)
