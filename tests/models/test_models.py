"""Registered models in use: where they are found, how they score, and what is not loaded."""

import dataclasses
import io
import json
import os
import pickle
import re
import shutil
import sys
import tempfile
from pathlib import Path

import mlflow
import mlflow.pytorch
import numpy as np
import pytest
import torch
from conftest import ROOT, Payload, assert_refused, enter, make_arrays, run
from finished_runs import REGISTERED, journaled, publish
from PIL import Image
from torch import nn

from poolnet.data import folds
from poolnet.data.dataset import open_dataset
from poolnet.errors import InputError
from poolnet.text import WIDTH
from poolnet.tracking import registry
from poolnet.tracking.programs import EXPORT, WEIGHTS
from poolnet.training.evaluation import evaluate


@pytest.fixture
def alone(letters):
    """The run that the champion is from, on a store of the test's own."""
    run = publish(journaled(REGISTERED))
    mlflow.MlflowClient().set_registered_model_alias("poolnet", "champion", "1")
    return run


def addresses(run):
    client = mlflow.MlflowClient()
    model = registry.logged(client, run)
    folder = mlflow.artifacts.download_artifacts(artifact_uri=f"models:/{model.model_id}", dst_path="copy")
    return {
        "version": "models:/poolnet/1",
        "latest": "models:/poolnet/latest",
        "alias": "models:/poolnet@champion",
        "logged model": f"models:/{model.model_id}",
        "run": f"runs:/{run.info.run_id}/{run.info.run_name}",
        "folder": folder,
    }


def test_a_model_is_found_at_every_address_that_mlflow_resolves(alone):
    test = open_dataset("letters.npz").test
    for kind, uri in addresses(alone).items():
        loaded = registry.load(uri)
        scored = evaluate(loaded.net, test)
        recorded = (alone.data.metrics["test_loss"], alone.data.metrics["test_acc"])
        assert (scored.loss, scored.acc) == pytest.approx(recorded, abs=1e-6), kind
        assert (loaded.pool, loaded.run_id) == ("avg", alone.info.run_id), kind
        assert (loaded.version and int(loaded.version.version)) == (None if kind == "folder" else 1), kind
        served = mlflow.pyfunc.load_model(uri).predict(test.images(slice(None)))
        assert np.allclose(served, scored.logits, atol=1e-5), kind


def test_a_runs_name_is_enough_for_its_model(capsys, alone):
    """As is its address in earlier versions, whose models were all called `model`."""
    client, own = mlflow.MlflowClient(), f"runs:/{alone.info.run_id}/model"
    assert registry.logged(client, alone).name == alone.info.run_name
    for place in (alone.info.run_name, alone.info.run_name[:-1], alone.info.run_id, own, f"{own}/"):
        loaded = registry.load(place)
        assert (loaded.run_id, int(loaded.version.version)) == (alone.info.run_id, 1), place
    # one that somebody else logged in the run is found by its own name, and not taken for the run's
    other = client.create_logged_model("0", "model", alone.info.run_id)
    assert registry.logged(client, alone).name == alone.info.run_name
    code, _, err = run(capsys, "evaluate", own)
    assert_refused(code, err, own)
    client.delete_logged_model(other.model_id)
    Path(alone.info.run_name).mkdir()  # a folder comes first
    code, _, err = run(capsys, "evaluate", alone.info.run_name)
    assert_refused(code, err, "found no model of MLflow's there")


def test_the_model_of_a_run_of_an_earlier_version_is_found(alone):
    """Which is called `model`, and has no tag."""
    client = mlflow.MlflowClient()
    made = client.create_run("0", tags={"poolnet.run": "avg-seed1-8702c031"}, run_name="avg-seed1")
    model = client.create_logged_model("0", "model", made.info.run_id)
    folder = mlflow.artifacts.download_artifacts(artifact_uri="models:/poolnet/1", dst_path="copy")
    client.log_model_artifacts(model.model_id, folder)
    for place in (f"runs:/{made.info.run_id}/model", "avg-seed1", "avg-seed1-8702c031"):
        assert registry.load(place).model_id == model.model_id


def test_an_evaluation_is_named_after_its_model(capsys, letters):
    """By the run or the folder, where it is no version."""
    client, trained = mlflow.MlflowClient(), publish(journaled(dataclasses.replace(REGISTERED, register=False)))
    model = registry.logged(client, trained)
    mlflow.artifacts.download_artifacts(artifact_uri=f"models:/{model.model_id}", dst_path="copy")
    name = f"{trained.info.run_name} on letters test"
    for place, expected in ((trained.info.run_name[:-1], name), ("copy", "copy")):
        report, _ = scored(capsys, place, "--data", "letters.npz")
        assert client.get_run(report["run_id"]).info.run_name.startswith(expected)


