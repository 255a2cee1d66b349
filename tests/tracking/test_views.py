"""Saved views, and the links that open them."""

import base64
import json
import os
import shlex
import signal
import subprocess
import zlib
from pathlib import Path

import forked
import mlflow
import numpy as np
import pytest
from conftest import make_arrays, wait_for
from finished_runs import CONFIG, journaled, publish

from poolnet.data.dataset import open_dataset
from poolnet.tracking import addresses, pages, servers, views

pytestmark = pytest.mark.usefixtures("letters")
TAG = "mlflow.sharedViewState."


def tags():
    return mlflow.MlflowClient().get_experiment("0").tags


def named():
    return {key.removeprefix(TAG): json.loads(value)["name"] for key, value in tags().items() if key.startswith(TAG)}


def state(key):
    packed = json.loads(tags()[TAG + key])["state"].removeprefix("deflate;")
    return json.loads(zlib.decompress(base64.b64decode(packed)))


def test_the_first_run_of_an_experiment_brings_three_views_and_a_description():
    publish(journaled())
    sha256 = open_dataset("letters.npz").sha256
    key = f"poolnet-{sha256[:8]}"
    names = {key: "max against avg on letters", f"{key}-seeds": "seeds on letters"}
    assert named() == names | {"poolnet-leaderboard": "leaderboard"}
    note = tags()["mlflow.note.content"]
    for each in named():
        assert f"(#/experiments/0/runs?workflowType=machine_learning&viewStateShareKey={each}" in note
    means, seeds = state(key), state(f"{key}-seeds")
    assert means["groupBy"]["groupByKeys"] == [{"mode": "param", "groupByData": "pool"}]
    assert seeds["groupBy"] is None
    for view in (means, seeds):
        assert sha256 in view["searchFilter"]
        shown = [(card["type"], card["metricKey"]) for card in view["compareRunCharts"]]
        curves = [("LINE", f"{split}_{kind}") for split in ("val", "train") for kind in ("acc", "loss")]
        assert shown == [*curves, ("BAR", "test_acc"), ("BAR", "test_loss")]
    assert all(len(value) < 5000 for value in tags().values())  # what older servers hold


def test_views_show_each_training_once_and_nothing_else():
    run = journaled()
    publish(run)
    client = mlflow.MlflowClient()
    again = publish(journaled())
    client.set_tag(again.info.run_id, "poolnet.reproduces", "another")
    client.create_run("0", run_name="an evaluation")
    found = client.search_runs(["0"], state("poolnet-leaderboard")["searchFilter"])
    assert [each.data.tags["poolnet.run"] for each in found] == [run.name]


def test_what_others_wrote_stays_as_it_is():
    client = mlflow.MlflowClient()
    theirs = {f"{TAG}mine": '{"name": "leaderboard"}', f"{TAG}odd": "no JSON", "mlflow.note.content": "ours"}
    for key, value in theirs.items():
        client.set_experiment_tag("0", key, value)
    publish(journaled())
    assert {key: tags()[key] for key in theirs} == theirs
    assert len([key for key in tags() if key.startswith(f"{TAG}poolnet-")]) == 3


def test_another_data_set_has_views_of_its_own_and_a_name_that_tells_them_apart(monkeypatch):
    publish(journaled())
    first = tags()
    Path("other").mkdir()
    np.savez("other/letters.npz", **make_arrays(seed=5))
    publish(journaled(CONFIG.__class__(data="other/letters.npz", epochs=2, register=False)))
    sha256 = open_dataset("other/letters.npz").sha256
    assert named()[f"poolnet-{sha256[:8]}"] == f"max against avg on letters ({sha256[:4]})"
    assert len(named()) == 5
    assert {key: tags()[key] for key in first if key.startswith(TAG)} == {
        key: value for key, value in first.items() if key.startswith(TAG)
    }
    assert f"poolnet-{sha256[:8]}" in tags()["mlflow.note.content"]


def test_views_are_written_again_where_they_are_missing_but_no_description_that_was_changed(monkeypatch):
    """As in a store of an earlier version, or after somebody has deleted them."""
    publish(journaled())
    client = servers.own_client()
    data = open_dataset("letters.npz")
    client.delete_experiment_tag("0", f"{TAG}poolnet-leaderboard")
    client.set_experiment_tag("0", "mlflow.note.content", tags()["mlflow.note.content"] + " Ask Ada.")
    servers.forget()  # as in another process
    views.keep(client, "0", data.name, data.sha256)
    assert len(named()) == 3
    assert tags()["mlflow.note.content"].endswith(" Ask Ada.")


