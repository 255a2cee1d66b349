"""Secrets and hostile content are planted wherever they can be, and searched for wherever anything is written."""

import base64
import contextlib
import http.server
import json
import os
import pickle
import re
import shlex
import subprocess
import sys
import threading
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import mlflow
import numpy as np
import psutil
import pytest
import torch
from conftest import ROOT, STUDY, Payload, enter, inside, make_arrays, world
from PIL import Image

import poolnet
from poolnet import files
from poolnet.runs import provenance
from poolnet.training.config import TrainConfig

MARK = "c4n4ry"  # is in each secret


def secret(place):
    return f"{MARK}-{place}-0123456789"


PLANTED = {  # where libraries that we use look for one
    name: secret(name.lower().replace("_", "-"))
    for name in (
        *("MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "MLFLOW_FLASK_SERVER_SECRET_KEY"),
        *("PGPASSWORD", "MYSQL_PWD", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AZURE_STORAGE_CONNECTION_STRING"),
    )
}
PLANTED["MLFLOW_TRACKING_USERNAME"] = "me"


def forms(text):
    """A text as it is, and as a request has it."""
    return text, base64.b64encode(text.encode()).decode().rstrip("=")


LOGINS = [f"me:{secret('uri')}", f"me:{PLANTED['MLFLOW_TRACKING_PASSWORD']}"]
SOUGHT = [MARK.encode(), *(form.encode() for login in LOGINS for form in forms(login))]


def found(content):
    content = content.encode() if isinstance(content, str) else content
    return [word for word in SOUGHT if word in content]


class Telltale(http.server.BaseHTTPRequestHandler):
    """A server that refuses, and tells all that it was told."""

    def answer(self):
        told = f"{self.requestline} {self.headers}"
        with contextlib.suppress(Exception):
            told += base64.b64decode(self.headers["Authorization"].split()[1]).decode()
        content = " ".join(told.split()).encode()
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.send_response(self.server.status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = answer

    def log_message(self, *args):
        pass


@contextlib.contextmanager
def telling(status):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Telltale) as serving:
        serving.status = status  # of each answer
        threading.Thread(target=serving.serve_forever, daemon=True).start()
        yield f"http://me:{secret('uri')}@127.0.0.1:{serving.server_port}"
        serving.shutdown()


@contextlib.contextmanager
def watched():
    """What others see of processes while the block runs.

    These are all argument lists of this machine, those that this process gives, and the addresses at which it and its
    children listen.
    """
    seen, addresses, over = set(), set(), threading.Event()

    def look():
        while not over.wait(0.2):
            for path in Path("/proc").glob("[0-9]*/cmdline"):
                with contextlib.suppress(OSError):
                    seen.add(path.read_bytes())
            for each in [psutil.Process(), *psutil.Process().children(recursive=True)]:
                with contextlib.suppress(psutil.Error):
                    addresses.update(c.laddr for c in each.net_connections("tcp") if c.status == psutil.CONN_LISTEN)

    begin = subprocess.Popen.__init__

    def __init__(self, args, *more, **options):
        seen.add(" ".join(map(str, [args] if isinstance(args, str) else args)).encode())
        begin(self, args, *more, **options)

    thread = threading.Thread(target=look)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess.Popen, "__init__", __init__)
        thread.start()
        try:
            yield seen, addresses
        finally:
            over.set()
            thread.join()


@pytest.fixture(scope="module")
def used(server, server_folder, tmp_path_factory):
    """What all commands say and leave, with secrets in all that they are told."""
    folder, said = tmp_path_factory.mktemp("security"), []
    with pytest.MonkeyPatch.context() as patch, watched() as (lists, listening):
        enter(folder, patch)
        patch.setenv("MLFLOW_TRACKING_URI", server.replace("//", f"//me:{secret('uri')}@"))
        patch.setenv("MLFLOW_EXPERIMENT_NAME", "security")
        for name, value in PLANTED.items():
            patch.setenv(name, value)
        np.savez("letters.npz", **make_arrays())
        Path("study.toml").write_text(STUDY.replace("[1, 2, 3]", "[1]"), encoding="utf-8")
        Image.fromarray(make_arrays()["X_test"][0]).resize((60, 60)).save("letter.png")
        torch.save(poolnet.build_model("avg", seed=0).state_dict(), "weights.pt")

        def use(code, *args, **more):
            said.append(inside(*args, **more))
            assert (args, said[-1].returncode) == (args, code), said[-1].stdout + said[-1].stderr
            return said[-1]

        train = ("train", "--data", "letters.npz", "--epochs", "1", "--timeout", "3")
        model = re.search(r"models:/poolnet/\d+", use(0, *train, MLFLOW_RUN_ID=of_mlflow_run()).stdout)[0]
        name = next(Path("home/runs").iterdir()).name
        use(0, "sweep", "study.toml", "--workers", "1", MLFLOW_RUN_ID=of_mlflow_run())
        use(0, "compare", "--study", "study.toml", MLFLOW_RUN_ID=of_mlflow_run())
        use(0, "evaluate", model)
        use(0, "promote", model, "--force", MLFLOW_RUN_ID=of_mlflow_run())
        use(0, "reproduce", name)
        use(0, "predict", model, "letter.png")
        use(0, "register", "weights.pt", "--pool", "avg", "--data", "letters.npz")
        use(1, "team", "grant", "ada")  # of a server without users
        use(0, "sync", f"--to={os.environ['MLFLOW_TRACKING_URI']}")
        use(0, "clean", "--yes")
        use(0, "doctor")
        # and in vain
        use(2, "train", "--data", f"https://me:{secret('data')}@127.0.0.1/letters.npz")
        use(2, "evaluate", model, MLFLOW_TRACKING_TOKEN=secret("line") + "\n")
        use(2, "evaluate", model, MLFLOW_TRACKING_PASSWORD=secret("bytes") + "\udcff")
        for uri in (
            f"http://me:{secret('uri')}@127.0.0.1:9/?token={secret('query')}",
            f"mysql://me:{secret('uri')}@x/",
        ):
            use(1 if uri.startswith("http") else 2, "evaluate", model, MLFLOW_TRACKING_URI=uri)
        with telling(401) as uri:
            use(3, *train, MLFLOW_TRACKING_URI=uri)
            use(1, "compare", "--study", "study.toml", MLFLOW_TRACKING_URI=uri)
            use(1, "doctor", MLFLOW_TRACKING_URI=uri)
        with telling(400) as uri:
            use(3, "sync", MLFLOW_TRACKING_URI=uri)
            use(1, "team", "grant", "ada", MLFLOW_TRACKING_URI=uri)
            use(1, "doctor", "--json", MLFLOW_TRACKING_URI=uri)
        runs = mlflow.MlflowClient(server).search_runs([mlflow.get_experiment_by_name("security").experiment_id])
    return SimpleNamespace(said=said, lists=lists, listening=listening, places=(folder, server_folder), runs=runs)


def of_mlflow_run():
    """The id of a run as `mlflow run` makes it in a clone whose remote has a token."""
    origin = f"https://{secret('origin')}@example.org/team/poolnet.git"
    tags = {"mlflow.source.name": origin, "mlflow.source.git.repoURL": origin, "mlflow.project.entryPoint": "main"}
    experiment_id = mlflow.set_experiment("security").experiment_id
    return mlflow.MlflowClient().create_run(experiment_id, tags=tags).info.run_id


def test_no_secret_is_said(used):
    for done in used.said:
        assert not found(done.stdout + done.stderr), done.args
        assert "Traceback" not in done.stderr, done.args


def test_a_traceback_has_no_secret(tmp_path):
    script = "import os; from poolnet.cli import commands; commands._run = os.environ.__getitem__; commands.main({!r})"
    env = {**world(tmp_path), "MLFLOW_TRACKING_TOKEN": secret("token")}
    command = [sys.executable, "-c", script.format(f"a word like {secret('token')}")]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert "KeyError: 'a word like ***'" in done.stderr
    assert not found(done.stderr)


def test_no_secret_is_on_the_disk_or_on_the_server(used):
    paths = [path for place in used.places for path in place.rglob("*") if path.is_file()]
    assert {"record.json", "published.json", "report.html", "mlflow.db", "log"} <= {path.name for path in paths}
    assert not [path for path in paths if found(path.read_bytes())]


def test_the_origin_of_a_run_is_kept_without_the_token(used):
    origins = [run.data.tags.get("mlflow.source.git.repoURL") for run in used.runs]
    assert origins.count("https://example.org/team/poolnet.git") == 4


def test_no_secret_is_in_an_argument_list(used):
    assert any(b"sync" in words for words in used.lists)
    assert not [words for words in used.lists if found(words)]


def test_the_workers_of_a_sweep_listen_on_loopback_only(used):
    assert len(used.listening) > 2  # a scheduler, and more
    assert {address.ip for address in used.listening} == {"127.0.0.1"}


def test_a_lock_names_the_command_of_its_holder_and_none_of_its_options(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["poolnet", "sync", f"--to=http://me:{secret('to')}@host"])
    with files.locked(tmp_path / "lock"):
        holder = (tmp_path / "lock.holder").read_text()
    assert holder.endswith("(poolnet sync)")


def test_what_is_not_of_the_package_is_in_no_diff(tmp_path, monkeypatch):
    package = tmp_path / "poolnet"
    package.mkdir()
    (package / "__init__.py").write_text("one = 1\n")
    (tmp_path / "settings.toml").write_text("token = ''\n")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=me", "-c", "user.email=me@here"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "one"]):
        subprocess.run([*git, *words], check=True)
    (tmp_path / ".env").write_text(f"PASSWORD={secret('staged')}\n")
    subprocess.run([*git, "add", ".env"], check=True)
    (tmp_path / "settings.toml").write_text(f"token = '{secret('changed')}'\n")
    monkeypatch.setattr(provenance, "__file__", str(package / "provenance.py"))
    assert provenance.code_state()[1:] == ("false", b"")
    (package / "__init__.py").write_text("one = 2\n")
    _, dirty, diff = provenance.code_state()
    assert dirty == "true"
    assert b"+one = 2" in diff
    assert not found(diff)


# --- what others have written ----------------------------------------------------------------------------------------

VERSIONS = [TrainConfig(data="letters.npz", pool=pool, epochs=2, lr=0.01) for pool in ("avg", "max")]
HOSTILE = (
    "<script>alert(1)</script>|**b** [x](javascript:alert(1)) ![i](http://evil/x.png) \x1b[31mred\x1b]0;t\x07"
    "\u202egpj `code`\nsecond: line\n# head ../../x " + "long" * 60
)


class Tags(HTMLParser):
    """The names of a page's elements and attributes."""

    def __init__(self, page):
        super().__init__()
        self.names, self.links = set(), set()
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.names |= {tag, *(name for name, _ in attrs)}
        self.links |= {value for name, value in attrs if name in ("href", "src")}


def is_harmless(note):
    """Whether MLflow shows a description as text, and nothing of it as a page would have it."""
    obeyed = [char for char in note if not (char.isprintable() or char == "\n")]
    return not obeyed and not re.search(r"<script|(?<!\\)\]\(javascript|!\[|^(second: |# head)", note, re.MULTILINE)


def test_hostile_names_do_nothing(trained):
    client = mlflow.MlflowClient()
    for number, run in enumerate(client.search_runs(["0"])):
        for tag in ("mlflow.runName", "poolnet.run", "mlflow.source.git.commit", "poolnet.groups_cross"):
            client.set_tag(run.info.run_id, tag, f"{HOSTILE}{number}")
    path = Path(client.download_artifacts(trained.info.run_id, "record.json", "."))
    record = json.loads(path.read_text())
    record["environment"]["python"] = record["code"]["commit"] = HOSTILE
    path.write_text(json.dumps({key: value for key, value in record.items() if key != "crc32"}))
    client.log_artifact(trained.info.run_id, str(path))
    client.update_registered_model("poolnet", HOSTILE)
    client.update_model_version("poolnet", "1", HOSTILE)
    client.set_model_version_tag("poolnet", "1", "source", HOSTILE)
    failed = client.create_run("0", tags={"poolnet.run": f"x; {HOSTILE}"}, run_name=HOSTILE).info.run_id
    client.set_terminated(failed, "FAILED")
    runs = [run.info.run_id for run in client.search_runs(["0"], "params.seed = '42'")]
    for code, *args in (
        (0, "compare", *runs),
        (2, "compare", "--experiment", "0", "--by", "pool"),  # since one has failed
        (0, "evaluate", "models:/poolnet/1"),
        (0, "reproduce", trained.info.run_id),
        (0, "clean"),
    ):
        done = inside(*args)
        assert done.returncode == code, done.stderr
        for text in (done.stdout, done.stderr):
            assert all(char.isprintable() or char == "\n" for char in text), text
            assert not re.search(r"^(second: |# head)", text, re.MULTILINE), text
        if code:
            assert shlex.split(done.stderr.partition("finish it with: ")[2])[3].startswith("x; <script>")
    notes = {run.info.run_id: run.data.tags.get("mlflow.note.content", "") for run in client.search_runs(["0"])}
    assert sum("alert" in note for note in notes.values()) == 3
    assert [note for note in notes.values() if not is_harmless(note)] == []
    (report,) = Path("mlruns").rglob("report.html")
    tags = Tags(report.read_text(encoding="utf-8"))
    assert not tags.names & {"script", "iframe", "object", "form", "onerror", "onload"}
    assert all(link.startswith(("http://127.0.0.1:5000/#/", "data:image/png;")) for link in tags.links)


def versions_of_others(trained, touched):
    """Versions of `poolnet` that poolnet has not made, by what is wrong with them."""
    client = mlflow.MlflowClient()
    foreign = client.create_run(client.create_experiment("theirs")).info.run_id
    Path("model.pkl").write_bytes(pickle.dumps(Payload(touched)))
    for name in ("model", "model/data"):
        client.log_artifact(foreign, "model.pkl", name)
    own, model = trained.info.run_id, client.get_model_version("poolnet", "1").source
    sources = {
        "a pickle": (f"runs:/{foreign}/model", foreign),
        "a run of another experiment": (model, foreign),
        "a run that is not there": (model, "0" * 32),
        "a folder of this machine": ("file:///etc", own),
        "a folder above": ("../../../etc", own),
        "a path that leads out": (f"runs:/{foreign}/../../../etc", foreign),
        "no source": ("", foreign),
        "a bucket": ("s3://theirs/x", own),
    }
    return {what: client.create_model_version("poolnet", *source).version for what, source in sources.items()}


def test_versions_of_others_become_no_champion_and_nothing_of_them_is_run(trained, tmp_path, monkeypatch):
    for name, value in {"ACCESS_KEY_ID": "x", "SECRET_ACCESS_KEY": "y" * 20, "DEFAULT_REGION": "us-east-1"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setenv("MLFLOW_S3_ENDPOINT_URL", "http://127.0.0.1:9")
    for what, number in versions_of_others(trained, tmp_path / "touched").items():
        for more in ([], ["--force"]):
            done = inside("promote", f"models:/poolnet/{number}", *more)
            assert done.returncode in (1, 2), what
            (line,) = done.stderr.splitlines()
            assert line.startswith("poolnet: error: "), what
    assert mlflow.MlflowClient().get_model_version_by_alias("poolnet", "champion").version == 1
    assert not (tmp_path / "touched").exists()


def test_predictions_with_a_pickle_are_refused_and_nothing_of_it_is_run(trained, tmp_path):
    client = mlflow.MlflowClient()
    other = next(run for run in client.search_runs(["0"]) if run.data.params.get("pool") == "max")
    np.savez("test.npz", logits=np.array([Payload(tmp_path / "touched")] * 110), y=np.zeros(110, int))
    client.log_artifact(other.info.run_id, "test.npz", "predictions")
    done = inside("compare", trained.info.run_id, other.info.run_id)
    assert done.returncode == 2
    assert "found no readable predictions/test.npz" in done.stderr
    assert not (tmp_path / "touched").exists()


def test_nothing_of_ours_listens_to_the_network():
    paths = [path for folder in ("poolnet", "benchmarks", "tests") for path in (ROOT / folder).rglob("*.py")]
    everywhere = re.compile(r"0\.0\.0\.[0]|bind\(\(['\"]{2}")
    assert not [path for path in paths if everywhere.search(path.read_text(encoding="utf-8"))]
