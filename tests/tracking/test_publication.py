"""What a run leaves in a real store: once in SQLite, once on a real server."""

import contextlib
import dataclasses
import importlib
import os
import re
import secrets
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import mlflow
import numpy as np
import pytest
import torch
from conftest import inside, keep_exports, make_arrays, poolnet, world
from finished_runs import CONFIG, journaled, publish
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INTERNAL_ERROR, INVALID_PARAMETER_VALUE
from PIL import Image

from poolnet.data import folds
from poolnet.data.dataset import open_dataset
from poolnet.errors import InputError
from poolnet.runs import provenance, run_record
from poolnet.runs.figures import of_run, save_all
from poolnet.tracking import pages, publisher, servers, sync, training_runs, upload_process
from poolnet.tracking.publication import Publication, adopt
from poolnet.training import fast_step, features
from poolnet.training.config import TrainConfig
from poolnet.training.device import resolve_device
from poolnet.training.evaluation import score_logits

EPOCHS = 3
OPTIONS = {"pool": "avg", "epochs": EPOCHS, "batch_size": 32, "lr": 0.01}
PER_EPOCH = {"train_loss", "train_acc", "val_loss", "val_acc", "speed/epoch_seconds", "speed/examples_per_second"}
ONCE = {"test_loss", "test_acc", "best/val_acc", "best/val_epoch", "best/plateau_epoch"}


@pytest.fixture(scope="module", params=["sqlite", "http"])
def trained(request, tmp_path_factory, empty_store):
    """One `poolnet train`, finished, and everything needed to look at it."""
    folder = tmp_path_factory.mktemp("trained")
    shutil.copy(empty_store, folder)
    uri = request.getfixturevalue("server") if request.param == "http" else f"sqlite:///{folder / 'mlflow.db'}"
    path = folder / "letters.npz"
    # of its own: MLflow knows a data set that it has seen in an experiment again, by the path it had then
    np.savez(path, **make_arrays(seed=1))
    options = [f"--{name}={value}" for name, value in OPTIONS.items()]
    keep_exports(folder / "home")
    finished = poolnet("train", "--data", path, *options, cwd=folder, env=world(folder, uri))
    assert finished.returncode == 0, finished.stderr
    client = mlflow.MlflowClient(uri)
    (run,) = client.search_runs(["0"], f"params.data = '{path}'")
    return SimpleNamespace(uri=uri, path=path, client=client, run=run, stdout=finished.stdout, stderr=finished.stderr)


