"""The team server with its real parts, and poolnet on it as people with different rights use it."""

import gc
import json
import os
import re
import signal
import stat
import subprocess
import urllib.error
import urllib.request
from base64 import b64encode
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import forked
import mlflow
import numpy as np
import pytest
from conftest import STUDY, enter, inside, make_arrays, world
from PIL import Image

from poolnet import files
from poolnet.upkeep import parts

missing = [name for name in parts.PACKAGES if not find_spec(name)]
pytestmark = pytest.mark.skipif(
    bool(missing), reason=f"{', '.join(missing)} not installed: pip install 'poolnet[team]'"
)


def up(home, *options, begin=forked.start):
    """`poolnet team up`; with `begin=subprocess.Popen` as a user starts it."""
    command = [*forked.POOLNET, "team", "up", *map(str, options)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "bufsize": 1}
    return begin(command, env=world(home) | {"PYTHONUNBUFFERED": "1"}, cwd=home, **pipes)


def said(process):
    """What the command prints until it says how it is used."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("Ctrl-C"):
            break
    text = "".join(lines)
    if "does not run as root" in text:
        pytest.skip(text.strip())
    assert "The team server is at" in text, text
    return text


def settings(team, user):
    lines = (team.folder / f"{user}.env").read_text(encoding="utf-8").splitlines()
    return dict(line.split("=", 1) for line in lines)


def alive(folder):
    """The programs whose notes are in a folder and that still run."""
    import psutil

    notes = [json.loads((folder / f"{name}.json").read_text()) for name in ("mlflow", "postgres", "object-store")]
    return [note["pid"] for note in notes if psutil.pid_exists(note["pid"])]


@pytest.fixture(scope="module")
def team(tmp_path_factory):
    """A running team server, and how it said it is used."""
    home = tmp_path_factory.mktemp("team server")
    port = parts.free_port()
    process = up(home, "--port", port, begin=subprocess.Popen)
    text = said(process)
    folder = home / "home" / "team"
    found = SimpleNamespace(
        uri=f"http://127.0.0.1:{port}", folder=folder, process=process, said=text, home=home, port=port
    )
    yield found
    found.process.send_signal(signal.SIGINT)
    rest, _ = found.process.communicate(timeout=60)
    assert found.process.returncode == 0, rest
    assert "The team server has ended" in rest
    assert not alive(folder)


@pytest.fixture
def as_user(team, tmp_path, monkeypatch):
    """Runs a command as a user of the team server, on a machine of his own."""

    def do(user, *args):
        place = tmp_path / user
        place.mkdir(exist_ok=True)
        return inside(*args, **settings(team, user), POOLNET_HOME=str(place))

    enter(tmp_path, monkeypatch)
    np.savez("letters.npz", **make_arrays())
    Path("study.toml").write_text(STUDY.replace("[1, 2, 3]", "[1, 2]"), encoding="utf-8")
    return do


def test_it_says_what_to_type_and_keeps_passwords_to_its_owner(team):
    assert team.uri in team.said
    assert "ada (EDIT)" in team.said
    for user in ("admin", "ada", "ben", "cleo"):
        password = settings(team, user)["MLFLOW_TRACKING_PASSWORD"]
        assert len(password) >= 24
        assert password not in team.said
    private = [path for path in team.folder.rglob("*") if path.suffix in (".env", ".ini", ".pem", ".toml")]
    private.append(team.folder / "secrets.json")
    assert len(private) == 9
    if os.name == "posix":
        assert stat.S_IMODE(team.folder.stat().st_mode) == 0o700
        assert {stat.S_IMODE(path.stat().st_mode) for path in private} == {0o600}


def test_all_parts_listen_on_loopback_only_and_no_password_is_in_an_argument_list(team):
    import psutil

    keys = json.loads((team.folder / "secrets.json").read_text())
    top = psutil.Process(team.process.pid)
    tree = [top, *top.children(recursive=True)]
    addresses = {c.laddr.ip for each in tree for c in each.net_connections("inet") if c.status == psutil.CONN_LISTEN}
    assert addresses == {"127.0.0.1"}
    words = " ".join(word for each in tree for word in each.cmdline())
    assert "postgres" in words
    assert not [name for name, key in keys.items() if key in words]


def test_every_command_works_for_a_user_who_made_neither_experiment_nor_model(team, as_user):
    trained = as_user("ada", "train", "--data", "letters.npz", "--epochs", "2", "--seed", "9")
    run = re.search(r"models:/poolnet/(\d+)", trained.stdout)
    assert trained.returncode == 0, trained.stderr
    name = next(Path("ada/runs").iterdir()).name
    Image.fromarray(make_arrays()["X_test"][0]).resize((60, 60)).save("letter.png")
    import torch

    import poolnet

    torch.save(poolnet.build_model("avg", seed=0).state_dict(), "weights.pt")
    first = f"models:/poolnet/{run[1]}"
    expected = [
        ("train", "--data", "letters.npz", "--epochs", "2", "--seed", "8"),
        ("sync", "--prune"),  # while there is one run, of which each byte is looked at
        ("train", "--data", "letters.npz", "--epochs", "2", "--pool", "avg", "--seed", "9"),
        ("sweep", "study.toml", "--workers", "1"),
        ("compare", "--study", "study.toml"),
        ("compare", "--study", "study.toml", "--plan"),
        ("compare", name, "avg-seed9"),
        ("evaluate", first),
        ("evaluate", first, "--no-publish"),
        ("promote", first),
        ("promote", "avg-seed9", "--force"),
        ("promote", "--rollback"),
        ("promote", "avg-seed9", "--force", "--alias", "champion-avg"),
        ("predict", "models:/poolnet@champion", "letter.png"),
        ("reproduce", name),
        ("register", "weights.pt", "--pool", "avg", "--data", "letters.npz"),
        ("figures", "avg-seed9"),
        ("sync",),
        ("clean",),
    ]
    for args in expected:
        done = as_user("ben", *args)
        assert done.returncode == 0, (args, done.stdout, done.stderr)


def test_who_may_only_look_can_score_compare_and_predict_and_nothing_else(team, as_user):
    made = as_user("ada", "train", "--data", "letters.npz", "--epochs", "2", "--seed", "33")
    model = re.search(r"models:/poolnet/\d+", made.stdout)[0]
    made = as_user("ada", "train", "--data", "letters.npz", "--epochs", "2", "--seed", "33", "--pool", "avg")
    assert made.returncode == 0, made.stderr
    Image.fromarray(make_arrays()["X_test"][0]).resize((60, 60)).save("letter.png")
    Path("study.toml").write_text(STUDY.replace("[1, 2, 3]", "[51]"), encoding="utf-8")  # that nobody has swept
    before = state(team)
    gc.collect()  # what other tests have left would be said in the midst of a command
    for args in (
        ("evaluate", model, "--no-publish"),
        ("compare", "max-seed33", "avg-seed33", "--no-publish"),
        ("predict", model, "letter.png"),
    ):
        done = as_user("cleo", *args)
        assert done.returncode == 0, (args, done.stderr)
    refused = {
        ("evaluate", model): 1,
        ("compare", "max-seed33", "avg-seed33"): 1,
        ("promote", model, "--force"): 1,
        ("reproduce", "max-seed33"): 3,
        ("train", "--data", "letters.npz", "--epochs", "1"): 3,
        ("sweep", "study.toml", "--workers", "1"): 3,
        ("team", "grant", "cleo", "--right", "manage"): 1,
    }
    for args, code in refused.items():
        done = as_user("cleo", *args)
        assert done.returncode == code, (args, done.stdout, done.stderr)
        last = done.stderr.strip().splitlines()[-1]
        assert "may not do this there" in done.stderr, (args, done.stderr)
        assert last.startswith("poolnet: error: "), done.stderr
        assert "Traceback" not in done.stderr
    assert state(team) == before


def state(team):
    """What a user may have changed: runs, tags of the experiment, versions, aliases."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings(team, "admin").items():
            patch.setenv(name, value)
        client = mlflow.MlflowClient(team.uri)
        runs = sorted((run.info.run_id, run.info.status, len(run.data.tags)) for run in client.search_runs(["0"]))
        model = client.get_registered_model("poolnet")
        versions = {v.version: v.tags for v in client.search_model_versions("name = 'poolnet'")}
        return runs, client.get_experiment("0").tags, model.aliases, model.tags, versions


