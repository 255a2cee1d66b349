"""Who becomes champion: better challengers, and one at a time, on a real store."""

import contextlib
import dataclasses
import json
import os
import shutil
import sqlite3
import subprocess
import threading
import time

import forked
import mlflow
import numpy as np
import pytest
import torch
from conftest import assert_refused, make_arrays, run, wait_for
from finished_runs import REGISTERED, journaled, publish

from poolnet.errors import RunError
from poolnet.models import BUDGET, champions, promote
from poolnet.text import p_value
from poolnet.tracking import programs, registry

WEAK, STRONG = {"epochs": 1, "lr": 1e-5}, {"epochs": 6, "lr": 0.05}
VERSIONS = [dataclasses.replace(REGISTERED, **options) for options in (WEAK, STRONG, STRONG)]  # of the shared store


def version(**options):
    """Train with these options, and register. Returns the version's number."""
    publish(journaled(dataclasses.replace(REGISTERED, **options)))
    return int(registry.newest(mlflow.MlflowClient()).version)


EXPORTED = {}  # by network: what is exported of the few there are, each time that one is loaded


@pytest.fixture(autouse=True)
def exported_once(monkeypatch):
    export = programs._export

    def remembered(net, path):
        key = (str(net), *(tensor.numpy().tobytes() for tensor in net.state_dict().values()))
        if key not in EXPORTED:
            export(net, path)
            EXPORTED[key] = path.read_bytes()
        path.write_bytes(EXPORTED[key])

    monkeypatch.setattr(programs, "_export", remembered)


@pytest.fixture(scope="module")
def unpromoted(store):
    """A copy of the store's database."""
    return shutil.copy(store[0] / "mlflow.db", store[0] / "unpromoted.db")


@pytest.fixture
def client(trained, unpromoted):
    """The store before any promotion."""
    with (
        contextlib.closing(sqlite3.connect(unpromoted)) as copy,
        contextlib.closing(sqlite3.connect("mlflow.db")) as now,
    ):
        copy.backup(now)
    client = mlflow.MlflowClient()
    client.delete_registered_model_alias("poolnet", "champion")
    return client


def promoted(capsys, *options, code=0):
    exit_code, out, err = run(capsys, "promote", *options, "--json")
    assert exit_code == code, err
    return json.loads(out)


def champion(client, alias="champion"):
    version = champions.holder(client, alias)
    return int(version.version) if version else None


def test_the_first_champion_needs_no_test_and_a_better_challenger_wins_and_says_why(capsys, client):
    decision = promoted(capsys, "models:/poolnet/1")
    assert (decision["kind"], decision["promoted"], decision["val"]) == ("first", True, None)
    assert champion(client) == 1
    assert promoted(capsys, "models:/poolnet/1")["kind"] == "unchanged"
    decision = promoted(capsys, "models:/poolnet/2")
    assert (decision["kind"], decision["over"], champion(client)) == ("better", 1, 2)
    # by hand, from what both runs predicted of the same validation letters
    runs = [client.get_run(client.get_model_version("poolnet", number).run_id) for number in "12"]
    saved = [np.load(client.download_artifacts(each.info.run_id, "predictions/val.npz")) for each in runs]
    a, b = (each["logits"].argmax(1) == each["y"] for each in saved)
    val = decision["val"]
    assert (val["paired_test"]["only_a"], val["paired_test"]["only_b"]) == ((a & ~b).sum(), (b & ~a).sum())
    assert val["points"]["estimate"] == pytest.approx(100 * (b.mean() - a.mean()))
    assert val["points"]["low"] > 0
    assert val["paired_test"]["p"] < 0.05
    assert val["n"] == 90
    # the version says the same, test beside it
    tags, text = (getattr(client.get_model_version("poolnet", "2"), name) for name in ("tags", "description"))
    assert tags["champion.points"] == f"{val['points']['estimate']:+.2f}"
    assert tags["champion.p"] == p_value(val["paired_test"]["p"])
    assert max(len(text) for key, text in tags.items() if key != "champion.since") <= 12
    assert (tags["champion.decision"], tags["champion.over"]) == ("better", "1")
    assert tags["champion.test_points"] == f"{decision['test']['points']['estimate']:+.2f}"
    assert decision["sentence"] in text
    assert client.get_model_version("poolnet", "1").tags["champion.replaced_by"] == "2"