def test_an_evaluation_that_is_not_published_leaves_nothing_and_gives_the_same(capsys, trained):
    client, before = mlflow.MlflowClient(), len(mlflow.MlflowClient().search_runs(["0"]))
    code, out, err = run(capsys, "evaluate", "models:/poolnet/1", "--no-publish", "--json")
    assert (code, err) == (0, "")
    quiet = json.loads(out)
    assert (quiet.pop("run_id"), quiet.pop("look")) == (None, None)
    assert len(client.search_runs(["0"])) == before
    published = json.loads(run(capsys, "evaluate", "models:/poolnet/1", "--json")[1])
    assert quiet == {name: value for name, value in published.items() if name not in ("run_id", "look")}
    assert "Look at it" not in run(capsys, "evaluate", "models:/poolnet/1", "--no-publish")[1]
    code, _, err = run(capsys, "evaluate", "models:/poolnet/1", "--no-publish", "--open")
    assert_refused(code, err, "--no-publish", "--open")


@pytest.mark.parametrize(
    ("uri", "word"),
    [
        ("models:/poolnet/77", "not found"),
        ("models:/poolnet@nobody", "alias nobody not found"),
        ("models:/other/1", "not found"),
        ("models:/m-" + "0" * 32, "not found"),
        ("runs:/" + "0" * 32 + "/model", "not found"),
        ("nowhere", "no such folder, and no such run"),
        ("", "no such folder, and no such run"),
        ("xyz:/model", "xyz"),
    ],
)
def test_a_model_that_is_nowhere_is_one_line(capsys, trained, uri, word):
    code, _, err = run(capsys, "evaluate", uri)
    assert_refused(code, err, uri, word)


def scored(capsys, *options):
    code, out, err = run(capsys, "evaluate", *options, "--json")
    assert code == 0, err
    return json.loads(out), err


@pytest.mark.parametrize("split", ["test", "val"])
def test_evaluate_agrees_with_the_training_and_is_kept_with_model_and_data(capsys, trained, split):
    client = mlflow.MlflowClient()
    report, err = scored(capsys, "models:/poolnet@champion", "--split", split)
    assert err == ""
    assert report["agrees"] is True
    assert report["loss"]["estimate"] == pytest.approx(trained.data.metrics[f"{split}_loss"], abs=1e-6)
    assert report["acc"]["estimate"] == trained.data.metrics[f"{split}_acc"]
    assert report["loss"]["low"] < report["loss"]["estimate"] < report["loss"]["high"]
    assert np.array(report["confusion"]).sum() == report["n"] == len(getattr(open_dataset("letters.npz"), split))
    kept = client.get_run(report["run_id"])
    assert (kept.info.status, kept.info.run_name) == ("FINISHED", f"version 1 on letters {split}")
    assert kept.data.tags["poolnet.evaluation"] == "agrees"
    assert [entry.model_id for entry in kept.inputs.model_inputs] == [registry.logged(client, trained).model_id]
    (dataset,) = [entry.dataset for entry in kept.inputs.dataset_inputs]
    assert getattr(open_dataset("letters.npz"), split).sha256.startswith(dataset.digest)
    # the model's own page has the figures too, beside those of its training
    model = client.get_logged_model(registry.logged(client, trained).model_id)
    ours = {m.key: m for m in model.metrics if m.run_id == report["run_id"]}
    assert ours[f"{split}_acc"].value == report["acc"]["estimate"]
    assert ours[f"{split}_acc"].dataset_digest == dataset.digest
    names = {file.path for file in client.list_artifacts(report["run_id"])}
    assert names == {"evaluation.json", "figures", "letters.json", "predictions"}
    bare = {name for name in kept.data.metrics if not name.startswith("eval/")}
    assert bare == {f"{split}_loss", f"{split}_acc"}
    table = mlflow.load_table("letters.json", run_ids=[report["run_id"]])
    assert "".join(table["letter"]) == "ABCDEFGHIJ"
    for name in ("precision", "recall", "f1"):
        for value, letter in zip(table[name], report["per_class"], strict=True):
            estimate = letter[name]["estimate"]  # None if the letter was never predicted
            assert np.isnan(value) if estimate is None else value == pytest.approx(estimate, abs=5e-5)


