"""Tracking addresses: what they mean, what is refused, what is never seen of them; and servers that do not answer."""

import contextlib
import http.server
import os
import shlex
import shutil
import socket
import subprocess
import sys
import threading
import time
from importlib.util import find_spec
from pathlib import Path

import forked
import pytest
from conftest import ROOT, assert_refused, inside, keep_exports, poolnet, ran, world
from conftest import run as command
from finished_runs import journaled, publish
from mlflow.utils.file_utils import path_to_local_sqlite_uri

from poolnet.errors import InputError, NoAnswer, RunError
from poolnet.files import home
from poolnet.runs import provenance, run_record
from poolnet.secret import hidden
from poolnet.tracking import addresses, server_runs, servers, views, waiting

ODD = "Büro x#1 100%'s"


# --- what an address means -------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("nothing_kept")
@pytest.mark.parametrize("name", [ODD, "a%20b", "a b", "50%", "~"])
def test_a_store_is_found_however_its_address_is_written(name, tmp_path, empty_store):
    folder = tmp_path / name
    folder.mkdir()
    if name != "a%20b":  # there it is made, where most can go wrong
        shutil.copy(empty_store, folder)
    expected = folder / "mlflow.db"
    encoded = path_to_local_sqlite_uri(str(expected))  # as `mlflow run` hands it on
    for uri in (f"sqlite:///{expected}", encoded, f"{encoded}?timeout=30"):
        assert addresses.sqlite_file(uri) == expected
        whole = addresses.absolute(uri, tmp_path)
        assert addresses.sqlite_file(whole) == expected
        assert addresses.absolute(whole, tmp_path) == whole
    assert servers.client_of(addresses.absolute(encoded, tmp_path)).get_experiment("0").name == "Default"
    assert addresses.absolute(f"sqlite:///{name}/mlflow.db", tmp_path) == addresses.absolute(encoded, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {name, "mlflow.db"}


def test_a_folder_that_is_there_decides_between_two_readings(tmp_path):
    plain, literal = tmp_path / "a b" / "m.db", tmp_path / "a%20b" / "m.db"
    uri = f"sqlite:///{literal}"
    literal.parent.mkdir()
    assert addresses.sqlite_file(uri) == literal
    plain.parent.mkdir()
    assert addresses.sqlite_file(uri) == plain  # as SQLAlchemy reads it
    literal.touch()
    assert addresses.sqlite_file(uri) == literal


def test_a_tilde_means_the_users_own_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "me"))
    assert addresses.sqlite_file("sqlite:///~/m.db") == tmp_path / "me" / "m.db"
    monkeypatch.setenv("POOLNET_HOME", "~/poolnet")
    assert home() == tmp_path / "me" / "poolnet"


