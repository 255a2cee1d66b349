"""Tracking servers and stores: their addresses, what is on them, and local ones made whole."""

import contextlib
import functools
import gc
import logging
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import mlflow
import mlflow.db
from filelock import FileLock
from mlflow.exceptions import MlflowException
from mlflow.tracking.client import MlflowClient

from poolnet import files, journal
from poolnet.config import InputError, RunError
from poolnet.journal import Journal

SIGNS = (  # what says it all, in the long texts of MLflow and its libraries
    *("Connection refused", "Read timed out", "Name or service not known", "Connection reset", "timed out"),
    *("No space left on device", "File too large", "database or disk is full", "disk I/O error"),
    *("database is locked", "readonly database", "file is not a database", "database disk image is malformed"),
)


def own_uri() -> str:
    """The server that this process is told to use, a local store by its absolute path."""
    return absolute(mlflow.get_tracking_uri(), Path.cwd())


def home_of(run: Journal) -> str:
    """The address of the server that a run belongs to, with the password if the environment has it."""
    home = files.read_json(run.folder / "published.json").get("home") or recorded_home(run.record)
    return own_uri() if journal.without_password(own_uri()) == home else home


@contextlib.contextmanager
def as_environment(uri: str) -> Iterator[None]:
    """With this address in the environment: MLflow's own registry store looks there for the models of its runs."""
    before = os.environ.get("MLFLOW_TRACKING_URI")
    os.environ["MLFLOW_TRACKING_URI"] = uri
    try:
        yield
    finally:
        os.environ.pop("MLFLOW_TRACKING_URI")
        if before is not None:
            os.environ["MLFLOW_TRACKING_URI"] = before


def recorded_home(record: dict) -> str:
    """Where a run was to be tracked when it began; MLflow's default is a store in the working folder."""
    return absolute(record["tracking"]["uri"] or "sqlite:///mlflow.db", Path(record["tracking"]["folder"]))


def absolute(uri: str, folder: Path) -> str:
    prefix = "sqlite:///"
    return f"{prefix}{folder / uri.removeprefix(prefix)}" if uri.startswith(prefix) else uri


@functools.cache
def create_store(uri: str) -> None:
    """Make a fresh SQLite store under a lock, and whole or not at all: two processes that make one at once break it for
    good, and so does one that is killed before it has made all the tables. `MlflowException` if it cannot be used."""
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # it logs what it raises, pages of it
    if uri.startswith("sqlite:///"):
        path = Path(uri.removeprefix("sqlite:///"))
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            if not path.exists():
                with files.replacing(path) as part:
                    mlflow.db.commands.main(["upgrade", f"sqlite:///{part}"], standalone_mode=False)
                    gc.collect()  # of the connection: Windows does not rename a file that is open
            try:
                MlflowClient(uri).search_experiments(max_results=1)
            except MlflowException:
                raise
            except Exception as error:  # of the database, which MLflow passes on as it is while it opens a store
                raise MlflowException(reason(error)) from error


def own_client() -> MlflowClient:
    """A client of the server that this process is told to use."""
    uri = own_uri()
    create_store(uri)
    return MlflowClient(uri)


def own_experiment(client: MlflowClient) -> str:
    """The id of the experiment that this process is told to use, made if it is only named."""
    return os.environ.get("MLFLOW_EXPERIMENT_ID") or experiment(client, os.environ.get("MLFLOW_EXPERIMENT_NAME", ""))


def experiment_named(client: MlflowClient, name: str) -> str:
    """The id of the experiment of that name, or of that id, or by default this process's own; it must be there."""
    if not name:
        return own_experiment(client)
    found = client.get_experiment_by_name(name)
    if not found and name.isdecimal():
        with contextlib.suppress(MlflowException):
            found = client.get_experiment(name)
    if not found:
        names = ", ".join(each.name for each in client.search_experiments())
        raise InputError(f"--experiment: found none called {name!r}, expected one of {names}")
    return found.experiment_id


def experiment(client: MlflowClient, name: str) -> str:
    """The id of the experiment of that name, made if it is not there; MLflow's own is `Default`."""
    name = name or "Default"
    found = client.get_experiment_by_name(name)
    try:
        return found.experiment_id if found else client.create_experiment(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":  # made by another process just now
            raise
        return client.get_experiment_by_name(name).experiment_id


def look_up(client: MlflowClient, name: str) -> mlflow.entities.Run | None:
    """A run by its id, or by the name of its journal, in any experiment."""
    if re.fullmatch("[0-9a-f]{32}", name):
        with contextlib.suppress(MlflowException):
            return client.get_run(name)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    quoted = name.replace("'", "")
    found = client.search_runs(experiments, f"tags.`poolnet.run` = '{quoted}'", max_results=1)
    return found[0] if found else None


def reason(error: Exception) -> str:
    """What went wrong, in one line that fits a screen."""
    text = " ".join(str(error).split()) or type(error).__name__
    for sign in SIGNS:
        if sign in text:
            return sign.lower()
    if status := re.search(r"too many (\d{3}) error responses|error code (\d{3})", text):
        return f"the server answers {status[1] or status[2]}"
    return text if len(text) <= 200 else f"{text[:200]}..."


@contextlib.contextmanager
def asked(uri: str) -> Iterator[None]:
    """What goes wrong with a server meanwhile is one line."""
    try:
        yield
    except MlflowException as error:
        raise RunError(f"{journal.without_password(uri)}: {reason(error)}") from None


def page_of(uri: str, experiment_id: str, run_id: str) -> str:
    """The link of a run's page, or the command that serves it and the link."""
    page = f"#/experiments/{experiment_id}/runs/{run_id}?workflowType=machine_learning"
    if uri.startswith(("http://", "https://")):
        parts = urlsplit(uri)
        server = urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))  # no password on the screen
        return f"{server.rstrip('/')}/{page}"
    shown = shlex.quote(uri) if uri.startswith("sqlite:") else '"$MLFLOW_TRACKING_URI"'  # nor that of a database
    return f"mlflow ui --backend-store-uri {shown}\nthen http://127.0.0.1:5000/{page}"