def test_what_a_kill_or_another_process_left_out_is_made_up_for(monkeypatch):
    """A description that was not written, and a view of which there is only half."""
    publish(journaled())
    client, first = servers.own_client(), tags()["mlflow.note.content"]
    Path("other").mkdir()
    np.savez("other/letters.npz", **make_arrays(seed=5))
    publish(journaled(CONFIG.__class__(data="other/letters.npz", epochs=2, register=False)))
    whole, other = tags(), open_dataset("other/letters.npz")
    client.set_experiment_tag("0", "mlflow.note.content", first)
    key = f"{TAG}poolnet-{other.sha256[:8]}"
    client.set_experiment_tag("0", key, whole[key][:40])
    servers.forget()
    views.keep(client, "0", other.name, other.sha256)
    assert tags()["mlflow.note.content"] == whole["mlflow.note.content"]
    assert state(key.removeprefix(TAG))["groupBy"]["aggregateFunction"] == "average"


# --- links -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("http://10.0.0.1:5000", "http://10.0.0.1:5000/#/models/x"),
        ("https://me:secret@mlflow.example.org/team/", "https://mlflow.example.org/team/#/models/x"),
    ],
)
def test_the_link_to_a_server_is_one_line_without_a_password(uri, expected):
    assert pages.link(uri, "models/x") == expected


def test_a_store_is_named_by_its_file_in_its_own_folder_and_in_full_elsewhere(tmp_path, monkeypatch):
    uri = addresses.of_file(tmp_path / "mlflow.db")
    command, link = pages.link(uri, "models/x").split("\n")
    assert command == "mlflow ui --backend-store-uri sqlite:///mlflow.db"
    assert link == "then http://127.0.0.1:5000/#/models/x"
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    command, _ = pages.link(uri, "models/x").split("\n")
    assert addresses.sqlite_file(shlex.split(command)[-1]) == tmp_path / "mlflow.db"


def test_the_password_of_a_database_is_not_in_the_command():
    assert "secret" not in pages.link("postgresql://me:secret@db/mlflow", "models/x")
    assert "postgresql+psycopg://me@db/mlflow" in pages.link("postgresql://me@db/mlflow", "models/x")


# --- opening them ----------------------------------------------------------------------------------------------------


@pytest.fixture
def browser(tmp_path, monkeypatch):
    """A browser that writes down what it is asked to open."""
    if os.name == "nt":
        pytest.skip("Windows has no setting for the browser")
    script, opened = tmp_path / "browser", tmp_path / "opened"
    script.write_text(f'#!/bin/sh\necho "$1" >> "{opened}"\n')
    script.chmod(0o755)
    monkeypatch.setenv("BROWSER", f"{script} %s")
    return opened


def test_open_serves_a_store_until_ctrl_c(browser):
    publish(journaled())
    command = [*forked.POOLNET, "train", "--data", "letters.npz", "--epochs", "1", "--open"]
    with forked.start(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as training:
        wait_for(browser.exists, seconds=90)
        address = browser.read_text().strip()
        key = f"poolnet-{open_dataset('letters.npz').sha256[:8]}"
        assert address.endswith(pages.view("0", key))
        port = int(address.split(":")[2].split("/")[0])
        uri = f"http://127.0.0.1:{port}"
        assert len(mlflow.MlflowClient(uri).search_runs(["0"])) == 2
        training.send_signal(signal.SIGINT)
        out, err = training.communicate(timeout=30)
    assert (training.returncode, err) == (0, "")
    assert out.endswith(f"Opened {address}\nPress Ctrl-C to end it.\n")
    wait_for(lambda: addresses.unreachable(uri))


def test_open_on_a_server_opens_its_page_and_ends(browser, capfd):
    pages.show("http://me:secret@127.0.0.1:5000", "models/x", print)
    wait_for(browser.exists)
    assert browser.read_text() == "http://127.0.0.1:5000/#/models/x\n"
    assert capfd.readouterr().out == "Opened http://127.0.0.1:5000/#/models/x\n"