def test_mlflow_run_works_in_a_folder_of_any_name(tmp_path, letters, monkeypatch):
    """README's first command, from a copy of the project, with the store that MLflow makes there."""
    clone = tmp_path / "clones" / f"{ODD} a%20b"
    shutil.copytree(ROOT / "poolnet", clone / "poolnet", ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("MLproject", "conda.yaml"):
        shutil.copy(ROOT / file, clone)
    shutil.move(letters, clone)
    keep_exports(clone / ".poolnet")
    for variable in ("MLFLOW_TRACKING_URI", "PYTHONPATH", "POOLNET_HOME"):
        monkeypatch.delenv(variable)
    monkeypatch.chdir(clone)
    command = ["mlflow", "run", ".", "--env-manager", "local", "-P", f"data={clone / letters.name}", "-P", "epochs=1"]
    finished = ran(*forked.PYTHON, *command)  # which starts the copy's command from its very beginning
    assert finished.returncode == 0, finished.stderr
    (line,) = [line for line in finished.stdout.splitlines() if line.startswith("Look at it: mlflow ui ")]
    assert addresses.sqlite_file(shlex.split(line)[-1]) == clone / "mlflow.db"  # as a shell reads it
    (run,) = servers.client_of(addresses.of_file(clone / "mlflow.db")).search_runs(["0"])
    assert run.info.status == "FINISHED"
    assert run.data.tags["poolnet.run"] == run_record.names()[0]
    assert not list(clone.parent.rglob("*.part"))
    assert {path.name for path in clone.parent.iterdir()} <= {clone.name, f"{ODD} a b"}  # the last one is MLflow's


# --- what can never work ---------------------------------------------------------------------------------------------

NEVER = {  # an address, and what the line says
    **({} if find_spec("psycopg") else {"postgresql://me:secret@127.0.0.1:9/x": "pip install 'poolnet[postgres]'"}),
    "postgresql+pygresql://me:secret@127.0.0.1:9/x": "a driver that SQLAlchemy does not know",
    "mysql+nodriver://me:secret@127.0.0.1:9/x": "nodriver",
    "mysql://127.0.0.1/x": "mysqlclient",
    "mssql://127.0.0.1/x": "pyodbc",
    "gopher://127.0.0.1/x": "expected an address such as",
    "sqlite://": "in memory",
    "sqlite:///:memory:": "in memory",
    "sqlite://mlflow.db": "a slash is missing",
    "sqlite:////dev/null": "a folder or a device",
    "sqlite:///.": "a folder or a device",
    "sqlite:////dev/null/x/m.db": "cannot be made",
    "file:///x": "no runs any more",
    "mlruns": "expected an address such as",
    "http://": "expected http://HOST:PORT",
    "http://host:port": "expected http://HOST:PORT",
}


@pytest.mark.skipif(sys.platform == "win32", reason="names of devices")
@pytest.mark.parametrize("uri", NEVER)
def test_an_address_that_can_never_work_is_refused_before_anything_is_done(uri, capsys, letters, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    for driver in ("psycopg", "psycopg2", "MySQLdb", "pyodbc"):  # as where none is installed
        monkeypatch.setitem(sys.modules, driver, None)
    for args in (["train", "--data", letters], ["evaluate", "models:/poolnet/1"]):
        code, out, err = command(capsys, *args)
        assert_refused(code, err, "MLFLOW_TRACKING_URI", NEVER[uri])
        assert out == ""
        assert "secret" not in err
    assert run_record.names() == []


def test_a_command_refuses_an_address_before_it_imports_mlflow(tmp_path):
    code = (
        "import sys; from poolnet.cli import main\n"
        "try: main(['evaluate', 'models:/poolnet/1'])\n"
        "except SystemExit as end: assert end.code == 2 and 'mlflow' not in sys.modules"
    )
    environment = world(tmp_path, "gopher://127.0.0.1/x")
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (0, 1), done.stderr


def test_a_store_in_a_folder_that_may_not_be_written_is_refused_before_training(tmp_path, capsys, letters, monkeypatch):
    protected = tmp_path / "protected"
    protected.mkdir(mode=0o555)
    places = [place for place in (protected, Path("/proc/1")) if place.exists() and not os.access(place, os.W_OK)]
    if not places:
        pytest.skip("this user may write everywhere")
    place = places[0]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{place}/m.db")
    code, out, err = command(capsys, "train", "--data", letters)
    assert_refused(code, err, f"found 'sqlite:///{place}/m.db', which this user may not write")
    assert (out, run_record.names()) == ("", [])


def test_a_server_that_is_down_is_said_before_training(letters):
    options = ("--data", letters, "--epochs", 1, "--timeout", 0)
    finished = inside("train", *options, MLFLOW_TRACKING_URI="http://127.0.0.1:9")
    assert finished.returncode == 3
    first, *_ = finished.stderr.splitlines()
    assert first.startswith("poolnet: warning: http://127.0.0.1:9 cannot be reached (Connection refused); ")
    assert first.endswith("poolnet sync")


# --- servers that do not answer --------------------------------------------------------------------------------------


@pytest.fixture(params=["silent", "dripping"])
def hanging(request):
    """The address of a server that accepts and never answers, or sends a byte of its answer now and then."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve(connection):
            with contextlib.suppress(OSError), connection:
                connection.recv(65536)
                if request.param == "dripping":
                    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n{")
                while connection.recv(65536) if request.param == "silent" else connection.sendall(b" ") is None:
                    time.sleep(0.2)

        def accept():
            with contextlib.suppress(OSError):
                while True:
                    threading.Thread(target=serve, args=listening.accept()[:1], daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


def test_every_call_of_a_server_that_hangs_ends(hanging, monkeypatch):
    monkeypatch.setattr(waiting, "_silent", {})
    monkeypatch.setattr(waiting, "_limit", 0.5)
    client = servers.client_of(hanging)
    for seconds in (0.5, 0):  # and the second at once
        began = time.monotonic()
        with pytest.raises(NoAnswer, match=r"no answer for 0\.5 s"):
            client.search_experiments()
        assert seconds <= time.monotonic() - began < seconds + 0.5
    monkeypatch.setattr(waiting, "_limit", 20)
    began = time.monotonic()
    with waiting.within(1), waiting.within(60):  # a block within another has no more time
        for call in (client.search_experiments, client.search_registered_models):
            with pytest.raises(NoAnswer):
                call()
    assert 1 <= time.monotonic() - began < 1.5


def test_a_server_that_had_less_time_is_waited_for_again(hanging, monkeypatch):
    monkeypatch.setattr(waiting, "_silent", {})
    client = servers.client_of(hanging)
    with waiting.within(1):
        time.sleep(0.5)
        with pytest.raises(NoAnswer, match=r"no answer for 0\.5 s"):
            client.search_experiments()
    began = time.monotonic()
    with waiting.within(1), pytest.raises(NoAnswer, match="no answer for 1 s"):
        client.search_experiments()
    assert 1 <= time.monotonic() - began < 2


def test_views_are_tried_again_after_a_server_was_silent(hanging, monkeypatch):
    monkeypatch.setattr(waiting, "_silent", {})
    monkeypatch.setattr(waiting, "_limit", 0.5)
    client = servers.client_of(hanging)
    for _ in range(2):
        with pytest.raises(NoAnswer):
            views.keep(client, "0", "letters", "0" * 64)


def test_a_command_ends_in_one_line_when_the_server_hangs(hanging, letters):
    finished = poolnet("evaluate", "models:/poolnet/1", "--timeout", 1, env=world(letters.parent, hanging))
    assert finished.returncode == 1
    cure = "start the server, correct MLFLOW_TRACKING_URI, or wait longer with --timeout; poolnet doctor says more"
    assert finished.stderr == f"poolnet: error: {hanging}: no answer for 1 s; {cure}\n"


def test_a_library_call_refuses_an_address_and_names_a_server_that_hangs(hanging, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "mlruns")
    with pytest.raises(InputError, match="MLFLOW_TRACKING_URI: found 'mlruns'"), servers.own_server():
        raise AssertionError
    monkeypatch.setattr(waiting, "_silent", {})
    monkeypatch.setenv("MLFLOW_TRACKING_URI", hanging)
    refused = pytest.raises(RunError, match=rf"{hanging}: no answer for 1 s; start the server")
    with refused, waiting.within(1), servers.own_server():
        servers.own_client()


# --- servers that refuse, or are none --------------------------------------------------------------------------------


@pytest.fixture
def answers(request):
    """The address of a server that answers everything with one status and text."""
    status, text = request.param

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status)
            self.end_headers()
            self.wfile.write(text)

        do_POST = do_GET

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as serving:
        threading.Thread(target=serving.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{serving.server_port}"
        serving.shutdown()


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        ((200, b"{}"), "no MLflow server"),
        ((200, b"<html>hello</html>"), "no MLflow server"),
        ((401, b"who are you?"), "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"),
        ((403, b"no"), "ask who runs the server for permission"),
        ((404, b"not here"), "no MLflow server is there"),
    ],
    indirect=["answers"],
)
def test_a_server_that_refuses_or_is_none_is_named_with_the_cure(answers, said, capsys, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", answers)
    code, _, err = command(capsys, "promote")
    assert (code, err.count("\n")) == (1, 1)
    assert err.startswith(f"poolnet: error: {answers}: ")
    assert said in err


def test_a_deleted_experiment_is_named_with_the_command_that_restores_it(letters, capsys, monkeypatch):
    client = servers.own_client()
    number = client.create_experiment("x")
    client.delete_experiment(number)
    for name, value in (("MLFLOW_EXPERIMENT_NAME", "x"), ("MLFLOW_EXPERIMENT_ID", number)):
        monkeypatch.setenv(name, value)
        code, _, err = command(capsys, "compare", "--by", "pool")
        assert_refused(code, err, f"mlflow experiments restore --experiment-id {number}")


def test_a_run_is_found_behind_a_thousand_experiments(letters, monkeypatch):
    client = servers.own_client()
    run = publish(journaled())
    page, asked = client.search_experiments, []

    def one_a_page(**options):
        asked.append(options)
        return page(**options, max_results=1)

    for name in "abc":
        client.create_experiment(name)
    monkeypatch.setattr(client, "search_experiments", one_a_page)
    assert server_runs.look_up(client, run.data.tags["poolnet.run"]).info.run_id == run.info.run_id
    assert len(asked) == 4


# --- what is never seen ----------------------------------------------------------------------------------------------

PASSWORDS = [
    "p4ssw0rd",
    "p4s#sw0rd",
    "p4s/sw0rd",
    "p4s?sw0rd",
    "p4s[sw0rd",
    "p4s]sw0rd",
    "p4s@sw0rd",
    "p4s%23sw0rd",
    "p4:sw0rd",
]


@pytest.mark.parametrize("scheme", ["http", "https", "postgresql", "mysql+pymysql"])
@pytest.mark.parametrize("password", PASSWORDS)
def test_a_password_is_taken_out_of_an_address(password, scheme):
    assert addresses.shown(f"{scheme}://me:{password}@host:5000/x") == f"{scheme}://me@host:5000/x"
    shown = addresses.shown(f"{scheme}://me:{password}@host/x?password={password}&timeout=3&accessToken={password}")
    assert "sw0rd" not in shown
    text = hidden(f"cannot open {scheme}://me:{password}@host/x?token=t0ken: refused")
    assert "sw0rd" not in text
    assert "t0ken" not in text


def test_an_address_without_a_password_stays_as_it_is():
    for same in (
        "http://host:5000",
        "http://me@host",
        "sqlite:////a@b/c:d@e.db?timeout=30",
        "sqlite:///C:/a/b.db",
        "databricks",
        "",
    ):
        assert addresses.shown(same) == same
    assert addresses.shown("postgresql://host/x?sslmode=require&password=p") == "postgresql://host/x?sslmode=require"


def test_no_secret_is_stored_printed_or_published(letters, tmp_path):
    """Planted in every part of the address, searched for in everything that is written."""
    uri = "http://me:pl#nt/?[ed@127.0.0.1:9/x?password=pl4nted&token=pl4nted"
    for args in (
        ["train", "--data", letters, "--epochs", 1, "--timeout", 1],
        ["sync", "--timeout", 1],
        ["evaluate", "models:/poolnet/1"],
        ["sync", "--to", f"sqlite:///{tmp_path}/mlflow.db"],
    ):
        finished = inside(*args, MLFLOW_TRACKING_URI=uri)
        for text in (finished.stdout, finished.stderr):
            assert "pl4nted" not in text
            assert "pl#nt" not in text
            assert "Traceback" not in text
    assert finished.returncode == 0, finished.stdout + finished.stderr
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 10
    for path in files:
        assert not any(word in path.read_bytes() for word in (b"pl4nted", b"pl#nt", b"pl%23nt")), path


# --- whose settings these are ----------------------------------------------------------------------------------------


def test_importing_poolnet_changes_no_setting_of_the_users(tmp_path):
    script = """
import os
before = dict(os.environ)
import poolnet.cli
from poolnet.tracking import publisher, registry, servers, sync
assert {name: value for name, value in os.environ.items() if name.startswith("MLFLOW_")} == {
    name: value for name, value in before.items() if name.startswith("MLFLOW_")
}
"""
    finished = subprocess.run([sys.executable, "-c", script], env=world(tmp_path), capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr


def test_the_difference_of_the_code_is_that_of_git_whatever_the_user_sees_it_with(tmp_path, monkeypatch):
    tracked = tmp_path / "clone" / "poolnet" / "__init__.py"
    tracked.parent.mkdir(parents=True)
    tracked.write_text("one\n")
    git = ["git", "-C", str(tracked.parent), "-c", "user.name=me", "-c", "user.email=me@here"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-qm", "one"], check=True)
    tracked.write_text("two\n")
    for name, value in (("diff.external", "echo mine"), ("color.diff", "always"), ("color.ui", "always")):
        subprocess.run([*git, "config", name, value], check=True)
    monkeypatch.setattr(provenance, "__file__", str(tracked))
    _, dirty, diff = provenance.code_state()
    assert dirty == "true"
    assert diff.startswith(b"diff --git a/__init__.py")
    assert b"\n+two\n" in diff