def test_the_table_says_the_same(capsys, trained):
    code, out, _ = run(capsys, "evaluate", "models:/poolnet/1")
    assert code == 0
    assert "poolnet version 1 (avg) on letters, test: 110 letters" in out
    assert f"{trained.data.metrics['test_acc']:.4f}" in out
    assert f"Agrees with its run {trained.data.tags['poolnet.run']}" in out
    lines = out.partition("Look at it")[0].splitlines()
    assert max(map(len, lines)) <= WIDTH
    assert lines[0].startswith(f"Accuracy {trained.data.metrics['test_acc']:.4f}, 95 % interval ")
    (made,) = mlflow.MlflowClient().search_runs(["0"], "tags.poolnet.evaluation = 'agrees'", max_results=1)
    first, _, heading, *rest = made.data.tags["mlflow.note.content"].splitlines()
    assert first == f"**{lines[0]}**: {lines[1]}"
    assert heading == "| score | estimate | 95 % interval |"
    page = f"(#/experiments/0/runs/{trained.info.run_id}?workflowType=machine_learning)"
    assert any(line.endswith(f"of run [{trained.info.run_name}]{page}") for line in rest)
    assert re.search("[0-9a-f]{13}", "".join(rest).replace(trained.info.run_id, "")) is None


CLOTHES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")


def with_families(path, classes=None):
    """The letters, in families of eleven."""
    arrays = make_arrays()
    group = np.arange(500) // 11
    arrays |= {"group_train": group[:300], "group_val": group[300:390] + 50, "group_test": group[390:] + 50}
    np.savez(path, **arrays, **({"classes": np.array(classes)} if classes else {}))
    return arrays


def test_intervals_are_about_other_families(capsys):
    """The same letters with and without families: the same estimates, other intervals."""
    with_families("families.npz")
    np.savez("letters.npz", **make_arrays())
    run_id = publish(journaled(dataclasses.replace(REGISTERED, data="families.npz"))).info.run_id
    report, _ = scored(capsys, "models:/poolnet/1")
    plain, _ = scored(capsys, "models:/poolnet/1", "--data", "letters.npz", "--no-publish")
    assert (report["agrees"], report["groups"], plain["groups"], plain["n_effective"]) == (True, 11, None, 110)
    assert report["acc"]["estimate"] == plain["acc"]["estimate"]
    client = mlflow.MlflowClient()
    saved = np.load(client.download_artifacts(report["run_id"], "predictions/test.npz"))
    right, group = saved["logits"].argmax(1) == saved["y"], open_dataset(Path("families.npz")).test.group
    assert saved["group"].tolist() == group.tolist()
    # by hand: the jackknife variance of eleven sums of deviations, and that of 110 letters on their own
    index, sizes = np.unique(group, return_inverse=True, return_counts=True)[1:]
    few = 110**2 / (sizes**2).sum()
    sums = np.bincount(index, right - right.mean())
    few_groups, letters = (few / (few - 1)) ** 2, (110 / 109) ** 2
    effect = max(1, (sums**2).sum() * few_groups / (((right - right.mean()) ** 2).sum() * letters))
    assert report["n_effective"] == pytest.approx(110 / effect)
    kept = client.get_run(report["run_id"])
    assert kept.data.metrics["eval/groups"] == 11
    assert kept.data.metrics["eval/n_effective"] == report["n_effective"]
    out = run(capsys, "evaluate", "models:/poolnet/1", "--no-publish")[1]
    assert f"are of 11 families; for the accuracy, worth {110 / effect:.0f}" in " ".join(out.split())
    note = client.get_run(run_id).data.tags["mlflow.note.content"]
    low, high = report["acc"]["low"], report["acc"]["high"]
    assert note.splitlines()[0].endswith(f"95 % interval {low:.4f} to {high:.4f} over 110 letters of 11 families.")


def test_letters_that_were_trained_on_have_estimates_alone(capsys, trained):
    report, _ = scored(capsys, "models:/poolnet/1", "--split", "train")
    assert report["acc"]["estimate"] > 0.5
    none = {"low": None, "high": None}
    shares = [report["acc"], report["loss"], *(each[name] for each in report["per_class"] for name in ("f1", "recall"))]
    assert all(share == {"estimate": share["estimate"], **none} for share in shares)
    assert (report["n_effective"], report["ece_if_calibrated"]) == (None, None)
    metrics = mlflow.MlflowClient().get_run(report["run_id"]).data.metrics
    assert {name for name in metrics if name.startswith("eval/")} == {"eval/ece"}
    code, out, _ = run(capsys, "evaluate", "models:/poolnet/1", "--split", "train", "--no-publish")
    assert (code, "interval " in out.splitlines()[0]) == (0, False)
    assert "the model was trained on these letters, so its scores say nothing about others" in " ".join(out.split())
    np.savez("other.npz", **make_arrays(seed=9))  # on which it was not trained
    report, _ = scored(capsys, "models:/poolnet/1", "--split", "train", "--data", "other.npz", "--no-publish")
    assert report["acc"]["low"] > 0