@pytest.fixture
def here(trained, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", trained.uri)
    return trained


def history(client, run_id, name):
    return [(metric.step, metric.value) for metric in client.get_metric_history(run_id, name)]


def test_params_are_the_settings(trained):
    expected = dataclasses.asdict(TrainConfig(data=str(trained.path), **OPTIONS))
    assert trained.run.data.params == {name: str(value) for name, value in expected.items() if name != "fold"}


def test_metrics_have_one_value_an_epoch_with_the_epoch_as_step(trained):
    assert set(trained.run.data.metrics) == PER_EPOCH | ONCE
    for name in PER_EPOCH:
        assert [step for step, _ in history(trained.client, trained.run.info.run_id, name)] == [1, 2, 3]
    for name in ONCE:
        assert len(history(trained.client, trained.run.info.run_id, name)) == 1


def test_metrics_are_those_of_the_library_and_of_the_screen(trained):
    result = fast_step.fit(TrainConfig(**OPTIONS), *features.open_pooled(trained.path, "avg"))
    for name in ("train_loss", "train_acc", "val_loss", "val_acc"):
        expected = [(record.epoch, getattr(record, name)) for record in result.history]
        assert history(trained.client, trained.run.info.run_id, name) == expected
    assert trained.run.data.metrics["test_loss"] == result.test.loss
    assert trained.run.data.metrics["test_acc"] == result.test.acc
    first, *lines = trained.stdout.splitlines()
    assert re.fullmatch(r"Features: cached in .*features, 0.1 MB of at most 4,295 MB", first)
    assert lines[:EPOCHS] == [str(record) for record in result.history]
    assert lines[EPOCHS] == f"TEST: loss={result.test.loss:.4f}, acc={result.test.acc:.4f}"


def test_the_last_lines_say_where_to_look(trained):
    lines = trained.stdout.splitlines()[1:]
    view = f"poolnet-{open_dataset(trained.path).sha256[:8]}"
    assert f"mlflow.sharedViewState.{view}" in trained.client.get_experiment("0").tags
    page = f"#/experiments/0/runs?workflowType=machine_learning&viewStateShareKey={view}&compareRunsMode=CHART"
    assert lines[EPOCHS + 1 : EPOCHS + 3] == ["Drawing the figures ...", "Uploading the run ..."]  # a second each
    assert lines[EPOCHS + 3].startswith("Model: models:/poolnet/")
    if trained.uri.startswith("http"):
        assert lines[EPOCHS + 4 :] == [f"Look at it: {trained.uri}/{page}"]
    else:
        serve = "Look at it: mlflow ui --backend-store-uri sqlite:///mlflow.db"  # short in the store's own folder
        assert lines[EPOCHS + 4 :] == [serve, f"then http://127.0.0.1:5000/{page}"]
    assert trained.stderr == ""


def test_tags_status_and_name(trained):
    tags = trained.run.data.tags
    assert trained.run.info.status == "FINISHED"
    assert re.fullmatch("avg-seed42-[0-9a-f]{4}", trained.run.info.run_name)
    assert tags["poolnet.run"] == trained.run.info.run_name
    assert tags["poolnet.data_sha256"] == open_dataset(trained.path).sha256
    assert tags["poolnet.device"] == resolve_device("auto")
    commit, dirty, _ = provenance.code_state()
    assert tags["poolnet.git_dirty"] == dirty
    assert tags.get("mlflow.source.git.commit") == commit


def test_the_summary_holds_the_result_and_the_command(trained):
    note = trained.run.data.tags["mlflow.note.content"]
    metrics = trained.run.data.metrics
    assert f"**Test accuracy {metrics['test_acc']:.4f}**" in note
    first, _, heading, _, accuracy, *_ = note.splitlines()  # what MLflow shows before somebody unfolds it
    assert first.startswith("**Test accuracy ")
    assert heading == "| final weights | train, last epoch | val | test |"
    assert accuracy.startswith(f"| accuracy | {metrics['train_acc']:.4f} |")
    assert re.search(r"[0-9a-f]{13}", note) is None
    assert f"| loss | {metrics['train_loss']:.4f} | {metrics['val_loss']:.4f} | {metrics['test_loss']:.4f} |" in note
    assert f"poolnet train --data {trained.path} --pool avg" in note


def test_datasets_carry_the_digest_of_the_whole_split(trained):
    inputs = {entry.tags[0].value: entry.dataset for entry in trained.run.inputs.dataset_inputs}
    splits = open_dataset(trained.path)
    assert set(inputs) == {"train", "val", "test"}
    for split in splits:
        assert inputs[split.name].digest == split.sha256[:32]
        assert inputs[split.name].name == "letters"
        assert str(trained.path) in inputs[split.name].source


def test_predictions_explain_the_test_score(here):
    folder = Path(here.client.download_artifacts(here.run.info.run_id, "predictions"))
    splits = open_dataset(here.path)
    for split in (splits.val, splits.test):
        with np.load(folder / f"{split.name}.npz") as saved:
            assert set(saved) == {"logits", "y"}
            logits, y = saved["logits"], saved["y"]
        assert logits.dtype == np.float32
        assert y.dtype == np.int64
        np.testing.assert_array_equal(y, split.y)
        assert (logits.argmax(1) == y).mean() == here.run.data.metrics[f"{split.name}_acc"]


def test_figures_are_pictures(here):
    folder = Path(here.client.download_artifacts(here.run.info.run_id, "figures"))
    names = {"learning_curves", "confusion_matrix", "classifier_weights", "worst_mistakes"}
    assert {path.stem for path in folder.glob("*.png")} == names
    for path in folder.glob("*.png"):
        with Image.open(path) as image:
            assert np.asarray(image.convert("L")).std() > 10  # something is drawn


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such names")
def test_figures_can_be_drawn_of_data_of_any_name(tmp_path, letters):
    splits = open_dataset(letters.rename(tmp_path / "a$\\frac$b 文字 \x1b[31mred.npz"))
    config = TrainConfig(data=str(splits.path), epochs=1, pool="avg")
    result = fast_step.fit(config, *features.open_pooled(splits.path, "avg"))
    save_all(tmp_path / "figures", of_run(config, splits, result, None))


def test_the_registered_version_is_tagged_and_linked(trained):
    versions = trained.client.search_model_versions(f"run_id = '{trained.run.info.run_id}'")
    assert len(versions) == 1
    (version,) = versions
    metrics = trained.run.data.metrics
    assert version.name == "poolnet"
    assert version.tags == {
        "pool": "avg",
        "seed": "42",
        "val_acc": f"{metrics['val_acc']:.4f}",
        "test_acc": f"{metrics['test_acc']:.4f}",
        "data_sha256": trained.run.data.tags["poolnet.data_sha256"][:12],
    }
    assert version.description == (
        f"avg pooling, seed 42, trained on letters: accuracy {metrics['val_acc']:.4f} on val and "
        f"{metrics['test_acc']:.4f} on 110 test images. `poolnet evaluate` gives the intervals."
    )
    assert f"Model: models:/poolnet/{version.version}" in trained.stdout
    model = trained.client.get_logged_model(version.source.removeprefix("models:/"))
    assert model.name == trained.run.info.run_name
    scores = {metric.key: metric for metric in model.metrics if metric.dataset_name == "letters"}
    assert {name: scores[name].value for name in scores} == {name: metrics[name] for name in ("test_loss", "test_acc")}


def test_the_model_loads_without_pickle_for_any_batch(here, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    (version,) = here.client.search_model_versions(f"run_id = '{here.run.info.run_id}'")
    uri = f"models:/poolnet/{version.version}"
    native, pyfunc = mlflow.pytorch.load_model(uri), mlflow.pyfunc.load_model(uri)
    test = open_dataset(here.path).test
    images = test.images(slice(None))
    for n in (1, 7, 1000):
        batch = np.resize(images, (n, 1, 28, 28))
        logits = native(torch.from_numpy(batch)).detach().numpy()
        assert logits.shape == (n, 10)
        np.testing.assert_allclose(pyfunc.predict(batch), logits, atol=1e-6)
    acc = (pyfunc.predict(images).argmax(1) == test.y).mean()
    assert acc == pytest.approx(here.run.data.metrics["test_acc"], abs=1e-6)


def test_the_models_requirements_are_exact(here):
    (version,) = here.client.search_model_versions(f"run_id = '{here.run.info.run_id}'")
    requirements = mlflow.pyfunc.get_model_dependencies(f"models:/poolnet/{version.version}")
    lines = Path(requirements).read_text().split()
    assert f"torch=={torch.__version__.partition('+')[0]}" in lines
    assert f"numpy=={np.__version__}" in lines
    assert f"mlflow=={mlflow.__version__}" in lines


# --- runs that MLflow has made, runs that fail, stores that are fresh -----------------------------------------------


pytestmark = pytest.mark.usefixtures("letters")


def adopted(monkeypatch, params, name=None):
    """A run as `mlflow run` makes it: params as raw text, and a name that nobody chose."""
    client = mlflow.MlflowClient()
    run_id = client.create_run("0", run_name=name).info.run_id
    for key, value in params.items():
        client.log_param(run_id, key, value)
    monkeypatch.setenv("MLFLOW_RUN_ID", run_id)
    return run_id


def test_an_adopted_run_keeps_its_raw_params_and_gets_the_missing_ones(monkeypatch):
    raw = {"data": "'letters.npz'", "lr": "1e-3", "epochs": "02", "register": "no", "seed": "42"}
    run_id = adopted(monkeypatch, raw)
    run = publish(journaled())
    assert run.info.run_id == run_id
    assert run.data.params == raw | {"pool": "max", "batch_size": "128", "device": "auto"}
    assert run.info.run_name == run.data.tags["poolnet.run"]
    assert [step for step, _ in history(mlflow.MlflowClient(), run_id, "val_loss")] == [1, 2]


def test_a_name_that_the_user_chose_stays(monkeypatch):
    adopted(monkeypatch, {}, name="Monday, first try")
    assert publish(journaled()).info.run_name == "Monday, first try"


def test_a_run_that_says_something_else_is_refused_untouched(monkeypatch):
    run_id = adopted(monkeypatch, {"lr": "0.1"})
    mlflow.MlflowClient().set_terminated(run_id, "FINISHED")
    with pytest.raises(InputError, match=r"lr: found 0.1 in its record, expected 0.001"):
        publish(journaled())
    assert mlflow.get_run(run_id).info.status == "FINISHED"
    assert mlflow.get_run(run_id).data.params == {"lr": "0.1"}


def test_a_stale_run_id_in_the_environment_does_not_mix_two_runs(monkeypatch):
    adopted(monkeypatch, {})
    first = publish(journaled())
    second = journaled()
    with pytest.raises(InputError, match=f"found the record of {first.data.tags['poolnet.run']} in it"):
        publish(second)
    monkeypatch.delenv("MLFLOW_RUN_ID")
    assert publish(second).info.run_id != first.info.run_id  # a run of its own
    assert mlflow.get_run(first.info.run_id).data.tags == first.data.tags


def test_while_it_waits_a_publisher_says_how_many_runs_the_server_has():
    counts = []
    with publisher.Publisher(60) as process:
        for seed in (1, 2):
            process.add(journaled(TrainConfig(data="letters.npz", epochs=2, seed=seed)))
        assert process.close(on_upload=counts.append) is None
    assert counts == sorted(counts)
    assert counts[-1] == 2


def test_a_stale_run_id_is_refused_before_training_and_the_cure_helps(monkeypatch, letters):
    adopted(monkeypatch, {})
    first = publish(journaled())
    monkeypatch.setattr(publisher, "LOOK_SECONDS", 60)  # on a machine that is busy with much else
    with publisher.Publisher(30) as process:
        process.ask()
        with pytest.raises(InputError) as refused:
            process.check()
    name = first.data.tags["poolnet.run"]
    assert str(refused.value) == (
        f"MLFLOW_RUN_ID={first.info.run_id}: found the record of {name} in that run; unset MLFLOW_RUN_ID"
    )
    assert run_record.names() == [name]
    monkeypatch.delenv("MLFLOW_RUN_ID")
    assert inside("train", "--data", letters, "--epochs", "2").returncode == 0
    assert len(mlflow.MlflowClient().search_runs(["0"])) == 2


def test_the_command_refuses_such_a_run_as_bad_input_and_sync_publishes_it_once_the_variable_is_gone(
    monkeypatch, letters
):
    run_id = adopted(monkeypatch, {"lr": "0.1"})
    finished = inside("train", "--data", letters, "--epochs", "2")
    assert finished.returncode == 2
    (line,) = finished.stderr.splitlines()
    (name,) = run_record.names()
    problem = f"run {run_id}: lr: found 0.1 in its record, expected 0.001"
    assert line == f"poolnet: error: {problem}; unset MLFLOW_RUN_ID, then: poolnet sync {name}"
    assert inside("sync", name).returncode == 3
    monkeypatch.delenv("MLFLOW_RUN_ID")
    synced = inside("sync", name)
    assert synced.returncode == 0, synced.stdout
    (own,) = mlflow.MlflowClient().search_runs(["0"], f"tags.`poolnet.run` = '{name}'")
    assert own.info.run_id != run_id
    assert mlflow.get_run(run_id).data.params == {"lr": "0.1"}


def test_without_register_there_is_a_model_but_no_version():
    run = publish(journaled())
    assert len(mlflow.MlflowClient().search_logged_models(["0"])) == 1
    assert mlflow.MlflowClient().search_model_versions() == []
    assert "models:/poolnet" not in run.data.tags["mlflow.note.content"]


def test_passwords_do_not_reach_the_screen_or_the_disk(monkeypatch):
    password = secrets.token_hex(8)
    for uri in (f"http://me:{password}@127.0.0.1:5000/", f"postgresql://me:{password}@127.0.0.1/mlflow"):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        run = journaled()
        publication = Publication(run, servers.home_of(run))
        assert publication.uri == uri  # as long as the environment has it
        adopt(publication, SimpleNamespace(experiment_id="7", run_id="4f"))
        link = pages.link(publication.uri, pages.run("7", "4f"))
        assert "http://127.0.0.1:5000/#/experiments/7/runs/4f?" in link
        assert password not in link
        for path in run.folder.rglob("*"):
            assert path.is_dir() or password.encode() not in path.read_bytes()


def test_runs_go_to_the_experiment_that_the_environment_names(monkeypatch):
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "letters, spring")
    runs = [publish(journaled()) for _ in range(2)]
    experiment = mlflow.MlflowClient().get_experiment_by_name("letters, spring")
    assert [run.info.experiment_id for run in runs] == [experiment.experiment_id] * 2


@pytest.mark.parametrize("when", ["published at home first", "never at home"])
def test_sync_to_another_server_keeps_the_experiment_by_its_name(monkeypatch, tmp_path, when):
    home, team = mlflow.MlflowClient(), f"sqlite:///{tmp_path / 'team.db'}"
    shutil.copy(tmp_path / "mlflow.db", tmp_path / "team.db")
    home.create_experiment("something else")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", home.create_experiment("letters, spring"))
    run = journaled()
    if when == "published at home first":
        publish(run)
        home.rename_experiment(os.environ["MLFLOW_EXPERIMENT_ID"], "renamed since")
    monkeypatch.delenv("MLFLOW_EXPERIMENT_ID")
    row = sync.sync(run.name, to=team)
    assert (row.did, row.server) == ("published", team)
    there = mlflow.MlflowClient(team)
    experiment = there.get_experiment_by_name("letters, spring")
    assert len(there.search_runs([experiment.experiment_id])) == 1
    assert there.search_runs(["0"]) == []


def test_an_experiment_whose_name_cannot_be_asked_is_not_taken_for_the_default_one(monkeypatch, tmp_path):
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", "17")
    shutil.copy(tmp_path / "mlflow.db", tmp_path / "team.db")
    run = journaled()
    monkeypatch.delenv("MLFLOW_EXPERIMENT_ID")
    row = sync.sync(run.name, to=f"sqlite:///{tmp_path / 'team.db'}")
    assert row.did.startswith("experiment 17 of sqlite:")
    assert "set MLFLOW_EXPERIMENT_NAME, then: poolnet sync" in row.did
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "spring")
    assert sync.sync(run.name, to=f"sqlite:///{tmp_path / 'team.db'}").did == "published"