def test_a_run_that_the_server_has_lost_is_found_out_and_published_again(team, as_user, tmp_path):
    """To a run that is not there, a server with users answers that it is forbidden."""
    assert as_user("ben", "train", "--data", "letters.npz", "--epochs", "2", "--seed", "44").returncode == 0
    (memory,) = (tmp_path / "ben" / "runs").glob("*/published.json")
    known = files.read_json(memory)
    (copy,) = known["servers"].values()
    files.write_json(memory, {**known, "servers": {team.uri: {**copy, "run_id": "0" * 32}}})
    asked = as_user("ben", "doctor", "--json")
    (records,) = [each for each in json.loads(asked.stdout)["checks"] if each["check"] == "records"]
    assert (asked.returncode, records["ok"]) == (1, False)
    assert "poolnet sync" in records["cure"]
    done = as_user("ben", "sync")
    assert done.returncode == 0, done.stdout
    assert as_user("ben", "doctor").returncode == 0


def test_nobody_without_a_password_reads_or_writes(team):
    keys = settings(team, "ada")
    wrong = b64encode(f"ada:{keys['MLFLOW_TRACKING_PASSWORD']}x".encode()).decode()
    experiment, users = "/api/2.0/mlflow/experiments/get?experiment_id=0", "/ajax-api/2.0/mlflow/users/list"
    artifact = "/api/2.0/mlflow-artifacts/artifacts/0/x"
    for path, method in ((experiment, "GET"), (users, "GET"), (artifact, "GET"), (artifact, "PUT")):
        for headers in ({}, {"Authorization": f"Basic {wrong}"}):
            data = b"x" if method == "PUT" else None
            request = urllib.request.Request(team.uri + path, headers=headers, method=method, data=data)
            assert status(request) == 401, (path, method)


