"""What `poolnet doctor` finds, where one thing is broken, on real servers and stores; and that its cure is right."""

import contextlib
import importlib.util
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import time
from types import SimpleNamespace

import forked
import proxy
import pytest
from conftest import inside, poolnet, ran, wait_for, world
from finished_runs import journaled, publish
from mlflow.entities import ViewType

from poolnet import files
from poolnet.files import home
from poolnet.tracking import addresses, servers
from poolnet.upkeep import parts, rights

ADMIN, USERS = "admin", ("edith", "reader")
missing = [name for name in parts.PACKAGES if not importlib.util.find_spec(name)]
with_team_parts = pytest.mark.skipif(
    bool(missing), reason=f"{', '.join(missing)} not installed: pip install 'poolnet[team]'"
)


def password(user):
    return f"secret-word-of-{user}"


def as_user(uri, user, word=""):
    settings = {"MLFLOW_TRACKING_USERNAME": user, "MLFLOW_TRACKING_PASSWORD": word or password(user)}
    return settings | {"MLFLOW_TRACKING_URI": uri}


def doctor(settings=None, begin=inside):
    """The exit code of the command and its checks by name; it says no secret."""
    finished = begin("doctor", "--json", "--timeout", 3, **(settings or {}))
    assert finished.stderr == ""
    assert "secret" not in finished.stdout
    return finished.returncode, {check["check"]: check for check in json.loads(finished.stdout)["checks"]}


def assert_only(done, check, *words, also=()):
    """One alarm and no more, with these words."""
    code, checks = done
    assert [name for name, each in checks.items() if each["ok"] is False] == [check, *also], checks
    assert code == 1
    for word in words:
        assert word in f"{checks[check]['found']}; {checks[check]['cure']}"


def assert_well(done, *not_asked):
    code, checks = done
    assert [name for name, each in checks.items() if not each["ok"]] == [*not_asked], checks
    assert code == 0