def followed(run):
    """Published by the process beside a training, which would wait for an hour. Exit code and what is said."""
    said = []
    return upload_process.run([run.name], 3600, said.append, lambda: None), said


@pytest.mark.parametrize(
    ("root", "module", "package"),
    [
        ("s3://bucket/x", "boto3", "boto3"),
        ("gs://bucket/x", "google.cloud.storage", "google-cloud-storage"),
        ("wasbs://c@account.blob.core.windows.net/x", "azure", "azure-storage-blob azure-identity"),
    ],
)
def test_a_package_that_the_artifacts_need_is_named_and_not_waited_for(monkeypatch, root, module, package):
    with contextlib.suppress(ImportError):
        importlib.import_module(module)
        pytest.skip(f"{module} is installed here, and would ask a real server")
    mlflow.MlflowClient().create_experiment("far", artifact_location=root)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "far")
    code, (said,) = followed(journaled())
    assert code == 3
    assert said.endswith(f"mlflow.db: {package} is not installed here; pip install {package}")


def test_a_deleted_experiment_is_not_waited_for(monkeypatch):
    client = mlflow.MlflowClient()
    number = client.create_experiment("gone")
    client.delete_experiment(number)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "gone")
    run = journaled()
    code, (said,) = followed(run)
    assert (code, said) == (3, f"experiment {number} was deleted; restore it with: mlflow experiments restore "
                               f"--experiment-id {number}")  # fmt: skip
    client.restore_experiment(number)
    assert followed(run) == (0, [])


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no folder here that even root cannot write")
def test_artifacts_in_a_folder_of_the_servers_machine_are_not_waited_for(monkeypatch, server):
    mlflow.MlflowClient(server).create_experiment("theirs", artifact_location="/proc/theirs")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "theirs")
    code, (said,) = followed(journaled())
    assert code == 3
    assert re.match(
        rf"{server}: keeps artifacts in /proc/theirs/\S+, which cannot be written here \(.*--serve-art", said
    )