@pytest.mark.parametrize("challenger", [1, 3], ids=["worse", "equal"])
def test_a_challenger_that_is_not_better_is_refused_with_numbers(capsys, client, challenger):
    promoted(capsys, "models:/poolnet/2")
    code, out, err = run(capsys, "promote", f"models:/poolnet/{challenger}")
    assert code == 1
    assert out.splitlines()[-1] == f"then http://127.0.0.1:5000/#/models/poolnet/versions/{challenger}"
    assert out.startswith("Look at it: mlflow ui --backend-store-uri ")
    assert out.count("\n") == 2
    assert err.count("\n") == 1
    assert f"Version {challenger} is not champion: it is not shown to be better than version 2" in err
    assert "+0.00 points" in err if challenger == 3 else "points, 95 % interval -" in err
    assert champion(client) == 2
    refused = client.get_model_version("poolnet", str(challenger))
    assert refused.tags["champion.decision"] == "refused"
    assert "is not shown to be better" in refused.description
    decision = promoted(capsys, f"models:/poolnet/{challenger}", code=1)
    assert (decision["promoted"], decision["kind"]) == (False, "refused")


def test_an_equal_one_wins_if_not_being_worse_is_enough_and_sure(capsys, client):
    promoted(capsys, "models:/poolnet/2")
    # 90 letters without a difference do not exclude one of a point
    assert promoted(capsys, "models:/poolnet/3", "--non-inferior", "1", code=1)["val"]["p_inferior"] > 0.05
    decision = promoted(capsys, "models:/poolnet/3", "--non-inferior", "10")
    assert (decision["kind"], champion(client)) == ("not worse", 3)
    assert decision["val"]["p_inferior"] < 0.05 / 10
    assert promoted(capsys, "models:/poolnet/1", "--non-inferior", "10", code=1)["kind"] == "refused"


def test_a_challenger_is_one_of_ten_and_says_so(capsys, client):
    promoted(capsys, "models:/poolnet/2")
    for _ in range(2):  # asked again, it is the same one
        decision = promoted(capsys, "models:/poolnet/1", code=1)
        assert decision["challenger"] == {"number": 1, "budget": 10, "level": 0.005, "spent": 0.005}
        assert "It is challenger 1 of 10 of version 2, so p must be below 0.005." in decision["sentence"]
        assert "90 validation images, each a family of its own, as the data name none" in decision["sentence"]
        assert client.get_model_version("poolnet", "1").tags["champion.challenger"] == "1 of 10"
    other = promoted(capsys, "models:/poolnet/3", "--alias", "champion-avg")  # an alias without a champion
    assert (other["kind"], other["challenger"]) == ("first", None)
    assert promoted(capsys, "models:/poolnet/1", "--alias", "champion-avg", code=1)["challenger"]["number"] == 1
    ledger = [client.get_model_version("poolnet", number).tags["challenger/1"] for number in "23"]
    assert ledger == 2 * ["1 of 10: pool=avg epochs=1 batch_size=32 lr=1e-05, seed=42 on cpu"]


def test_another_seed_and_too_many_challengers_are_refused_untested(capsys, client):
    promoted(capsys, "models:/poolnet/1")
    client.set_model_version_tag("poolnet", "1", "challenger/8", "1 of 2: pool=avg, seed=1 on cpu")
    client.set_model_version_tag("poolnet", "1", "challenger/9", "2 of 2: pool=max, seed=1 on cpu")
    decision = promoted(capsys, "models:/poolnet/2", "--budget", "2", code=1)
    assert (decision["kind"], decision["val"], decision["challenger"]) == ("refused", None, None)
    assert decision["sentence"].startswith(
        "Version 2 is not champion: it was not tested. Version 1 has met 2 challengers on these validation images, "
        "which is its budget; raise that, as in --budget 4"
    )
    assert decision["sentence"] in client.get_model_version("poolnet", "2").description
    settings = "pool=avg epochs=6 batch_size=32 lr=0.05"
    client.set_model_version_tag("poolnet", "1", "challenger/8", f"1 of 2: {settings}, seed=1 on cpu")
    code, _, err = run(capsys, "promote", "models:/poolnet/2", "--budget", "20")
    assert (code, err.count("\n")) == (1, 1)
    assert "Version 8 stands for these settings, as the first seed that was tested (seed=1 on cpu)" in err
    decision = promoted(capsys, "models:/poolnet/2", "--force")
    assert (decision["kind"], decision["val"]["n"], champion(client)) == ("forced", 90, 2)


