"""Connect to tracking servers and read what they hold.

This module also finds their addresses and creates local SQLite stores, so that each store is complete.
"""

import contextlib
import functools
import gc
import logging
import os
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar
from urllib.parse import quote

import mlflow
import mlflow.db
from mlflow.entities import Experiment, ViewType
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repo import ArtifactRepository
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.store.entities import PagedList
from mlflow.tracking.client import MlflowClient
from sqlalchemy.exc import SQLAlchemyError

from poolnet import files
from poolnet.errors import InputError, NoAnswer, RunError
from poolnet.runs.run_record import RunRecord
from poolnet.secret import hidden
from poolnet.tracking import addresses, published, waiting

AWAY = ("Connection refused", "Read timed out", "Name or service not known", "Connection reset", "timed out")
SIGNS = (  # the words that matter in the long texts of MLflow and its libraries
    *AWAY,
    *("No space left on device", "File too large", "database or disk is full", "disk I/O error"),
    *("database is locked", "readonly database", "file is not a database", "database disk image is malformed"),
)
SERVERS = re.compile(  # what `poolnet doctor` looks at
    "|".join(
        [*SIGNS, "the server answers", "no MLflow server", "database schema", "OperationalError", "connection failed"]
    )
)
CURES = {  # the status of a server's reply, and what to do
    "401": "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN",
    "403": "MLFLOW_TRACKING_USERNAME may not do this there; ask who runs the server for permission, who types: "
    "poolnet team grant USER",
    "404": "no MLflow server is there; look at MLFLOW_TRACKING_URI",
}
PACKAGES = {"botocore": "boto3", "google": "google-cloud-storage", "azure": "azure-storage-blob azure-identity"}
CREDENTIALS = "Unable to locate credentials"  # so says boto3
REFUSALS = ("UNAUTHENTICATED", "PERMISSION_DENIED", "INVALID_PARAMETER_VALUE", "BAD_REQUEST", "ENDPOINT_NOT_FOUND")
BUSY = "SlowDown|InternalError|ServiceUnavailable|RequestTimeout|Throttling"  # what S3 may say once and not again
STORE_SECONDS = 20  # that a process waits while others make the same SQLite store

Found = TypeVar("Found")

_environment = threading.RLock()  # of which a process has one
_known: dict[tuple, str] = {}  # what `once` has found
_looking = threading.Lock()  # so that runs that are published at once do not all look, and create


# --- addresses ---------------------------------------------------------------------------------------------------


def home_of(run: RunRecord) -> str:
    """Return the address of a run's tracking server.

    It has the password if the environment has it.
    """
    home = published.read(run).home or recorded_home(run.record)
    return addresses.own() if addresses.shown(addresses.own()) == home else home


@contextlib.contextmanager
def as_environment(uri: str) -> Iterator[None]:
    """Set `MLFLOW_TRACKING_URI` to this address inside the block.

    MLflow's own registry store looks there for the models of its runs. Other threads wait.
    """
    with _environment:
        before = os.environ.get("MLFLOW_TRACKING_URI")
        os.environ["MLFLOW_TRACKING_URI"] = addresses.for_mlflow(uri)
        try:
            yield
        finally:
            os.environ.pop("MLFLOW_TRACKING_URI")
            if before is not None:
                os.environ["MLFLOW_TRACKING_URI"] = before


def recorded_home(record: dict) -> str:
    """Return the tracking address that a run began with.

    The default of MLflow is a store in the working folder.
    """
    return addresses.absolute(record["tracking"]["uri"], Path(record["tracking"]["folder"]))


class Client(MlflowClient):
    """An MLflow client whose calls have a time limit.

    Each call runs inside `answering`.
    """

    def __init__(self, uri: str):
        self.uri = uri
        super().__init__(addresses.for_mlflow(uri))

    def __getattribute__(self, name: str) -> object:
        method = super().__getattribute__(name)
        if name.startswith("_") or not callable(method):
            return method

        @functools.wraps(method)
        def call(*args: object, **options: object) -> object:
            with waiting.answering(self.uri):
                return method(*args, **options)

        return call


