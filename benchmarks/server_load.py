"""What a team's tracking server does under load, and what is lost when its parts fail.

    python benchmarks/server_load.py [--clients N] [--rounds N] [--store WHAT]... [--fault WHAT]... [--json]

So many clients train at once, each a process with local state of its own, and publish to one server. Only their
trainings have their imports done, else the machine would not hold them:

- `sqlite`: `mlflow server` with one worker, an SQLite file and a folder for artifacts;
- `postgres`: the same with PostgreSQL and an S3-compatible object store;
- `users`: that with users and passwords, as `poolnet team up` starts it; `unremembered`: without its memory of
  passwords.

The seconds are those until all commands have ended; the seconds of the server are its processor's, those of PostgreSQL
and the object store beside it. They depend on the machine, so compare rows. The requests are those in the server's log.

Faults happen amid uploads, each after up to one more file a client: `postgres` and `server` are restarted, and the
object `store` is killed and started again after 3 seconds. And `proxy` drops a third of all uploads. They go on while
all clients run `poolnet sync` once; then these do so until they have nothing left. A run is lost if it is not on the
server as FINISHED with predictions, figures and a model that is the one it was scored with, and doubled if it is there
twice. Needs `pip install "poolnet[team]"`.
"""

import contextlib
import http.client
import importlib
import json
import multiprocessing
import os
import random
import re
import secrets
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.pool import ThreadPool
from pathlib import Path

import click
import numpy as np
import psutil

from poolnet.cli.commands import main as main_of_poolnet
from poolnet.upkeep import parts
from poolnet.upkeep.parts import HOST, Part

IMPORTS = ("poolnet.tracking.train", "poolnet.runs.train_run", "poolnet.runs.figures", "mlflow")
for name in IMPORTS:
    importlib.import_module(name)
FORKED = multiprocessing.get_context("fork")  # so this benchmark is one for Linux and macOS
POOLNET = [sys.executable, "-m", "poolnet"]
STORES = ("sqlite", "postgres", "users", "unremembered")
FAULTS = ("postgres", "store", "server", "proxy")
DOWN_SECONDS = 3
FIRST = 10_000  # the seed of the run that makes the exports
AT_ONCE = 8  # commands with imports of their own, which fit into memory
SYNCS = 10  # that a client may need


class Server:
    """A tracking server in a folder, and what its parts have used."""

    def __init__(self, folder: Path, store: str):
        self.folder, self.store, self.port = folder, store, parts.free_port()
        self.uri, self.parts = f"http://{HOST}:{self.port}", dict[str, Part]()
        self.settings: dict[str, str] = {}

    def __enter__(self) -> "Server":
        folder = self.folder
        if self.store == "sqlite":
            env = {"MLFLOW_BACKEND_STORE_URI": f"sqlite:///{folder}/mlflow.db"}
            self._serve(env, str(folder / "artifacts"))
            return self
        key, password = secrets.token_urlsafe(18), secrets.token_urlsafe(18)
        self.parts["store"], env = parts.object_store(folder, key)
        self.parts["postgres"], database = parts.postgres(folder, password)
        self.parts["store"].wait_until(lambda: parts.has_bucket(env))
        if self.store == "postgres":
            self._serve({**env, "MLFLOW_BACKEND_STORE_URI": f"{database}mlflow"}, f"s3://{parts.BUCKET}")
            return self
        self.settings = {"MLFLOW_TRACKING_USERNAME": "admin", "MLFLOW_TRACKING_PASSWORD": password}
        env |= {"MLFLOW_FLASK_SERVER_SECRET_KEY": key, "MLFLOW_AUTH_ADMIN_PASSWORD": password}
        server = self.parts["server"] = parts.mlflow_server(folder, self.port, database, env)
        server.wait_until(self.answers)
        if self.store == "unremembered":
            config = folder / "auth.ini"
            config.write_text(re.sub("auth_cache_ttl_seconds.*", "", config.read_text()))
            self.restart("server")
            server.wait_until(self.answers)
        return self

    def _serve(self, env: dict[str, str], destination: str) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--workers", "1", "--port", str(self.port)]
        command += ["--artifacts-destination", destination]
        quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        self.parts["server"] = Part("mlflow", command, self.folder, env | quiet)
        self.parts["server"].wait_until(self.answers)

    def answers(self) -> bool:
        return parts.mlflow_answers(self.port)

    def restart(self, name: str, kill: bool = False) -> None:
        part = self.parts[name]
        if kill:
            for each in (part.process, *psutil.Process(part.process.pid).children(recursive=True)):
                each.kill()
            part.process.wait()
            time.sleep(DOWN_SECONDS)
        else:
            part.stop()
        part.start()

    def seconds(self) -> dict[str, float]:
        """The processor's seconds of each part so far."""
        used = {}
        for name, part in self.parts.items():
            top = psutil.Process(part.process.pid)
            tree = [top, *top.children(recursive=True)]
            used[name] = sum(sum(each.cpu_times()[:4]) for each in tree)  # also of children that have ended
        return used

    def requests(self) -> int:
        return len(re.findall(r'" \d{3}', self.parts["server"].log.read_text(encoding="utf-8", errors="replace")))

    def uploads(self) -> int:
        """Files that were sent to the server so far."""
        return self.parts["server"].log.read_bytes().count(b'"PUT ')

    def __exit__(self, *error: object) -> None:
        for name in ("server", "store", "postgres"):
            if name in self.parts:
                self.parts[name].stop()