REFUSED = (
    MlflowException("bad", INVALID_PARAMETER_VALUE),
    MlflowException("API request to endpoint /x failed with error code 413 != 200. Response body: ''"),
    OSError("403 Client Error: Forbidden for url: http://s/x"),
    ValueError("Failed to upload: An error occurred (NoSuchBucket) when calling the PutObject operation"),
    RuntimeError("Unable to locate credentials"),
)
MENDED = (
    MlflowException("no time", INTERNAL_ERROR),
    MlflowException("API request to endpoint /x failed with error code 503 != 200. Response body: ''"),
    MlflowException("API request to endpoint /x failed with error code 429 != 200. Response body: ''"),
    OSError("502 Server Error: Bad Gateway for url: http://s/x"),
    OSError("An error occurred (SlowDown) when calling the PutObject operation"),
    ConnectionError("Connection refused"),
)


@pytest.mark.parametrize(("error", "final"), [*((e, True) for e in REFUSED), *((e, False) for e in MENDED)], ids=str)
def test_what_time_cannot_mend_is_told_from_what_it_can(error, final):
    assert servers.is_refusal(error) == final


def test_uncommitted_changes_are_kept_with_the_run(tmp_path, monkeypatch):
    package = tmp_path / "repository" / "poolnet"
    package.mkdir(parents=True)
    monkeypatch.setattr(provenance, "__file__", str(package / "provenance.py"))
    assert provenance.code_state() == (None, "unknown", b"")

    def git(*args):
        who = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
        return subprocess.run(["git", *who, *args], cwd=package, check=True, capture_output=True, text=True).stdout

    git("init", "-q")
    assert provenance.code_state() == (None, "unknown", b"")  # a repository, but of something else
    (package / "__init__.py").write_text("one = 1\n")
    git("add", ".")
    git("commit", "-qm", "first")
    assert provenance.code_state() == (git("rev-parse", "HEAD").strip(), "false", b"")
    (package / "__init__.py").write_text("one = 2\n")
    run = publish(journaled())
    assert run.data.tags["poolnet.git_dirty"] == "true"
    diff = Path(mlflow.artifacts.download_artifacts(run_id=run.info.run_id, artifact_path="git.diff"))
    assert "+one = 2" in diff.read_text()


