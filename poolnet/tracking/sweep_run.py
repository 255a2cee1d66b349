"""The run in MLflow that is the parent of a sweep's runs."""

import re
from collections.abc import Mapping
from pathlib import Path

from mlflow.entities import Metric, RunTag
from mlflow.tracking.client import MlflowClient

from poolnet import files
from poolnet.files import home
from poolnet.runs import provenance, run_record
from poolnet.tracking import names, pages


def find_or_create(client: MlflowClient, experiment_id: str, sweep: str, adopted: str = "") -> str:
    """Return the run id of the sweep's parent run.

    It is the run that exists already, the run `adopted` that `mlflow run` has made, or a new one.
    """
    with files.locked(folder() / f"{sweep}.parent.lock"):  # of two publishers at once, the second finds it
        query = f"tags.`{names.STUDY}` = '{sweep}'"
        for parent in client.search_runs([experiment_id], query, max_results=1):
            run_id = parent.info.run_id
            if adopted not in ("", run_id):  # so that its page says where the results are
                link = pages.in_markdown(sweep, pages.run(experiment_id, run_id))
                note = f"Made by `mlflow run` to go on with the sweep {link}, which holds everything."
                client.log_batch(adopted, tags=[RunTag(names.NOTE, note), RunTag(names.TITLE, f"goes on with {sweep}")])
            return run_id
        if adopted:
            client.log_batch(adopted, tags=[RunTag(names.STUDY, sweep), RunTag(names.TITLE, sweep)])
            return adopted
        tags = {names.STUDY: sweep, **names.source("sweep", provenance.user())}
        return client.create_run(experiment_id, run_record.now(), tags, sweep).info.run_id


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
