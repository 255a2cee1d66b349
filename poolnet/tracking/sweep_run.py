"""The run in MLflow that is the parent of a sweep's runs."""

import contextlib
import re
from collections.abc import Mapping
from pathlib import Path

from mlflow.entities import Metric, Run, RunTag
from mlflow.exceptions import MlflowException
from mlflow.tracking.client import MlflowClient

from poolnet import files
from poolnet.errors import InputError
from poolnet.files import home
from poolnet.runs import provenance, run_record
from poolnet.runs.run_record import RunRecord
from poolnet.tracking import names, pages, server_runs, servers, training_runs
from poolnet.training.config import TrainConfig

OPTIMUM = names.METRICS["optimum_test_loss"]  # of a run that found it


def find_or_create(client: MlflowClient, experiment_id: str, sweep: str, adopted: str = "") -> str:
    """Return the run id of the sweep's parent run.

    It is the run that exists already, the run `adopted` that `mlflow run` has made, or a new one.
    """
    if adopted:
        server_runs.hide_origin(client, client.get_run(adopted))
    with files.locked(folder() / f"{sweep}.parent.lock"):  # of two publishers at once, the second finds it
        query = f"tags.`{names.STUDY}` = '{sweep}'"
        for parent in _all(client, experiment_id, query)[:1]:
            run_id = parent.info.run_id
            if adopted not in ("", run_id):
                _explain_adopted(client, adopted, experiment_id, sweep, run_id)
            return run_id
        if adopted:
            client.log_batch(adopted, tags=[RunTag(names.STUDY, sweep), RunTag(names.TITLE, sweep)])
            return adopted
        tags = {names.STUDY: sweep, **names.source("sweep", provenance.user())}
        return client.create_run(experiment_id, run_record.now(), tags, sweep).info.run_id


def settle(client: MlflowClient, experiment_id: str, sweep: str) -> None:
    """Leave one run of a sweep, and one of each combination.

    There are more if two machines have swept at once, since MLflow lets each of them create its own. Of several, the
    one that began first stays. Each machine does this after its own runs are there, so the last one to do it sees all
    of them.
    """
    parents = _all(client, experiment_id, f"tags.`{names.STUDY}` = '{sweep}'")
    children = _all(client, experiment_id, f"tags.`{names.SWEEP}` = '{sweep}'")
    for other in parents[1:]:
        if "mlflow.project.entryPoint" in other.data.tags:  # `mlflow run` fails if its run is deleted
            client.delete_tag(other.info.run_id, names.STUDY)
            _explain_adopted(client, other.info.run_id, experiment_id, sweep, parents[0].info.run_id)
        else:
            _remove(client, other.info.run_id, names.STUDY)
    kept: set[tuple] = set()
    for child in children:
        key = (_key(child), OPTIMUM in child.data.metrics)
        if child.info.status == "FINISHED" and key in kept:
            _remove(client, child.info.run_id, names.SWEEP, names.PARENT)
        elif parents and child.data.tags.get(names.PARENT) != parents[0].info.run_id:
            client.set_tag(child.info.run_id, names.PARENT, parents[0].info.run_id)
        if child.info.status == "FINISHED":
            kept.add(key)


def _remove(client: MlflowClient, run_id: str, *links: str) -> None:
    """Delete a run, or unlink it from its sweep.

    Who may train may not always delete. Then the tags `links` go, and the run stands alone.
    """
    try:
        client.delete_run(run_id)
    except MlflowException as error:
        if not servers.is_forbidden(error):
            raise
        for tag in links:
            client.delete_tag(run_id, tag)


def double_of(client: MlflowClient, experiment_id: str, run: RunRecord) -> str:
    """Return the id of a finished run that stands for a record.

    Another machine has published it, for the same sweep and settings. The text is empty if there is none.
    """
    record = run.record
    with contextlib.suppress(InputError, TypeError):  # settings of another version
        config = TrainConfig(**record["config"])
        key = training_runs.key(config, record["device"], record["data"]["sha256"])
        query = f"tags.`{names.SWEEP}` = '{record['sweep']}' AND attributes.status = 'FINISHED'"
        query += f" AND tags.`{names.RUN}` LIKE '{run_record.stem_of(config)}-%'"
        for other in _all(client, experiment_id, query):
            same = _key(other) == key and other.data.tags[names.RUN] != run.name
            if same and (OPTIMUM in other.data.metrics or not record["optimum"]):
                return other.info.run_id
    return ""


def _key(run: Run) -> tuple:
    """Return a run's key; its own, if its settings are not known."""
    try:
        return training_runs.of(run).key
    except InputError:
        return (run.info.run_id,)


def _all(client: MlflowClient, experiment_id: str, query: str) -> list[Run]:
    """Return all runs that match, the one that began first in front."""
    runs = servers.all_pages(client.search_runs, [experiment_id], query, max_results=1000)
    return sorted(runs, key=lambda run: (run.info.start_time, run.info.run_id))


def describe(
    client: MlflowClient, run_id: str, study: str, note: str, metrics: Mapping[str, float], status: str
) -> None:
    """Update the parent run with the sweep's current state.

    The run gets the text of the study, a description in Markdown, and figures over the seeds of each arm.
    """
    known = client.get_run(run_id).data.metrics
    new = [Metric(name, value, run_record.now(), 0) for name, value in metrics.items() if known.get(name) != value]
    client.log_batch(run_id, metrics=new, tags=[RunTag(names.NOTE, note)])
    client.log_text(run_id, study, "study.toml")
    if status == "RUNNING":
        client.update_run(run_id, status)
    else:
        client.set_terminated(run_id, status)


def _explain_adopted(client: MlflowClient, adopted: str, experiment_id: str, sweep: str, run_id: str) -> None:
    """Say on the page of a run where the results are."""
    link = pages.in_markdown(sweep, pages.run(experiment_id, run_id))
    note = f"Made by `mlflow run` to go on with the sweep {link}, which holds everything."
    client.log_batch(adopted, tags=[RunTag(names.NOTE, note), RunTag(names.TITLE, f"goes on with {sweep}")])


def name_of(study: str, data_sha256: str) -> str:
    """Return a sweep's name from its study and data."""
    plain = re.sub(r"[^\w.-]+", "_", study)
    return f"{plain}-{data_sha256[:8]}"


def folder() -> Path:
    """Return this machine's folder for the files of sweeps."""
    path = home() / "sweeps"
    path.mkdir(exist_ok=True)
    return path