def with_groups(client, number, group, folder):
    """Log the predictions of a version's run again, as those of data that name families."""
    run_id = client.get_model_version("poolnet", str(number)).run_id
    for split in ("val", "test"):
        path = client.download_artifacts(run_id, f"predictions/{split}.npz", str(folder))
        with np.load(path) as saved:
            arrays = {"logits": saved["logits"], "y": saved["y"]}
        np.savez(path, **arrays, group=group[: len(arrays["y"])])
        client.log_artifact(run_id, path, "predictions")


def test_families_are_kept_together(capsys, client, tmp_path):
    """Where only one of the two runs knows them, as the other was trained before, too."""
    promoted(capsys, "models:/poolnet/1")
    number, group = version(**STRONG), np.arange(110) // 9
    with_groups(client, number, group, tmp_path)
    decision = promoted(capsys, f"models:/poolnet/{number}")
    assert "On the same 90 validation images, of 10 families: +" in decision["sentence"]
    runs = [client.get_run(client.get_model_version("poolnet", str(each)).run_id) for each in (1, number)]
    saved = [np.load(client.download_artifacts(each.info.run_id, "predictions/val.npz")) for each in runs]
    a, b = (each["logits"].argmax(1) == each["y"] for each in saved)
    sums = np.bincount(group[:90], b.astype(int) - a).astype(int)
    assert (sums > 0).all()  # so that no flip goes farther
    assert decision["val"]["paired_test"]["p"] == 2 / 2**10
    assert decision["val"]["families"] == 10
    assert client.get_model_version("poolnet", str(number)).tags["champion.families"] == "10"
    other = version(**STRONG)
    with_groups(client, other, group + 1, tmp_path)
    code, _, err = run(capsys, "promote", f"models:/poolnet/{other}")
    assert_refused(code, err, f"version {other}: found other groups in its predictions of val than in those of")
    with_groups(client, other, np.zeros(110, int), tmp_path)
    client.delete_registered_model_alias("poolnet", "champion")
    promoted(capsys, "models:/poolnet/1")
    code, _, err = run(capsys, "promote", f"models:/poolnet/{other}")
    assert_refused(code, err, f"version {other}: found 1 family of val, expected 2 or more")


def test_data_that_were_given_families_are_the_same_and_other_folds_are_not(capsys, client):
    """The digest of the whole covers families, those of the splits do not."""
    promoted(capsys, "models:/poolnet/1")
    run_id = client.get_model_version("poolnet", "2").run_id
    digest = client.get_run(run_id).data.tags["poolnet.data_sha256"]
    client.set_tag(run_id, "poolnet.data_sha256", "f" * 64)
    assert promoted(capsys, "models:/poolnet/2")["kind"] == "better"
    client.set_tag(run_id, "poolnet.data_sha256", digest)
    number = version(**STRONG, fold="2/5")
    code, _, err = run(capsys, "promote", f"models:/poolnet/{number}")
    assert_refused(code, err, f"version {number}: found data SHA-256 {digest[:16]} fold 2/5, but that of the champion")


def test_force_is_recorded_as_such(capsys, client):
    promoted(capsys, "models:/poolnet/2")
    decision = promoted(capsys, "models:/poolnet/1", "--force")
    assert (decision["kind"], champion(client)) == ("forced", 1)
    assert decision["val"]["points"]["estimate"] < 0
    kept = client.get_model_version("poolnet", "1")
    assert kept.tags["champion.decision"] == "forced"
    assert "by force and not by evidence" in kept.description


def test_without_a_model_the_newest_version_of_the_aliass_pool_is_meant(capsys, client):
    newest = version(pool="max", **WEAK)
    assert promoted(capsys)["version"] == newest
    assert promoted(capsys, "--alias", "champion-avg")["version"] == 3
    assert promoted(capsys, "--alias", "champion-max")["version"] == newest
    numbers = [champion(client, alias) for alias in ("champion", "champion-avg", "champion-max")]
    assert numbers == [newest, 3, newest]
    code, _, err = run(capsys, "promote", f"models:/poolnet/{newest}", "--alias", "champion-avg")
    assert_refused(code, err, "champion-avg", f"max model in version {newest}, expected avg")