def files_below(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class Database:
    """A PostgreSQL of one's own, which can be stopped and started."""

    def __init__(self, folder):
        self.part, beginning = parts.postgres(folder, "secret")
        self.address = f"{beginning}mlflow"
        self.stop()
        self.start()

    def stop(self):
        self.part.stop()

    def start(self):
        old = self.part
        fast = [*old.process.args, "-F"]  # MLflow's tables take five seconds, if each change waits for the disk
        self.part = parts.Part(old.name, fast, old.folder, ending=old.ending)
        wait_for(lambda: not addresses.unreachable(self.address))


@pytest.fixture(scope="module")
def team(tmp_path_factory):
    """A server with users on a database, and artifacts in a folder."""
    folder, port = tmp_path_factory.mktemp("team"), parts.free_port()
    database = Database(folder)
    command = [*forked.PYTHON, "mlflow", "server", "--app-name", "basic-auth", "--workers", "1", "--port", str(port)]
    command += ["--artifacts-destination", str(folder / "artifacts")]
    settings = {
        "MLFLOW_AUTH_ADMIN_PASSWORD": password(ADMIN),
        "MLFLOW_AUTH_CONFIG_PATH": str(folder / "auth.ini"),
        "MLFLOW_FLASK_SERVER_SECRET_KEY": "of this server",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_BACKEND_STORE_URI": database.address,
    }
    lines = ["[mlflow]", "default_permission = READ", f"database_uri = sqlite:///{folder}/auth.db"]
    lines += [f"admin_username = {ADMIN}", "auth_cache_ttl_seconds = 600"]  # a look at a password takes 0.1 s
    lines += ["authorization_function = mlflow.server.auth:authenticate_request_basic_auth"]
    (folder / "auth.ini").write_text("\n".join(lines))
    with (folder / "log").open("w") as log:
        process = forked.start(command, cwd=folder, env=world(folder) | settings, stdout=log, stderr=log)
    uri = f"http://127.0.0.1:{port}"
    try:
        wait_for(lambda: parts.mlflow_answers(port))
        with as_admin(uri) as client:
            for user in USERS:
                rights.create_user(client, user, password(user))
            rights.grant(client, "edith", "EDIT")
        yield SimpleNamespace(uri=uri, database=database, artifacts=folder / "artifacts")
    finally:
        process.terminate()
        process.wait()
        database.stop()


@contextlib.contextmanager
def as_admin(uri):
    with pytest.MonkeyPatch.context() as patch:
        for name, value in as_user(uri, ADMIN).items():
            patch.setenv(name, value)
        yield servers.client_of(uri)


# --- all is well ------------------------------------------------------------------------------------------------------


def test_a_newcomer_is_well_and_nothing_is_made(tmp_path, monkeypatch):
    new = tmp_path / "new"
    new.mkdir()
    monkeypatch.chdir(new)
    store = f"sqlite:///{new}/store/mlflow.db"
    code, checks = doctor({"POOLNET_HOME": str(new / "home"), "MLFLOW_TRACKING_URI": store})
    assert code == 0
    assert "the first run makes it" in checks["reachability"]["found"]
    assert checks["artifact"] == {
        "check": "artifact",
        "ok": None,
        "found": "not asked: there is no store yet",
        "cure": "",
    }
    assert [*new.iterdir()] == []


def test_a_store_of_ones_own_is_well_and_stays_as_it_is(letters, tmp_path):
    publish(journaled())
    before = files_below(tmp_path)
    done = doctor()
    assert_well(done)
    assert done[1]["records"]["found"] == "published there: 1, all of which are there"
    assert files_below(tmp_path) == before


@with_team_parts
def test_a_team_server_is_well_and_nothing_is_left_there(team):
    before = files_below(team.artifacts)
    assert_well(doctor(as_user(team.uri, ADMIN)))
    assert files_below(team.artifacts) == before
    with as_admin(team.uri) as client:
        assert client.search_runs(["0"], run_view_type=ViewType.ALL) == []


@with_team_parts
def test_a_user_who_may_edit_is_well_and_leaves_one_small_file(team):
    """Without the right to delete, that is: each time the same."""
    for _ in range(2):
        code, checks = doctor(as_user(team.uri, "edith"))
        assert code == 0
        assert "stays, since this user may not delete" in checks["artifact"]["found"]
    (content,) = files_below(team.artifacts).values()
    assert content == b"Written by `poolnet doctor` to see whether artifacts arrive. It may be removed.\n"


@with_team_parts
def test_runs_that_a_server_has_are_looked_for(team, letters, monkeypatch):
    for name, value in as_user(team.uri, "edith").items():
        monkeypatch.setenv(name, value)
    run = journaled()
    server_run = publish(run)
    assert doctor()[1]["records"]["found"] == "published there: 1, all of which are there"
    memory = run.folder / "published.json"
    memory.write_text(memory.read_text().replace(server_run.info.run_id, "0" * 32).replace("crc32", "unchecked"))
    assert_only(doctor(), "records", "1 of 1 runs", run.name, "poolnet sync")
    memory.write_text(memory.read_text().replace('"experiment_id": "0"', '"experiment_id": "999"'))
    assert '"999"' in memory.read_text()
    assert_only(doctor(), "records", "1 of 1 runs", run.name, "poolnet sync")


# --- what is broken ---------------------------------------------------------------------------------------------------


def test_a_server_that_is_down():
    done = doctor(as_user("http://me:secret@127.0.0.1:9", ADMIN))
    assert_only(done, "reachability", "http://me@127.0.0.1:9: Connection refused", "start it")
    assert done[1]["artifact"]["found"] == "not asked: the server cannot be reached"


class Older(proxy.Trouble):
    version = b"3.9.0"

    def answer(self, body):
        status, kind, content = super().answer(body)
        return status, kind, self.version if self.path == "/version" else content


@with_team_parts
def test_a_server_of_an_older_or_a_newer_version(team):
    with proxy.serving(team.uri, Older) as (uri, handler):
        done = doctor(as_user(uri, ADMIN))
        assert_only(
            done, "version", "MLflow 3.9.0 on the server is older", "pip install mlflow==3.", "mlflow db upgrade"
        )
        handler.version = b"4.0.0"
        assert_only(doctor(as_user(uri, ADMIN)), "version", "4.0.0 on the server is newer", "--upgrade poolnet")


@with_team_parts
def test_a_wrong_password(team):
    done = doctor(as_user(team.uri, ADMIN, "not the secret"))
    assert_only(
        done, "credentials", "refuses user admin", "correct MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
    )
    assert done[1]["database"]["found"] == "not asked: the server does not know this user"


@with_team_parts
def test_a_user_who_only_looks_until_granted_more(team):
    user = as_user(team.uri, "reader")
    done = doctor(user)
    words = ("user reader may not write in experiment Default", "poolnet team grant reader")
    assert_only(done, "experiment", *words, also=["registry"])
    assert done[1]["artifact"]["ok"] is None
    cure = done[1]["experiment"]["cure"].partition("poolnet ")[2]
    assert inside(*cure.split(), **as_user(team.uri, ADMIN)).returncode == 0
    assert doctor(user)[0] == 0


def test_tables_of_an_older_mlflow_until_upgraded(tmp_path):
    from alembic import command
    from alembic.script import ScriptDirectory
    from mlflow.store.db.utils import _get_alembic_config
    from mlflow.store.tracking.dbmodels.initial_models import Base
    from sqlalchemy import create_engine

    old = f"sqlite:///{tmp_path}/old.db"
    engine = create_engine(old)
    Base.metadata.create_all(engine)
    engine.dispose()
    config = _get_alembic_config(old)
    scripts = ScriptDirectory.from_config(config)
    command.upgrade(config, scripts.get_revision(scripts.get_current_head()).down_revision)
    env = {"MLFLOW_TRACKING_URI": old}
    done = doctor(env)
    assert_only(done, "schema", "of an older MLflow", "back it up", f"mlflow db upgrade {old}")
    *_, cure = done[1]["schema"]["cure"].partition("then: mlflow ")
    assert ran(*forked.PYTHON, "mlflow", *cure.split()).returncode == 0
    assert_well(doctor(env), "artifact")  # there is no experiment yet


@with_team_parts
def test_a_proxy_that_eats_what_is_put(team):
    with proxy.serving(team.uri) as (uri, handler):
        handler.trouble = "PUT"
        began = time.monotonic()
        env = os.environ | as_user(uri, ADMIN)
        done = doctor(begin=lambda *words: poolnet(*words, env=env))  # a process that gives up ends at once
        assert time.monotonic() - began < 8
    cure = "a proxy or a firewall that does not pass PUT"
    assert_only(done, "artifact", "an artifact of 2,000,000 bytes does not arrive: no answer for", cure)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such limit")
def test_a_full_disk():
    done = doctor(begin=lambda *words: ran(*forked.PYTHON, "trouble", "full_disk", *words))
    assert_only(done, "disk", str(home()), "takes no file of 1,000,000 bytes (File too large)", "poolnet clean")


class Behind(proxy.Trouble):
    def date_time_string(self, timestamp=None):
        return super().date_time_string(time.time() - 3600)


@with_team_parts
def test_a_clock_that_is_off_by_an_hour(team):
    with proxy.serving(team.uri, Behind) as (uri, _):
        assert_only(doctor(as_user(uri, ADMIN)), "clock", "s behind this machine's", "timedatectl set-ntp true")


HOLD = """
from poolnet.files import home, locked
with locked(home() / "promote.lock"):
    print("held", flush=True)
    input()
"""


def test_a_lock_that_is_held_until_its_process_ends():
    with subprocess.Popen([sys.executable, "-c", HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        holder.stdout.readline()
        assert_only(doctor(), "locks", f"promote.lock: held by process {holder.pid} on ", "end that process")
        holder.kill()
    assert_well(doctor(), "artifact")  # there is no experiment yet


def test_a_run_that_is_trained_is_no_alarm_as_long_as_it_goes_on(letters):
    run = journaled()
    with files.locked(run.folder / "lock"):
        assert_only(doctor(), "locks", f"{run.name}/lock: held by process {os.getpid()} on ")
        (run.folder / "metrics.jsonl").touch()
        code, checks = doctor()
    assert code == 0
    assert checks["locks"]["found"].startswith(f"{run.name}/lock: process {os.getpid()} on ")


def test_a_server_restored_from_an_older_backup_until_synced(letters, tmp_path):
    servers.own_client()
    shutil.copy(tmp_path / "mlflow.db", tmp_path / "backup.db")
    run = publish(journaled())
    shutil.copy(tmp_path / "backup.db", tmp_path / "mlflow.db")
    done = doctor()
    assert_only(done, "records", "1 of 1 runs", run.data.tags["poolnet.run"], "an older backup", "poolnet sync")
    assert inside("sync").returncode == 0
    assert_well(doctor())


def test_a_file_that_is_no_database(tmp_path):
    (tmp_path / "mlflow.db").write_bytes(b"not a database at all, but long enough to look at" * 100)
    assert_only(doctor(), "database", "file is not a database", "poolnet sync")


def test_a_damaged_data_set_and_an_odd_time_out():
    (home() / "data").mkdir()
    (home() / "data" / "mine.npz").write_bytes(b"PK, and no more")
    code, checks = doctor({"MLFLOW_HTTP_REQUEST_TIMEOUT": "20s"})
    assert code == 1
    assert {name for name, each in checks.items() if each["ok"] is False} == {"data sets", "time-outs"}
    assert "mine.npz: truncated or damaged" in checks["data sets"]["found"]
    assert "MLFLOW_HTTP_REQUEST_TIMEOUT: found '20s'" in checks["time-outs"]["found"]


def test_a_store_that_another_program_is_writing(tmp_path):
    with contextlib.closing(sqlite3.connect(tmp_path / "mlflow.db")) as writing:
        writing.execute("BEGIN IMMEDIATE")
        code, checks = doctor()
    assert code == 1
    assert "database is locked" in checks["experiment"]["found"]


def test_other_commands_point_to_it():
    finished = inside("promote", "--timeout", 1, MLFLOW_TRACKING_URI="http://127.0.0.1:9")
    assert finished.returncode == 1
    assert finished.stderr.endswith("; poolnet doctor says more\n")


@with_team_parts
def test_a_database_that_is_stopped_until_it_is_started(team):
    """The last test here, of which the others should not hear."""
    _, checks = doctor({"MLFLOW_TRACKING_URI": team.database.address})
    assert [name for name, each in checks.items() if not each["ok"]] == ["artifact"]
    assert checks["artifact"]["cure"] == "set MLFLOW_TRACKING_URI to the address of that server"
    team.database.stop()
    try:
        done = doctor(as_user(team.uri, ADMIN))
        assert_only(done, "database", "the server answers 503", "start the server's database")
        assert done[1]["artifact"]["found"] == "not asked: the server cannot read its database"
        done = doctor({"MLFLOW_TRACKING_URI": team.database.address})
        assert_only(done, "reachability", "postgres@127.0.0.1", "Connection refused")
    finally:
        team.database.start()
    wait_for(lambda: doctor(as_user(team.uri, ADMIN))[0] == 0)
