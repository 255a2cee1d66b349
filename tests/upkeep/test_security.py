"""Secrets are planted wherever one can be, and searched for wherever anything is written."""

import base64
import contextlib
import http.server
import os
import re
import subprocess
import threading
from pathlib import Path
from types import SimpleNamespace

import mlflow
import numpy as np
import pytest
import torch
from conftest import enter, inside, make_arrays
from PIL import Image

import poolnet
from poolnet import files
from poolnet.runs import provenance

STUDY = """question = "Which pooling loses less?"
data = "letters.npz"
seeds = [1]
[grid]
pool = ["max", "avg"]
epochs = 1
[arms]
max = { pool = "max" }
avg = { pool = "avg" }
"""
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
def argument_lists():
    """All argument lists of this machine, and those that this process gives, while the block runs."""
    seen, over = set(), threading.Event()

    def look():
        while not over.wait(0.2):
            for path in Path("/proc").glob("[0-9]*/cmdline"):
                with contextlib.suppress(OSError):
                    seen.add(path.read_bytes())

    begin = subprocess.Popen.__init__

    def __init__(self, args, *more, **options):
        seen.add(" ".join(map(str, [args] if isinstance(args, str) else args)).encode())
        begin(self, args, *more, **options)

    thread = threading.Thread(target=look)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess.Popen, "__init__", __init__)
        thread.start()
        try:
            yield seen
        finally:
            over.set()
            thread.join()


@pytest.fixture(scope="module")
def used(server, server_folder, tmp_path_factory):
    """What all commands say and leave, with secrets in all that they are told."""
    folder, said = tmp_path_factory.mktemp("security"), []
    with pytest.MonkeyPatch.context() as patch, argument_lists() as lists:
        enter(folder, patch)
        patch.setenv("MLFLOW_TRACKING_URI", server.replace("//", f"//me:{secret('uri')}@"))
        patch.setenv("MLFLOW_EXPERIMENT_NAME", "security")
        for name, value in PLANTED.items():
            patch.setenv(name, value)
        np.savez("letters.npz", **make_arrays())
        Path("study.toml").write_text(STUDY, encoding="utf-8")
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
        with telling(400) as uri:
            use(3, "sync", MLFLOW_TRACKING_URI=uri)
            use(1, "team", "grant", "ada", MLFLOW_TRACKING_URI=uri)
        runs = mlflow.MlflowClient(server).search_runs([mlflow.get_experiment_by_name("security").experiment_id])
    return SimpleNamespace(said=said, lists=lists, places=(folder, server_folder), runs=runs)


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