def test_a_fold_is_scored_on_its_own_letters(capsys):
    """The splits of the file hold letters that it was trained on."""
    with_families("families.npz")
    publish(journaled(dataclasses.replace(REGISTERED, data="families.npz", fold="2/5")))
    fold, _ = folds.take(open_dataset(Path("families.npz")), "2/5")
    for options in ([], ["--data", "families.npz"]):
        report, _ = scored(capsys, "models:/poolnet/1", "--no-publish", *options)
        assert (report["agrees"], report["fold"], report["n"]) == (True, "2/5", len(fold.test))


def test_classes_have_the_names_of_the_data(capsys):
    arrays = with_families("clothes.npz", CLOTHES)
    publish(journaled(dataclasses.replace(REGISTERED, data="clothes.npz")))
    report, _ = scored(capsys, "models:/poolnet/1")
    assert tuple(each["letter"] for each in report["per_class"]) == CLOTHES
    table = mlflow.load_table("letters.json", run_ids=[report["run_id"]])
    assert tuple(table["class"]) == CLOTHES
    out = run(capsys, "evaluate", "models:/poolnet/1", "--no-publish")[1]
    assert "test: 110 images" in out
    assert "\nT-shirt/top " in out
    assert "true          0 " in out
    assert "9 Ankle boot " in out
    Image.fromarray(arrays["X_test"][0]).save("one.png")
    said = predicted(capsys, "one.png")
    assert said["letter"] in CLOTHES
    weights = registry.load("models:/poolnet/1").net.state_dict()
    torch.save(weights, "weights.pt")
    assert run(capsys, "register", "weights.pt", "--pool", "avg", "--data", "clothes.npz")[0] == 0
    assert predicted(capsys, "one.png", "models:/poolnet/2")["letter"] == said["letter"]
    assert f",{said['letter']}," in run(capsys, "predict", "models:/poolnet/1", "one.png", "--csv")[1]
    assert said["letter"] in run(capsys, "predict", "models:/poolnet/1", "one.png")[1]


def predicted(capsys, image, model="models:/poolnet/1"):
    code, out, err = run(capsys, "predict", model, image, "--json")
    assert code == 0, err
    (found,) = json.loads(out)["predictions"]
    return found


def test_another_device_may_turn_a_letter_round(capsys, alone):
    """One letter of 110, and a loss in its fifth digit, as sums in another order do."""
    client, run_id = mlflow.MlflowClient(), alone.info.run_id
    client.log_metric(run_id, "test_loss", alone.data.metrics["test_loss"] + 5e-5)
    for device, letters, agrees in (("cpu", 1, False), ("cuda:0", 1, True), ("mps", 1, True), ("mps", 2, False)):
        client.set_tag(run_id, "poolnet.device", device)
        client.log_metric(run_id, "test_acc", alone.data.metrics["test_acc"] - letters / 110)
        assert scored(capsys, "models:/poolnet/1", "--no-publish")[0]["agrees"] is agrees, device


def test_other_data_are_scored_and_not_compared(capsys, trained):
    np.savez("other.npz", **make_arrays(seed=5))
    report, err = scored(capsys, "models:/poolnet/1", "--data", "other.npz", "--no-publish")
    assert err == ""
    assert report["agrees"] is None
    assert "was on other data" in report["agreement"]


@pytest.mark.usefixtures("alone")
def test_data_that_changed_or_vanished_are_not_taken_for_those_of_the_training(capsys):
    np.savez("letters.npz", **make_arrays(seed=5))
    code, _, err = run(capsys, "evaluate", "models:/poolnet/1")
    assert_refused(code, err, "letters.npz: found SHA-256", "--data")
    Path("letters.npz").unlink()
    code, _, err = run(capsys, "evaluate", "models:/poolnet/1")
    assert_refused(code, err, "letters.npz", "no such file", "--data")


def test_a_model_whose_weights_were_changed_is_found_out(capsys, alone):
    """The files of another network of the same kind, put in the place of the registered one's."""
    other = publish(journaled(dataclasses.replace(REGISTERED, seed=7, epochs=1)))
    client = mlflow.MlflowClient()
    ours, theirs = (Path(registry.logged(client, each).artifact_location) for each in (alone, other))
    (ours / EXPORT).write_bytes((theirs / EXPORT).read_bytes())
    for command in (["evaluate", "models:/poolnet/1"], ["promote", "models:/poolnet/1", "--force"]):
        code, _, err = run(capsys, *command)
        assert_refused(code, err, "models:/poolnet/1: found an export, which MLflow would serve")
    (ours / WEIGHTS).write_bytes((theirs / WEIGHTS).read_bytes())
    report, err = scored(capsys, "models:/poolnet/1", "--no-publish")
    assert report["agrees"] is False
    assert err.startswith("poolnet: warning: Differs from its run ")
    assert err.count("\n") == 1


