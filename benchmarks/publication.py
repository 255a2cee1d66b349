"""How long it takes to publish the runs of a sweep, and how many requests that is.

    python benchmarks/publication.py [--data FILE] [--seeds N] [--workers N] [--rounds N] [--kinds] [--json]

A sweep of max and avg with so many seeds is trained without a server. Then its runs are published to an SQLite file,
and to `mlflow server` with one worker and with `--workers`, each time by the process that a sweep uses (`sync
--follow`) and by `poolnet sync`. These are medians; imports are included, and torch's export of a network, which each
home makes once, is not. The requests are those in the server's log.

To compare two versions, set PYTHONPATH to one checkout and then to the other.
"""

import collections
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import click
from mlflow.tracking.client import MlflowClient
from sweep_speed import STUDY
from train_speed import EPOCHS, random_letters

from poolnet.files import write_json

POOLNET = [sys.executable, "-m", "poolnet"]
NOWHERE = "http://127.0.0.1:9"
REQUEST = re.compile(r'"([A-Z]+) /(?:api|ajax-api)/2.0/(\S*?)(?:\?\S*)? HTTP')
ID = re.compile(r"/(?:[0-9a-f]{32}|m-[0-9a-f]{32})\b.*|artifacts/.*")


@contextlib.contextmanager
def serving(folder: Path, workers: int) -> Iterator[str]:
    """`mlflow server` with a fresh store in a folder; yields its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--workers", str(workers), "--port", str(port)]
    command += ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db"]
    command += ["--artifacts-destination", f"{folder}/artifacts"]
    quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(
            command, cwd=folder, env=os.environ | quiet, stdout=log, stderr=log, start_new_session=True
        )
    address = f"http://127.0.0.1:{port}"
    try:
        while (folder / "log").read_text(encoding="utf-8").count("Application startup complete") < workers:
            if server.poll() is not None:
                raise click.ClickException((folder / "log").read_text(encoding="utf-8"))
            time.sleep(0.1)
        yield address
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait()


def train(folder: Path, data: Path, seeds: int) -> list[str]:
    """Train a sweep that is not published, and make the exports of its networks; the names of its runs."""
    study = folder / "publication.toml"
    study.write_text(STUDY.format(seeds=list(range(1, seeds + 1)), epochs=EPOCHS), encoding="utf-8")
    environment = os.environ | {"POOLNET_HOME": str(folder / "trained"), "MLFLOW_TRACKING_URI": NOWHERE}
    command = [*POOLNET, "sweep", str(study), "--data", str(data), "--timeout", "0"]
    subprocess.run(command, env=environment, capture_output=True, check=False)  # it says 3: not published
    runs = sorted(path.name for path in (folder / "trained" / "runs").iterdir())
    if len(runs) != 2 * seeds:
        raise click.ClickException(f"{len(runs)} runs were trained, expected {2 * seeds}")
    shutil.copytree(folder / "trained", folder / "once")
    publish(folder / "once", f"sqlite:///{folder}/once.db", [runs[0], runs[-1]], follow=True)
    shutil.copytree(folder / "once" / "exports", folder / "trained" / "exports")
    return runs


def publish(home: Path, uri: str, runs: list[str], follow: bool) -> float:
    """Publish the runs of a home; the seconds that this takes."""
    environment = os.environ | {"POOLNET_HOME": str(home), "MLFLOW_TRACKING_URI": uri}
    for run in runs if follow else ():
        write_json(home / "runs" / run / "published.json", {"home": uri, "experiment": "", "servers": {}})
    command = [*POOLNET, "sync", *(["--follow"] if follow else ["--to", uri])]
    said, start = "\n".join(runs) if follow else "", time.perf_counter()
    subprocess.run(command, env=environment, input=said, text=True, capture_output=True, check=True)
    return time.perf_counter() - start


def check(uri: str, runs: list[str]) -> None:
    """Each run is there once, whole, below one sweep."""
    client = MlflowClient(uri)
    parent, children = [], []
    for run in client.search_runs(["0"]):
        (parent if "poolnet.study" in run.data.tags else children).append(run)
    assert sorted(run.info.run_name for run in children) == runs
    assert {run.info.status for run in children} == {"FINISHED"}
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {run.info.run_id for run in parent}
    assert all("mlflow.note.content" in run.data.tags and run.outputs.model_outputs for run in children)


def requests(log: Path) -> collections.Counter[str]:
    """The requests in a server's log, by kind."""
    return collections.Counter(
        f"{method} {ID.sub('/...', path)}" for method, path in REQUEST.findall(log.read_text(encoding="utf-8"))
    )


def measure(trained: Path, runs: list[str], workers: int, follow: bool) -> tuple[float, collections.Counter[str]]:
    """The seconds of a publication and its requests; without workers to an SQLite file."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copytree(trained, folder / "home")
        if not workers:
            uri = f"sqlite:///{folder}/mlflow.db"
            MlflowClient(uri).search_experiments()  # which makes the tables
            seconds = publish(folder / "home", uri, runs, follow)
            check(uri, runs)
            return seconds, collections.Counter()
        with serving(folder, workers) as uri:
            before = requests(folder / "log")
            seconds = publish(folder / "home", uri, runs, follow)
            made = requests(folder / "log") - before
            check(uri, runs)
        return seconds, made


@click.command()
@click.option("--data", type=click.Path(exists=True, path_type=Path), help="Letters; by default random ones.")
@click.option("--seeds", default=10, show_default=True, help="Seeds of each pooling.")
@click.option("--workers", default=4, show_default=True, help="Processes of the larger server.")
@click.option("--rounds", default=3, show_default=True, help="Measurements of each; medians are reported.")
@click.option("--kinds", is_flag=True, help="Also list the requests by kind.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the table.")
def main(data: Path | None, seeds: int, workers: int, rounds: int, kinds: bool, as_json: bool) -> None:
    result, by_kind = {}, {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        runs = train(folder, data or random_letters(folder / "letters.npz", 0.03), seeds)
        for follow in (True, False):
            for count in dict.fromkeys((0, 1, workers)):
                found = [measure(folder / "trained", runs, count, follow) for _ in range(rounds)]
                title = ("sweep" if follow else "sync") + (f", server of {count}" if count else ", SQLite")
                result[f"{title}: s"] = statistics.median(seconds for seconds, _ in found)
                result[f"{title}: s a run"] = result[f"{title}: s"] / len(runs)
                if count:
                    by_kind[title] = found[0][1]
                    result[f"{title}: requests a run"] = found[0][1].total() / len(runs)
    if as_json:
        click.echo(json.dumps(result))
        return
    click.echo("\n".join(f"{name:36}{value:8.2f}" for name, value in result.items()))
    for title, counts in by_kind.items() if kinds else ():
        click.echo(f"\n{title}")
        click.echo("\n".join(f"{count / len(runs):8.2f}  {kind}" for kind, count in counts.most_common()))


if __name__ == "__main__":
    main()
