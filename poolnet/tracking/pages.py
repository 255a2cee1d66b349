"""Link to pages of MLflow's interface, and open them."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
import webbrowser
from pathlib import Path

from poolnet import process
from poolnet.errors import RunError
from poolnet.text import Echo, marked, pasted
from poolnet.tracking import addresses

TRAINING = "workflowType=machine_learning"  # or the interface opens in its mode for language models
LEADERBOARD = "poolnet-leaderboard"  # the key of a saved view
START_SECONDS = 60  # that `mlflow ui` has to start


def run(experiment_id: str, run_id: str) -> str:
    return f"experiments/{experiment_id}/runs/{run_id}?{TRAINING}"


def artifact(experiment_id: str, run_id: str, name: str) -> str:
    return f"experiments/{experiment_id}/runs/{run_id}/artifacts/{name}?{TRAINING}"


def model(experiment_id: str, model_id: str) -> str:
    """Return the page of a logged model."""
    return f"experiments/{experiment_id}/models/{model_id}?{TRAINING}"


def version(name: str, number: int) -> str:
    """Return the page of a registered model's version."""
    return f"models/{name}/versions/{number}"


def view_of(data_sha256: str) -> str:
    """Return the key of the view for a data set.

    It shows max against avg.
    """
    return f"poolnet-{data_sha256[:8]}"


def is_view(key: str) -> bool:
    """Whether a saved view is one of poolnet's."""
    return bool(re.fullmatch(rf"poolnet-[0-9a-f]{{8}}(-seeds)?|{LEADERBOARD}", key))


def view(experiment_id: str, key: str) -> str:
    """Return the page of a saved view.

    All but the leaderboard open with charts.
    """
    charts = "" if key == LEADERBOARD else "&compareRunsMode=CHART"
    return f"experiments/{experiment_id}/runs?{TRAINING}&viewStateShareKey={key}{charts}"


def in_markdown(name: str, page: str) -> str:
    """Return a link to a page, for a description in MLflow."""
    return f"[{marked(name)}](#/{page})"


def link(uri: str, page: str) -> str:
    """Return the link to a page on a tracking server.

    If the address is not an HTTP server, the text is the command that serves the page, and the link.
    """
    command = serving(uri)
    return f"{command}\nthen {address(uri, page)}" if command else address(uri, page)


def address(uri: str, page: str) -> str:
    """Return the link to a page, for a browser.

    If the address is not an HTTP server, the page is there while `serving` runs.
    """
    server = "http://127.0.0.1:5000" if serving(uri) else re.sub("//[^/@]*@", "//", addresses.shown(uri))
    return f"{server.rstrip('/')}/#/{page}"


def serving(uri: str) -> str:
    """Return the command that serves the pages of a store.

    It is empty for an HTTP server, which serves its own.
    """
    if uri.startswith(("http://", "https://")):
        return ""
    path = addresses.sqlite_file(uri)
    if path and path.parent == Path.cwd():
        uri = addresses.of_file(Path(path.name))
    shown = pasted(addresses.for_mlflow(uri))
    if not path and addresses.shown(uri) != uri:  # the password is not for the screen
        shown = "$env:MLFLOW_TRACKING_URI" if os.name == "nt" else '"$MLFLOW_TRACKING_URI"'
    return f"mlflow ui --backend-store-uri {shown}"


def show(uri: str, page: str, echo: Echo) -> None:
    """Open a page in the browser.

    A store that has no server is served on a free port of this machine until Ctrl-C. Raises `RunError` if the server
    does not start.
    """
    if not serving(uri):
        _browse(address(uri, page), echo)
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    echo(f"Starting `mlflow ui` on port {port} ...")
    store = {"MLFLOW_BACKEND_STORE_URI": addresses.for_mlflow(uri), "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    server = subprocess.Popen(
        [sys.executable, *("-m", "mlflow", "ui", "--host", "127.0.0.1", "--port", str(port), "--workers", "1")],
        env=os.environ | store,  # where no other user sees a password
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        **process.detached(),
    )
    try:
        _wait_for(server, port)
        _browse(f"http://127.0.0.1:{port}/#/{page}", echo)
        echo("Press Ctrl-C to end it.")
        while server.poll() is None:
            time.sleep(0.2)
    except process.Stop as stop:
        if stop.signum != signal.SIGINT:
            raise
    finally:
        server.send_signal(getattr(signal, "CTRL_BREAK_EVENT", signal.SIGTERM))  # on Windows this ends its children too
        server.wait()


def _wait_for(server: subprocess.Popen, port: int) -> None:
    deadline = time.monotonic() + START_SECONDS
    while server.poll() is None and time.monotonic() < deadline:
        if not addresses.unreachable(f"http://127.0.0.1:{port}"):
            return
        time.sleep(0.2)
    raise RunError("`mlflow ui` did not start; start it with the command that is printed without --open")


def _browse(place: str, echo: Echo) -> None:
    opened = webbrowser.open(place)
    echo(f"Opened {place}" if opened else f"Found no browser here; open {place}")