UNCHECKED = {  # what is done to a model's folder, and why its export is not checked then
    "another torch": (
        lambda folder: in_mlmodel(folder, f"pytorch_version: {torch.__version__}", "pytorch_version: 2.9.0"),
        f"torch 2.9.0 made it and this is {torch.__version__}",
    ),
    "older": (lambda folder: (folder / WEIGHTS).unlink(), "an earlier version of poolnet logged it"),
}


def test_an_export_that_cannot_be_checked_is_said(capsys, alone):
    folder = Path(registry.logged(mlflow.MlflowClient(), alone).artifact_location)
    whole = shutil.copytree(folder, "whole")
    for change, why in UNCHECKED.values():
        shutil.copytree(whole, folder, dirs_exist_ok=True)
        change(folder)
        report, err = scored(capsys, "models:/poolnet/1", "--no-publish")
        assert report["agrees"] is True
        assert err.count("\n") == 1
        assert err.startswith("poolnet: warning: models:/poolnet/1: its weights are used, and its export,")
        assert why in err
        code, _, err = run(capsys, "promote", "models:/poolnet/1")
        assert code == 0
        assert why in err


def test_what_mlflow_loads_says_the_same(trained):
    images = torch.from_numpy(open_dataset("letters.npz").test.images(slice(None)))
    net = registry.load("models:/poolnet/1").net
    served = mlflow.pytorch.load_model("models:/poolnet/1")
    with torch.inference_mode():
        for n in (1, 2, 110):
            assert torch.equal(served(images[:n]), net(images[:n]))


def test_a_model_says_nothing_of_the_folders_it_was_made_in(trained):
    """Torch's stack traces name home and user."""
    folder = Path(registry.logged(mlflow.MlflowClient(), trained).artifact_location)
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert files.keys() | {"registered_model_meta"} == registry.FILES  # which MLflow adds when it loads a model
    for name, content in files.items():
        for place in (str(ROOT), sys.prefix, str(Path.home()), "stack_trace"):
            assert place.encode() not in content.replace(str(folder).encode(), b""), (name, place)


def test_the_description_recommends_what_executes_nothing(trained):
    note = mlflow.MlflowClient().get_run(trained.info.run_id).data.tags["mlflow.note.content"]
    assert 'poolnet.load_model("models:/poolnet/1")' in note
    assert "pytorch" not in note


@pytest.mark.parametrize("place", ["absolute", "file"])
def test_a_folder_that_is_no_model_is_not_fetched(capsys, tmp_path, monkeypatch, place):
    """What is there is looked at first: nothing of it is copied, and nothing left."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    folder = tmp_path / "etc"
    (folder / "deep").mkdir(parents=True)
    (folder / "secret").write_text("secret")
    code, _, err = run(capsys, "evaluate", folder.as_uri() if place == "file" else folder)
    assert_refused(code, err, "found no model of MLflow's there", "poolnet register FILE")
    assert list(scratch.rglob("*")) == []


@pytest.mark.parametrize("command", [["evaluate", "models:/poolnet/1"], ["promote"]], ids=" ".join)
def test_a_store_that_is_none_is_one_line(capsys, tmp_path, command):
    (tmp_path / "mlflow.db").write_text("no database at all, and long enough to be looked at as one" * 20)
    code, _, err = run(capsys, *command)
    assert code == 1
    assert re.fullmatch(r"poolnet: error: .*mlflow\.db: file is not a database; poolnet doctor says more\n", err)


# --- what is not loaded -----------------------------------------------------------------------------------------------


class Bomb(nn.Module):
    """A network whose pickle runs what its maker put in."""

    def __init__(self, path):
        super().__init__()
        self.path = path

    def __reduce__(self):
        return Payload(self.path).__reduce__()


@pytest.fixture(scope="module")
def bomb(store):
    """Version 2: a model that was logged as pickle, with a payload, by a run that looks like one of poolnet's."""
    with pytest.MonkeyPatch.context() as patch:
        enter(store[0], patch)
        return plant_bomb(store[1], store[0] / "touched")


@pytest.fixture
def pickled(trained, bomb):
    """The path that the payload writes to, which is not there yet."""
    bomb.unlink(missing_ok=True)
    return bomb


def plant_bomb(trained, touched):
    client = mlflow.MlflowClient()
    with mlflow.start_run() as bad:
        mlflow.pytorch.log_model(
            Bomb(touched),
            name="model",
            serialization_format="pickle",
            pip_requirements=[],
            registered_model_name="poolnet",
        )
    for key, value in trained.data.tags.items():
        if key.startswith("poolnet."):
            client.set_tag(bad.info.run_id, key, value)
    client.set_tag(bad.info.run_id, "poolnet.run", "avg-seed42-0badbad0")
    for name in ("record.json", "predictions"):
        path = mlflow.artifacts.download_artifacts(run_id=trained.info.run_id, artifact_path=name, dst_path="theirs")
        (client.log_artifacts if Path(path).is_dir() else client.log_artifact)(
            bad.info.run_id, path, *([name] if Path(path).is_dir() else [])
        )
    torch.save(Bomb(touched), "bomb.pt")
    return touched


