"""The parent run of a sweep in MLflow.

The runs of the sweep are its children.
"""

import re
from collections.abc import Mapping
from pathlib import Path

from mlflow.entities import Metric, RunTag
from mlflow.tracking.client import MlflowClient

from poolnet import files
from poolnet.files import home
from poolnet.runs import provenance, run_record
from poolnet.tracking import names


def find_or_create(client: MlflowClient, experiment_id: str, sweep: str, adopted: str = "") -> str:
    """Return the run id of the sweep's parent run.

    It is the run that exists already, the run `adopted` that `mlflow run` has made, or a new one.
    """
    with files.locked(folder() / f"{sweep}.parent.lock"):  # of two publishers at once, the second finds it
        found = client.search_runs([experiment_id], f"tags.`{names.STUDY}` = '{sweep}'", max_results=1)
        if found:
            _explain(client, adopted, found[0].info.run_id, sweep)
            return found[0].info.run_id
        tags = {names.STUDY: sweep, **names.source("sweep", provenance.user())}
        if adopted:
            tags = {names.STUDY: sweep, names.TITLE: sweep}
            client.log_batch(adopted, tags=[RunTag(*tag) for tag in tags.items()])
            return adopted
        return client.create_run(experiment_id, run_record.now(), tags, sweep).info.run_id


def _explain(client: MlflowClient, carrier: str, run_id: str, sweep: str) -> None:
    """Say in a carrier run where the results are.

    The carrier is the run that `mlflow run` made for this command. It gets a note if the sweep has an earlier parent
    run, which holds everything.
    """
    if carrier and carrier != run_id:
        note = f"Made by `mlflow run` to go on with the sweep {sweep}, run {run_id}, which holds everything."
        tags = {names.NOTE: note, names.TITLE: f"goes on with {sweep}"}
        client.log_batch(carrier, tags=[RunTag(*tag) for tag in tags.items()])


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


def name_of(study: str, data_sha256: str) -> str:
    """Return a sweep's name from its study and data."""
    plain = re.sub(r"[^\w.-]+", "_", study)
    return f"{plain}-{data_sha256[:8]}"


def folder() -> Path:
    """Return this machine's folder for the files of sweeps."""
    path = home() / "sweeps"
    path.mkdir(exist_ok=True)
    return path
