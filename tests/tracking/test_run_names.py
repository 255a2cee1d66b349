"""One name for one run: what finds it, on disk and on a real server, and what is told apart."""

from types import SimpleNamespace

import mlflow
import pytest
from conftest import assert_refused, run
from finished_runs import CONFIG, journaled, publish

from poolnet.errors import InputError
from poolnet.runs import run_record
from poolnet.tracking import server_runs, servers, sync

ODD = ["50%_a", "it's", 'say "no"', "a\\b", "a;b -- c", "naïve run", "`x`", "a/b:c"]


@pytest.fixture
def client():
    return servers.own_client()


def begun(client, name, title=None, **more):
    """A training as a server shows it, of this record name and under this title; the id of its run."""
    return client.create_run("0", tags={"poolnet.run": name, **more}, run_name=title or name).info.run_id


def found(client, text):
    return server_runs.look_up(client, text).info.run_id


def test_name_beginning_and_id_find_a_run(client):
    first, second = begun(client, "avg-seed4-1a2b"), begun(client, "avg-seed42-8702")
    for text in ("avg-seed4-1a2b", "avg-seed4-1", "avg-seed4-", "avg-seed4", first):  # seed 42 begins so too
        assert found(client, text) == first
    for text in ("avg-seed42-8702", "avg-seed42-87", "avg-seed42", second):
        assert found(client, text) == second
    for text in ("", "max", "vg-seed42", "avg-seed42-87020", "AVG-seed42", "0" * 32, second[:31]):
        with pytest.raises(InputError, match=f"^{text}: no such run on the tracking server$"):
            found(client, text)


def test_the_name_on_the_screen_finds_a_run(client):
    """That of `mlflow run --run-name`, of a run that was renamed there, or that an earlier version gave."""
    named, old = begun(client, "max-seed1-1a2b", "monday"), begun(client, "avg-seed42-8702c031", "avg-seed42")
    begun(client, "avg-seed42-1111")
    for text in ("monday", "mon", "max-seed1", "max-seed1-1a2b"):
        assert found(client, text) == named
    for text in ("avg-seed42", "avg-seed42-8702c031", "avg-seed42-87"):
        assert found(client, text) == old
    client.update_run(named, name="tuesday")
    assert found(client, "tuesday") == named
    with pytest.raises(InputError, match="monday: no such run"):
        found(client, "monday")


@pytest.mark.parametrize("name", ODD)
def test_a_name_is_text_and_no_query(client, name):
    begun(client, "max-seed1-0000", "50xxa")  # what a wildcard would find
    wanted = begun(client, "max-seed2-0000", name)
    begun(client, "max-seed3-0000", name[:-1])
    assert found(client, name) == wanted
    with pytest.raises(InputError, match="no such run"):
        found(client, f"{name}%")