def test_other_data_are_refused_unless_forced(capsys, client):
    promoted(capsys, "models:/poolnet/1")
    np.savez("other.npz", **make_arrays(seed=9))
    number = version(data="other.npz", **STRONG)
    code, _, err = run(capsys, "promote", f"models:/poolnet/{number}")
    assert_refused(code, err, f"version {number}: found data SHA-256", "champion, version 1", "--force")
    assert champion(client) == 1
    decision = promoted(capsys, f"models:/poolnet/{number}", "--force")
    assert (decision["kind"], decision["val"], champion(client)) == ("forced", None, number)


def test_predictions_that_are_not_the_models_are_refused(capsys, client, tmp_path):
    promoted(capsys, "models:/poolnet/1")
    number = version(**WEAK)
    run_id = client.get_model_version("poolnet", str(number)).run_id
    y = make_arrays()["y_val"]
    np.savez(tmp_path / "val.npz", logits=9 * np.eye(10, dtype=np.float32)[y], y=y)
    client.log_artifact(run_id, str(tmp_path / "val.npz"), "predictions")
    code, _, err = run(capsys, "promote", f"models:/poolnet/{number}")
    assert_refused(code, err, f"version {number}", "predictions of val with loss", "logged")


def test_rollback_goes_back_step_by_step(capsys, client):
    promoted(capsys, "models:/poolnet/1")
    code, _, err = run(capsys, "promote", "--rollback")
    assert_refused(code, err, "no champion before the present one")
    promoted(capsys, "models:/poolnet/2")
    promoted(capsys, "models:/poolnet/3", "--force")
    decision = promoted(capsys, "--rollback")
    assert (decision["kind"], decision["version"], decision["over"], champion(client)) == ("rollback", 2, 3, 2)
    assert "rolled back" in client.get_model_version("poolnet", "2").description
    assert promoted(capsys, "--rollback")["version"] == champion(client) == 1
    assert run(capsys, "promote", "--rollback")[0] == 2
    promoted(capsys, "models:/poolnet/3")
    client.delete_registered_model_alias("poolnet", "champion")
    client.delete_model_version("poolnet", "3")
    assert promoted(capsys, "--rollback")["version"] == champion(client) == 1


def test_an_alias_set_by_hand_is_respected_and_comes_back(capsys, client):
    client.set_registered_model_alias("poolnet", "champion", "1")
    assert promoted(capsys, "models:/poolnet/2")["over"] == 1
    assert promoted(capsys, "--rollback")["version"] == champion(client) == 1
    client.set_registered_model_alias("poolnet", "champion", "2")
    assert promoted(capsys, "models:/poolnet/1", code=1)["over"] == 2
    assert promoted(capsys, "--rollback")["version"] == champion(client) == 1


# --- runs that are no version yet ------------------------------------------------------------------------------------


def unregistered(**options):
    """The name of a finished run, whose model is no version."""
    return publish(journaled(dataclasses.replace(REGISTERED, register=False, **options))).info.run_name


def count(client):
    return len(client.search_model_versions("name = 'poolnet'"))


def test_a_run_is_registered_by_its_name(capsys, client):
    promoted(capsys, "models:/poolnet/1")
    before, name = count(client), unregistered(**STRONG)
    decision = promoted(capsys, name)
    assert (decision["kind"], decision["over"], champion(client)) == ("better", 1, decision["version"])
    assert count(client) == before + 1
    assert promoted(capsys, name)["kind"] == "unchanged"
    made, trained = (client.get_model_version("poolnet", str(number)) for number in (decision["version"], 2))
    plain = {"pool", "seed", "val_acc", "test_acc", "data_sha256"}
    assert {key: made.tags[key] for key in plain} == {key: trained.tags[key] for key in plain}
    paragraphs = made.description.split("\n\n")
    assert decision["sentence"] in paragraphs[1]
    metrics = client.get_run(made.run_id).data.metrics
    assert paragraphs[0].startswith(
        f"avg pooling, seed 42, trained on letters: accuracy {metrics['val_acc']:.4f} on val and "
        f"{metrics['test_acc']:.4f} on 110 test images."
    )