def client_of(uri: str) -> Client:
    """Return a client of this server or store.

    Raises `InputError` if the address can never work.
    """
    addresses.check(uri)
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # it logs what it raises, pages of it
    logging.getLogger("urllib3").setLevel(logging.ERROR)  # it logs each attempt, with the address
    if path := addresses.sqlite_file(uri):
        _create_store(uri, path)
    elif not uri.startswith("http") and (problem := addresses.unreachable(uri)) and "no answer" not in problem:
        # SQLAlchemy's own attempts take minutes
        raise NoAnswer(problem)
    try:
        with waiting.answering(uri):
            return Client(uri)
    except SQLAlchemyError as error:  # which MLflow passes on as it is while it opens a store
        raise MlflowException(reason(error)) from error


@functools.cache
def _create_store(uri: str, path: Path) -> None:
    """Create the SQLite file if it is missing.

    A lock lets only one process create it. The file appears when it is complete. Without this, two processes that
    create a store at the same time break it for good. A process that is killed before it has made all the tables breaks
    it too. Raises `MlflowException` if the file cannot be used.
    """
    with files.locked(path.with_name(f"{path.name}.lock"), STORE_SECONDS):
        if not path.exists():
            with files.replacing(path) as part:
                part_uri = addresses.for_mlflow(addresses.of_file(part))
                mlflow.db.commands.main(["upgrade", part_uri], standalone_mode=False)
                gc.collect()  # of the connection: Windows does not rename a file that is open
        try:
            MlflowClient(addresses.for_mlflow(uri)).search_experiments(max_results=1)
        except SQLAlchemyError as error:
            raise MlflowException(reason(error)) from error
    _remove_misnamed(path)


def _remove_misnamed(path: Path) -> None:
    """Remove the empty folders with escaped names.

    `mlflow run` makes them from the address, because it does not decode the escapes in it.
    """
    folder = Path(quote(path.parent.as_posix(), safe="/:"))
    while folder != path.parent and "%" in str(folder):
        try:
            folder.rmdir()
        except OSError:  # it is not there, or there is something in it
            break
        folder = folder.parent


def own_client() -> Client:
    """Return a client of this process's own tracking server.

    It is the server that this process is told to use. Raises `RunError` if no MLflow server answers there.
    """
    client = client_of(addresses.own())
    if client.uri.startswith("http") and not client.search_experiments(view_type=ViewType.ALL, max_results=1):
        raise RunError(
            f"{addresses.shown(client.uri)}: shows no experiment at all: it is no MLflow server, or one that lets this "
            "user see nothing; look at MLFLOW_TRACKING_URI and MLFLOW_TRACKING_USERNAME; poolnet doctor says more"
        )
    return client


@contextlib.contextmanager
def own_server(timeout: float | None = None) -> Iterator[None]:
    """Use this process's own tracking server in the block.

    An error of MLflow about the server becomes a one-line `RunError`. A server that is silent for `timeout` seconds is
    given up. Raises `InputError` if the address can never work.
    """
    uri = addresses.own()
    addresses.check(uri)
    if timeout is not None:
        waiting.limit(timeout)
    with brief_errors(uri), as_environment(uri):
        yield


@contextlib.contextmanager
def artifacts(client: Client, place: str) -> Iterator[ArtifactRepository]:
    """Open the folder of artifacts at an address of MLflow's.

    What is done in the block is one server call. MLflow's own methods ask for the address again.
    """
    with waiting.answering(client.uri):
        yield get_artifact_repository(place, client.tracking_uri)


# --- what is there -----------------------------------------------------------------------------------------------


def once(client: MlflowClient, look_up: Callable[..., str], *args: str) -> str:
    """Return `look_up(client, *args)`, asked once a process.

    This is for what many runs share. `forget` makes it ask again.
    """
    with _looking:
        key = (client.tracking_uri, look_up, *args)
        if key not in _known:
            _known[key] = look_up(client, *args)
        return _known[key]


def forget() -> None:
    """Forget what `once` has found, after an error.

    The server may be another one now.
    """
    with _looking:
        _known.clear()


def own_experiment(client: MlflowClient) -> str:
    """Return the experiment id that this process must use.

    An experiment that is given by its name is created if it is missing.
    """
    if number := os.environ.get("MLFLOW_EXPERIMENT_ID"):
        return _active(client.get_experiment(number))
    return experiment(client, os.environ.get("MLFLOW_EXPERIMENT_NAME", ""))