def test_the_payload_is_real(pickled):
    with pytest.raises(pickle.UnpicklingError):
        torch.load("bomb.pt", weights_only=True)
    torch.load("bomb.pt", weights_only=False)
    assert pickled.exists()


@pytest.mark.parametrize(
    "command",
    [
        ["evaluate", "models:/poolnet/2"],
        ["predict", "models:/poolnet/2", "letter.png"],
        ["promote", "models:/poolnet/2"],
        ["promote", "models:/poolnet/2", "--force"],
        ["promote"],
        ["reproduce", "avg-seed42-0badbad0"],
        ["register", "bomb.pt", "--pool", "avg"],
    ],
    ids=" ".join,
)
def test_a_pickled_model_is_refused_by_every_command_and_its_payload_never_run(capsys, pickled, command):
    from PIL import Image

    Image.new("L", (28, 28)).save("letter.png")
    code, out, err = run(capsys, *command)
    lines = [line for line in err.splitlines() if line.startswith("poolnet: error: ")]
    assert (code, out, len(lines)) == (2, "", 1)
    expected = (
        ["torch.save(model.state_dict()"] if command[0] == "register" else ["pickled model", "poolnet register FILE"]
    )
    assert all(words in lines[0] for words in expected)
    assert not pickled.exists()
    assert mlflow.MlflowClient().get_model_version_by_alias("poolnet", "champion").version == 1


def test_the_library_refuses_it_too(pickled):
    with pytest.raises(InputError, match="found a pickled model"):
        registry.load("models:/poolnet/2")
    assert not pickled.exists()


def test_one_unreadable_image_among_many_is_named_and_the_others_are_predicted(trained, tmp_path, capsys):
    from PIL import Image, ImageDraw

    folder = tmp_path / "pictures"
    folder.mkdir()
    bad = {"cut.png": b"\x89PNG\r\n", "empty.jpg": b"", "text.gif": b"no picture"}
    for name, content in bad.items():
        (folder / name).write_bytes(content)
    code, out, err = run(capsys, "predict", "models:/poolnet/1", str(folder))
    assert (code, out) == (2, "")
    for name in ("a.png", "._a.png", "z.png"):
        picture = Image.new("L", (90, 90), "white")
        ImageDraw.Draw(picture).rectangle((30, 10, 50, 80), "black")
        picture.save(folder / name)
    (folder / "._z.png").write_bytes(b"\0\5\x16\7")
    for options in ([], ["--csv"], ["--json"]):
        code, out, err = run(capsys, "predict", "models:/poolnet/1", str(folder), *options)
        assert code == 1
        assert [out.count(name) for name in ("a.png", "z.png", "._", *bad)] == [1, 1, 0, 0, 0, 0]
        assert [err.count(f"{folder / name}: found ") for name in bad] == [1, 1, 1]
        assert err.count("poolnet: error: ") == 3


SMUGGLED = {  # what is changed in a model's folder, and the words of the refusal
    "a pickle beside the program": (lambda folder: (folder / "data" / "model.pth").write_bytes(b""), "pickled model"),
    "no program": (lambda folder: (folder / EXPORT).unlink(), "pickled model"),
    "code beside the model": (lambda folder: (folder / "code").mkdir(), "found code beside the model"),
    "a file in its data": (lambda folder: (folder / "data" / "x.so").write_bytes(b""), "found data/x.so beside"),
    "a huge file": (lambda folder: os.truncate(folder / WEIGHTS, 5 << 20), "weights.safetensors of 5,242,880 bytes"),
    "a folder for a file": (lambda folder: swapped(folder / WEIGHTS, Path.mkdir), "safetensors of unknown size"),
    "a pipe": (lambda folder: swapped(folder / WEIGHTS, pipe), "safetensors of unknown size"),
    "damaged weights": (lambda folder: (folder / WEIGHTS).write_bytes(b"\x80\x04N."), "no readable data/weights"),
    "no MLmodel": (lambda folder: (folder / "MLmodel").unlink(), "found no model of MLflow's"),
    "a damaged MLmodel": (lambda folder: (folder / "MLmodel").write_bytes(b"\xff: ["), "found no pytorch model"),
    "a loader of its own": (
        lambda folder: in_mlmodel(folder, "loader_module: mlflow.pytorch", "loader_module: evil"),
        "brings code along",
    ),
    "code": (lambda folder: in_mlmodel(folder, "code: null", "code: code"), "brings code along"),
    "another program": (
        lambda folder: in_mlmodel(folder, "model_data: data", "model_data: other"),
        "brings code along",
    ),
    "another flavor": (
        lambda folder: in_mlmodel(folder, "flavors:", "flavors:\n  sklearn: {pickled_model: x}"),
        "brings code along",
    ),
}


