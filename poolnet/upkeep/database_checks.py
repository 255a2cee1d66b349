"""Ask a database what `poolnet doctor` wants to know.

An SQLite file is one too. It is asked without MLflow's own store, which would create tables. Nothing is written: the
statements that would need the right to write concern no row.
"""

import contextlib
import os
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import mlflow
import sqlalchemy
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy import Connection, text
from sqlalchemy.exc import SQLAlchemyError

from poolnet.text import pasted
from poolnet.tracking import addresses, waiting
from poolnet.upkeep.visit import START, Experiment, NotAsked, Problem, Visit, brief, may_be_written, no_experiment

UNKNOWN = re.compile("authentication failed|Access denied|no password supplied|Login failed|role .* does not exist")
MIGRATIONS = Path(mlflow.__file__).parent / "store" / "db_migrations"
LOCK_SECONDS = 2  # that SQLite waits for another process
NOW = {"postgresql": "SELECT extract(epoch FROM now())", "mysql": "SELECT unix_timestamp(now(6))"}


@contextlib.contextmanager
def connected(visit: Visit) -> Iterator[Connection]:
    """Open one connection, and undo what is done with it."""
    options = {"timeout": LOCK_SECONDS} if addresses.sqlite_file(visit.uri) else {}
    engine = sqlalchemy.create_engine(
        addresses.for_mlflow(visit.uri), poolclass=sqlalchemy.NullPool, connect_args=options
    )
    with waiting.answering(visit.uri), engine.connect() as connection:
        yield connection


def reachability(visit: Visit) -> str:
    if path := addresses.sqlite_file(visit.uri):
        if not path.exists():
            visit.blocked = "there is no store yet"
            return f"{path} is not there yet; the first run makes it"
        return f"{path} is there"
    if problem := addresses.unreachable(visit.uri):
        raise Problem(f"{visit.shown}: {problem}", START, "the database cannot be reached")
    return "takes the connection"


def credentials(visit: Visit) -> str:
    if addresses.sqlite_file(visit.uri):
        return "none asked for"
    try:
        with connected(visit):
            return "the database knows them"
    except SQLAlchemyError as error:
        if not UNKNOWN.search(str(error)):
            raise NotAsked("the database does not open") from None
        cure = "correct user and password in MLFLOW_TRACKING_URI"
        raise Problem(
            f"the database refuses them: {_why(error)}", cure, "the database does not know this user"
        ) from None


def database(visit: Visit) -> str:
    try:
        with connected(visit) as connection:
            tables = sqlalchemy.inspect(connection).get_table_names()
    except SQLAlchemyError as error:
        why, blocks = _why(error), "the database does not open"
        if path := addresses.sqlite_file(visit.uri):
            cure = "move that file away, and start with a backup of it, or with a new one and: poolnet sync"
            raise Problem(f"{path}: {why}", cure, blocks) from None
        raise Problem(why, "start the database, or correct its name in MLFLOW_TRACKING_URI", blocks) from None
    if not tables:
        visit.blocked = "the database is empty; the first run makes its tables"
    return f"{len(tables)} tables"


def _why(error: SQLAlchemyError) -> str:
    return brief(getattr(error, "orig", None) or error)


def version(visit: Visit) -> str:
    return f"MLflow {mlflow.__version__} here, and no server"


def schema(visit: Visit) -> str:
    with connected(visit) as connection:
        theirs = MigrationContext.configure(connection).get_current_revision()
    script = ScriptDirectory(str(MIGRATIONS))
    ours, blocks = script.get_current_head(), "the tables have another form"
    if theirs == ours:
        return f"revision {ours}"
    try:
        is_older = theirs is None or script.get_revision(theirs) is not None
    except CommandError:
        is_older = False
    if not is_older:
        cure = "pip install --upgrade poolnet"
        raise Problem(f"its tables are of a newer MLflow than {mlflow.__version__} (revision {theirs})", cure, blocks)
    command = pasted("mlflow", "db", "upgrade", addresses.shown(addresses.for_mlflow(visit.uri)))
    password = " (with the password in it)" if visit.shown != visit.uri else ""
    found = f"its tables are of an older MLflow than {mlflow.__version__} (revision {theirs}, expected {ours})"
    raise Problem(found, f"back it up, stop who writes, then: {command}{password}", blocks)


def seconds_ahead(visit: Visit) -> float | None:
    """Return how much later it is for the database."""
    query = NOW.get(sqlalchemy.make_url(visit.uri).get_backend_name())
    if not query:
        return None
    with connected(visit) as connection:
        return float(connection.execute(text(query)).scalar_one()) - time.time()


def experiment(visit: Visit) -> str:
    number, name = os.environ.get("MLFLOW_EXPERIMENT_ID"), os.environ.get("MLFLOW_EXPERIMENT_NAME") or "Default"
    query = "SELECT experiment_id, name, artifact_location, lifecycle_stage FROM experiments WHERE "
    given = {"value": int(number) if (number or "").isdecimal() else number} if number else {"value": name}
    with connected(visit) as connection:
        found = connection.execute(text(query + ("experiment_id" if number else "name") + " = :value"), given).first()
    if not found and number:
        raise no_experiment(number)
    _check_writable(visit, "runs", "status")
    if not found:
        return f"{name} is not there yet; the first run makes it"
    visit.experiment = Experiment(str(found.experiment_id), found.name, found.artifact_location)
    return may_be_written(visit, found.lifecycle_stage)


def registry(visit: Visit) -> str:
    _check_writable(visit, "registered_models", "description")
    return "may be written"


def _check_writable(visit: Visit, table: str, column: str) -> None:
    try:
        with connected(visit) as connection:
            connection.execute(text(f"UPDATE {table} SET {column} = {column} WHERE 1 = 0"))
    except SQLAlchemyError as error:
        why = _why(error)
        if "locked" in why:
            cure = "wait for the process that writes it, or end it"
            raise Problem(f"another process writes: {why}", cure, "the database is locked") from None
        raise Problem(f"table {table}: {why}", "ask who runs the database for the right to write its tables") from None


def statuses(visit: Visit, experiment_of: Mapping[str, str]) -> dict[str, str]:
    """Return the statuses of the database's runs, by id."""
    query = text("SELECT run_uuid, status FROM runs WHERE run_uuid IN :ids").bindparams(
        sqlalchemy.bindparam("ids", expanding=True)
    )
    ids = [*experiment_of]
    with connected(visit) as connection:
        parts = [ids[start : start + 500] for start in range(0, len(ids), 500)]  # databases bind so many values only
        rows = [row for part in parts for row in connection.execute(query, {"ids": part})]
    return {row.run_uuid: row.status for row in rows}