def status(request):
    """The status of an answer that refuses."""
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(request, timeout=20)
    error.value.close()
    return error.value.code


def test_who_is_denied_an_experiment_reads_nothing_of_it(team, tmp_path, monkeypatch):
    for name, value in settings(team, "admin").items():
        monkeypatch.setenv(name, value)
    client = mlflow.MlflowClient(team.uri)
    experiment_id = client.create_experiment("salaries")
    run_id, other = client.create_run(experiment_id).info.run_id, client.create_run("0").info.run_id
    (tmp_path / "note.txt").write_text("1,000")
    client.log_artifact(run_id, str(tmp_path / "note.txt"))
    denied = {"username": "cleo", "resource_type": "experiment", "resource_id": experiment_id, "permission": "DENY"}
    asked(team, "admin", "/api/3.0/mlflow/users/permissions/grant", denied)
    artifacts, note = "/api/2.0/mlflow-artifacts", f"{experiment_id}/{run_id}/artifacts/note.txt"
    paths = (
        *(f"{artifacts}/artifacts/{way}{note}" for way in ("", "0/../", "0/%2e%2e/", "0/..%2f", "./", "/")),
        *(f"{artifacts}/presigned/{note}", f"{artifacts}/artifacts?path={experiment_id}/{run_id}/artifacts"),
        *(f"/get-artifact?run_uuid={run_id}&path=note.txt", f"/get-artifact?run_uuid={other}&path=../../../{note}"),
        *(f"/api/2.0/mlflow/{what}?run_id={run_id}" for what in ("runs/get", "artifacts/list")),
        f"/api/2.0/mlflow/experiments/get?experiment_id={experiment_id}",
    )
    assert asked(team, "admin", paths[0])[:2] == (200, "1,000")
    for path in paths:
        code, text = asked(team, "cleo", path)
        assert code in (400, 403, 500), path
        assert "1,000" not in text