def test_a_server_answers_as_a_store_does(server, letters, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    client = servers.own_client()
    wanted = {name: begun(client, f"max-seed{number}-fade", name) for number, name in enumerate(ODD)}
    assert {name: found(client, name) for name in ODD} == wanted
    ours = journaled()
    theirs = begun(client, ours.name)
    created = publish(ours).info.run_id
    assert created != theirs
    (ours.folder / "published.json").unlink()
    assert server_runs.find_earlier(client, ours, "").info.run_id == created


def test_several_runs_are_listed_with_what_tells_them_apart(client):
    for tail in "ab":
        begun(client, f"avg-seed42-000{tail}", "avg-seed42")
    with pytest.raises(InputError) as error:
        found(client, "avg-seed42")
    assert str(error.value) == (
        "avg-seed42: found 2 runs: avg-seed42-000b, avg-seed42-000a; type more of the name, or MLflow's run id"
    )
    twins = [begun(client, "max-seed1-1a2b") for _ in range(2)]  # of two machines
    for text in ("max-seed1-1a2b", "max"):
        with pytest.raises(InputError) as error:
            found(client, text)
        assert all(f"max-seed1-1a2b (run {number})" in str(error.value) for number in twins)
    for number in range(12):
        begun(client, f"conv-seed{number}-0000")
    with pytest.raises(InputError, match="more than 10 runs: conv") as error:
        found(client, "conv")
    assert str(error.value).count("conv-seed") == 10
    assert "\n" not in str(error.value)


def test_what_has_no_model_or_was_deleted_does_not_count(client):
    wanted, gone = begun(client, "avg-seed42-8702"), begun(client, "avg-seed42-8888")
    client.delete_run(gone)
    for title in ("avg-seed42-8702 on small test", "avg-seed42-87", "avg vs max, small, 10 seeds"):
        client.create_run("0", run_name=title)
    assert found(client, "avg-seed42-87") == found(client, "avg-seed42") == found(client, "avg") == wanted
    with pytest.raises(InputError, match=f"run {gone} was deleted; restore it with: mlflow runs restore"):
        found(client, gone)


def test_a_run_of_another_machine_with_the_same_name_is_never_taken_for_ones_own(client, letters):
    ours = journaled()
    theirs = begun(client, ours.name)
    created = publish(ours).info.run_id
    assert created != theirs
    assert client.get_run(theirs).data.params == {}
    # a run whose id did not arrive is found again, and the other one is not
    (ours.folder / "published.json").unlink()
    assert server_runs.find_earlier(client, ours, "").info.run_id == created
    assert client.get_run(created).info.start_time == ours.record["started"]


# --- on disk ----------------------------------------------------------------------------------------------------------


def renamed(record, name):
    record.folder.rename(run_record.folder() / name)
    return name


def test_names_on_disk_are_found_by_the_same_rules(letters):
    record = journaled()
    for name in ("max-seed4-1a2b", "max-seed42-8702", "max-seed42-8702c031"):
        (run_record.folder() / name).mkdir()
        (run_record.folder() / name / "record.json").write_bytes((record.folder / "record.json").read_bytes())
    old = renamed(record, "avg-seed1-00000000")
    assert run_record.find_name("max-seed4") == "max-seed4-1a2b"
    assert run_record.find_name("max-seed42-8702") == "max-seed42-8702"
    assert run_record.find_name("max-seed42-8702c") == "max-seed42-8702c031"
    assert run_record.find("avg").name == old
    for text in ("", ".", "..", f"../runs/{old}", "seed"):
        assert run_record.find_name(text) is None
    with pytest.raises(InputError, match="max-seed42: found 2 runs: max-seed42-8702"):
        run_record.find("max-seed42")


def test_no_two_runs_get_the_same_name(monkeypatch, letters):
    first = journaled()
    tails = iter([first.name[-4:], "beef0000", *["beef1111"] * run_record.TRIES, "8702c031"])
    monkeypatch.setattr(run_record, "uuid", SimpleNamespace(uuid4=lambda: SimpleNamespace(hex=next(tails))))
    assert [journaled().name for _ in range(2)] == ["max-seed42-beef", "max-seed42-8702c031"]


def test_commands_about_records_take_every_name(capsys, letters, client):
    record = journaled()
    run_id = publish(record).info.run_id
    client.update_run(run_id, name="it's 50%")  # in the UI
    texts = (record.name, record.name[:-2], run_id, "it's 50%", "it's")
    for command, some in ((["sync"], texts), (["figures"], texts[-1:]), (["train", "--resume"], texts[-1:])):
        for text in some:
            code, _, err = run(capsys, *command, text)
            assert (code, err) == (0, ""), text
        code, _, err = run(capsys, *command, "monday")
        assert_refused(code, err, "monday: no such run in")


def test_a_beginning_of_several_records_is_refused_by_name(capsys, letters):
    names = [journaled().name for _ in range(2)]
    for command in (("sync",), ("train", "--resume")):
        code, _, err = run(capsys, *command, "max-seed42")
        assert_refused(code, err, "max-seed42: found 2 runs: ", *names, "type more of the name")


def test_without_a_server_names_on_disk_are_enough(capsys, letters, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    record = journaled(CONFIG)
    assert sync.find(record.name[:-1]).name == record.name
    code, _, err = run(capsys, "train", "--resume", "monday", "--timeout", "3")
    assert_refused(code, err, "monday: no such run in", "train it anew")


def test_the_name_in_mlflow_is_that_of_the_record(letters, monkeypatch):
    record = journaled()
    assert publish(record).info.run_name == record.name
    monkeypatch.setenv("MLFLOW_RUN_ID", mlflow.MlflowClient().create_run("0").info.run_id)
    adopted = journaled()
    assert publish(adopted).info.run_name == adopted.name
