"""Find runs on a server, and create those of run records."""

import contextlib
import itertools
import os
import re
import shlex
from collections.abc import Iterator

import click
from mlflow.entities import Run, RunTag, ViewType
from mlflow.exceptions import MlflowException
from mlflow.tracking.client import MlflowClient

from poolnet.errors import InputError, RunError
from poolnet.runs import run_name
from poolnet.runs.run_record import RunRecord
from poolnet.secret import anonymous
from poolnet.tracking import addresses, names, servers
from poolnet.tracking.servers import Client

DEFAULT = "0"  # the id of MLflow's experiment `Default`, on each server


class Refused(InputError):
    """The server's record contradicts the run; retrying is useless."""


def find(client: Client, run_id: str) -> Run | None:
    """Return the run with this id, or None.

    Raises `RunError` if the run was deleted.
    """
    server_run = get_run(client, run_id)
    if server_run:
        _refuse_deleted(client, server_run)
    return server_run


def is_there(client: Client, run_id: str) -> bool:
    """Whether there is a run with this id, not deleted."""
    server_run = get_run(client, run_id)
    return bool(server_run and server_run.info.lifecycle_stage == "active")


def find_earlier(client: Client, run: RunRecord, experiment: str) -> Run | None:
    """Return the server's run for a record whose id is not known here.

    It is the run that `mlflow run` has made, or one that was created earlier but whose id did not arrive here.
    `experiment` is the name of the run's experiment, if it is known. Raises `RunError` if the run was deleted.
    """
    server_run = _made_by_mlflow_run(client, run)
    if not server_run:
        # another machine may have a run of this name, but begun at another time
        query = f"tags.`{names.RUN}` = '{run.name}' AND attributes.start_time = {run.record['started']}"
        places = [experiment_id(client, run, experiment)]
        server_run = next(iter(client.search_runs(places, query, ViewType.ALL, max_results=1)), None)
    if server_run:
        _refuse_deleted(client, server_run)
    return server_run


def is_home(uri: str, run: RunRecord) -> bool:
    """Whether the run was begun on this server."""
    return addresses.shown(uri) == servers.recorded_home(run.record)


def explain_carrier(client: Client, carrier: str, run: RunRecord, run_id: str) -> None:
    """Say in a carrier run which run holds the results.

    The carrier is the run that `mlflow run -P resume=...` made. It cannot be deleted: `mlflow run` fails if it cannot
    set the status of that run at the end.
    """
    hide_origin(client, client.get_run(carrier))
    note = f"Made by `mlflow run` to resume {run.name}, run {run_id}, which holds everything."
    tags = {names.NOTE: note, names.TITLE: f"resumes {run.name}"}
    client.log_batch(carrier, tags=[RunTag(*tag) for tag in tags.items()])


def hide_origin(client: MlflowClient, run: Run) -> None:
    """Remove secrets from what `mlflow run` recorded of its origin.

    That is the address of a repository, in which many a clone has a token.
    """
    tags = run.data.tags
    shown = {name: anonymous(tags[name]) for name in names.ORIGIN if name in tags}
    if changed := [RunTag(name, text) for name, text in shown.items() if text != tags[name]]:
        client.log_batch(run.info.run_id, tags=changed)


def agrees(raw: str, value: str | int | float | bool) -> bool:
    """Whether a recorded param means this value.

    `raw` is the param as `mlflow run` records it: the raw text, possibly quoted for a shell.
    """
    texts = [raw]
    with contextlib.suppress(ValueError):
        texts += shlex.split(raw)
    for text in texts:
        with contextlib.suppress(click.BadParameter):
            if click.types.convert_type(type(value))(text) == value:
                return True
    return False


def get_run(client: MlflowClient, run_id: str) -> Run | None:
    """Return the run with this id, or None.

    It may be deleted. A server with users refuses to say whether a run exists that it does not have, so then the runs
    that this user may see are searched.
    """
    try:
        return client.get_run(run_id) if run_id else None
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        if not servers.is_forbidden(error) or not re.fullmatch("[0-9a-f]{32}", run_id):
            raise
    ids = [each.experiment_id for each in servers.experiments(client)]
    return next(iter(client.search_runs(ids, f"attributes.run_id = '{run_id}'", ViewType.ALL, max_results=1)), None)


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
    experiment_ids = [each.experiment_id for each in servers.experiments(client)] if text else []
    runs: dict[str, Run] = {}

    def search(beginning: str, more: bool) -> dict[str, str]:
        for field in (f"tags.`{names.RUN}`", "attributes.run_name"):
            matches = _with_name(client, experiment_ids, field, beginning, more)
            runs.update((run.info.run_id, run) for run in itertools.islice(matches, run_name.LISTED + 1))
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
        some, query = experiment_ids[start : start + 500], f"{field} LIKE '{pattern}'"
        for run in servers.all_pages(client.search_runs, some, query, max_results=100):
            name = run.info.run_name if field == "attributes.run_name" else run.data.tags[names.RUN]
            fits = name.startswith(beginning) if more else name == beginning
            if fits and run.data.tags.keys() & {names.RUN, names.WEIGHTS}:
                yield run


def _refuse_deleted(client: Client, server_run: Run) -> None:
    if server_run.info.lifecycle_stage == "deleted":
        where = addresses.shown(client.uri)
        raise RunError(f"run {server_run.info.run_id} was deleted on {where}; restore it there, or sync --to elsewhere")


def _made_by_mlflow_run(client: Client, run: RunRecord) -> Run | None:
    """Return the run that `mlflow run` made for this one.

    The result is None if there is no such run, or if it cannot be this one. If it cannot be this one and
    `MLFLOW_RUN_ID` still names it, this raises `Refused` instead.
    """
    run_id = run.record["tracking"]["run_id"]
    server_run = get_run(client, run_id) if is_home(client.uri, run) else None
    problem = _contradiction(server_run, run) if server_run else ""
    if problem and os.environ.get("MLFLOW_RUN_ID") == run_id:
        raise Refused(f"run {run_id}: {problem}; unset MLFLOW_RUN_ID, then: poolnet sync {run.name}")
    return None if problem else server_run


def _contradiction(server_run: Run, run: RunRecord) -> str:
    """Say why a server's run cannot be this one, or nothing."""
    other = server_run.data.tags.get(names.RUN)
    if other != run.name and (other or server_run.info.lifecycle_stage == "deleted"):
        return f"found the record of {other} in it" if other else "was deleted"
    for name, value in run.record["config"].items():
        raw = server_run.data.params.get(name)
        if raw is not None and not agrees(raw, value):
            return f"{name}: found {raw} in its record, expected {value}"
    return ""


def experiment_id(client: Client, run: RunRecord, name: str) -> str:
    """Return the id of the run's experiment on this server.

    It is the experiment that the run was begun in. `name` is its name, if it is known.
    """
    tracking = run.record["tracking"]
    if not name and tracking["experiment_id"] and is_home(client.uri, run):
        return tracking["experiment_id"]
    if not name and tracking["experiment_id"] in ("", DEFAULT):
        name = tracking["experiment_name"]
    elif not name:
        home = servers.recorded_home(run.record)
        try:
            name = MlflowClient(home).get_experiment(tracking["experiment_id"]).name
        except MlflowException as error:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "")
            if not name:
                raise InputError(
                    f"experiment {tracking['experiment_id']} of {home}: its name cannot be asked "
                    f"({servers.reason(error)}); set MLFLOW_EXPERIMENT_NAME, then: poolnet sync {run.name} --to "
                    f"{addresses.shown(client.uri)}"
                ) from None
    return servers.once(client, servers.experiment, name)