def test_only_what_the_test_refuses_becomes_a_version(capsys, client):
    promoted(capsys, "models:/poolnet/2")
    np.savez("other.npz", **make_arrays(seed=9))
    before, other, weak = count(client), unregistered(data="other.npz"), unregistered(**WEAK)
    for options, words in (
        ([other], [f"{other}: found data SHA-256", "--force"]),
        ([weak, "--alias", "champion-max"], [f"model in {weak}, expected max"]),
        ([weak, "--alias", "v1"], ["--alias"]),
    ):
        code, _, err = run(capsys, "promote", *options)
        assert_refused(code, err, *words)
    client.set_terminated(client.search_runs(["0"], f"attributes.run_name = '{weak}'")[0].info.run_id, "KILLED")
    code, _, err = run(capsys, "promote", weak)
    assert_refused(code, err, f"{weak}: found its run KILLED, expected a finished one")
    assert count(client) == before
    client.set_terminated(client.search_runs(["0"], f"attributes.run_name = '{weak}'")[0].info.run_id, "FINISHED")
    decision = promoted(capsys, weak, code=1)
    assert (decision["kind"], count(client), champion(client)) == ("refused", before + 1, 2)
    assert "is not champion" in client.get_model_version("poolnet", str(decision["version"])).description


def test_the_run_of_mlflow_run_says_what_was_decided(capsys, client, monkeypatch):
    promoted(capsys, "models:/poolnet/1")
    better = "version 2 is champion", "Version 2 is champion instead of version 1"
    refused = "Refused: Version 1 is not champion: it is not shown to be better than version 2"
    said = {2: better, 1: ("Refused: version 1 as champion", refused)}
    for challenger, (name, beginning) in said.items():
        made = client.create_run("0").info.run_id
        monkeypatch.setenv("MLFLOW_RUN_ID", made)
        decision = promoted(capsys, f"models:/poolnet/{challenger}", code=int(challenger == 1))
        kept = client.get_run(made)
        assert kept.info.run_name == name
        assert kept.data.tags["mlflow.note.content"].startswith(beginning)
        val = decision["val"]  # to the last digit
        assert (kept.data.metrics["promote/points"], kept.data.metrics["promote/p"]) == (
            val["points"]["estimate"],
            val["paired_test"]["p"],
        )
        assert decision["look"].endswith(f"/#/models/poolnet/versions/{challenger}")


def test_the_registered_model_is_described_unless_somebody_has_done_so(client):
    ours = client.get_registered_model("poolnet").description
    promise, use = f"shared among {BUDGET} challengers", 'poolnet.load_model("models:/poolnet@champion")'
    for words in ("letter, A to J", "exact paired test", promise, use):
        assert words in ours
    for text, expected in (("Ours, do not touch", "Ours, do not touch"), ("", ours)):  # none in earlier versions
        client.update_registered_model("poolnet", text)
        version(**WEAK)
        assert client.get_registered_model("poolnet").description == expected


# --- at the same time -------------------------------------------------------------------------------------------------


def forced(client, number):
    return promote.decide(client, f"models:/poolnet/{number}", "champion", None, True)


def test_of_two_decisions_that_rest_on_the_same_champion_the_first_counts(client):
    one, other = (forced(client, number) for number in (1, 2))
    promote.enact(client, other)
    with pytest.raises(RunError, match="version 1: another promotion came first, and version 2 is champion now"):
        promote.enact(client, one)
    assert champion(client) == 2
    assert "champion.since" not in client.get_model_version("poolnet", "1").tags
    # the same once there is a champion, and where somebody took its alias away
    one, other, third = (forced(client, number) for number in (1, 3, 3))
    promote.enact(client, one)
    with pytest.raises(RunError, match="version 3: another promotion came first, and version 1 is champion now"):
        promote.enact(client, other)
    client.delete_registered_model_alias("poolnet", "champion")
    with pytest.raises(RunError, match="version 3: another promotion came first, and nothing is champion now"):
        promote.enact(client, third)
    assert client.get_model_version("poolnet", "1").tags["champion.before"] == "2"


