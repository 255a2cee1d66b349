"""Find or create the run on a server for a run record."""

import contextlib
import os
import shlex

import click
from mlflow.entities import Run, RunTag, ViewType
from mlflow.exceptions import MlflowException
from mlflow.tracking.client import MlflowClient

from poolnet.errors import InputError, RunError
from poolnet.runs.run_record import RunRecord
from poolnet.tracking import addresses, names, servers
from poolnet.tracking.servers import Client

DEFAULT = "0"  # the id of MLflow's experiment `Default`, on each server


class Refused(InputError):
    """The server's record contradicts the run; retrying is useless."""


def find(client: Client, run_id: str) -> Run | None:
    """Return the run with this id, or None.

    Raises `RunError` if the run was deleted.
    """
    server_run = servers.get_run(client, run_id)
    if server_run:
        _refuse_deleted(client, server_run)
    return server_run


def find_or_create(client: Client, run: RunRecord, experiment: str) -> Run:
    """Return the server's run for a record, created if missing.

    It is the run that `mlflow run` has made, a run that was created earlier but whose id did not arrive here, or a new
    one. `experiment` is the name of the run's experiment, if it is known. Raises `RunError` if the run was deleted.
    """
    server_run = _made_by_mlflow_run(client, run)
    if not server_run:
        experiment_id = _experiment_id(client, run, experiment)
        # another machine may have a run of this name, but begun at another time
        query = f"tags.`{names.RUN}` = '{run.name}' AND attributes.start_time = {run.record['started']}"
        if earlier := client.search_runs([experiment_id], query, ViewType.ALL, max_results=1):
            server_run = earlier[0]
        else:
            tags = {names.RUN: run.name, **names.source("train", run.record["environment"]["user"])}
            server_run = client.create_run(experiment_id, run.record["started"], tags, run.name)
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
    note = f"Made by `mlflow run` to resume {run.name}, run {run_id}, which holds everything."
    tags = {names.NOTE: note, names.TITLE: f"resumes {run.name}"}
    client.log_batch(carrier, tags=[RunTag(*tag) for tag in tags.items()])


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
    server_run = servers.get_run(client, run_id) if is_home(client.uri, run) else None
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


def _experiment_id(client: Client, run: RunRecord, name: str) -> str:
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
    return servers.experiment(client, name)