def swapped(path, make):
    path.unlink()
    make(path)


def pipe(path):
    if not hasattr(os, "mkfifo"):
        pytest.skip("no pipes among the files of this system")
    os.mkfifo(path)


def in_mlmodel(folder, old, new):
    text = (folder / "MLmodel").read_text(encoding="utf-8")
    assert old in text
    (folder / "MLmodel").write_text(text.replace(old, new), encoding="utf-8")


@pytest.mark.parametrize("case", SMUGGLED)
def test_what_mlflow_would_run_of_a_models_folder_is_refused(trained, tmp_path, case):
    change, word = SMUGGLED[case]
    uri = "models:/poolnet/1"
    folder = Path(mlflow.artifacts.download_artifacts(artifact_uri=uri, dst_path=str(tmp_path / "model")))
    assert registry.load(str(folder)).pool == "avg"
    change(folder)
    with pytest.raises(InputError, match=word):
        registry.load(str(folder))


# --- weights from elsewhere -------------------------------------------------------------------------------------------

NOTEBOOK = """
import torch
from PIL import Image
from torch import nn

class SimplePoolNet(nn.Module):
    def __init__(self, pool_type):
        super().__init__()
        pool = nn.MaxPool2d if pool_type == "max" else nn.AvgPool2d
        self.layer1 = pool(2, 2)
        self.layer2 = pool(2, 2)
        self.act = nn.ReLU()
        self.fc = nn.Linear(49, 10)

    def forward(self, x):
        x = self.act(self.layer2(self.act(self.layer1(x))))
        return self.fc(x.flatten(1))

torch.manual_seed(3)
model = SimplePoolNet("avg")
torch.save(model.state_dict(), "notebook.pt")
"""


def registered(capsys, *options):
    code, out, err = run(capsys, "register", *options, "--json")
    assert (code, err) == (0, "")
    return json.loads(out)


def test_weights_of_the_notebook_become_a_version_that_says_the_same(capsys, letters):
    names = {}
    exec(NOTEBOOK, names)
    printed = registered(capsys, "notebook.pt", "--pool", "avg", "--data", "letters.npz")
    test = open_dataset("letters.npz").test
    images = torch.from_numpy(test.images(slice(None)))
    with torch.inference_mode():
        expected = names["model"](images).numpy()
        ours = registry.load(f"models:/poolnet/{printed['version']}").net(images).numpy()
    assert np.allclose(ours, expected, atol=1e-6)
    assert np.allclose(mlflow.pyfunc.load_model("models:/poolnet/1").predict(images.numpy()), expected, atol=1e-6)
    assert printed["scores"]["test"]["acc"] == (expected.argmax(1) == test.y).mean()
    version = mlflow.MlflowClient().get_model_version("poolnet", "1")
    assert version.tags["pool"] == "avg"
    assert version.tags["test_acc"] == f"{printed['scores']['test']['acc']:.4f}"
    assert version.description.startswith("avg pooling, weights from notebook.pt, scored on letters: accuracy 0.")
    assert "test images. `poolnet evaluate` gives the intervals." in version.description
    assert scored(capsys, "models:/poolnet/1", "--no-publish")[0]["agrees"] is True


def test_weights_without_data_are_a_version_too(capsys):
    torch.save(registry_weights("max"), "weights.pt")
    printed = registered(capsys, "weights.pt", "--pool", "max")
    assert printed["scores"] == {}
    code, _, err = run(capsys, "evaluate", "models:/poolnet/1")
    assert_refused(code, err, "no record of the data", "--data")


def registry_weights(pool):
    from poolnet.training.model import build_model

    return dict(build_model(pool, 0).state_dict())


BAD_WEIGHTS = {
    "another network": (lambda: registry_weights("conv"), "expected for --pool max: fc.weight (10, 49), fc.bias (10,)"),
    "nan": (lambda: {"fc.weight": torch.full((10, 49), torch.nan), "fc.bias": torch.zeros(10)}, "not finite"),
    "integers": (lambda: {"fc.weight": torch.ones(10, 49).long(), "fc.bias": torch.zeros(10)}, "no plain floating"),
    "too large": (
        lambda: {"fc.weight": torch.full((10, 49), 1e300, dtype=torch.float64), "fc.bias": torch.zeros(10)},
        "not finite",
    ),
    "sparse": (lambda: {"fc.weight": torch.zeros(10, 49).to_sparse(), "fc.bias": torch.zeros(10)}, "no plain floating"),
    "one tensor": (lambda: torch.zeros(3), "no state_dict"),
    "a list": (lambda: [1, 2], "no state_dict"),
    "whole module": (lambda: nn.Linear(49, 10), "other things than tensors"),
}