def test_machines_at_once_have_one_winner(client, tmp_path):
    """Versions 2 and 3 are the same: whoever comes second is refused, by the race or by the test."""
    command = [*forked.POOLNET, "promote"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    homes = [{**os.environ, "POOLNET_HOME": str(tmp_path / f"machine {number}")} for number in range(3)]
    racing = [
        forked.start([*command, f"models:/poolnet/{number}"], env=home, **pipes)
        for number, home in zip((2, 3, 2), homes, strict=True)
    ]
    ended = [(process.communicate(timeout=120), process.returncode) for process in racing]
    out = "".join(printed for (printed, _), _ in ended)
    assert out.count("is the first champion.") == 1
    assert {code for _, code in ended} <= {0, 1}
    winner, loser = (champion(client), 5 - champion(client))
    assert f"Version {winner} is the first champion." in out
    assert "champion.since" not in client.get_model_version("poolnet", str(loser)).tags


def test_a_claim_of_a_killed_promotion_is_removed_after_a_while(client, monkeypatch):
    monkeypatch.setattr(champions, "CLAIM_SECONDS", 0.3)
    client.set_registered_model_tag("poolnet", f"{champions.CLAIM}dead", "somebody")
    with champions.alone(client):
        assert len(claims(client)) == 1
    assert not claims(client)


def test_a_promotion_waits_until_another_has_ended(client, monkeypatch):
    """The second one sees the first one's claim, which changes hands."""
    monkeypatch.setattr(champions, "CLAIM_SECONDS", 5)
    inside = []

    def enter(number):
        with champions.alone(mlflow.MlflowClient()):
            inside.append(number)
            time.sleep(0.1)
            inside.append(number)

    threads = [threading.Thread(target=enter, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert inside[::2] == inside[1::2]
    assert sorted(inside) == [0, 0, 1, 1, 2, 2]


def test_a_promotion_that_waits_long_is_not_taken_for_a_killed_one(client):
    """The others count the age of a claim from its first sight, so each try has another one."""
    seen, entered = set(), []

    def enter():
        with champions.alone(mlflow.MlflowClient()):
            entered.append(claims(client))

    waiting = threading.Thread(target=enter)
    with champions.alone(client):
        (held,) = claims(client)
        waiting.start()
        wait_for(lambda: seen.update(claims(client)) or len(seen - {held}) > 1)
    waiting.join()
    assert len(entered) == 1
    assert not claims(client)


def claims(client):
    return [tag for tag in client.get_registered_model("poolnet").tags if tag.startswith(champions.CLAIM)]


class Killed(BaseException):
    """A process that ends between two calls of the server."""


def test_a_promotion_killed_at_any_call_is_completed_by_the_same_command(client, monkeypatch):
    promote.enact(client, forced(client, 1))
    history = state(client, "12")
    decision = forced(client, 2)
    promote.enact(client, decision)
    wanted = state(client, "12")
    promote.enact(client, promote.rollback(client, "champion"))
    assert state(client, "12") == history
    for calls, calls_back in ((5, 3), (10, 4), (11, 5), (12, 6), (13, 7)):
        with killed_after(client, monkeypatch, calls) as alive:
            promote.enact(alive, decision)
        promote.enact(client, forced(client, 2))
        assert state(client, "12") == wanted, calls
        with killed_after(client, monkeypatch, calls_back) as alive:
            promote.enact(alive, promote.rollback(client, "champion"))
        present = champions.holder(client, "champion")
        if int(present.version) == 2 or champions.unfinished_rollback(client, "champion", present):
            promote.enact(client, promote.rollback(client, "champion"))
        assert state(client, "12") == history, calls_back


def state(client, numbers):
    """What champions and their history are, without times and texts."""
    versions = [client.get_model_version("poolnet", number) for number in numbers]
    tags = [{"since": "champion.since" in each.tags, "before": each.tags.get("champion.before")} for each in versions]
    return champion(client), [each if each["since"] else None for each in tags]


@contextlib.contextmanager
def killed_after(client, monkeypatch, calls):
    """A client whose process ends before its next writing, when it has written so often."""
    left = [calls]
    alive = mlflow.MlflowClient()

    def counted(write):
        def call(*args, **kwargs):
            if not left[0]:
                raise Killed
            left[0] -= 1
            return write(*args, **kwargs)

        return call

    for name in ("set_model_version_tag", "delete_model_version_tag", "update_model_version"):
        monkeypatch.setattr(alive, name, counted(getattr(alive, name)))
    alias = "set_registered_model_alias"
    monkeypatch.setattr(alive, alias, counted(getattr(alive, alias)))
    with contextlib.suppress(Killed):
        yield alive


# --- what earlier versions wrote --------------------------------------------------------------------------------------


def entry(client, kind, number, over, after):
    """An entry of the ledger in which versions up to 0.1.0 kept who was champion."""
    tags = {"alias": "champion", "kind": kind, "version": str(number), "after": str(after), "settled": "yes"}
    source = client.get_model_version("poolnet", str(number))
    tags |= {"champion.over": str(over), "champion.decision": kind}
    made = client.create_model_version(champions.OLD_LEDGER, source.source, source.run_id, tags)
    client.set_registered_model_alias("poolnet", "champion", str(number))
    return int(made.version)


def test_an_old_ledger_is_read_for_rollbacks(capsys, client):
    client.create_registered_model(champions.OLD_LEDGER)
    last = 0
    for kind, number, over in [("first", 1, "none"), ("forced", 3, 1), ("rollback", 1, 3), ("better", 2, 1)]:
        last = entry(client, kind, number, over, last)
    entry(client, "forced", 3, 2, 0)  # rests on what was over: it did not count
    client.set_registered_model_alias("poolnet", "champion", "2")
    promoted(capsys, "models:/poolnet/3", "--force")
    assert [promoted(capsys, "--rollback")["version"] for _ in range(2)] == [2, 1]
    code, _, err = run(capsys, "promote", "--rollback")
    assert_refused(code, err, "no champion before the present one")


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--alias", "v1"], ["--alias", "v1"]),
        (["--alias", "a b"], ["--alias", "a b"]),
        (["--non-inferior", "much"], ["--non-inferior", "much"]),
        (["--non-inferior", "-1"], ["--non-inferior", "-1"]),
        (["models:/poolnet/1", "--rollback"], ["--rollback"]),
        (["--rollback", "--budget", "3"], ["--rollback"]),
        (["--budget", "0"], ["--budget", "0"]),
        (["--rollback"], ["no champion before"]),
        ([], ["poolnet train"]),
        (["models:/poolnet/1"], ["not found"]),
    ],
    ids=" ".join,
)
def test_bad_usage_is_one_line(capsys, options, words):
    code, out, err = run(capsys, "promote", *options)
    assert_refused(code, err, *words)
    assert out == ""


def test_weights_from_elsewhere_can_be_promoted_once_they_are_scored(capsys, client):
    """Those of version 2, as the notebook would have saved them."""
    torch.save(registry.load("models:/poolnet/2").net.state_dict(), "weights.pt")
    promoted(capsys, "models:/poolnet/1")
    assert run(capsys, "register", "weights.pt", "--pool", "avg")[0] == 0
    code, _, err = run(capsys, "promote")
    assert_refused(code, err, "found data SHA-256 unknown")
    assert run(capsys, "register", "weights.pt", "--pool", "avg", "--data", "letters.npz")[0] == 0
    decision = promoted(capsys)
    assert (decision["kind"], champion(client)) == ("better", decision["version"])


def test_a_server_takes_all_of_it_too(capsys, letters, server, monkeypatch):
    """Which is more particular than a store about where a version comes from."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    weak, alias = version(**WEAK), ["--alias", "served"]
    assert promoted(capsys, f"models:/poolnet/{weak}", *alias)["kind"] == "first"
    weights = journaled(dataclasses.replace(REGISTERED, **STRONG)).load_tensors("model")
    torch.save({name: torch.from_numpy(weights[name]) for name in ("fc.weight", "fc.bias")}, "weights.pt")
    assert run(capsys, "register", "weights.pt", "--pool", "avg", "--data", "letters.npz")[0] == 0
    decision = promoted(capsys, *alias)
    assert (decision["kind"], decision["over"]) == ("better", weak)
    code, out, _ = run(capsys, "evaluate", "models:/poolnet@served", "--no-publish", "--json")
    assert (code, json.loads(out)["version"], json.loads(out)["agrees"]) == (0, decision["version"], True)
    assert promoted(capsys, "--rollback", *alias)["version"] == weak
