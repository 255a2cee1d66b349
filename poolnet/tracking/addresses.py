"""Read, complete and check tracking server addresses.

An SQLite address may be percent-encoded or not: `mlflow run` gives its child an encoded one, users type plain ones. The
files that exist on the disk decide how it is read. This module does not import MLflow, since a training checks its
address first.
"""

import importlib.metadata
import os
import re
import socket
import threading
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError

from poolnet.errors import InputError
from poolnet.files import expanded
from poolnet.secret import USER, shown

DEFAULT = "sqlite:///mlflow.db"  # MLflow's own, in the working folder
DATABASES = ("postgresql", "mysql", "mssql")
PROBE_SECONDS = 2  # that a training waits to hear whether there is a server


def own() -> str:
    """Return the complete tracking address of this process.

    It is the address that this process is told to use. Raises `InputError` if a setting of MLflow is not UTF-8, or if
    the token cannot be sent.
    """
    for name, value in os.environ.items():
        if name.startswith("MLFLOW_") and value != value.encode(errors="replace").decode():
            raise InputError(f"{name}: found a value that is not UTF-8, as tracking servers store it")
    token = os.environ.get("MLFLOW_TRACKING_TOKEN", "")
    if token != token.strip() or not (token.isascii() and token.isprintable()):
        raise InputError("MLFLOW_TRACKING_TOKEN: found a line break or another sign that no token has; set it anew")
    return absolute(os.environ.get("MLFLOW_TRACKING_URI", ""), Path.cwd())


def environment() -> dict[str, str]:
    """Return the tracking settings of this process.

    They are part of a run's record. They say where the environment tells this process to track its runs, as MLflow
    reads it, without secrets.
    """
    return {
        "uri": shown(os.environ.get("MLFLOW_TRACKING_URI", "")),
        "folder": str(Path.cwd()),  # in which MLflow's default lies
        "experiment_id": os.environ.get("MLFLOW_EXPERIMENT_ID", ""),
        "experiment_name": os.environ.get("MLFLOW_EXPERIMENT_NAME", ""),
        "run_id": os.environ.get("MLFLOW_RUN_ID", ""),  # that `mlflow run` has made for this process
    }


def absolute(uri: str, folder: Path) -> str:
    """Return the address with an absolute SQLite path.

    The path is written as SQLAlchemy reads it. Other addresses stay as they are.
    """
    path = sqlite_file(uri or DEFAULT, folder)
    if not path:
        return uri
    _, mark, query = uri.partition("?")
    return of_file(path) + mark + query


def of_file(path: Path) -> str:
    """Return the SQLite address of a file, as SQLAlchemy reads it."""
    text = path.as_posix()
    if unquote(text) != text or "?" in text:
        text = text.replace("%", "%25").replace("?", "%3F")
    return f"sqlite:///{text}"


def sqlite_file(uri: str, folder: Path | None = None) -> Path | None:
    """Return the file that an SQLite address means, if any."""
    url = _parsed(uri)
    if not url or not _is_sqlite(url) or _why_no_file(url):
        return None
    readings = (url.database, make_url(uri.replace("%", "%25")).database)
    paths = [(folder or Path.cwd()) / expanded(Path(text)) for text in readings if text]
    files = [path for path in paths if _is(path, Path.is_file)]
    in_folders = [path for path in paths if _is(path.parent, Path.is_dir)]
    return (files or in_folders or paths)[0]


def _is(path: Path, kind: Callable[[Path], bool]) -> bool:
    try:
        return kind(path)
    except OSError:  # of a name that is too long, say
        return False


def check(uri: str, source: str = "MLFLOW_TRACKING_URI") -> None:
    """Refuse a tracking address that can never work.

    Raises `InputError`, which says what to write instead. The folder of an SQLite file is created if it is missing.
    """
    scheme, url = uri.partition(":")[0].lower(), _parsed(uri)
    if url and _is_sqlite(url):
        path = sqlite_file(uri)
        problem = _why_not_writable(path) if path else _why_no_file(url)
    elif scheme.partition("+")[0] in DATABASES:
        problem = _why_no_database(url)
    elif scheme in ("http", "https"):
        problem = _why_no_server(for_mlflow(uri))
    elif scheme == "file":
        problem = "where MLflow keeps no runs any more, expected a database, as in sqlite:///mlflow.db"
    else:
        plugins = {entry.name for entry in importlib.metadata.entry_points(group="mlflow.tracking_store")}
        known = {*plugins, "databricks", "databricks-uc", "uc"}
        problem = None if scheme in known else "expected an address such as http://host:5000 or sqlite:///mlflow.db"
    if problem:
        raise InputError(f"{source}: found {shown(uri)!r}, {problem}")