@contextlib.contextmanager
def dropping(port: int, share: float) -> Iterator[int]:
    """A proxy that drops a share of all uploads without an answer; yields its port."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def forward(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if self.command == "PUT" and random.random() < share:
                self.close_connection = True
                return
            connection = http.client.HTTPConnection(HOST, port, timeout=60)
            headers = {name: value for name, value in self.headers.items() if name.lower() != "host"}
            connection.request(self.command, self.path, body, {**headers, "Host": f"{HOST}:{port}"})
            answer = connection.getresponse()
            content = answer.read()
            connection.close()
            self.send_response(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in ("transfer-encoding", "connection", "content-length", "date", "server"):
                    self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = do_HEAD = forward

        def log_message(self, *args: object) -> None:
            pass

        def handle(self) -> None:
            with contextlib.suppress(OSError, http.client.HTTPException):
                super().handle()

    with ThreadingHTTPServer((HOST, 0), Handler) as proxy:
        thread = threading.Thread(target=proxy.serve_forever)
        thread.start()
        yield proxy.server_port
        proxy.shutdown()
        thread.join()


class Client:
    """One of many users, with a seed and local state of his own."""

    def __init__(self, folder: Path, uri: str, settings: dict[str, str], data: Path, seed: int):
        self.seed, self.data = seed, data
        self.home = folder / f"client{seed}"
        own = {"POOLNET_HOME": str(self.home), "MLFLOW_TRACKING_URI": uri, "OMP_NUM_THREADS": "1"}
        self.environment = {**os.environ, **settings, **own}

    def start(self) -> multiprocessing.process.BaseProcess:
        """Begin to train, with all imports done, so that all clients reach the server at once and fit into memory."""
        self.home.mkdir(exist_ok=True)
        process = FORKED.Process(target=self._train)
        process.start()
        return process

    def _train(self) -> None:
        os.environ.clear()
        os.environ.update(self.environment)
        with (self.home / "said").open("w") as said:
            os.dup2(said.fileno(), 1)
            os.dup2(said.fileno(), 2)
        main_of_poolnet(["train", "--data", str(self.data), "--epochs", "3", "--seed", str(self.seed)])

    def said(self) -> str:
        return (self.home / "said").read_text(encoding="utf-8")[-300:]

    def sync(self) -> bool:
        command = [*POOLNET, "sync", "--timeout", "60"]
        return not subprocess.run(command, env=self.environment, capture_output=True, check=False).returncode


def train(clients: list[Client]) -> tuple[dict[int, int], list[str]]:
    """Train with all of them at once; their exit codes, and what failed ones said."""
    running = [client.start() for client in clients]
    for process in running:
        process.join()
    codes = [process.exitcode for process in running]
    failed = [client.said() for client, code in zip(clients, codes, strict=True) if code not in (0, 3)]
    return {code: codes.count(code) for code in sorted(set(codes))}, failed


def sync(clients: list[Client]) -> list[Client]:
    """Let all of them run `poolnet sync`; those that have something left."""
    with ThreadPool(AT_ONCE) as pool:
        return [client for client, done in zip(clients, pool.map(Client.sync, clients), strict=True) if not done]


def check(server: Server, clients: list[Client]) -> dict[str, int]:
    """How many runs are lost or doubled on a server."""
    from mlflow.tracking.client import MlflowClient

    os.environ.update(server.settings, MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR="false")
    client = MlflowClient(server.uri)
    by_seed: dict[str, list] = {}
    for run in client.search_runs(["0"], max_results=1000):
        by_seed.setdefault(run.data.params.get("seed", run.info.run_id), []).append(run)
    whole = 0
    for each in clients:
        runs = [run for run in by_seed.get(str(each.seed), []) if run.info.status == "FINISHED"]
        whole += len(runs) == 1 and _is_whole(client, runs[0])
    return {
        "runs": sum(len(runs) for seed, runs in by_seed.items() if seed != str(FIRST)),
        "lost": len(clients) - whole,
        "doubled": sum(len(runs) > 1 for runs in by_seed.values()),
    }


def _is_whole(client, run) -> bool:
    folders = ("predictions", "figures")
    paths = {each.path for folder in folders for each in client.list_artifacts(run.info.run_id, folder)}
    if not {"predictions/val.npz", "predictions/test.npz"} <= paths or not any("figures/" in path for path in paths):
        return False
    with tempfile.TemporaryDirectory() as place:
        path = client.download_artifacts(run.info.run_id, "predictions/test.npz", place)
        with np.load(path) as arrays:
            acc = (arrays["logits"].argmax(1) == arrays["y"]).mean()
    versions = client.search_model_versions(f"run_id = '{run.info.run_id}'")
    return len(versions) == 1 and abs(acc - run.data.metrics["test_acc"]) < 1e-6


def make_clients(folder: Path, server: Server, uri: str, count: int) -> list[Client]:
    """Clients that have their exports, as after a first run."""
    data = letters(folder / "letters.npz")
    first = Client(folder, server.uri, server.settings, data, FIRST)
    train([first])
    clients = [Client(folder, uri, server.settings, data, seed) for seed in range(count)]
    for client in clients:
        shutil.copytree(first.home, client.home, ignore=shutil.ignore_patterns("runs"))
    return clients


def letters(path: Path) -> Path:
    rng = np.random.default_rng(0)
    arrays = {}
    for name, size in (("train", 2_000), ("val", 500), ("test", 500)):
        arrays[f"X_{name}"] = rng.integers(0, 256, (size, 28, 28), dtype=np.uint8)
        arrays[f"y_{name}"] = rng.integers(0, 10, size)
    np.savez(path, **arrays)
    return path


def measure_load(folder: Path, store: str, count: int) -> dict[str, float]:
    """What one training with all clients at once takes."""
    with Server(folder, store) as server:
        clients = make_clients(folder, server, server.uri, count)
        before, requests, start = server.seconds(), server.requests(), time.perf_counter()
        codes, failed = train(clients)
        seconds = time.perf_counter() - start
        used = {name: after - before[name] for name, after in server.seconds().items()}
        requests = server.requests() - requests
        if failed:
            raise click.ClickException(failed[0])
        left = sync(clients) if 3 in codes else []
        outcome = check(server, clients)
    rows = {"seconds": seconds, "requests a run": requests / count, "not at once": codes.get(3, 0)}
    rows |= {f"seconds of {name} a run": value / count for name, value in used.items()}
    return rows | {"not synced": len(left), "lost": outcome["lost"], "doubled": outcome["doubled"]}


def measure_fault(folder: Path, fault: str, count: int) -> dict[str, object]:
    """Let a part fail while all clients publish; what is lost after `poolnet sync`."""
    with Server(folder, "users") as server, contextlib.ExitStack() as stack:
        uri = server.uri
        if fault == "proxy":
            uri = f"http://{HOST}:{stack.enter_context(dropping(server.port, 1 / 3))}"
        clients = make_clients(folder, server, uri, count)
        over, times = threading.Event(), []  # the uploads before each fault

        def torment() -> None:
            while fault != "proxy":
                wanted = server.uploads() + random.randint(count // 4, count)
                while server.uploads() < wanted:
                    if over.wait(0.1):
                        return
                times.append(server.uploads())
                server.restart(fault, kill=fault == "store")

        thread = threading.Thread(target=torment)
        stack.callback(thread.join)
        stack.callback(over.set)
        thread.start()
        codes, failed = train(clients)
        left, syncs = sync(clients), 1
        over.set()
        thread.join()
        while left and syncs < SYNCS:
            left = sync(left)
            syncs += 1
        return {
            "clients": count,
            "times": len(times),
            "after uploads": times,
            "uploads": server.uploads(),
            "exit codes": codes,
            "failed": failed,
            "rounds of sync": syncs,
            "not synced": len(left),
            **check(server, clients),
        }


@click.command()
@click.option("--clients", default=32, show_default=True)
@click.option("--rounds", default=3, show_default=True, help="Of the load; medians are shown.")
@click.option("--store", "stores", multiple=True, type=click.Choice(STORES), default=STORES)
@click.option("--fault", "faults", multiple=True, type=click.Choice(FAULTS), default=FAULTS)
@click.option("--seed", default=0, show_default=True, help="Of the moments of the faults.")
@click.option("--json", "as_json", is_flag=True)
def main(clients: int, rounds: int, stores: tuple, faults: tuple, seed: int, as_json: bool) -> None:
    """Measure a team's tracking server under load and faults."""
    parts.check_installed()
    random.seed(seed)
    results: dict[str, dict] = {}
    loads: dict[str, list[dict]] = {store: [] for store in stores}
    for _ in range(rounds):  # in turn, since the machine may become slower
        for store in stores:
            with tempfile.TemporaryDirectory() as place:
                loads[store].append(measure_load(Path(place), store, clients))
    for store, rows in loads.items():
        medians = {name: statistics.median(row[name] for row in rows) for name in (rows or [{}])[0]}
        results[f"load on {store}"] = show(f"load on {store}", medians, as_json)
    for fault in faults:
        with tempfile.TemporaryDirectory() as place:
            outcome = measure_fault(Path(place), fault, clients)
        results[f"fault of {fault}"] = show(f"fault of {fault}", outcome, as_json)
    if as_json:
        click.echo(json.dumps(results))


def show(title: str, rows: dict, as_json: bool) -> dict:
    """Print an outcome as soon as it is known."""
    for name, value in () if as_json else rows.items():
        click.echo(f"{title}: {name:<30}{value if not isinstance(value, float) else round(value, 2)}")
    return rows


if __name__ == "__main__":
    main()