def test_the_optimum_is_recorded():
    run = publish(journaled(optimum=True))
    data = run.data
    assert 0 < data.metrics["optimum/gap"] < data.metrics["train_loss"]
    assert f"any weights reach: {data.metrics['optimum/train_loss']:.6f}" in data.tags["mlflow.note.content"]
    for split in ("val", "test"):
        found = training_runs.predictions(mlflow.MlflowClient(), run.info.run_id, "run", split)
        scored = score_logits(found.optimum, found.y)
        assert (scored.loss, scored.acc) == tuple(data.metrics[f"optimum/{split}_{name}"] for name in ("loss", "acc"))
        assert found.group is None


def test_groups_classes_and_the_fold_are_recorded(letters):
    with np.load(letters) as saved:
        arrays = dict(saved)
    sizes = {name: len(arrays[f"y_{name}"]) for name in ("train", "val", "test")}
    groups = {f"group_{name}": np.arange(size) % 40 for name, size in sizes.items()}
    names = [f"Größe {n}" for n in range(10)]
    np.savez(letters, **arrays, **groups, classes=names)
    client = mlflow.MlflowClient()
    own, fold = (publish(journaled(dataclasses.replace(CONFIG, fold=fold))) for fold in ("", "2/5"))
    assert own.data.tags["poolnet.groups_cross"] == "40 of 40 groups"
    assert "poolnet.groups_cross" not in fold.data.tags  # which keeps them together
    assert ("fold" in own.data.params, fold.data.params["fold"]) == (False, "2/5")
    assert re.fullmatch(r"max-seed42-fold2-[0-9a-f]{4}", fold.info.run_name)
    assert "fold 2/5" in fold.data.tags["mlflow.note.content"]
    assert own.data.tags["poolnet.data_sha256"] == fold.data.tags["poolnet.data_sha256"]
    expected, _ = folds.take(open_dataset(letters), "2/5")
    digests = {each.dataset.name: each.dataset.digest for each in fold.inputs.dataset_inputs}
    assert digests == {"letters": digests["letters"]}
    assert {each.dataset.digest for each in fold.inputs.dataset_inputs} == {split.sha256[:32] for split in expected}
    for run, test in ((own, np.arange(sizes["test"]) % 40), (fold, expected.test.group)):
        trained = training_runs.of(run)
        assert (trained.classes, trained.config.fold) == (tuple(names), run.data.params.get("fold", ""))
        np.testing.assert_array_equal(training_runs.predictions(client, run.info.run_id, "run", "test").group, test)