def unreachable(uri: str) -> str | None:
    """Return why the address cannot be reached, or None.

    The check waits two seconds at most. The result is None if somebody can be reached, or if the address has no host to
    ask.
    """
    url = _parsed(for_mlflow(uri))
    if not url or not url.host or _is_sqlite(url):
        return None
    ports = {"http": 80, "https": 443, "postgresql": 5432, "mysql": 3306, "mssql": 1433}
    port = url.port or ports.get(url.drivername.partition("+")[0])
    if not port:
        return None
    problems: list[str | None] = [f"no answer for {PROBE_SECONDS} s"]

    def connect() -> None:
        try:
            socket.create_connection((url.host, port), PROBE_SECONDS).close()
            problems.append(None)
        except OSError as error:
            problems.append(error.strerror or str(error))

    probe = threading.Thread(target=connect, daemon=True)  # the look-up of a name has no time-out of its own
    probe.start()
    probe.join(PROBE_SECONDS)
    return problems[-1]


def for_mlflow(uri: str) -> str:
    """Return the address in the form that MLflow needs.

    The password is escaped. The driver of `postgresql` is psycopg 3, unless only psycopg2 is installed. The driver of
    an SQLite address with escapes is named, so that the escapes are understood: without a driver, MLflow makes a folder
    from the text after `sqlite:///` without decoding it.
    """
    if "%" in uri:
        uri = re.sub("^sqlite:", "sqlite+pysqlite:", uri)
    if match := USER.match(uri):
        start, password = match.groups()
        uri = f"{start}:{quote(unquote(password), safe='')}@{uri[match.end() :]}"
    if uri.startswith("postgresql://") and (find_spec("psycopg") or not find_spec("psycopg2")):
        uri = uri.replace("postgresql:", "postgresql+psycopg:", 1)
    return uri


def _parsed(uri: str) -> URL | None:
    try:
        return make_url(uri)
    except (ArgumentError, ValueError):  # the latter of a port that is no number
        return None


def _is_sqlite(url: URL) -> bool:
    return url.drivername.partition("+")[0] == "sqlite"


def _why_no_file(url: URL) -> str | None:
    if url.host:
        return "where a slash is missing, expected sqlite:///FILE, or sqlite:////FOLDER/FILE"
    if not url.database or url.database.startswith((":memory:", "file:")):
        return "which is in memory and gone with the process, expected a file, as in sqlite:///mlflow.db"
    return None


def _why_not_writable(path: Path) -> str | None:
    try:
        if path.exists() and not path.is_file():
            return "which is a folder or a device, expected a file, as in sqlite:///mlflow.db"
        path.parent.mkdir(parents=True, exist_ok=True)
        if not all(os.access(place, os.W_OK) for place in (path.parent, path) if place.exists()):
            return "which this user may not write, expected another"
        return None
    except (OSError, ValueError) as error:
        return f"whose folder cannot be made ({getattr(error, 'strerror', None) or error}), expected another"


def _why_no_database(url: URL | None) -> str | None:
    if not url:
        return "expected DATABASE://USER:PASSWORD@HOST:PORT/NAME"
    try:
        make_url(for_mlflow(url.render_as_string(hide_password=False))).get_dialect().import_dbapi()
    except NoSuchModuleError:
        return f"a driver that SQLAlchemy does not know, expected {url.drivername.partition('+')[0]}"
    except ImportError as error:
        module = error.name or str(error)
        package = {"MySQLdb": "mysqlclient", "psycopg": "'poolnet[postgres]'"}.get(module, module)
        return f"whose driver {module} is not installed; pip install {package}"
    return None


def _why_no_server(uri: str) -> str | None:
    try:
        parts = urlsplit(uri)
        return None if parts.hostname and parts.port != 0 else "expected http://HOST:PORT"
    except ValueError:
        return "expected http://HOST:PORT"