def asked(team, user, path, message=None):
    """The status and the text of an answer."""
    keys = settings(team, user)
    login = b64encode(f"{user}:{keys['MLFLOW_TRACKING_PASSWORD']}".encode()).decode()
    headers = {"Authorization": f"Basic {login}", "Content-Type": "application/json"}
    data = json.dumps(message).encode() if message else None
    request = urllib.request.Request(team.uri + path, data, headers)
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def test_the_object_store_gives_nothing_to_other_users_of_the_machine(team):
    import psutil

    (store,) = [each for each in psutil.Process(team.process.pid).children() if "weed" in each.name()]
    words = " ".join(store.cmdline())
    ports = {name: int(number) for name, number in re.findall(r"-(\w+)\.port=(\d+)", words)}
    for url in (f"{ports['s3']}/artifacts/ready", f"{ports['filer']}/buckets/artifacts/ready", f"{ports['filer']}/"):
        assert status(f"http://127.0.0.1:{url}") in (401, 403), url


def test_rights_are_given_replaced_and_refused(team, as_user):
    assert "cleo has READ" in as_user("admin", "team", "grant", "cleo", "--right", "read").stdout
    unknown = as_user("admin", "team", "grant", "nobody")
    assert (unknown.returncode, unknown.stdout) == (2, "")
    assert "no such user" in unknown.stderr
    assert as_user("ada", "team", "grant", "cleo").returncode == 1


def test_who_may_edit_cannot_clean_until_an_administrator_lets_him_manage(team, as_user, monkeypatch):
    for name, value in settings(team, "ada").items():
        monkeypatch.setenv(name, value)
    client = mlflow.MlflowClient(team.uri)
    run_id = client.create_run("0", tags={"mlflow.source.name": "poolnet compare"}).info.run_id
    client.set_terminated(run_id, "FAILED")
    refused = as_user("ben", "clean", "failed", "--yes")
    assert (refused.returncode, refused.stdout, refused.stderr.count("\n")) == (1, "", 1)
    assert "nothing was deleted" in refused.stderr
    assert "poolnet team grant USER --right manage" in refused.stderr
    assert client.get_run(run_id).info.lifecycle_stage == "active"
    as_user("admin", "team", "grant", "ben", "--right", "manage")
    assert as_user("ben", "clean", "failed", "--yes").returncode == 0
    assert client.get_run(run_id).info.lifecycle_stage == "deleted"
    as_user("admin", "team", "grant", "ben")


def test_a_server_without_users_has_no_rights_to_give(server):
    done = inside("team", "grant", "ada", MLFLOW_TRACKING_URI=server)
    assert done.returncode == 1
    assert "the server has no users" in done.stderr
    done = inside("team", "grant", "ada")
    assert done.returncode == 2
    assert "has no users" in done.stderr


def test_a_second_one_and_a_used_port_are_refused_in_one_line(team, tmp_path):
    again = up(team.home, "--port", parts.free_port())
    out, _ = again.communicate(timeout=60)
    assert again.returncode == 1
    assert re.fullmatch(r"poolnet: error: .*team.lock: held by process \d+ .*\n", out)
    other = up(tmp_path, "--port", team.port)
    out, _ = other.communicate(timeout=60)
    assert other.returncode == 2
    assert out.startswith(f"poolnet: error: --port {team.port}: cannot be used")


def test_a_killed_one_leaves_nothing_that_the_next_cannot_end_and_its_data_stay(team, as_user):
    """It is the last test here, and the next one takes its place."""
    made = as_user("ada", "train", "--data", "letters.npz", "--epochs", "2", "--seed", "61")
    assert made.returncode == 0, made.stderr
    team.process.kill()
    team.process.wait()
    team.process.stdout.close()
    left = alive(team.folder)
    assert len(left) == 3
    team.port = parts.free_port()
    team.process = up(team.home, "--port", team.port)
    said(team.process)
    assert not {*left} & {*alive(team.folder)}
    found = as_user("ben", "evaluate", "max-seed61", "--no-publish")
    assert found.returncode == 0, found.stderr