def experiment_named(client: MlflowClient, name: str) -> str:
    """Return the id of an existing experiment.

    `name` is the name or the id of the experiment. If it is empty, the experiment is this process's own. An experiment
    that is named must exist, otherwise this raises `InputError`.
    """
    if not name:
        return own_experiment(client)
    existing = client.get_experiment_by_name(name)
    if not existing and name.isdecimal():
        with contextlib.suppress(MlflowException):
            existing = client.get_experiment(name)
    if not existing:
        known = ", ".join(each.name for each in experiments(client)[:20])
        raise InputError(f"--experiment: found none called {name!r}, expected one of {known}")
    return _active(existing)


def experiment(client: MlflowClient, name: str) -> str:
    """Return the id of an experiment, created if missing.

    An empty name means `Default`, which is MLflow's own experiment.
    """
    name = name or "Default"
    existing = client.get_experiment_by_name(name)
    if not existing:
        try:
            return client.create_experiment(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        existing = client.get_experiment_by_name(name)  # made by another process just now
        assert existing
    return _active(existing)


def _active(existing: Experiment) -> str:
    """Return an experiment's id, or refuse it if deleted."""
    number = existing.experiment_id
    if existing.lifecycle_stage == "deleted":
        raise InputError(
            f"experiment {number} was deleted; restore it with: mlflow experiments restore --experiment-id {number}"
        )
    return number


def experiments(client: MlflowClient) -> list[Experiment]:
    """Return all experiments that are not deleted."""
    return [*all_pages(client.search_experiments)]


def all_pages(search: Callable[..., PagedList[Found]], *args: object, **options: object) -> Iterator[Found]:
    """Yield what a search of MLflow's finds, page by page."""
    token = None
    while token is None or token:
        page = search(*args, **options, page_token=token)
        yield from page
        token = page.token or ""


def reason(error: Exception) -> str:
    """Explain an error and its cure in one line.

    The line says what went wrong and, where that is known, what to do. It fits a screen and holds no password.
    """
    text = hidden(" ".join(str(error).split())) or type(error).__name__
    if isinstance(error, ImportError) and error.name:
        name = error.name.partition(".")[0]
        package = PACKAGES.get(name, name)
        return f"{package} is not installed here; pip install {package}"
    if CREDENTIALS in text:
        return "no credentials for its artifacts; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
    for sign in SIGNS:
        if sign in text:
            return sign.lower()
    if "response body was not in a valid JSON" in text:
        return "it is no MLflow server; look at MLFLOW_TRACKING_URI"
    if match := re.search(r"too many (\d{3}) error responses|error code (\d{3})", text):
        status = match[1] or match[2]
        return f"the server answers {status}" + (f"; {CURES[status]}" if status in CURES else "")
    if match := re.search(r"experiment (\d+) must be in the 'active' state", text):
        return (
            f"experiment {match[1]} is deleted; restore it with: mlflow experiments restore --experiment-id {match[1]}"
        )
    return text if len(text) <= 200 else f"{text[:200]}..."


def pointer(error: Exception) -> str:
    """Say where to look further, if a server failed."""
    is_servers = isinstance(error, NoAnswer) or SERVERS.search(f"{reason(error)} {error}")
    return "; poolnet doctor says more" if is_servers else ""


def is_refusal(error: Exception) -> bool:
    """Whether the same request would fail again."""
    if isinstance(error, MlflowException) and error.error_code in REFUSALS:
        return True
    text, status = str(error), r"4(?!08|25|29)\d\d"
    refused = re.search(rf"An error occurred \((?!{BUSY})|error code {status}|\b{status} Client Error", text)
    return isinstance(error, ImportError) or CREDENTIALS in text or bool(refused)


def is_forbidden(error: MlflowException) -> bool:
    """Whether this user may not do what was asked."""
    return error.error_code == "PERMISSION_DENIED" or "error code 403" in str(error)


@contextlib.contextmanager
def brief_errors(uri: str) -> Iterator[None]:
    """Turn server errors in the block into a one-line `RunError`."""
    try:
        yield
    except Exception as error:
        if not (isinstance(error, (MlflowException, NoAnswer)) or _is_of_artifacts(error)):
            raise
        away = isinstance(error, NoAnswer) or reason(error) in map(str.lower, AWAY)
        cure = "; start the server, correct MLFLOW_TRACKING_URI, or wait longer with --timeout" if away else ""
        raise RunError(f"{addresses.shown(uri)}: {reason(error)}{cure}{pointer(error)}") from None


def _is_of_artifacts(error: Exception) -> bool:
    """Whether a library that fetches artifacts has raised it.

    They have errors of their own, which MLflow passes on as they are.
    """
    return type(error).__module__.partition(".")[0] in PACKAGES
