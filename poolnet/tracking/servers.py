"""Connect to tracking servers and read what they hold.

This module also finds their addresses and creates local SQLite stores, so that each store is complete.
"""

import _thread
import contextlib
import functools
import gc
import itertools
import logging
import math
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import mlflow
import mlflow.db
from mlflow.entities import Experiment, Run, ViewType
from mlflow.exceptions import MlflowException
from mlflow.tracking.client import MlflowClient
from sqlalchemy.exc import SQLAlchemyError

from poolnet import files
from poolnet.errors import InputError, NoAnswer, RunError
from poolnet.runs import run_name
from poolnet.runs.run_record import RunRecord
from poolnet.tracking import addresses, names, published

AWAY = ("Connection refused", "Read timed out", "Name or service not known", "Connection reset", "timed out")
SIGNS = (  # the words that matter in the long texts of MLflow and its libraries
    *AWAY,
    *("No space left on device", "File too large", "database or disk is full", "disk I/O error"),
    *("database is locked", "readonly database", "file is not a database", "database disk image is malformed"),
)
CURES = {  # the status of a server's reply, and what to do
    "401": "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN",
    "403": "MLFLOW_TRACKING_USERNAME may not do this there; ask who runs the server for permission",
    "404": "no MLflow server is there; look at MLFLOW_TRACKING_URI",
}
PACKAGES = {"botocore": "boto3", "google": "google-cloud-storage", "azure": "azure-storage-blob azure-identity"}
CREDENTIALS = "Unable to locate credentials"  # so says boto3
REFUSALS = ("UNAUTHENTICATED", "PERMISSION_DENIED", "INVALID_PARAMETER_VALUE", "BAD_REQUEST", "ENDPOINT_NOT_FOUND")
BUSY = "SlowDown|InternalError|ServiceUnavailable|RequestTimeout|Throttling"  # what S3 may say once and not again
STORE_SECONDS = 20  # that a process waits while others make the same SQLite store


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

    MLflow's own registry store looks there for the models of its runs.
    """
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


# --- waiting for an answer ---------------------------------------------------------------------------------------


class _Silence(BaseException):
    """Signal that a server gave no answer for some seconds.

    It is not an `Exception`, because MLflow would catch that and try again.
    """

    def __init__(self, seconds: float):
        self.seconds = seconds


_limit = math.inf  # seconds that a call may take
_deadline = math.inf  # by which all calls must have their answers
_calls = 0  # that are under way, one in the other
_silent: dict[str, float] = {}  # servers that gave no answer, and for how long they were waited for
_ALARM = getattr(signal, "SIGALRM", signal.SIGABRT)  # Windows has no alarms
_timer: threading.Timer | None = None  # there


def limit(seconds: float) -> None:
    """Set how long to wait for a silent server.

    From now on, a call of a server that is silent for `seconds` is given up with `NoAnswer`.
    """
    global _limit
    _limit = seconds
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", str(max(1, math.ceil(seconds))))  # where no alarm ends a call
    os.environ.setdefault("PGCONNECT_TIMEOUT", str(math.ceil(seconds) + 1))


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """Limit the total time of server calls in a block.

    All calls in the block have `seconds` together. They do not get more time than an outer block leaves.
    """
    global _deadline, _limit
    before = (_deadline, _limit)
    _deadline = min(_deadline, time.monotonic() + seconds)
    _limit = min(_limit, seconds)
    try:
        yield
    finally:
        _deadline, _limit = before


@contextlib.contextmanager
def answering(uri: str) -> Iterator[None]:
    """Limit the waiting time of one server call.

    Raises `NoAnswer` if the server is silent. If it was silent before, this is raised at once. There is no limit for
    SQLite files, in other threads than the main one, and before `limit` or `within` sets one.
    """
    global _calls
    if _limit == math.inf or addresses.sqlite_file(uri) or threading.current_thread() is not threading.main_thread():
        yield
        return
    depth = _calls
    if not depth and _silent.get(uri, -1) >= _limit:
        raise NoAnswer(f"no answer for {_silent[uri]:g} s")
    try:
        _calls = depth + 1
        _set_alarm()
        yield
        _set_alarm()  # a call of a call was answered
    except _Silence as silence:
        if depth:
            raise
        _silent[uri] = silence.seconds
        raise NoAnswer(f"no answer for {_silent[uri]:g} s") from None
    finally:
        _calls = depth
        if not depth:
            _clear_alarm()


def gave_up() -> bool:
    """Whether a server was silent for too long.

    Threads of MLflow may still wait for it.
    """
    return bool(_silent)


def _set_alarm() -> None:
    """Set an alarm that raises `_Silence` in the main thread.

    The alarm rings when the time for the call is over.
    """
    global _timer
    remaining = _deadline - time.monotonic()
    waited = min(_limit, max(0.1, round(remaining, 1)))  # rounded for the message, which never says 0 s

    def ring(signum: int, frame: object) -> None:
        if _calls:
            raise _Silence(waited)

    seconds = max(0.001, min(_limit, remaining))
    signal.signal(_ALARM, ring)
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, seconds, 1)  # and again, should somebody swallow it
    else:
        _clear_alarm()
        _timer = threading.Timer(seconds, _thread.interrupt_main, (_ALARM,))
        _timer.daemon = True
        _timer.start()


def _clear_alarm() -> None:
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, 0)
    elif _timer:
        _timer.cancel()


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
            with answering(self.uri):
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
        with answering(uri):
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
            "user see nothing; look at MLFLOW_TRACKING_URI and MLFLOW_TRACKING_USERNAME"
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
        limit(timeout)
    with brief_errors(uri), as_environment(uri):
        yield


# --- what is there -----------------------------------------------------------------------------------------------


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
    all_pages: list[Experiment] = []
    token = None
    while token is None or token:
        page = client.search_experiments(page_token=token)
        all_pages += page
        token = page.token or ""
    return all_pages


def get_run(client: MlflowClient, run_id: str) -> Run | None:
    """Return the run with this id, or None.

    It may be deleted.
    """
    try:
        return client.get_run(run_id) if run_id else None
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise


def look_up(client: MlflowClient, text: str) -> Run:
    """Find the run on the server that a text names.

    The text is the name of its record, the name that MLflow shows, a beginning of one, or MLflow's run id, see
    `run_name.choose`. By name, only runs that have a model are found. All experiments are searched. Raises `InputError`
    if there is no such run, or if there are several.
    """
    run = find_run(client, text)
    if not run:
        raise InputError(f"{text}: no such run on the tracking server")
    return run


def find_run(client: MlflowClient, text: str) -> Run | None:
    """Find a run as `look_up` does, or return None."""
    if re.fullmatch("[0-9a-f]{32}", text) and (run := get_run(client, text)):
        if run.info.lifecycle_stage == "deleted":
            raise InputError(f"run {text} was deleted; restore it with: mlflow runs restore --run-id {text}")
        return run
    experiment_ids = [each.experiment_id for each in experiments(client)] if text else []
    runs: dict[str, Run] = {}

    def search(beginning: str, more: bool) -> dict[str, str]:
        for field in (f"tags.`{names.RUN}`", "attributes.run_name"):
            found = _with_name(client, experiment_ids, field, beginning, more)
            runs.update((run.info.run_id, run) for run in itertools.islice(found, run_name.LISTED + 1))
        return {run_id: name_of(run) for run_id, run in runs.items()}

    run_id = run_name.choose(text, search)
    return runs[run_id] if run_id else None


def name_of(run: Run) -> str:
    """Return the name of a run's record, or MLflow's name."""
    return run.data.tags.get(names.RUN) or run.info.run_name


def _with_name(
    client: MlflowClient, experiment_ids: list[str], field: str, beginning: str, more: bool
) -> Iterator[Run]:
    """Yield the runs whose name begins so.

    They have a model. The newest comes first. `field` is the name's in MLflow's search. If not `more`, `beginning` is
    the whole name.
    """
    # LIKE has no way to quote its wildcards, and MLflow none to quote quotes: "_" stands for any character
    pattern = re.sub(r"[^\w .-]", "_", beginning) + "%" * more
    for start in range(0, len(experiment_ids), 500):  # databases bind so many values only
        some, token = experiment_ids[start : start + 500], None
        while token is None or token:
            page = client.search_runs(some, f"{field} LIKE '{pattern}'", max_results=100, page_token=token)
            for run in page:
                name = run.info.run_name if field == "attributes.run_name" else run.data.tags[names.RUN]
                fits = name.startswith(beginning) if more else name == beginning
                if fits and run.data.tags.keys() & {names.RUN, names.WEIGHTS}:
                    yield run
            token = page.token or ""


def reason(error: Exception) -> str:
    """Explain an error and its cure in one line.

    The line says what went wrong and, where that is known, what to do. It fits a screen and holds no password.
    """
    text = addresses.hidden(" ".join(str(error).split())) or type(error).__name__
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


def is_refusal(error: Exception) -> bool:
    """Whether the same request would fail again."""
    if isinstance(error, MlflowException) and error.error_code in REFUSALS:
        return True
    text, status = str(error), r"4(?!08|25|29)\d\d"
    refused = re.search(rf"An error occurred \((?!{BUSY})|error code {status}|\b{status} Client Error", text)
    return isinstance(error, ImportError) or CREDENTIALS in text or bool(refused)


@contextlib.contextmanager
def brief_errors(uri: str) -> Iterator[None]:
    """Turn server errors in the block into a one-line `RunError`."""
    try:
        yield
    except (MlflowException, NoAnswer) as error:
        why = reason(error)
        away = isinstance(error, NoAnswer) or why in map(str.lower, AWAY)
        cure = "; start the server, correct MLFLOW_TRACKING_URI, or wait longer with --timeout" if away else ""
        raise RunError(f"{addresses.shown(uri)}: {why}{cure}") from None