@pytest.mark.parametrize("case", BAD_WEIGHTS)
def test_bad_weights_are_one_line_and_leave_no_run(capsys, tmp_path, case):
    make, word = BAD_WEIGHTS[case]
    torch.save(make(), "weights.pt")
    code, _, err = run(capsys, "register", "weights.pt", "--pool", "max")
    assert_refused(code, err, "weights.pt", word)
    assert mlflow.MlflowClient().search_runs(["0"]) == []


def archive(**arrays):
    with io.BytesIO() as buffer:
        np.savez(buffer, **arrays)
        return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (None, "no such file"),
        (b"", "found an empty file"),
        (b"\x80\x04N.", "found other things than tensors"),
        (b"PK\x03\x04 not a zip", "found no weights of torch's, or damaged ones"),
        (b"text", "found no weights of torch's, or damaged ones"),
        (archive(weight=np.zeros((10, 49)))[:-30], "found no weights of torch's, or damaged ones"),
        (archive(weight=np.zeros((10, 49))), "found arrays of NumPy, expected what torch.save("),
    ],
)
def test_files_that_are_no_weights_are_one_line(capsys, content, kind):
    if content is not None:
        Path("weights.pt").write_bytes(content)
    code, _, err = run(capsys, "register", "weights.pt", "--pool", "max")
    assert_refused(code, err, f"weights.pt: {kind}", "torch.save(model.state_dict(), FILE)")


def test_the_line_that_makes_weights_of_numpys_arrays_does(capsys):
    arrays = {name: tensor.numpy() for name, tensor in registry_weights("avg").items()}
    Path("weights.npz").write_bytes(archive(**arrays))
    err = run(capsys, "register", "weights.npz", "--pool", "avg")[2]
    line = err.strip().split("make it with ")[1].replace("FILE", "'weights.npz'").replace("OTHER", "'weights.pt'")
    eval(line, {"torch": torch, "np": np})
    assert registered(capsys, "weights.pt", "--pool", "avg")["version"] == 1


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="these systems have no names that are not UTF-8")
def test_names_that_are_not_utf8_are_shown_with_escapes(capsys, letters):
    torch.save(registry_weights("max"), name := os.fsdecode(b"w`\xff.pt"))
    assert registered(capsys, name, "--pool", "max", "--data", "letters.npz")["version"] == 1
    version = mlflow.MlflowClient().get_model_version("poolnet", "1")
    weights_run = mlflow.get_run(version.run_id)
    assert version.tags["source"] == weights_run.data.params["file"] == r"w`\udcff.pt"
    note = weights_run.data.tags["mlflow.note.content"]
    assert r"Weights from `` w`\udcff.pt ``, SHA-256" in note
    assert note.startswith(f"**Test accuracy {weights_run.data.metrics['test_acc']:.4f}**, 95 % interval ")
    assert note.splitlines()[2] == "| final weights | val | test |"
    assert re.search("[0-9a-f]{13}", note) is None
    for command in (
        ["evaluate", "models:/poolnet/1", "--data"],
        ["train", "--data"],
        ["prepare", "notmnist", "--small"],
    ):
        code, _, err = run(capsys, *command, os.fsdecode(b"no\xfe"))
        assert_refused(code, err, r"no\udcfe")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes among the files of this system")
def test_pipes_and_devices_in_place_of_weights_are_refused_at_once(capsys):
    os.mkfifo("pipe.pt")
    for name, kind in (("pipe.pt", "a pipe"), ("/dev/zero", "a device")):
        code, _, err = run(capsys, "register", name, "--pool", "max")
        assert_refused(code, err, f"{name}: found {kind}, expected what torch.save(")


def test_data_without_some_letters_or_with_one_image_are_scored_or_refused_in_one_line(capsys):
    arrays = make_arrays()
    few = arrays | {"y_test": arrays["y_test"] % 3}
    one = arrays | {"X_test": arrays["X_test"][:1], "y_test": arrays["y_test"][:1]}
    torch.save(registry_weights("max"), "weights.pt")
    for number, (name, changed) in enumerate({"few": few, "one": one}.items(), start=1):
        np.savez(f"{name}.npz", **changed)
        registered(capsys, "weights.pt", "--pool", "max", "--data", f"{name}.npz")
        code, out, err = run(capsys, "evaluate", f"models:/poolnet/{number}", "--no-publish", "--json")
        if name == "one":
            assert_refused(code, err, "one.npz")
        else:
            classes = json.loads(out)["per_class"]
            assert [each["n"] > 0 for each in classes] == [True] * 3 + [False] * 7
